"""Figures of a run, drawn without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from fastscarce.files import write_whole

__all__ = ["confidence_png", "draw_curves", "kept_png"]

# Okabe and Ito's colours, told apart under the common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GRID, OTHERS = "#333333", "#dddddd", "#bbbbbb"
MOST_NAMED = 40

# Points that a loss curve is averaged over: steps with and without mixed images alternate.
WINDOW = 5


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw the loss by step and the score when it ended of each stage, into a PNG.

    Args:
        metrics: Lines of ``metrics.jsonl``: ``stage``, ``step``, and ``loss`` or ``score`` (in
            [0, 1]). Values that are not finite and lines without these are left out.
        path: Where the PNG is to be.

    Returns:
        ``path``.

    Raises:
        ResultsError: The file can't be written.
    """
    figure = Figure(figsize=(10.5, 4.0), layout="constrained", facecolor="white")
    loss_axes, score_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    stages = list(dict.fromkeys(str(line["stage"]) for line in metrics if "stage" in line))
    for number, stage in enumerate(stages):
        colour = COLOURS[number % len(COLOURS)]
        steps, losses = _series(metrics, stage, "loss")
        if len(steps):
            loss_axes.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.3)
            loss_axes.plot(steps, _smooth(losses), color=colour, linewidth=1.8, label=stage)
        _, scores = _series(metrics, stage, "score")
        if len(scores):
            score_axes.plot(
                [number],
                scores[-1:],
                color=colour,
                linestyle="none",
                marker=MARKERS[number % len(MARKERS)],
                markersize=9,
                label=stage,
            )
    _dress(loss_axes, f"Training loss (running mean of {WINDOW})", "step", "loss")
    _dress(score_axes, "Hold-out or agreement score", "stage", "score")
    score_axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=" %"))
    loss_axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    score_axes.set_xticks(range(len(stages)), stages, rotation=20)
    score_axes.margins(x=0.12, y=0.15)
    for axes in (loss_axes, score_axes):
        if not axes.lines:
            axes.text(0.5, 0.5, "nothing measured", ha="center", transform=axes.transAxes)
    handles = {
        str(line.get_label()): line
        for axes in (score_axes, loss_axes)
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=min(len(handles), 6),
            frameon=False,
            fontsize=9,
        )
    data = _png(figure)
    return write_whole(path, lambda temporary: temporary.write_bytes(data))


def confidence_png(confidences: NDArray[Any], chosen: NDArray[np.bool_]) -> bytes:
    """A histogram of confidences, the chosen rows and the others stacked, as a PNG.

    Args:
        confidences: ``(n,)`` in [0, 1].
        chosen: bool ``(n,)``.
    """
    figure = Figure(figsize=(5.2, 3.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    values = np.asarray(confidences, dtype=np.float64)
    axes.hist(
        [values[chosen], values[~chosen]],
        bins=np.linspace(0.0, 1.0, 26).tolist(),
        stacked=True,
        color=[COLOURS[0], OTHERS],
        edgecolor="white",
        linewidth=0.6,
        label=["kept", "not kept"],
    )
    _dress(axes, "Confidence of the pseudo-labels", "confidence", "images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def kept_png(labels: NDArray[Any], chosen: NDArray[np.bool_], names: Sequence[str]) -> bytes:
    """Bars of the labels of each class, the kept before all, as a PNG.

    Args:
        labels: int ``(n,)``.
        chosen: bool ``(n,)``.
        names: One a class. Beyond 40 classes the names give way to numbers.
    """
    classes = len(names)
    height = min(3.2 + 0.16 * max(classes - 10, 0), 8.0)
    figure = Figure(figsize=(5.2, height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    rows = np.asarray(labels, dtype=np.int64)
    total = np.bincount(rows, minlength=classes)
    kept = np.bincount(rows[chosen], minlength=classes)
    if classes <= MOST_NAMED:
        places = np.arange(classes)
        axes.barh(places, total, color=OTHERS, label="all")
        axes.barh(places, kept, color=COLOURS[0], height=0.5, label="kept")
        shown = [name if len(name) <= 18 else name[:17] + "…" for name in names]
        # A dollar sign would begin a formula.
        axes.set_yticks(places, [name.replace("$", r"\$") for name in shown], fontsize=8)
    else:
        edges = np.arange(classes + 1) - 0.5
        for counts, colour, label in ((total, OTHERS, "all"), (kept, COLOURS[0], "kept")):
            axes.stairs(
                counts, edges, orientation="horizontal", fill=True, color=colour, label=label
            )
    axes.invert_yaxis()
    _dress(axes, "Pseudo-labels of each class", "images", "" if classes <= MOST_NAMED else "class")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    return _png(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and those around it, ``WINDOW`` in all where there are as many."""
    reach = WINDOW // 2
    parts = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _series(
    metrics: Sequence[Mapping[str, Any]], stage: str, key: str
) -> tuple[list[int], list[float]]:
    """Steps and finite values of one stage, lowest step first."""
    points = sorted(
        (int(line["step"]), float(line[key]))
        for line in metrics
        if str(line.get("stage")) == stage and line.get(key) is not None and "step" in line
    )
    points = [point for point in points if math.isfinite(point[1])]
    return [step for step, _ in points], [value for _, value in points]


def _dress(axes: Axes, title: str, across: str, up: str) -> None:
    """Title, names of the axes, a quiet grid and no box."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _png(figure: Figure) -> bytes:
    """The figure at 144 dots an inch, without a date, so that equal figures are equal bytes."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(
        buffer, format="png", dpi=144, metadata={"Software": "fastscarce"}
    )
    return buffer.getvalue()
