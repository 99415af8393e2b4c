"""Draws the records of bench_kd_loss.py, each to a PNG beside it.

``python bench/plot_kd_loss.py`` draws all of ``bench/results/kd_loss-*.json``;
``python bench/plot_kd_loss.py RECORD ...`` draws those.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import RESULTS, short

COLOURS = {
    "fastscarce": "#0072b2",
    "fastscarce, graph": "#56b4e9",
    "torch.compile": "#e69f00",
    "eager": "#999999",
    "torchdistill": "#009e73",
    "Liger": "#cc79a7",
}


def _tick(row: dict[str, Any]) -> str:
    share = row["share_of_copy"]
    of_copy = "" if share is None else f"\n{share:.0%} of a copy"
    return f"{row['rows']} x {row['classes']}{of_copy}"


def _panel(panel: Any, table: dict[str, Any]) -> None:
    rows = table["measurements"]
    names = [name for name in COLOURS if any(name in row["ratio"] for row in rows)]
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        there = [(i, row) for i, row in enumerate(rows) if name in row["ratio"]]
        places = [i + (offset - (len(names) - 1) / 2) * width for i, _ in there]
        ratios = [row["ratio"][name] for _, row in there]
        bars = panel.bar(places, ratios, 0.93 * width, color=COLOURS[name], label=name)
        labels = [short(row["milliseconds"][name]) for _, row in there]
        panel.bar_label(bars, labels, fontsize=7, padding=1)
    panel.set_xticks(range(len(rows)), [_tick(row) for row in rows], fontsize=8)
    panel.set_xlabel("rows x classes")
    panel.set_title(table["title"], fontsize=11)
    panel.spines[["top", "right"]].set_visible(False)


def draw(path: Path) -> Path:
    """The figure of a record."""
    record = json.loads(path.read_text())
    tables = record["tables"]
    figure, panels = plt.subplots(
        1, len(tables), figsize=(6.2 * len(tables), 4.4), sharey=True, layout="constrained"
    )
    for panel, table in zip(panels, tables, strict=True):
        _panel(panel, table)
    panels[0].set_ylabel("time, fastscarce = 1\n(bars are labelled in milliseconds)")
    panels[0].legend(frameon=False, fontsize=9)
    machine = f"{record['processor']}, {record['threads']} threads, {record['instruction_set']}"
    figure.suptitle(
        f"kd_loss forward and backward, {record.get('gpu', machine)}, "
        f"torch {record['versions']['torch']}",
        fontsize=10,
    )
    drawn = path.with_suffix(".png")
    figure.savefig(drawn, dpi=150)
    plt.close(figure)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("records", nargs="*", type=Path, help="JSON records of bench_kd_loss.py")
    for path in parser.parse_args().records or sorted(RESULTS.glob("kd_loss-*.json")):
        print(draw(path))


if __name__ == "__main__":
    main()
