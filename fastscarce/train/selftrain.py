"""The main job: a teacher labels, a student learns from it and becomes the teacher, for rounds."""

from __future__ import annotations

from typing import Any

from fastscarce.config import SelftrainConfig
from fastscarce.errors import DataError
from fastscarce.pseudo import PseudoLabels, label_flips
from fastscarce.train.guard import Guard
from fastscarce.train.loop import fit
from fastscarce.train.objectives import SelfTraining, Supervised
from fastscarce.train.results import RoundResult, write_labels, write_model, write_run
from fastscarce.train.run import Run, remove_state
from fastscarce.train.task import prepare
from fastscarce.train.teaching import label_teaching

__all__ = ["selftrain"]


def selftrain(run: Run, config: SelftrainConfig) -> dict[str, Any]:
    """Run the whole job and write its results.

    Args:
        run: An open run.
        config: Its settings.

    Returns:
        The content of ``result.json``; accuracies are parts of 1, on the test split.

    Raises:
        FastscarceError: As the stages say.

    Source: Xie et al., "Self-training with Noisy Student improves ImageNet classification" (2020);
    distribution alignment as in Berthelot et al., "ReMixMatch" (2020).
    """
    task = prepare(run, config)
    if len(task.split.unlabelled) == 0:
        raise DataError(
            "Self-training needs unlabelled images, got none; give --unlabelled PATH, or a smaller "
            "--labels_per_class, or use finetune."
        )
    guard = Guard.of(run, task.pool, task.split)
    labelled = task.split.labelled

    supervised_accuracy = None
    if config.baseline:
        model = fit(
            run,
            "supervised",
            task.prepared(config.model, config.supervised, "supervised"),
            config.supervised,
            Supervised(run, task.pool, labelled, config.supervised),
            score=guard.score,
        )
        supervised_accuracy = task.accuracy(model, task.split.test)
        _say(run, "supervised baseline", supervised_accuracy)

    chosen_model = config.teacher_model or config.model
    teacher = fit(
        run,
        "teacher",
        task.prepared(chosen_model, config.teacher, "teacher"),
        config.teacher,
        Supervised(run, task.pool, labelled, config.teacher),
        score=guard.score,
    )
    teacher_accuracy = task.accuracy(teacher, task.split.test)
    _say(run, "teacher", teacher_accuracy)

    best, best_verdict = teacher, guard.judge_model(teacher)
    rounds: list[RoundResult] = []
    before: PseudoLabels | None = None
    labels: PseudoLabels | None = None
    for number in range(1, config.rounds + 1):
        stage = f"student-{number}"
        labels = task.label(best, config.labels, stage)
        student = fit(
            run,
            stage,
            task.prepared(config.model, config.student, stage),
            config.student,
            SelfTraining(
                run,
                task.pool,
                labelled,
                label_teaching(task.pool, labels, config.student),
                config.student,
            ),
            score=guard.score,
        )
        verdict = guard.judge_model(student)
        adopted = not guard.is_worse(verdict, best_verdict)
        confidence = labels.confidence[labels.chosen]
        rounds.append(
            RoundResult(
                round=number,
                judge=guard.judge,
                teacher_score=best_verdict.score,
                student_score=verdict.score,
                adopted=adopted,
                chosen=int(labels.chosen.sum()),
                mean_confidence=float(confidence.mean()) if len(confidence) else None,
                label_flips=None if before is None else label_flips(before, labels),
            )
        )
        outcome = "adopted" if adopted else "not adopted: worse than its teacher"
        run.say(
            f"round {number}: {rounds[-1].chosen} pseudo-labels, {guard.judge} "
            f"{best_verdict.score:.4f} -> {verdict.score:.4f}, {outcome}"
        )
        before = labels
        if adopted:
            best, best_verdict, chosen_model = student, verdict, config.model

    student_accuracy = task.accuracy(best, task.split.test)
    _say(run, "returned model", student_accuracy)
    result = {
        "supervised_accuracy": supervised_accuracy,
        "teacher_accuracy": teacher_accuracy,
        "student_accuracy": student_accuracy,
        "judge": guard.judge,
    }

    def write() -> dict[str, Any]:
        write_model(task, best, chosen_model)
        if labels is not None:
            write_labels(task, labels)
        return write_run(
            task,
            result,
            summary={
                "supervised baseline": supervised_accuracy,
                "teacher": teacher_accuracy,
                "returned model": student_accuracy,
            },
            rounds=rounds,
            labels=labels,
        )

    content = run.on_main(write)
    remove_state(run)
    return content


def _say(run: Run, what: str, accuracy: float | None) -> None:
    if accuracy is not None:
        run.say(f"{what}: {accuracy:.2%} of the test images")
