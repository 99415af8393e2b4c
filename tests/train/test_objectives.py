"""What a step minimises, against plain PyTorch on the very same batch."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fastscarce.config import DataConfig, ModelConfig, RunConfig, StageConfig, StudentConfig
from fastscarce.data import Stream, partner_ids
from fastscarce.errors import ConfigError
from fastscarce.ops import MixedTarget, topk
from fastscarce.pseudo import from_logits, select
from fastscarce.train.objectives import SelfTraining, Supervised
from fastscarce.train.pool import AHEAD, Feed
from fastscarce.train.run import Run, derive_seed, open_run
from fastscarce.train.task import Task, prepare
from fastscarce.train.teaching import label_teaching, mixed_log_probs, with_mixing


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Task]:
    out = tmp_path_factory.mktemp("objectives") / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        run = open_run(RunConfig(out=str(out), tensorboard=False, cpu=True, threads=1), "finetune")
        yield prepare(run, DataConfig())
    run.close()


@pytest.fixture
def model(task: Task) -> torch.nn.Module:
    return task.network(ModelConfig(name="small_cnn_gn"), "teacher")


@pytest.fixture(scope="module")
def labels(task: Task) -> Any:
    ids = task.pool.ids[task.split.unlabelled]
    logits = 3 * torch.randn(2, len(ids), 10, generator=torch.Generator().manual_seed(1))
    return select(from_logits(ids, logits), keep_per_class=20)


@pytest.mark.parametrize("probability", [0.0, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_supervised_loss_is_cross_entropy(
    task: Task, model: torch.nn.Module, probability: float, smoothing: float
) -> None:
    settings = StageConfig(batch_size=16, cutmix_probability=probability, label_smoothing=smoothing)
    objective = Supervised(task.run, task.pool, task.split.labelled, settings)
    images, target = objective.batch(model, 7, 0, 1)
    assert images.shape == (16, 1, 8, 8)
    assert isinstance(target, MixedTarget)
    assert bool((target.lam == 1).all()) == (probability == 0.0)
    loss = objective(model, 7, 0, 1)
    expected = cross_entropy(model(images), target.dense(10), label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)
    assert all(bool((g != 0).any()) for g in gradients if g is not None)


def taught(
    task: Task, labels: Any, settings: StudentConfig, run: Run | None = None
) -> SelfTraining:
    """Self-training by pseudo-labels."""
    teaching = label_teaching(task.pool, labels, settings)
    return SelfTraining(run or task.run, task.pool, task.split.labelled, teaching, settings)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_student_loss_is_two_means(
    task: Task, labels: Any, model: torch.nn.Module, temperature: float, alpha: float,
    probability: float,
) -> None:  # fmt: skip
    settings = StudentConfig(
        batch_size=8, unlabelled_batch_size=24, temperature=temperature, alpha=alpha,
        cutmix_probability=probability,
    )  # fmt: skip
    objective = taught(task, labels, settings)
    first = 0 if alpha == 1.0 else 8  # without a weight on them, labelled rows are left out
    assert objective.rows == first + 24

    seen: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    loss = objective(model, 5, 0, 1)
    hook.remove()
    (images,) = seen  # one forward pass of all rows
    assert images.shape == (first + 24, 1, 8, 8)

    own, target = Supervised(task.run, task.pool, task.split.labelled, settings).batch(
        model, 5, 0, 1
    )
    assert torch.equal(images[:first], own[:first])
    batch = objective._stream.batch(5)
    place = {int(number): row for row, number in enumerate(labels.ids)}
    rows = [place[int(number)] for number in task.pool.ids[batch.positions]]
    kept = torch.from_numpy(labels.log_probs[rows]).half().double()  # as a table keeps them
    probabilities = (kept / temperature).softmax(1)
    entropy = -(probabilities * probabilities.log()).sum(1).mean()
    if probability:
        plan = task.pool.draw(batch.positions, settings.augmentation, batch.view)
        plain = task.pool.carry_out(plan, task.pool.take(batch.positions), model)
        mixed = task.pool.draw(batch.positions, objective._teaching.mixing, batch.view).table
        lam = torch.from_numpy(mixed["lam"].copy())
        partner = torch.arange(24) ^ 1
        for row in range(24):
            top, left, bottom, right = mixed["box"][row]
            expected = plain[row].clone()
            expected[:, top:bottom, left:right] = plain[row ^ 1][:, top:bottom, left:right]
            assert torch.equal(images[first + row], expected)
        share = lam.double()[:, None]
        # Of a mixture the cross entropy is taken: the gradient is that of the divergence.
        probabilities = share * probabilities + (1 - share) * probabilities[partner]
        entropy = torch.zeros(())
    logits = model(images).double()
    crossed = cross_entropy(logits[first:] / temperature, probabilities)
    expected = alpha * temperature**2 * (crossed - entropy)
    if first:
        label_loss = cross_entropy(logits[:first], target.dense(10).double())
        expected = expected + (1 - alpha) * label_loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert float(loss.detach()) > 0.0
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())
        assert bool((parameter.grad != 0).any())


def test_pieces_of_a_batch_make_up_the_batch(task: Task, labels: Any) -> None:
    model = task.network(ModelConfig(name="small_cnn_gn"), "teacher")
    settings = StudentConfig(batch_size=8, unlabelled_batch_size=16, cutmix_probability=1.0)
    objective = taught(task, labels, settings)
    whole = objective(model, 3, 0, 1)
    pieces = [objective(model, 3, piece, 4) for piece in range(4)]
    torch.testing.assert_close(torch.stack(pieces).mean(), whole)


def test_mixed_rows_are_the_dense_mixture(task: Task) -> None:
    draw = torch.Generator().manual_seed(0)
    said = torch.randn(40, 5, generator=draw).mul(4)
    said[0, 0] = said[1, 1] = -torch.inf  # a class that a teacher rules out
    plan = task.pool.draw(np.arange(40), "weak+cutmix(1.0)", 0)
    rows = topk(said, 5)
    mixed = mixed_log_probs(rows, plan, 5)
    own = said.log_softmax(1)
    other = own[plan.partner]
    share = plan.lam.double()[:, None]
    assert bool((share < 1).any())
    dense = share * own.double().exp() + (1 - share) * other.double().exp()
    torch.testing.assert_close(mixed.double().exp(), dense, rtol=1e-5, atol=1e-7)
    assert not bool(torch.isnan(mixed).any())


def test_what_is_drawn_ahead_is_what_the_step_says(task: Task) -> None:
    """In order, again, back and ahead, and after a change of pieces: a resumed run asks so."""
    stream = Stream(task.split.labelled, seed=3, batch_size=12, pairs=True, views=2)
    policy = with_mixing("standard", StageConfig(cutmix_probability=1.0))
    feed = Feed(task.pool, stream, policy)
    calls = [(step, piece, 3) for step in range(90) for piece in range(3)]
    calls += [(20, 0, 1), (20, 0, 1), (4, 1, 2), (5, 0, 2), (0, 0, 3)]
    assert len(calls) > AHEAD
    for step, piece, pieces in calls:
        fed = feed(step, piece, pieces)
        rows = stream.batch(step).piece(piece, pieces)
        assert np.array_equal(fed.rows.positions, rows.positions)
        assert np.array_equal(fed.rows.view, rows.view)
        plan = task.pool.draw(rows.positions, policy, rows.view, rows.partners)
        assert np.array_equal(fed.plan.table, plan.table)
        assert np.array_equal(task.pool.ids[rows.positions], plan.table["id"])
    feed.close()


def test_about_the_asked_part_of_the_views_is_mixed(task: Task, model: torch.nn.Module) -> None:
    settings = StageConfig(batch_size=40, cutmix_probability=0.3)
    objective = Supervised(task.run, task.pool, task.split.labelled, settings)
    own = torch.cat([objective.batch(model, step, 0, 1)[1].lam for step in range(50)])
    assert 0.25 < float((own < 1).float().mean()) < 0.35


def test_each_labelled_image_once_an_epoch_in_any_number_of_processes(task: Task) -> None:
    class Part(Run):
        """One of two processes, as the stream sees it."""

        place = 0
        rank = property(lambda self: self.place)  # type: ignore[assignment]
        world_size = property(lambda self: 2)  # type: ignore[assignment]

    def positions(run: Run, steps: range) -> list[int]:
        objective = Supervised(run, task.pool, task.split.labelled, StageConfig(batch_size=8))
        return [int(row) for step in steps for row in objective._stream.batch(step).positions]

    alone = positions(task.run, range(5))
    assert sorted(alone) == sorted(task.split.labelled.tolist())  # 5 steps of 8: one epoch
    parts = []
    for place in range(2):
        part = Part(task.run.accelerator, task.run.config, "finetune")
        part.place = place
        parts.append(positions(part, range(5)))
    assert len(parts[0]) == len(parts[1]) == 20
    assert sorted(parts[0] + parts[1]) == sorted(alone)


def test_partners_are_dealt_by_seed_and_epoch(task: Task) -> None:
    settings = StageConfig(batch_size=8, cutmix_probability=1.0)
    labelled = task.split.labelled
    objective = Supervised(task.run, task.pool, labelled, settings)
    seed = derive_seed(task.run.config.seed, "batch_size", "order")
    epochs = [partner_ids(task.pool.ids[labelled], seed=seed, view=epoch) for epoch in range(2)]
    mate = [dict(zip(task.pool.ids[labelled], partners, strict=True)) for partners in epochs]
    for step in range(10):  # two epochs of 40
        rows = objective._stream.batch(step)
        ids = task.pool.ids[rows.positions]
        assert [mate[e][i] for e, i in zip(rows.epoch, ids, strict=True)] == list(
            ids[rows.partners]
        )


def test_batches_that_can_not_be_shared_out(task: Task, labels: Any) -> None:
    class Pieces(Run):
        config = RunConfig(gradient_accumulation_steps=3)

        def __init__(self) -> None:
            self.accelerator = task.run.accelerator

    run = Pieces()
    with pytest.raises(ConfigError, match=r"batch_size must be a multiple .* \(1 x 3 x 2\), got 8"):
        Supervised(run, task.pool, task.split.labelled, StageConfig(batch_size=8))
    settings = StudentConfig(batch_size=12, unlabelled_batch_size=16)
    with pytest.raises(ConfigError, match="unlabelled_batch_size must be a multiple"):
        taught(task, labels, settings, run)


def test_no_lessons_are_refused(task: Task, labels: Any) -> None:
    nothing = labels.take(np.zeros(0, dtype=np.int64))
    with pytest.raises(ConfigError, match=r"lower labels\.threshold"):
        taught(task, nothing, StudentConfig())


def test_the_run_folder_holds_no_results_yet(task: Task) -> None:
    assert [path.name for path in Path(task.run.folder).iterdir()] == ["state"]
