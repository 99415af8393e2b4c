"""The benchmarks: what they measure with, and their commands on small shapes."""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_cache
import bench_data
import bench_kd_loss
import bench_losses
import bench_sources
import harness
import plot_kd_loss
import pytest
import torch

from fastscarce import _ops

BENCH = Path(harness.__file__).parent
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


def run(script: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_steps_take_turns() -> None:
    order: list[str] = []
    found = harness.turns({name: lambda name=name: order.append(name) for name in "abc"}, 0.0)
    assert order == list("aabbcc") * (1 + harness.LEAST_TURNS)
    assert found["turns"] == harness.LEAST_TURNS
    assert found["ratio"]["a"] == 1
    for name in "abc":
        assert 0 < found["fastest_milliseconds"][name] <= found["milliseconds"][name]


def test_a_step_without_enough_memory_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def large() -> None:
        raise torch.OutOfMemoryError

    found = harness.turns({"small": lambda: None, "large": large}, 0.0)
    assert list(found["ratio"]) == ["small"]
    assert capsys.readouterr().err == "large: out of memory, left out.\n"


def test_a_copy_is_timed_in_gigabytes_per_second() -> None:
    speeds = harness.copy_times("cpu", mebibytes=16, times=5)
    assert len(speeds) == 5
    assert all(0.05 < speed < 10_000 for speed in speeds)


@needs_linux
def test_peaks_are_above_what_was_there() -> None:
    held = torch.ones(2**23)

    def touched(mebibytes: int) -> mmap.mmap:
        # Memory of its own: an allocator may keep what is freed.
        pages = mmap.mmap(-1, mebibytes * 2**20)
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
        return pages

    def step() -> mmap.mmap:
        touched(32).close()
        return touched(16)

    for _ in range(2):
        assert harness.peak_of(step) == pytest.approx(32, abs=3)
    assert harness.peak_of(lambda: held) == pytest.approx(0, abs=1)


@needs_linux
def test_fused_head_holds_no_logits() -> None:
    made, gradients = bench_losses.head_steps("cpu", torch.float32, 4096, 16, 8192)
    peaks = {}
    for name, step in made.items():
        step()
        peaks[name] = harness.peak_of(step)
    logits = 128
    assert peaks["unfused"] == pytest.approx(2 * logits + gradients, rel=0.1)
    assert peaks["fastscarce"] == pytest.approx(20 + gradients, rel=0.15)


@pytest.mark.parametrize("head", bench_losses.HEAD_STEPS)
def test_heads_have_one_gradient(head: str) -> None:
    made, _ = bench_losses.HEAD_STEPS[head]("cpu", torch.float32, 70, 12, 300)
    fused, unfused = (step() for step in made.values())
    torch.testing.assert_close(fused, unfused)


def test_gradient_steps() -> None:
    student, teacher, target = harness.tensors(6, 5)
    step = harness.gradient_step(bench_kd_loss.ours, student, teacher, target)
    bench_kd_loss.ours(student, teacher, target).backward()
    (gradient,) = step()
    torch.testing.assert_close(gradient, student.grad)


def test_peers_have_the_same_gradient() -> None:
    data = harness.tensors(9, 40)
    found = bench_kd_loss.losses("cpu")
    expected = harness.gradient_step(found.pop("fastscarce"), *data)()
    for name in ("eager", "torchdistill"):
        torch.testing.assert_close(harness.gradient_step(found[name], *data)(), expected)


def test_what_differs_is_not_compared() -> None:
    data = harness.tensors(6, 5)

    def other(student: Any, teacher: Any, target: Any) -> torch.Tensor:
        return 1.01 * bench_kd_loss.ours(student, teacher, target)

    harness.check_agreement({"a": bench_kd_loss.ours, "b": bench_kd_loss.ours}, data)
    with pytest.raises(AssertionError):
        harness.check_agreement({"a": bench_kd_loss.ours, "b": other}, data)


def test_records_are_named_by_the_machine() -> None:
    assert harness.place("cpu") == f"cpu-{_ops.isa()}"
    found = harness.environment("cpu", 1)
    assert found["instruction_set"] == _ops.isa()
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"].startswith("python bench/")
    json.dumps(found)


@pytest.mark.parametrize(
    "path", sorted(harness.RESULTS.glob("kd_loss-*.json")), ids=lambda p: p.stem
)
def test_records_that_are_kept_can_be_drawn(path: Path, tmp_path: Path) -> None:
    assert path.with_suffix(".png").exists()
    drawn = plot_kd_loss.draw(Path(shutil.copy(path, tmp_path)))
    assert drawn.read_bytes().startswith(b"\x89PNG")


@needs_linux
def test_kd_loss_command(tmp_path: Path) -> None:
    path = tmp_path / "kd_loss-here.json"
    printed = run(
        "bench_kd_loss.py",
        "--seconds",
        "0",
        "--threads",
        "1",
        "--shapes",
        "300x7000",
        "--out",
        str(path),
    )
    record = json.loads(path.read_text())
    assert [table["title"] for table in record["tables"]] == [
        "float32, memory warm",
        "float32, memory as it comes",
    ]
    for table in record["tables"]:
        (row,) = table["measurements"]
        assert set(row["milliseconds"]) == {"fastscarce", "torch.compile", "eager", "torchdistill"}
        counted = 12e-6 * 300 * 7000 / row["milliseconds"]["fastscarce"]
        assert row["gigabytes_per_second"] == pytest.approx(counted)
        assert row["share_of_copy"] == pytest.approx(counted / row["copy_gigabytes_per_second"])
    peaks, gradient = row["peak_mebibytes"], row["gradient_mebibytes"]
    assert gradient == pytest.approx(4 * 300 * 7000 / 2**20)
    assert peaks["fastscarce"] == pytest.approx(gradient, abs=1)
    assert peaks["fastscarce, reused teacher"] == pytest.approx(0, abs=1)
    assert peaks["eager"] > 3 * gradient
    assert "| 300 x 7000 |" in printed
    run("plot_kd_loss.py", str(path))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@needs_linux
def test_losses_command(tmp_path: Path) -> None:
    path = tmp_path / "losses-here.json"
    words = [
        "--seconds",
        "0",
        "--threads",
        "1",
        "--shapes",
        "70x40",
        "--heads",
        "64x8x100",
        "--out",
        str(path),
    ]
    printed = run("bench_losses.py", *words)
    record = json.loads(path.read_text())
    names = ["jsd", "dkd", "dist", "kl, TopK of 32"]
    assert [row["loss"] for row in record["losses"]] == names
    assert [row["head"] for row in record["heads"]] == ["dense teacher", "both heads, JSD"]
    assert all(set(row["peak_mebibytes"]) == {"fastscarce", "unfused"} for row in record["heads"])
    assert "| 64 x 8 to 100 | float32 | dense teacher | unfused |" in printed


def test_shapes_and_numbers() -> None:
    assert harness.shape("4096x1000") == (4096, 1000)
    assert [harness.short(x) for x in (None, 0.01234, 1.5, 123.4, 1437.3)] == [
        "",
        "0.0123",
        "1.5",
        "123",
        "1437",
    ]
    table = harness.markdown(["a", "b"], [["1", "2"]])
    assert table == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_replayed_graphs_and_peaks_on_a_gpu() -> None:
    data = harness.tensors(64, 1000, "cuda")
    step = harness.gradient_step(bench_kd_loss.ours, *data)
    (expected,) = step()
    torch.testing.assert_close(harness.replay(step)()[0], expected)
    assert harness.peak_of(step, "cuda") == pytest.approx(4 * 64 * 1000 / 2**20, abs=0.1)
    assert harness.milliseconds(step, "cuda") > 0
    assert harness.place("cuda").startswith("cuda-sm")


def test_sources_are_read_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTSCARCE_CACHE", str(tmp_path))  # put back at the end
    monkeypatch.setattr(bench_sources, "DECODED", 2)
    kinds = bench_sources.sources(12)
    contents = {
        kind: sorted(content for _, content in source.contents()) for kind, source in kinds.items()
    }
    assert all(found == contents["folder"] for found in contents.values())
    results, index = bench_sources.measure(12, 0.0), bench_sources.measure_index(30)
    assert index["files"] == 30
    assert index["again"] > 0
    bench_sources.print_tables(results, index)
    printed = capsys.readouterr().out
    assert printed.count("| 1.00 |") >= 2
    assert all(f"| {kind} |" in printed for kind in bench_sources.KINDS)


def test_cache_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_cache, "SHARDS", 3)
    monkeypatch.setattr(bench_cache, "ROWS", 500)
    monkeypatch.setattr(bench_cache, "BATCH", 8)
    monkeypatch.setattr(bench_cache, "TEACHER", "test_efficientnet")
    path = tmp_path / "cache-here.json"
    words = ["files", "build", "--seconds", "0", "--threads", "1", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", [str(BENCH / "bench_cache.py"), *words])
    bench_cache.main()
    record = json.loads(path.read_text())
    assert record["instruction_set"] == _ops.isa()
    assert record["files"]["float16: bytes_per_row"] == 66
    assert record["files"]["uint8: bytes_per_row"] == 52
    assert all(value > 0 for value in record["files"].values())
    assert record["build"]["batches"] == 4
    assert record["build"]["build_x_passes"] > 1.0
    assert "build: build_x_passes" in capsys.readouterr().out


def test_loaders_are_counted_from_files_and_from_the_pool(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates = {"Pillow decodes, a core": bench_data.decoded(20), "another": 1.0}
    for name in ("fastscarce, files", "fastscarce, pool"):
        rates[name] = bench_data.turn(bench_data.METHODS[name], 70, 0.05)
    assert all(rate > 0 for rate in rates.values())
    bench_data.print_table(rates)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rates)
    assert f"| fastscarce, pool | {rates['fastscarce, pool']:.0f} |" in lines[-1]
