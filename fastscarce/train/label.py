"""A trained model's labels for the unlabelled images, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastscarce.config import LabelCommandConfig
from fastscarce.errors import DataError
from fastscarce.models import load
from fastscarce.train.results import write_labels, write_run
from fastscarce.train.run import Run, remove_state
from fastscarce.train.task import prepare

__all__ = ["label"]


def label(run: Run, config: LabelCommandConfig) -> dict[str, Any]:
    """Label the unlabelled images with the model of ``config.teacher`` and write the table.

    Returns:
        The content of ``result.json``: how many images were labelled and chosen.

    Raises:
        DataError: There is nothing to label, or the teacher knows other classes.
    """
    model, info = load(Path(config.teacher))
    task = prepare(run, config)
    if info.class_names != task.images.classes:
        raise DataError(
            f"The teacher in {config.teacher} knows the classes {', '.join(info.class_names)}, but "
            f"the data has {', '.join(task.images.classes)}; name the teacher of this data."
        )
    if len(task.split.unlabelled) == 0:
        raise DataError(
            "There are no unlabelled images to label; give --unlabelled PATH or a smaller "
            "--labels_per_class."
        )
    model.to(run.device)
    labels = task.label(model, config.labels, "label")
    result = {
        "labelled": len(labels),
        "chosen": int(labels.chosen.sum()),
        "mean_confidence": float(labels.confidence.mean()),
    }

    def write() -> dict[str, Any]:
        write_labels(task, labels)
        return write_run(
            task, result, summary={"mean confidence": result["mean_confidence"]}, labels=labels
        )

    content = run.on_main(write)
    remove_state(run)
    return content
