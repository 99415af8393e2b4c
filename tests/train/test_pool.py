"""The pool changes nothing but time and memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

# Normalised without batch statistics: then the batch and not its parts decides what is learned.
SETTINGS: dict[str, Any] = {
    "model__name": "small_cnn_gn",
    "test_fraction": 0.25,
    "labels_per_class": 5,
    "image_size": 16,
    "student__learning_rate": 0.02,
    "labels__keep_per_class": 4,
    "student__steps": 5,
    "teacher__steps": 4,
    "training__steps": 5,
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve JPEGs of each of three classes, told apart by their level."""
    root = tmp_path_factory.mktemp("data") / "photographs"
    draw = np.random.Generator(np.random.Philox(0))
    for label, name in enumerate(("beach", "city", "forest")):
        (root / name).mkdir(parents=True)
        for number in range(12):
            small = draw.integers(80 * label, 80 * label + 90, (4, 5, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((30, 24), Image.Resampling.BICUBIC)
            image.save(root / name / f"{number}.jpg")
    return root


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def taken(settings: dict[str, Any], command: str) -> dict[str, Any]:
    stage = {"selftrain": ("student", "teacher", "labels"), "finetune": ("training",)}[command]
    return {k: v for k, v in settings.items() if "__" not in k or k.split("__")[0] in
            (*stage, "model")}  # fmt: skip


def test_every_pool_ends_with_the_same_weights(
    command: Any, photographs: Path, tmp_path: Path
) -> None:
    outcomes = []
    for pool, workers in (("host", 0), ("off", 1)):  # tests/data/test_pixels.py has the disk
        settings = taken(SETTINGS, "selftrain")
        settings |= {"data": f"folder:{photographs}", "pool": pool, "workers": workers}
        outcome = command("selftrain", tmp_path / pool, **settings)
        assert outcome.code == 0, outcome.err
        outcomes.append(outcome)
    assert all(same(outcome, outcomes[0]) for outcome in outcomes[1:])


def test_a_worker_that_dies_leaves_a_run_that_goes_on(
    command: Any, photographs: Path, tmp_path: Path
) -> None:
    settings = taken(SETTINGS, "finetune")
    settings |= {"data": f"folder:{photographs}", "pool": "off", "workers": 1}
    settings |= {"checkpoint_every": 2, "training__steps": 40}
    whole = command("finetune", tmp_path / "whole", **{**settings, "pool": "host"})

    def children() -> set[int]:
        return {child.pid for child in psutil.Process().children()}

    others = children()

    def kill() -> None:
        checkpoint = tmp_path / "run" / "state" / "teacher.checkpoint.safetensors"
        while not checkpoint.exists():
            time.sleep(0.01)
        for worker in children() - others:
            os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    died = command("finetune", tmp_path / "run", **settings)
    killer.join()
    assert died.code == 2
    assert "A worker that decodes images ended" in died.err
    assert (tmp_path / "run" / "state" / "teacher.checkpoint.safetensors").exists()
    resumed = command("finetune", tmp_path / "run", **settings, resume=True)
    assert resumed.code == 0, resumed.err
    assert same(resumed, whole)


def test_two_processes_train_from_files_by_dali(
    command: Any, in_two_processes: Any, photographs: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    settings = taken(SETTINGS, "finetune")
    settings |= {"data": f"folder:{photographs}", "pool": "off", "workers": 1, "loader": "dali"}
    alone = command("finetune", tmp_path / "one", **{**settings, "pool": "host"})
    assert alone.code == 0, alone.err
    two = in_two_processes("finetune", tmp_path / "two", **settings)
    assert two.code == 0, two.err
    for name in alone.weights:
        torch.testing.assert_close(two.weights[name], alone.weights[name], rtol=0, atol=1e-3)
