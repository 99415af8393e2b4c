"""A student from labelled images and a teacher: its table, itself, or its pseudo-labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastscarce.augment import Policy, get_policy, read_policy
from fastscarce.cache import (
    Layout,
    Samples,
    Teacher,
    TeacherTable,
    check_sentinels,
    expectation,
)
from fastscarce.cache.fingerprint import of_transform, require_same
from fastscarce.config import DistillConfig, StudentConfig
from fastscarce.errors import CacheError, ConfigError, DataError
from fastscarce.pseudo import PseudoLabels, read_parquet
from fastscarce.train.guard import Guard
from fastscarce.train.loop import fit
from fastscarce.train.objectives import SelfTraining
from fastscarce.train.results import write_model, write_run
from fastscarce.train.run import Run, remove_state
from fastscarce.train.tables import keys_of, samples_of
from fastscarce.train.task import Task, prepare
from fastscarce.train.teacher import load_teacher
from fastscarce.train.teaching import Teaching, label_teaching, mixes, with_mixing

__all__ = ["distill"]

# Classes that a teacher without a table is heard of.
_K = 16
# Epochs of consistent teaching, at least.
_LONG = 30
# Views whose sentinels are looked at before the first step.
_CHECKED_VIEWS = 2


def distill(run: Run, config: DistillConfig) -> dict[str, Any]:
    """Train a student on the labels and on what a teacher says, and write it.

    Returns:
        The content of ``result.json``: ``accuracy`` on the test split and on the hold-out, and of a
        table its fingerprint and how many rows the teacher said in its place since the run was
        last started.

    Raises:
        CacheError: The table is of something else, damaged, or lacks rows that nobody can say.
        DataError: Pseudo-labels are of other classes or images, or the teacher is.
    """
    task = prepare(run, config)
    result: dict[str, Any] = {}
    with _teaching(task, config, result) as (teaching, labels):
        settings = _preset(config, len(teaching.lessons))
        model = fit(
            run,
            "student",
            task.prepared(config.model, settings, "student"),
            settings,
            SelfTraining(run, task.pool, task.split.labelled, teaching, settings),
            score=Guard.of(run, task.pool, task.split).score,
        )
        if config.cache is not None:
            result["filled_rows"] = run.total(teaching.filled)
    result = {
        "accuracy": task.accuracy(model, task.split.test),
        "holdout_accuracy": task.accuracy(model, task.split.holdout),
        **result,
    }

    def write() -> dict[str, Any]:
        write_model(task, model, config.model)
        summary = {"test": result["accuracy"], "hold-out": result["holdout_accuracy"]}
        return write_run(task, result, summary=summary, labels=labels)

    content = run.on_main(write)
    remove_state(run)
    return content


def _preset(config: DistillConfig, lessons: int) -> StudentConfig:
    """The student's settings with those of the preset."""
    student = config.student
    match config.preset:
        case "consistent":
            steps = -(-_LONG * lessons // student.unlabelled_batch_size)
            return replace(
                student, alpha=1.0, loss="kl", temperature=1.0, steps=max(student.steps, steps)
            )
        case "deit":
            return replace(student, alpha=0.5, loss="hard")
        case "dkd":
            return replace(student, alpha=0.5, loss="dkd", temperature=4.0)
    return student


@contextmanager
def _teaching(
    task: Task, config: DistillConfig, result: dict[str, Any]
) -> Iterator[tuple[Teaching, PseudoLabels | None]]:
    """Who teaches, by what is given: a table, a teacher, both, or pseudo-labels."""
    student = config.student
    if config.cache is None and not config.teacher:
        labels = _labels(task, config.labels)
        yield label_teaching(task.pool, labels, student), labels
        return
    asked = None if config.policy is None else read_policy(config.policy)
    live = None
    if config.teacher:
        live = load_teacher(
            config,
            classes=task.images.classes,
            channels=task.images.channels,
            device=task.run.device,
        )
    samples = samples_of(task.images, task.split, task.pool)

    def teaching(policy: Policy, views: int | None, **rows: Any) -> Teaching:
        mixing = policy if policy.mixes else with_mixing(policy, student)
        if config.preset == "consistent":
            mixing = policy  # the student sees what the teacher saw, and nothing else
        return Teaching(
            task.pool,
            samples.positions,
            policy=policy,
            mixing=mixing,
            live=live,
            views=views,
            **rows,
        )

    if config.cache is None:
        policy = task.pool.policy(asked or student.augmentation)
        if config.preset == "consistent" and not policy.mixes:
            policy = with_mixing(policy, student)
        classes = task.pool.classes
        layout = Layout(classes, min(config.k or _K, classes))
        yield teaching(policy, config.views, layout=layout), None
        return
    with _table(task, samples, config, asked, live) as table:
        policy = get_policy(table.manifest.content["transform"]["policy"])
        views = table.views if config.views is None else config.views
        _check(task, samples, config, table, policy, views, live)
        result["table"] = table.manifest.fingerprint
        if config.preset == "consistent" and not policy.mixes and mixes(student):
            task.run.say(
                "the teacher saw unmixed views, and so does the student; `cache build --policy "
                "standard+cutmix` would mix them"
            )
        yield teaching(policy, views, source=table), None


def _table(
    task: Task,
    samples: Samples,
    config: DistillConfig,
    asked: Policy | None,
    live: Teacher | None,
) -> TeacherTable:
    """The table of this data, these views and, where it is given, this teacher."""
    assert config.cache is not None
    expect = expectation(samples, task.pool.policy(asked or "eval"), task.pool.seed)
    if asked is None:
        del expect["transform"]["policy"]
    if config.k is not None:
        expect["cache"] = {"k": min(config.k, task.pool.classes)}
    if live is not None:
        expect["teacher"] = live.content(task.images.channels)
    return TeacherTable.open(
        Path(config.cache),
        device=task.run.device,
        expect=expect,
        allow_mismatch=keys_of(config.allow_mismatch),
    )


def _check(
    task: Task,
    samples: Samples,
    config: DistillConfig,
    table: TeacherTable,
    policy: Policy,
    views: int,
    live: Teacher | None,
) -> None:
    """Refuse a table whose views are others, or that lacks rows that nobody can say."""
    allowed = keys_of(config.allow_mismatch)
    if task.pool.policy(policy) != policy and "transform.policy" not in allowed:
        raise CacheError(
            f"{table.folder} was made of something else: transform.policy differs (flips or the "
            "ground of a warp); build a table with this --flip, or pass --allow-mismatch "
            "transform.policy where you know that it does not matter."
        )
    ids = np.sort(samples.ids)
    require_same(
        {"transform": of_transform(policy, task.pool.seed, samples.size, ids)},
        table.manifest.content,
        where=str(table.folder),
        allow=allowed,
    )
    if not 1 <= views <= table.views:
        raise ConfigError(
            f"views must be from 1 to the {table.views} of the table {table.folder}, got {views}."
        )
    lacking = table.missing() + views * int((~np.isin(samples.ids, table.ids)).sum())
    if lacking and live is None:
        raise CacheError(
            f"{table.folder} lacks {lacking} rows; run the same `fastscarce cache build` again, or "
            "give --teacher to say what is missing."
        )
    if lacking == 0 and "data.pixels" not in allowed:
        compared = check_sentinels(
            table,
            samples,
            policy=policy,
            seed=task.pool.seed,
            views=range(min(views, _CHECKED_VIEWS)),
        )
        task.run.say(f"{table.folder}: {table.views} views, {compared} remembered ones are equal")


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
