"""A progress bar on a terminal, and silence elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from fastscarce.train.run import Run

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["Progress"]


class Progress:
    """Shows loss, rate, images a second and the time left, once for all processes."""

    def __init__(self, run: Run, stage: str, *, total: int, start: int) -> None:
        self._bar: RichProgress | None = None
        if not (run.is_main and sys.stderr.isatty()):
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("rate {task.fields[learning_rate]:.2g}"),
            TextColumn("{task.fields[rate]:.0f} images/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(
            stage, total=total, completed=start, loss=float("nan"), learning_rate=0.0, rate=0.0
        )

    def update(self, completed: int, *, loss: float, learning_rate: float, rate: float) -> None:
        """Show the state after ``completed`` steps; ``rate`` is in images a second."""
        if self._bar is not None:
            self._bar.update(
                self._task, completed=completed, loss=loss, learning_rate=learning_rate, rate=rate
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
