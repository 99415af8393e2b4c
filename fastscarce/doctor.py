"""What this machine has, and what to do about what is broken."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastscarce import __version__

__all__ = ["Check", "collect", "main", "render"]

State = Literal["ok", "note", "broken"]

# Torch first and torchvision next, so that a failure is told of the package that causes it.
IMPORTED = ("torch", "torchvision", "timm", "kornia")
LISTED = ("accelerate", "numba", "numpy", "pyarrow", "safetensors")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
REINSTALL = "python -m pip install --force-reinstall --no-deps"


@dataclass(frozen=True)
class Check:
    """One line of the doctor's.

    Attributes:
        name: What was looked at.
        state: ``"ok"``; ``"note"`` for what is absent and optional; ``"broken"``.
        value: What was found: a version, a name, or the reason why not.
        cure: What mends it; empty where nothing needs to be done.
    """

    name: str
    state: State
    value: str
    cure: str = ""


def collect() -> list[Check]:
    """Look at everything; a check that fails is a line of the list, never an exception."""
    checks = [_own_version()]
    checks.append(Check("python", "ok", f"{platform.python_version()} ({sys.executable})"))
    checks += [_imported(name) for name in IMPORTED]
    checks += [_version(name) for name in LISTED]
    if any(check.name == "torch" and check.state == "broken" for check in checks):
        waits = Check("kernels", "note", "not looked at, since torch is broken")
        return [*checks, waits, _dali(), _fashion_mnist()]
    return [*checks, *_kernels(), *_gpus(), _dali(), *_threads(), _fashion_mnist()]


def render(checks: list[Check]) -> None:
    """Print the checks as a table, and below it the cure of each that has one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=False)
    marks = {
        "ok": "[green]ok[/green]",
        "note": "[yellow]note[/yellow]",
        "broken": "[bold red]broken[/bold red]",
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(escape(check.name), marks[check.state], escape(check.value))
    console.print(table)
    cures = [check for check in checks if check.cure]
    if cures:
        console.print()
    for check in cures:
        # A cure is there to be copied: it stays on one line, however narrow the terminal.
        console.print(f"{escape(check.name)}: {escape(check.cure)}", soft_wrap=True)


def main() -> int:
    """Collect and print.

    Returns:
        1 where something is broken, otherwise 0.
    """
    checks = collect()
    render(checks)
    return int(any(check.state == "broken" for check in checks))


def _own_version() -> Check:
    check = _version("fastscarce")
    if check.state == "ok":
        return check
    return Check("fastscarce", "note", f"{__version__}, used from its source folder")


def _version(name: str) -> Check:
    """A package that is needed, by what its installer wrote of it."""
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "broken", "not installed", f"python -m pip install {name}")


def _imported(name: str) -> Check:
    """A package whose compiled parts must fit torch's, so only an import tells."""
    check = _version(name)
    if check.state == "broken":
        return check
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken package raises is what the user must see
        where = f"{type(error).__name__}: {_line(error)}"
        cure = f"{REINSTALL} {name}" if name == "torch" else f"{REINSTALL} torch {name}"
        return Check(
            name,
            "broken",
            f"{check.value}, but importing it fails: {where}",
            f"{cure}; if it stays, see that no folder named {name} on PYTHONPATH hides it",
        )
    return check


def _kernels() -> list[Check]:
    """The compiled libraries of fastscarce itself."""
    build = "python -m pip install --force-reinstall --no-deps ."
    try:
        ops = importlib.import_module("fastscarce._ops")
    except Exception as error:  # a library that doesn't fit raises OSError or RuntimeError
        return [
            Check("CPU library", "broken", _line(error), f"in the source folder: {build}"),
            Check("CUDA library", "note", "not looked at, since the CPU library is broken"),
        ]
    checks = [Check("CPU library", "ok", "loaded")]
    try:
        checks.append(Check("instruction set", "ok", str(ops.isa())))
    except ValueError as error:
        checks.append(Check("instruction set", "broken", _line(error), "unset FASTSCARCE_ISA"))
    status = str(ops.cuda_status())
    if status == "loaded":
        checks.append(Check("CUDA library", "ok", status))
    elif _gpu_count():
        checks.append(
            Check(
                "CUDA library",
                "broken",
                f"{status}, and this machine has a GPU",
                f"with nvcc on PATH, in the source folder: {build}",
            )
        )
    else:
        checks.append(Check("CUDA library", "note", status))
    return checks


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpus() -> list[Check]:
    import torch

    if not _gpu_count():
        return [Check("GPU", "note", "none; training runs on the CPU")]
    checks = []
    for place in range(_gpu_count()):
        try:
            found = torch.cuda.get_device_properties(place)
        except RuntimeError as error:
            cure = "see nvidia-smi, and update the driver where it reports an error"
            checks.append(Check(f"GPU {place}", "broken", _line(error), cure))
            continue
        memory = found.total_memory / 2**30
        value = f"{found.name}, capability {found.major}.{found.minor}, {memory:.1f} GiB"
        checks.append(Check(f"GPU {place}", "ok", value))
    return checks


def _dali() -> Check:
    for found in importlib.metadata.distributions():
        name = (found.metadata["Name"] or "").lower()
        if name.startswith("nvidia-dali-cuda"):
            return Check("DALI", "ok", f"{found.version} ({name})")
    return Check(
        "DALI", "note", "not installed; optional, with a GPU: pip install fastscarce[dali]"
    )


def _threads() -> list[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(cores or 1, _quota() or sys.maxsize)
    # torch may take fewer than were asked for where other libraries take them all.
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(torch.get_num_threads(), int(asked) if asked.isdigit() else 0)
    value = f"{threads} on {cores} cores"
    if threads > cores:
        cure = f"export OMP_NUM_THREADS={cores}"
        return [Check("threads", "note", f"{value}: more than there are, which is slower", cure)]
    return [Check("threads", "ok", value)]


def _quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Whole cores that a container may use at once; ``None`` where it has no limit."""
    try:
        share, period = file.read_text().split()
        return max(1, round(int(share) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _fashion_mnist() -> Check:
    if any(FASHION_MNIST.glob("train-images-idx3-ubyte*")):
        return Check("Fashion-MNIST", "ok", str(FASHION_MNIST))
    absent = "not at hand; optional, on Debian: apt-get install dataset-fashion-mnist"
    return Check("Fashion-MNIST", "note", absent)


def _line(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]
