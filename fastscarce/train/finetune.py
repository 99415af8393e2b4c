"""A teacher from labelled images: a frozen backbone's head, or the whole network."""

from __future__ import annotations

from typing import Any

from fastscarce.config import FinetuneConfig
from fastscarce.train.guard import Guard
from fastscarce.train.loop import fit
from fastscarce.train.objectives import Supervised
from fastscarce.train.results import write_model, write_run
from fastscarce.train.run import Run, remove_state
from fastscarce.train.task import prepare

__all__ = ["finetune"]


def finetune(run: Run, config: FinetuneConfig) -> dict[str, Any]:
    """Train on labelled images alone and write the model.

    Returns:
        The content of ``result.json``: ``accuracy`` on the test split and on the hold-out.
    """
    task = prepare(run, config)
    model = fit(
        run,
        "teacher",
        task.prepared(config.model, config.training, "teacher"),
        config.training,
        Supervised(run, task.pool, task.split.labelled, config.training),
        score=Guard.of(run, task.pool, task.split).score,
    )
    result = {
        "accuracy": task.accuracy(model, task.split.test),
        "holdout_accuracy": task.accuracy(model, task.split.holdout),
    }

    def write() -> dict[str, Any]:
        write_model(task, model, config.model)
        summary = {"test": result["accuracy"], "hold-out": result["holdout_accuracy"]}
        return write_run(task, result, summary=summary)

    content = run.on_main(write)
    remove_state(run)
    return content
