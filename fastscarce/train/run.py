"""A run: its folder, its processes, its log, and how it stops."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import yaml

from fastscarce.config import RunConfig, to_dict
from fastscarce.errors import FastscarceError, Interrupted, ResultsError
from fastscarce.files import write_whole
from fastscarce.train.ranges import check_ranges

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Run", "derive_seed", "open_run", "remove_state"]

T = TypeVar("T")

# Settings that may differ when a run is resumed: they do not change what it computes.
_FREE_ON_RESUME = frozenset(
    {
        "checkpoint_every", "cpu", "log_every", "out", "overwrite", "pool", "resume", "tensorboard",
        "threads", "workers",
    }
)  # fmt: skip
# Files that mark a folder as a run's, so that --overwrite never deletes anything else.
_MARKS = ("state/run.json", "manifest.json")


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and names, the same on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Run:
    """What every stage of a command shares."""

    def __init__(self, accelerator: Accelerator, config: RunConfig, command: str) -> None:
        self.accelerator = accelerator
        self.config = config
        self.command = command
        self.folder = Path(config.out)
        self.state = self.folder / "state"
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._signal: int | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return bool(self.accelerator.is_main_process)

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(self.accelerator.device)

    @property
    def seconds(self) -> float:
        """Time spent on this run, interrupted parts counted in."""
        return self._seconds_before + time.monotonic() - self._started

    def restore_seconds(self, seconds: float) -> None:
        """Count from a saved state's time on."""
        self._seconds_before = seconds
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.is_main:
            print(text, flush=True)

    # ---- metrics

    def log(self, stage: str, step: int, **values: float) -> None:
        """Append a line to ``metrics.jsonl`` and to the trackers."""
        self.accelerator.log({f"{stage}/{name}": value for name, value in values.items()}, step)
        if self.is_main:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")

    def forget_metrics(self, stage: str, after_step: int) -> None:
        """Drop a stage's lines that a resumed run will write again."""
        path = self.folder / "metrics.jsonl"
        if not self.is_main or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that a kill cut short
                continue
            if entry["stage"] != stage or entry["step"] <= after_step:
                kept.append(line + "\n")
        write_whole(path, lambda place: place.write_text("".join(kept), encoding="utf-8"))

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def complete(self) -> bool:
        """Whether the folder holds the results of this run already."""
        return self.on_main((self.folder / "result.json").is_file)

    def close(self) -> None:
        """End trackers and the process group, so that the next run may choose its own precision."""
        from accelerate.state import AcceleratorState, GradientState

        self.accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    # ---- processes

    def on_main(self, action: Callable[[], T]) -> T:
        """Do something in the main process alone, and give all processes its result or error."""
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except (FastscarceError, OSError) as error:
                outcome[1] = error
        if self.world_size > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def total(self, count: int) -> int:
        """The sum of what all processes counted; each gets it, and all must ask."""
        if self.world_size > 1:
            sums = torch.tensor([count], device=self.device)
            torch.distributed.all_reduce(sums)
            count = int(sums.item())
        return count

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop. All processes get one answer."""
        return self.total(int(self._signal is not None)) > 0

    def stopped(self, where: str) -> Interrupted:
        """The error that ends a run whose state has been saved."""
        number = self._signal if self._signal is not None else signal.SIGTERM
        name = signal.Signals(number).name
        error = Interrupted(
            f"Stopped by {name} at {where}; the state is saved: the same command with --resume "
            "goes on from there."
        )
        error.signal = int(number)
        return error

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT ask for a stop at the next step instead of ending at once."""

        def remember(number: int, _frame: FrameType | None) -> None:
            self._signal = number

        previous = {
            number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _settings(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in to_dict(config).items() if name not in _FREE_ON_RESUME}


def _differing(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name in sorted({*old, *new}):
        left, right = old.get(name), new.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            names += _differing(left, right, f"{prefix}{name}.")
        elif left != right:
            names.append(f"{prefix}{name}")
    return names


def _changed(run: Run, command: str, settings: dict[str, Any]) -> list[str]:
    """Names of the settings that an earlier run of a folder had otherwise."""
    return ["command"] * (command != run.command) + _differing(settings, _settings(run.config))


def _of_results(folder: Path) -> tuple[str, dict[str, Any]]:
    """The command and the settings of a complete run."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return manifest["command"], {k: v for k, v in settings.items() if k not in _FREE_ON_RESUME}


def _is_used(folder: Path) -> bool:
    """Whether a folder holds more than a run leaves that ended before its first step."""
    return any(
        path.is_file() and not (path.match("state/run.json") or path.match(".*.tmp"))
        for path in folder.rglob("*")
        if folder / "tensorboard" not in path.parents
    )


def _prepare_folder(run: Run) -> None:
    config, folder = run.config, run.folder
    record = run.state / "run.json"
    if folder.exists() and not folder.is_dir():
        raise ResultsError(f"--out {folder} is a file; name a folder.")
    used = _is_used(folder)
    if used and config.overwrite and not config.resume:
        if not any((folder / mark).is_file() for mark in _MARKS):
            raise ResultsError(
                f"{folder} holds files that no run wrote, so --overwrite leaves it alone; "
                "name another --out."
            )
        shutil.rmtree(folder)
        used = False
    if used and not config.resume:
        raise ResultsError(
            f"{folder} already holds results; name another --out, go on with an interrupted run by "
            "--resume, or replace it by --overwrite."
        )
    for leftover in (*folder.glob(".*.tmp"), *run.state.glob(".*.tmp")):
        leftover.unlink()  # what a kill left of a file that was being written
    if used and record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = _changed(run, before["command"], before["settings"])
        if changed:
            raise ResultsError(
                f"{folder} was started with other settings ({', '.join(changed)}); resume it with "
                "the same ones, or name another --out."
            )
        return
    if used and not (folder / "result.json").is_file():
        raise ResultsError(f"{folder} holds no run that could be resumed; name another --out.")
    if used:
        changed = _changed(run, *_of_results(folder))
        if changed:
            raise ResultsError(
                f"{folder} holds the results of other settings ({', '.join(changed)}); name "
                "another --out, or replace them by --overwrite without --resume."
            )
        return
    run.state.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"command": run.command, "settings": _settings(config)}, indent=1)
    write_whole(record, lambda place: place.write_text(content, encoding="utf-8"))


def open_run(config: RunConfig, command: str) -> Run:
    """Start Accelerate, and make or reopen the results folder.

    Raises:
        ResultsError: The folder is in use, or belongs to a run with other settings.
    """
    from accelerate import Accelerator

    check_ranges(config)
    # Weights that decay towards zero become denormals, which a CPU is many times slower at.
    torch.set_flush_denormal(True)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    accelerator = Accelerator(
        # Processes on a machine without a GPU find each other only when Accelerate is told so.
        cpu=config.cpu or not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=config.out,
    )
    run = Run(accelerator, config, command)
    try:
        run.on_main(lambda: _prepare_folder(run))
        if config.tensorboard:
            accelerator.init_trackers("tensorboard")
    except OSError as error:
        run.close()
        if error.errno == errno.ENOSPC:
            raise
        raise ResultsError(
            f"{config.out} can't be written ({error.strerror}); name a folder you may write to "
            "with --out."
        ) from error
    except FastscarceError:
        run.close()
        raise
    processes = "1 process" if run.world_size == 1 else f"{run.world_size} processes"
    count = torch.get_num_threads()
    threads = "1 thread each" if count == 1 else f"{count} threads each"
    # A process of several on a CPU is given cpu:0, cpu:1, ...: one device all the same.
    device = "cpu" if run.device.type == "cpu" else run.device
    run.say(f"{command}: {processes}, {device}, {threads}")
    return run


def remove_state(run: Run) -> None:
    """Delete the checkpoints of a finished run."""
    if run.is_main:
        shutil.rmtree(run.state, ignore_errors=True)
