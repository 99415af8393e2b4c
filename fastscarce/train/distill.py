"""A student from labelled images and a table of pseudo-labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastscarce.config import DistillConfig
from fastscarce.errors import DataError
from fastscarce.pseudo import PseudoLabels, read_parquet
from fastscarce.train.guard import Guard
from fastscarce.train.loop import fit
from fastscarce.train.objectives import SelfTraining
from fastscarce.train.results import write_model, write_run
from fastscarce.train.run import Run, remove_state
from fastscarce.train.task import Task, prepare

__all__ = ["distill"]


def distill(run: Run, config: DistillConfig) -> dict[str, Any]:
    """Train a student on the labels and on the table of ``config.labels``, and write it.

    Returns:
        The content of ``result.json``: ``accuracy`` on the test split and on the hold-out.

    Raises:
        DataError: The table is of other classes, or of other images.
    """
    task = prepare(run, config)
    labels = _labels(task, config.labels)
    model = fit(
        run,
        "student",
        task.prepared(config.model, config.student, "student"),
        config.student,
        SelfTraining(run, task.pool, task.split.labelled, labels, config.student),
        score=Guard.of(run, task.pool, task.split).score,
    )
    result = {
        "accuracy": task.accuracy(model, task.split.test),
        "holdout_accuracy": task.accuracy(model, task.split.holdout),
    }

    def write() -> dict[str, Any]:
        write_model(task, model, config.model)
        summary = {"test": result["accuracy"], "hold-out": result["holdout_accuracy"]}
        return write_run(task, result, summary=summary, labels=labels)

    content = run.on_main(write)
    remove_state(run)
    return content


def _labels(task: Task, folder: str) -> PseudoLabels:
    table = read_parquet(Path(folder) / "pseudo_labels.parquet")
    if table.class_names != task.images.classes:
        raise DataError(
            f"The labels in {folder} are of the classes {', '.join(table.class_names)}, but the "
            f"data has {', '.join(task.images.classes)}; label this data first."
        )
    unlabelled = task.pool.ids[task.split.unlabelled]
    strangers = ~np.isin(table.labels.ids, unlabelled)
    if strangers.any():
        raise DataError(
            f"{int(strangers.sum())} of the {len(strangers)} images labelled in {folder} are not "
            "among this run's unlabelled images; use the data, seed and labels_per_class that the "
            "labels were made with."
        )
    return table.labels
