"""The same run in two processes, in pieces, and in bfloat16."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# No batch statistics: then the batch and not its parts decides what is learned.
# At a small rate: at a large one, twelve steps multiply a difference in the last bits.
NORMALISED = {
    "model.name": "small_cnn_gn",
    "student.cutmix_probability": 1.0,
    "teacher.learning_rate": 0.02,
}


def largest_difference(left: Any, right: Any) -> float:
    assert left.weights.keys() == right.weights.keys()
    return max(
        float((left.weights[name] - right.weights[name]).abs().max()) for name in left.weights
    )


@pytest.fixture(scope="module")
def alone(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = {key.replace(".", "__"): value for key, value in NORMALISED.items()}
    outcome = command("selftrain", tmp_path_factory.mktemp("alone") / "run", **settings)
    assert outcome.code == 0, outcome.err
    assert "selftrain: 1 process, cpu" in outcome.out
    return outcome


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2", "--master_port={port}"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
        "--main_process_port={port}",
    ],
}  # fmt: skip


# As a user types it on a machine without GPUs: without --cpu.
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_learn_what_one_does(
    command_words: Any, alone: Any, tmp_path: Path, launcher: str
) -> None:
    folder = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [word.format(port=port) for word in LAUNCHERS[launcher]]
    words = [word for word in command_words("selftrain", folder, NORMALISED) if word != "--cpu"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "fastscarce", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("selftrain: 2 processes, cpu") == 1  # said once for both
    two = type(alone)(0, done.stdout, done.stderr, folder)
    assert largest_difference(two, alone) < 1e-3
    for key in ("teacher_accuracy", "student_accuracy"):
        assert two.result[key] == pytest.approx(alone.result[key], abs=0.01)
    assert [entry[:2] for entry in two.losses] == [entry[:2] for entry in alone.losses]
    for (*_, left), (*_, right) in zip(two.losses, alone.losses, strict=True):
        assert left == pytest.approx(right, rel=1e-3)
    assert two.result["rounds"][0]["chosen"] == alone.result["rounds"][0]["chosen"]


def test_pieces_add_up_to_the_step(command: Any, alone: Any, tmp_path: Path) -> None:
    settings = {key.replace(".", "__"): value for key, value in NORMALISED.items()}
    pieces = command("selftrain", tmp_path / "run", gradient_accumulation_steps=2, **settings)
    assert pieces.code == 0, pieces.err
    assert largest_difference(pieces, alone) < 1e-4


def test_bfloat16_is_near_float32(command: Any, alone: Any, tmp_path: Path) -> None:
    settings = {key.replace(".", "__"): value for key, value in NORMALISED.items()}
    rounded = command("selftrain", tmp_path / "run", mixed_precision="bf16", **settings)
    assert rounded.code == 0, rounded.err
    assert all(value.dtype == torch.float32 for value in rounded.weights.values())
    assert largest_difference(rounded, alone) > 0.0
    # Later stages learn from other labels; the teacher's are the same.
    pairs = zip(rounded.losses, alone.losses, strict=True)
    teacher = [(left, right) for (stage, _, left), (*_, right) in pairs if stage == "teacher"]
    assert len(teacher) == 12
    for left, right in teacher:
        assert left == pytest.approx(right, rel=0.1)
