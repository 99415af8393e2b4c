"""Draws bench/results/kd_loss.png from bench/results/kd_loss.json."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
COLOURS = {
    "fastscarce": "#0072b2",
    "torch.compile": "#e69f00",
    "eager": "#999999",
    "torchdistill": "#009e73",
}


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def main() -> None:
    record = json.loads((RESULTS / "kd_loss.json").read_text())
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    titles = {"warm": "memory warm", "as_it_comes": "memory as it comes"}
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        rows = record[key]
        names = [name for name in COLOURS if name in rows[0]["ratio"]]
        width = 0.8 / len(names)
        for offset, name in enumerate(names):
            places = [i + (offset - (len(names) - 1) / 2) * width for i in range(len(rows))]
            ratios = [row["ratio"][name] for row in rows]
            bars = panel.bar(places, ratios, 0.93 * width, color=COLOURS[name], label=name)
            labels = [_short(row["milliseconds"][name]) for row in rows]
            panel.bar_label(bars, labels, fontsize=8, padding=1)
        panel.set_xticks(range(len(rows)), [f"{r['rows']} x {r['classes']}" for r in rows])
        panel.set_xlabel("rows x classes")
        panel.set_title(title)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time, fastscarce = 1\n(bars are labelled in milliseconds)")
    panels[0].legend(frameon=False)
    figure.suptitle(
        f"kd_loss forward and backward, float32, {record['processor']}, "
        f"{record['threads']} threads, {record['instruction_set']}, torch {record['torch']}",
        fontsize=10,
    )
    figure.savefig(RESULTS / "kd_loss.png", dpi=150)


if __name__ == "__main__":
    main()
