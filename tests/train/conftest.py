"""Tiny runs of the real commands, in this process where that proves the same."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastscarce.cli import main
from fastscarce.config import DataConfig, RunConfig
from fastscarce.data import load
from fastscarce.train.run import open_run
from fastscarce.train.task import Task, prepare

# Forty labelled images and as many lessons: an epoch is five steps of eight, or two and a half.
COMMON = {"cpu": True, "threads": 1, "tensorboard": False, "log_every": 1, "test_fraction": 0.85}
STAGE = {"steps": 12, "batch_size": 8, "warmup_steps": 2}
SIZES: dict[str, dict[str, Any]] = {
    "selftrain": {
        "rounds": 1,
        "baseline": False,
        "labels.views": 2,
        "labels.keep_per_class": 4,
        **{f"teacher.{key}": value for key, value in STAGE.items()},
        **{f"supervised.{key}": value for key, value in STAGE.items()},
        **{f"student.{key}": value for key, value in STAGE.items()},
        "student.unlabelled_batch_size": 16,
    },
    "finetune": {f"training.{key}": value for key, value in STAGE.items()},
    "label": {"labels.views": 2},
    "distill": {
        **{f"student.{key}": value for key, value in STAGE.items()},
        "student.unlabelled_batch_size": 16,
    },
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and where."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return content

    @property
    def weights(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.folder / "student.safetensors")
        return tensors

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def losses(self) -> list[tuple[str, int, float]]:
        return [(m["stage"], m["step"], m["loss"]) for m in self.metrics if "loss" in m]


Command = Callable[..., Outcome]


def words(command: str, out: Path, settings: dict[str, Any]) -> list[str]:
    """The command line of a tiny run; ``settings`` come last and so win."""
    chosen = {**COMMON, **SIZES[command], **settings}
    flags = [f"--{key}={_spelled(value)}" for key, value in chosen.items()]
    return [command, f"--out={out}", *flags]


def _spelled(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def run_command(command: str, out: Path, **settings: Any) -> Outcome:
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    out_text, err_text = io.StringIO(), io.StringIO()
    with redirect_stdout(out_text), redirect_stderr(err_text):
        code = main(words(command, out, dotted))
    return Outcome(code, out_text.getvalue(), err_text.getvalue(), out)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2", "--master_port={port}"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
        "--main_process_port={port}",
    ],
}  # fmt: skip


def launch(program: Sequence[str], launcher: str = "torchrun") -> tuple[int, str, str]:
    """Words behind ``python`` in two processes: exit status, and what was printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.format(port=port) for word in LAUNCHERS[launcher]]
    done = subprocess.run(
        [sys.executable, "-m", *words, *program],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    return done.returncode, done.stdout, done.stderr


def run_in_two(command: str, out: Path, *, launcher: str = "torchrun", **settings: Any) -> Outcome:
    """As a user types it on a machine without GPUs: without ``--cpu``."""
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    typed = [word for word in words(command, out, dotted) if not word.startswith("--cpu")]
    return Outcome(*launch(["-m", "fastscarce", *typed], launcher), out)


@pytest.fixture(scope="session")
def launched() -> Callable[..., tuple[int, str, str]]:
    """Runs a Python program in two processes: ``launched(["-m", "fastscarce", ...])``."""
    return launch


@pytest.fixture(scope="session")
def in_two_processes() -> Command:
    """Runs a command in two processes, as `command` does in this one."""
    return run_in_two


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs a command in this process: ``command(name, folder, student__steps=3)``."""
    return run_command


@pytest.fixture(scope="session")
def command_words() -> Callable[[str, Path, dict[str, Any]], list[str]]:
    """The words of such a command, for a process of its own."""
    return words


def pictures() -> Iterator[tuple[str, bytes, int, np.ndarray]]:
    """Digits of three classes: name, PNG, label and pixels."""
    digits = load("digits")
    for place in np.flatnonzero(digits.labels < 3)[:90].tolist():
        file = io.BytesIO()
        Image.fromarray(digits.images[place, ..., 0]).save(file, "PNG")
        yield f"{place}.png", file.getvalue(), int(digits.labels[place]), digits.images[place]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same pictures as every kind of data."""
    root = tmp_path_factory.mktemp("sources")
    rows = list(pictures())
    with tarfile.open(root / "shard-0.tar", "w") as shard:
        for name, content, label, _ in rows:
            for member, data in ((name, content), (f"{name[:-4]}.cls", b"%d" % label)):
                facts = tarfile.TarInfo(member)
                facts.size = len(data)
                shard.addfile(facts, io.BytesIO(data))
    for name, content, label, _ in rows:
        (root / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        (root / "folder" / str(label) / name).write_bytes(content)
    lines = [f"folder/{label}/{name},{label}" for name, _, label, _ in rows]
    (root / "scans.csv").write_text("path,label\n" + "\n".join(lines), encoding="utf-8")
    images = [{"bytes": content, "path": name} for name, content, *_ in rows]
    labels = [label for _, _, label, _ in rows]
    pq.write_table(pa.table({"image": images, "label": labels}), root / "scans.parquet")
    np.savez(root / "scans.npz", images=np.stack([row[3] for row in rows]), labels=labels)
    (root / "idx").mkdir()
    for name, array in (
        ("images-idx3", np.stack([row[3] for row in rows])[..., 0]),
        ("labels-idx1", np.array(labels)),
    ):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (root / "idx" / f"train-{name}-ubyte").write_bytes(header + array.astype("u1").tobytes())
    return {
        "folder": f"folder:{root / 'folder'}",
        "csv": f"table:{root / 'scans.csv'}",
        "parquet": f"table:{root / 'scans.parquet'}",
        "webdataset": f"webdataset:{root}/shard-*.tar",
        "arrays": f"arrays:{root / 'scans.npz'}",
        "idx": f"idx:{root / 'idx'}",
    }


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A self-training run that nothing disturbed."""
    outcome = run_command("selftrain", tmp_path_factory.mktemp("reference") / "run")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="session")
def same_weights() -> Callable[[Outcome, Outcome], bool]:
    def same(left: Outcome, right: Outcome) -> bool:
        a, b = left.weights, right.weights
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    return same


@pytest.fixture(scope="module")
def teacher(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small network that was trained on forty digits."""
    outcome = command("finetune", tmp_path_factory.mktemp("teacher") / "run", training__steps=60)
    assert outcome.code == 0, outcome.err
    folder: Path = outcome.folder
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Task]:
    """The digits, split and in a pool, for what is called without a command."""
    out = tmp_path_factory.mktemp("distill") / "run"
    with redirect_stdout(io.StringIO()):
        run = open_run(RunConfig(out=str(out), tensorboard=False, cpu=True, threads=1), "distill")
        yield prepare(run, DataConfig(test_fraction=0.85))
    run.close()
