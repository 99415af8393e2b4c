"""The CUDA kernels' sources, run on the CPU by an emulator of CUDA's execution model.

This is no run on a GPU: it holds the arithmetic, the indexing, the barriers and the bounds of the
kernels, not what a GPU's compiler and memory make of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "cuda_emulator"
ROOT = FOLDER.parents[2]
BUILD = ROOT / "build" / "cuda_emulator"
CASES = ("cases.py", "loading_cases.py", "augment_cases.py")


@pytest.fixture(scope="module")
def build() -> Path:
    """The folder of the compiled emulator; compiled where sources are newer."""
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"the emulator is compiled here, and {tool} is not found")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    commands = [
        ["cmake", "-S", FOLDER, "-B", BUILD, *generator, f"-DTORCH_ROOT={torch.__path__[0]}",
         "-DCMAKE_CXX_COMPILER=g++"],
        ["cmake", "--build", BUILD, "--parallel", str(os.cpu_count() or 1)],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return BUILD


def _self_test(build: Path, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([build / "self_test", name], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("sum", "2016\n2016\n"),
        ("warp_sum", "2544 16\n"),
        ("cluster_sum", "3\n7\n"),
        ("missing_barrier", "0\n"),
    ],
)
def test_the_emulator_computes(build: Path, name: str, printed: str) -> None:
    done = _self_test(build, name)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diverging_barrier", "thread 40 returned"),
        ("two_barriers", "Threads diverge"),
        ("diverging_shuffle", "thread 16 returned"),
        ("outside_mask", "a lane outside its mask"),
        ("shared_out_of_bounds", "heap-buffer-overflow"),
        ("static_shared_out_of_bounds", "index 31 out of bounds"),
        ("global_out_of_bounds", "heap-buffer-overflow"),
        ("misaligned", "requires 16 byte alignment"),
    ],
)
def test_the_emulator_refuses(build: Path, name: str, message: str) -> None:
    done = _self_test(build, name)
    assert done.returncode != 0
    assert message in done.stderr


def test_no_launcher_waits_for_the_device() -> None:
    """What a CUDA graph can't capture: a launcher that waits, copies to the host, or allocates
    other than by torch."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu*"))
    assert sources
    refused = re.compile(r"\bcuda\w*Synchronize|\bcudaMemcpy|\bcudaMalloc|\bcudaFree|\bitem\(")
    found = [f"{source.name}: {line}" for source in sources
             for line in source.read_text().splitlines() if refused.search(line)]  # fmt: skip
    assert found == []


@pytest.mark.timeout(1800)
def test_kernels_agree_with_the_cpu(build: Path) -> None:
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # Fresh memory is NaN: what is read before it is written shows.
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1000000:malloc_fill_byte=255",
        "FASTSCARCE_EMULATED": str(build / "libemulated.so"),
        # Cases share helpers.
        "PYTHONPATH": os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p",
         "no:benchmark", *(str(FOLDER / name) for name in CASES)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
