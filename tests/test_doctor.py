"""The doctor on this machine, and on machines broken on purpose in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastscarce
from fastscarce.doctor import Check, _quota, collect, render

SOURCE = Path(fastscarce.__file__).parents[1]
WHOLE = "import sys; from fastscarce.doctor import main; sys.exit(main())"
# One part alone, where importing everything again would only take time.
KERNELS = "from fastscarce import doctor; doctor.render(doctor._kernels())"
THREADS = "from fastscarce import doctor; doctor.render(doctor._threads())"

# An editable install answers for the package before any folder of the path does.
FROM_PATH_ALONE = (
    "import sys; sys.meta_path[:] = "
    "[finder for finder in sys.meta_path if 'editable' not in type(finder).__module__];"
)


def run(
    program: str, *before: Path, source: Path = SOURCE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The doctor in a fresh process, with folders that come before all others."""
    path = os.pathsep.join(str(folder) for folder in (*before, source))
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        # Away from the source folder, which a program given by -c would look into first.
        cwd=os.sep,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        | environment,
        timeout=60,
    )


def shadow(folder: Path, name: str, text: str) -> Path:
    """A package of that name that fails, which hides the real one."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return folder


def test_this_machine() -> None:
    checks = {check.name: check for check in collect()}
    for name in ("python", "torch", "torchvision", "timm", "kornia", "accelerate", "numba"):
        assert checks[name].state == "ok", checks[name]
    assert checks["torch"].value.split("+")[0] == torch.__version__.split("+")[0]
    assert checks["CPU library"] == Check("CPU library", "ok", "loaded")
    assert checks["instruction set"].value in ("scalar", "avx2", "avx512")
    assert "fastscarce" in checks
    assert {"CUDA library", "DALI", "threads", "Fashion-MNIST"} <= set(checks)
    if not torch.cuda.is_available():
        assert checks["GPU"].state == "note"
    built = importlib.util.find_spec("fastscarce._C_cuda") is not None
    assert checks["CUDA library"].state == ("ok" if built else "note")
    assert all(check.cure for check in checks.values() if check.state == "broken")


def test_a_broken_package_is_told_with_reason_and_cure(tmp_path: Path) -> None:
    text = "raise RuntimeError('operator torchvision::nms does not exist\\nand more')\n"
    ran = run(WHOLE, shadow(tmp_path, "kornia", text))
    assert ran.returncode == 1, ran.stderr
    assert "RuntimeError: operator torchvision::nms does not exist" in ran.stdout
    assert "and more" not in ran.stdout
    assert "pip install --force-reinstall --no-deps torch kornia" in ran.stdout
    assert "PYTHONPATH" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_a_broken_torch_does_not_stop_the_doctor(tmp_path: Path) -> None:
    ran = run(
        WHOLE, shadow(tmp_path, "torch", "raise ImportError('libtorch_cpu.so: cannot open')\n")
    )
    assert ran.returncode == 1, ran.stderr
    assert "libtorch_cpu.so: cannot open" in ran.stdout
    assert "Fashion-MNIST" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_a_library_that_is_not_built(tmp_path: Path) -> None:
    """The package without its compiled half, as a source folder is before it is installed."""
    package = tmp_path / "fastscarce"
    package.mkdir()
    for file in (SOURCE / "fastscarce").iterdir():
        if file.suffix != ".so":
            (package / file.name).symlink_to(file)
    ran = run(FROM_PATH_ALONE + KERNELS, source=tmp_path)
    assert ran.stdout.split()[:3] == ["CPU", "library", "broken"], ran.stderr
    assert "not built" in ran.stdout
    assert "pip install" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_an_instruction_set_that_no_processor_has() -> None:
    ran = run(KERNELS, FASTSCARCE_ISA="avx4096")
    assert "instruction set  broken" in ran.stdout, ran.stderr
    assert "avx4096" in ran.stdout
    assert "unset FASTSCARCE_ISA" in ran.stdout


def test_more_threads_than_cores_are_a_note() -> None:
    ran = run(THREADS, OMP_NUM_THREADS=str(4 * (os.cpu_count() or 1)))
    assert "more than there are" in ran.stdout
    assert "export OMP_NUM_THREADS=" in ran.stdout


@pytest.mark.parametrize(
    ("text", "cores"),
    [("200000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None), ("", None)],
)
def test_a_container_s_share_of_cores(tmp_path: Path, text: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert _quota(tmp_path / "cpu.max") == cores
    assert _quota(tmp_path / "absent") is None


def test_cures_are_printed_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    cure = "python -m pip install " + "very-long-name[extra] " * 8
    render([Check("thing", "broken", "why [not]", cure), Check("other", "ok", "1.0")])
    shown = capsys.readouterr().out
    assert cure.strip() in shown
    assert "why [not]" in shown
