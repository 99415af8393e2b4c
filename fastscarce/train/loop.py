"""The one training loop: Accelerate's processes and precision, exact resume, moving average.

Nothing random survives a step. A step's batch is a function of (seed, step), and the generators
that dropout draws from are seeded anew for each step, so a run that was killed and resumed ends
with the weights of one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastscarce.config import StageConfig
from fastscarce.errors import ConfigError, TrainingError
from fastscarce.models import groups, train_mode
from fastscarce.train.checkpoint import load_state, load_weights, save_state, save_weights
from fastscarce.train.progress import Progress
from fastscarce.train.run import Run, derive_seed
from fastscarce.train.schedule import cosine, set_rates

__all__ = ["Objective", "fit"]


class Objective(Protocol):
    """What a step minimises."""

    rows: int
    """Rows a step over all processes, for the throughput."""

    def __call__(self, model: nn.Module, step: int, piece: int, pieces: int) -> Tensor:
        """Loss of piece ``piece`` of ``pieces`` of this process's part of a step's batch."""

    def close(self) -> None:
        """End what was started for the steps to come."""


def fit(
    run: Run,
    stage: str,
    model: nn.Module,
    settings: StageConfig,
    objective: Objective,
    *,
    score: Callable[[nn.Module], float] | None = None,
) -> nn.Module:
    """Train ``model`` and return the moving average of its weights, in eval mode.

    A stage that is already done is read back; one that was interrupted goes on where it stopped.

    Args:
        run: The run that the stage belongs to.
        stage: Its name, unique in the run, and the name of its files.
        model: The network, with the weights to start from.
        settings: Steps, rates and the rest.
        objective: Gives the loss of each step.
        score: Higher is better; logged when the stage ends.

    Returns:
        The averaged network on the run's device.

    Raises:
        TrainingError: The loss is not finite.
        Interrupted: A signal asked to stop; the state is saved.
    """
    from timm.utils import ModelEmaV3

    done = run.state / f"{stage}.safetensors"
    checkpoint = run.state / f"{stage}.checkpoint.safetensors"
    model.to(run.device)
    if run.on_main(done.is_file):
        run.restore_seconds(load_weights(done, model)["seconds"])
        return model.eval()

    optimizer = _optimizer(model, settings)
    average = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True)
    wrapped, optimizer = run.accelerator.prepare(model, optimizer)
    start = 0
    if run.on_main(checkpoint.is_file):
        facts, scaler = load_state(
            checkpoint, model=model, average=average.module, optimizer=optimizer.optimizer
        )
        if scaler is not None and run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(scaler)
        start = facts["step"]
        run.restore_seconds(facts["seconds"])
    run.forget_metrics(stage, start)

    def save(step: int) -> None:
        scaler = run.accelerator.scaler
        run.on_main(
            lambda: save_state(
                checkpoint,
                model=model,
                average=average.module,
                optimizer=optimizer.optimizer,
                scaler=None if scaler is None else scaler.state_dict(),
                facts={"step": step, "seconds": run.seconds},
            )
        )

    watch = _FiniteWatch(stage, settings, run.device)
    pieces = run.config.gradient_accumulation_steps
    with Progress(run, stage, total=settings.steps, start=start) as progress, closing(objective):
        window = time.perf_counter()
        for step in range(start, settings.steps):
            set_rates(
                optimizer.optimizer,
                cosine(step, steps=settings.steps, warmup_steps=settings.warmup_steps),
            )
            torch.manual_seed(derive_seed(run.config.seed, stage, step, run.rank))
            train_mode(model)
            total = torch.zeros((), device=run.device)
            for piece in range(pieces):
                with run.accelerator.accumulate(wrapped):
                    with run.accelerator.autocast():
                        loss = objective(wrapped, step, piece, pieces)
                    run.accelerator.backward(loss)
                    if settings.max_gradient_norm is not None and run.accelerator.sync_gradients:
                        run.accelerator.clip_grad_norm_(
                            wrapped.parameters(), settings.max_gradient_norm
                        )
                    optimizer.step()
                    optimizer.zero_grad()
                total += loss.detach() / pieces
            average.update(model, step=step + 1)
            watch.see(total, step)

            ended = step + 1
            stop = run.stop_requested()
            last = ended == settings.steps
            if ended % run.config.log_every == 0 or last or stop:
                value = watch.check(run, total)
                elapsed = time.perf_counter() - window
                steps_seen = (ended - start - 1) % run.config.log_every + 1
                rate = objective.rows * steps_seen / max(elapsed, 1e-9)
                window = time.perf_counter()
                learning_rate = optimizer.optimizer.param_groups[0]["lr"]
                run.log(
                    stage, ended, loss=value, learning_rate=learning_rate, images_per_second=rate
                )
                progress.update(ended, loss=value, learning_rate=learning_rate, rate=rate)
            if not last and (stop or ended % run.config.checkpoint_every == 0):
                watch.check(run, total)
                save(ended)
            if stop and not last:
                raise run.stopped(f"{stage}, step {ended} of {settings.steps}")

    result: nn.Module = average.module
    _average_buffers(run, result)
    if not all(bool(torch.isfinite(value).all()) for value in result.state_dict().values()):
        raise TrainingError(
            f"The weights of {stage} are not finite at its end; lower its learning_rate (now "
            f"{settings.learning_rate:g}) or set max_gradient_norm, and start anew."
        )
    result.eval()
    if score is not None:
        run.log(stage, settings.steps, score=score(result))
    run.on_main(lambda: _finish(run, done, checkpoint, result))
    run.accelerator.free_memory()
    return result


def _finish(run: Run, done: Path, checkpoint: Path, result: nn.Module) -> None:
    save_weights(done, result, seconds=run.seconds)
    checkpoint.unlink(missing_ok=True)


def _optimizer(model: nn.Module, settings: StageConfig) -> torch.optim.Optimizer:
    if settings.steps < 1:
        raise ConfigError(f"A stage needs at least 1 step, got steps {settings.steps}.")
    parameters: list[dict[str, Any]] = groups(
        model,
        head_rate=settings.learning_rate,
        backbone_rate=settings.backbone_rate,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
    )
    for group in parameters:
        group["initial_lr"] = group["lr"]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(parameters)


def _average_buffers(run: Run, model: nn.Module) -> None:
    """Give all processes the mean of the batch-norm statistics that each saw of its own rows."""
    if run.world_size == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            torch.distributed.all_reduce(buffer)
            buffer /= run.world_size
        else:
            torch.distributed.broadcast(buffer, 0)


class _FiniteWatch:
    """Remembers on the device the first step whose loss was not finite: no sync a step."""

    def __init__(self, stage: str, settings: StageConfig, device: torch.device) -> None:
        self._stage = stage
        self._settings = settings
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def see(self, loss: Tensor, step: int) -> None:
        bad = (~torch.isfinite(loss)) & (self._first < 0)
        self._first = torch.where(bad, torch.full_like(self._first, step), self._first)

    def check(self, run: Run, loss: Tensor) -> float:
        """The loss as a mean over processes, or the error that names the first bad step."""
        value, first = loss.clone(), self._first.clone()
        if run.world_size > 1:
            torch.distributed.all_reduce(value)
            value /= run.world_size
            torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MAX)
        if int(first) >= 0:
            raise TrainingError(
                f"The loss of {self._stage} is not finite at step {int(first) + 1}; lower its "
                f"learning_rate (now {self._settings.learning_rate:g}) or set max_gradient_norm, "
                "and start anew; checkpoints up to there are kept in the results folder."
            )
        return float(value)
