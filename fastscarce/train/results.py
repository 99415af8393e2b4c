"""The results folder: numbers, models, settings, labels, figures and the page of a run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from torch import nn

from fastscarce.config import ModelConfig, to_dict
from fastscarce.data import write_quarantine, write_split
from fastscarce.files import write_whole
from fastscarce.models import save
from fastscarce.pseudo import PseudoLabels, write_parquet
from fastscarce.report import ReportContext, RoundRow, draw_curves, write_report
from fastscarce.train.run import Run
from fastscarce.train.task import Task

__all__ = ["RoundResult", "write_labels", "write_model", "write_run"]

_PACKAGES = ("accelerate", "kornia", "numpy", "timm", "torch", "torchvision")
# Images of the report's sheet: the surest, and those nearest to being left out.
_SHEET = 12


@dataclass(frozen=True)
class RoundResult:
    """What one round of self-training came to.

    Attributes:
        round: From 1.
        judge: What the guard judged by.
        teacher_score: The guard's score of the teacher.
        student_score: The guard's score of the student.
        adopted: Whether the student became the teacher.
        chosen: Pseudo-labelled images that the student learned from.
        mean_confidence: Of those images' labels.
        label_flips: Images whose label differs from the round before; None in the first.
    """

    round: int
    judge: str
    teacher_score: float
    student_score: float
    adopted: bool
    chosen: int
    mean_confidence: float | None
    label_flips: int | None


def versions() -> dict[str, str]:
    """Versions of what computed the results."""
    found = {"python": platform.python_version()}
    for name in ("fastscarce", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            from fastscarce import __version__

            found[name] = __version__ if name == "fastscarce" else "not installed"
    return found


def command_line(run: Run) -> str:
    """The command that repeats a run, from its resolved configuration."""
    config = shlex.quote(str(run.folder / "config.yaml"))
    repeat = shlex.quote(f"{run.folder}-again")
    return f"fastscarce {run.command} --config {config} --out {repeat}"


def _text(run: Run, name: str, content: str) -> None:
    write_whole(run.folder / name, lambda place: place.write_text(content, encoding="utf-8"))


def _config_yaml(run: Run) -> str:
    config = replace(run.config, resume=False, overwrite=False)
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def write_model(task: Task, model: nn.Module, config: ModelConfig) -> None:
    """Write ``student.safetensors`` and its ``config.json``."""
    mean, std = task.normalisation(model)
    save(
        model,
        task.run.folder,
        name=config.name,
        classes=task.pool.classes,
        channels=task.images.channels,
        image_size=int(task.images.images.shape[1]),
        class_names=task.images.classes,
        mean=mean,
        std=std,
    )


def write_labels(task: Task, labels: PseudoLabels) -> None:
    """Write ``pseudo_labels.parquet`` and its soft rows."""
    paths = None
    if task.images.paths is not None:
        place = {
            int(number): name
            for number, name in zip(task.images.ids, task.images.paths, strict=True)
        }
        paths = [place[int(number)] for number in labels.ids]
    write_parquet(
        task.run.folder / "pseudo_labels.parquet",
        labels,
        paths=paths,
        class_names=task.images.classes,
    )


def write_run(
    task: Task,
    result: dict[str, Any],
    *,
    summary: dict[str, float | None],
    rounds: Sequence[RoundResult] = (),
    labels: PseudoLabels | None = None,
) -> dict[str, Any]:
    """Write all that is not a model or a table; ``result.json`` last, since it says "complete".

    Args:
        task: The run and its data.
        result: What ``result.json`` says beside the rounds and the seconds.
        summary: The report's first numbers, by name.
        rounds: In order.
        labels: The last pseudo-labels, for the report.

    Returns:
        The content of ``result.json``.
    """
    run = task.run
    _text(run, "config.yaml", _config_yaml(run))
    manifest = {
        "command": run.command,
        "repeat": command_line(run),
        "versions": versions(),
        "seed": run.config.seed,
        "processes": run.world_size,
        "device": str(run.device),
        "data": {
            "name": task.images.name,
            "fingerprint": task.images.fingerprint(),
            "classes": list(task.images.classes),
            "labelled": len(task.split.labelled),
            "held_out": len(task.split.holdout),
            "unlabelled": len(task.split.unlabelled),
            "test": len(task.split.test),
        },
    }
    _text(run, "manifest.json", json.dumps(manifest, indent=1) + "\n")
    if task.images.failures:
        write_whole(
            run.folder / "quarantine.csv",
            lambda path: write_quarantine(path, task.images.failures),
        )
    write_whole(run.folder / "split.csv", lambda path: write_split(path, task.images, task.split))
    curves = run.folder / "curves.png"
    draw_curves(run.metrics(), curves)
    empty: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
    write_report(
        run.folder / "report.html",
        ReportContext(
            command=command_line(run),
            title=f"{run.command}: {task.images.name}",
            summary=summary,
            rounds=[
                RoundRow(
                    round=row.round,
                    teacher_score=row.teacher_score,
                    student_score=row.student_score,
                    guard=row.judge,
                    adopted=row.adopted,
                    chosen=row.chosen,
                    mean_confidence=row.mean_confidence,
                    flips=row.label_flips,
                )
                for row in rounds
            ],
            curves_png=curves,
            confidences=empty if labels is None else labels.confidence,
            chosen=empty.astype(bool) if labels is None else labels.chosen,
            labels=empty.astype(np.int64) if labels is None else labels.labels,
            class_names=task.images.classes,
            sheet=[] if labels is None else _sheet(task, labels),
            versions=versions(),
            config_yaml=_config_yaml(run),
        ),
    )
    content = {**result, "rounds": [asdict(row) for row in rounds], "seconds": run.seconds}
    _text(run, "result.json", json.dumps(content, indent=1) + "\n")
    return content


def _sheet(task: Task, labels: PseudoLabels) -> list[tuple[NDArray[np.uint8], str]]:
    """The surest images and those nearest to being left out, with their labels."""
    place = {int(number): position for position, number in enumerate(task.images.ids)}
    chosen = np.flatnonzero(labels.chosen)
    order = chosen[np.lexsort((labels.ids[chosen], -labels.confidence[chosen]))]
    rows = np.unique(np.concatenate([order[:_SHEET], order[-_SHEET:]]))
    rows = rows[np.lexsort((labels.ids[rows], -labels.confidence[rows]))]
    return [
        (
            task.images.images[place[int(labels.ids[row])]],
            f"{task.images.classes[labels.labels[row]]} {labels.confidence[row]:.0%}",
        )
        for row in rows
    ]
