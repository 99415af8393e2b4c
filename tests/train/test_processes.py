"""The same run in two processes, in pieces, and in bfloat16."""

from __future__ import annotations

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


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_learn_what_one_does(
    in_two_processes: Any, alone: Any, tmp_path: Path, launcher: str
) -> None:
    two = in_two_processes("selftrain", tmp_path / "run", launcher=launcher, **NORMALISED)
    assert two.code == 0, two.err
    assert two.out.count("selftrain: 2 processes, cpu") == 1  # said once for both
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
