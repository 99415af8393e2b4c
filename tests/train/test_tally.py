from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastscarce.train import Tally

SCRIPT = """
import json, sys, torch
from fastscarce.data import Loader, Sampler, open_source
from fastscarce.train import Tally
torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
source = open_source(f"arrays:{sys.argv[1]}")
sampler = Sampler(source.ids[:101], seed=0, batch_size=24, rank=rank, world_size=world)
tally = Tally()
with Loader(source, sampler, image_size=8, channels=1, workers=1) as loader:
    for batch in loader:
        tally.add(batch.labels == 3, batch.mask)
if rank == 0:
    print(json.dumps([*tally.total(), int((source.labels[:101] == 3).sum())]))
else:
    tally.total()
torch.distributed.destroy_process_group()
"""


def test_rows_are_counted_and_padding_is_not() -> None:
    tally = Tally()
    assert tally.mean() != tally.mean()  # not a number
    tally.add(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([True, True, False]))
    tally.add(torch.tensor([True, True]), torch.tensor([True, False]))
    assert tally.total() == (2.0, 3)
    assert tally.mean() == pytest.approx(2 / 3)


def test_refuses_rows_without_a_mask() -> None:
    with pytest.raises(ValueError, match="a value and a bool mask a row"):
        Tally().add(torch.zeros(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool mask"):
        Tally().add(torch.zeros(3), torch.ones(3))


def test_two_processes_with_a_loader_each_count_each_sample_once(tmp_path: Path) -> None:
    images = np.zeros((110, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(110) % 7)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "set.npz")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    right, count, expected = json.loads(outputs[0][0])
    assert count == 101
    assert right == expected
