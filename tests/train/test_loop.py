"""The loop itself: what a stage returns, and what it leaves behind."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastscarce.config import RunConfig, StageConfig
from fastscarce.errors import TrainingError
from fastscarce.train.loop import fit
from fastscarce.train.run import Run, open_run


class Linear(nn.Module):
    """The least that the loop asks of a model: it says which layer is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(rows))
        return out


class Squares:
    """Mean square of the logits of rows that follow from the step."""

    rows = 6

    def __init__(self, bad_step: int = -1) -> None:
        self.bad_step = bad_step
        self.closed = False

    def __call__(self, model: nn.Module, step: int, piece: int, pieces: int) -> Tensor:
        rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        out: Tensor = model(rows).square().mean()
        return out * float("nan") if step == self.bad_step else out

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    config = RunConfig(out=str(tmp_path / "run"), tensorboard=False, cpu=True, log_every=2)
    with contextlib.redirect_stdout(io.StringIO()):
        opened = open_run(config, "finetune")
    yield opened
    opened.close()


def linear() -> Linear:
    torch.manual_seed(3)
    return Linear()


SETTINGS = StageConfig(steps=7, warmup_steps=2, learning_rate=0.1, weight_decay=0.0, ema_decay=0.8)


def test_a_stage_returns_the_moving_average(run: Run) -> None:
    """Against the same steps and the same average by hand, in plain PyTorch."""
    result = fit(run, "stage", linear(), SETTINGS, Squares())
    assert not result.training

    model = linear()
    mean = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    factors = [
        1 / 3,
        2 / 3,
        *(0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / 5))) for k in range(5)),
    ]
    for step, factor in enumerate(factors):
        optimizer.param_groups[0]["lr"] = 0.1 * float(factor)
        Squares()(model, step, 0, 1).backward()
        optimizer.step()
        optimizer.zero_grad()
        # the average's warm-up, 1 - (1 + step)^(-2/3), until that reaches the decay
        decay = min(0.8, 1 - (1 + step) ** (-2 / 3))
        for name, value in model.state_dict().items():
            mean[name] = decay * mean[name] + (1 - decay) * value
    for name, value in result.state_dict().items():
        torch.testing.assert_close(value, mean[name], rtol=1e-4, atol=1e-5)
    assert any(
        not torch.equal(value, model.state_dict()[name])
        for name, value in result.state_dict().items()
    )


def test_a_done_stage_is_read_back(run: Run) -> None:
    first = fit(run, "stage", linear(), SETTINGS, Squares(), score=lambda _: 0.5)
    assert [path.name for path in sorted(run.state.iterdir())] == [
        "run.json",
        "stage.safetensors",
    ]
    metrics = run.metrics()
    assert [(m["step"], "loss" in m, m.get("score")) for m in metrics] == [
        (2, True, None), (4, True, None), (6, True, None), (7, True, None), (7, False, 0.5),
    ]  # fmt: skip

    def never(*_: object) -> Tensor:
        raise AssertionError("a stage that is done must not train")

    never.rows = 6  # type: ignore[attr-defined]
    again = fit(run, "stage", linear(), SETTINGS, never)  # type: ignore[arg-type]
    for left, right in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)
    assert run.metrics() == metrics


@pytest.mark.parametrize("bad_step", [0, 3, 6])
def test_the_first_step_without_a_finite_loss_is_named(run: Run, bad_step: int) -> None:
    objective = Squares(bad_step)
    with pytest.raises(TrainingError, match=rf"stage is not finite at step {bad_step + 1};"):
        fit(run, "stage", linear(), SETTINGS, objective)
    assert objective.closed
    assert not (run.state / "stage.safetensors").exists()


def test_weights_that_are_not_finite_are_never_returned(run: Run) -> None:
    """A loss may be finite at the last step and its gradient not."""

    class Infinite(Squares):
        def __call__(self, model: nn.Module, step: int, piece: int, pieces: int) -> Tensor:
            loss = super().__call__(model, step, piece, pieces)
            if step == SETTINGS.steps - 1:
                loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss

    with pytest.raises(TrainingError, match="weights of stage are not finite"):
        fit(run, "stage", linear(), SETTINGS, Infinite())
    assert not (run.state / "stage.safetensors").exists()


def test_gradients_are_cut_to_the_asked_norm(run: Run) -> None:
    settings = StageConfig(
        steps=1, warmup_steps=0, learning_rate=1.0, weight_decay=0.0, ema_decay=0.0,
        max_gradient_norm=1e-3,
    )  # fmt: skip
    before = linear()
    after = linear()
    fit(run, "stage", after, settings, Squares())
    moved = sum(
        float((a - b).detach().square().sum())
        for a, b in zip(after.parameters(), before.parameters(), strict=True)
    )
    assert moved**0.5 == pytest.approx(1.9e-3, rel=1e-3)  # Nesterov: 1 + momentum
