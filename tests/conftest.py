"""What every test shares: one thread, so that results repeat exactly."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

# Before torch is imported, here and in every process a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# What is kept of data sets goes into a folder of its own, here and in those processes.
if "FASTSCARCE_CACHE" not in os.environ:
    os.environ["FASTSCARCE_CACHE"] = tempfile.mkdtemp(prefix="fastscarce-tests-")
    atexit.register(shutil.rmtree, os.environ["FASTSCARCE_CACHE"], ignore_errors=True)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """A training run flushes them to zero, in its process for good."""
    yield
    torch.set_flush_denormal(False)
