"""The wheel: built as a user's pip builds it, checked, installed elsewhere and used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy of what the sources are, so that no build output of the checkout can slip in.
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            ".venv", ".git", "build", "*.so", "__pycache__", "demo", "runs"
        ),
    )
    log = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "-w",
        str(folder),
        ".",
        cwd=source,
        # What the set-up has compiled for GPUs already is compiled for the least here.
        CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=90-virtual",
    )
    (path,) = folder.glob("*.whl")
    return path, log


def test_torch_is_not_fetched_again(wheel: tuple[Path, str]) -> None:
    _, log = wheel
    assert "compiling against the torch in" in log
    assert "Collecting torch" not in log


def test_one_wheel_serves_every_python_3(wheel: tuple[Path, str]) -> None:
    path, _ = wheel
    assert path.name.startswith("fastscarce-")
    assert "-py3-none-" in path.name


def test_it_holds_what_runs_and_no_sources(wheel: tuple[Path, str]) -> None:
    path, log = wheel
    names = zipfile.ZipFile(path).namelist()
    assert "fastscarce/_C.so" in names
    assert ("fastscarce/_C_cuda.so" in names) == (shutil.which("nvcc") is not None)
    if shutil.which("nvcc") is None:
        assert "building the CPU library only" in log
    assert "fastscarce/report/page.html.j2" in names
    assert "fastscarce/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("csrc", "tests", "bench", "tools"))]


def test_it_runs_from_another_place_and_its_symbols_are_stable(
    wheel: tuple[Path, str], tmp_path: Path
) -> None:
    path, _ = wheel
    target = tmp_path / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(path),
        cwd=tmp_path,
    )
    code = (
        # The checkout's editable install would answer for the package before any folder does.
        "import sys; sys.meta_path[:] = "
        "[finder for finder in sys.meta_path if 'editable' not in type(finder).__module__];"
        "import torch, fastscarce, fastscarce.ops as ops; print(fastscarce.__file__);"
        "s = torch.randn(4, 10, requires_grad=True);"
        "ops.kd_loss(s, torch.randn(4, 10), torch.arange(4)).backward();"
        "print(float(s.grad.sum().abs()) < 1e-5)"
    )
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert str(target) in output
    assert "True" in output
    audit = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    assert audit is not None, "torch-abi-audit is missing: pip install -e '.[test]'"
    run(audit, "--check", "torch", str(target / "fastscarce"), cwd=tmp_path)
