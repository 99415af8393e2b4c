"""What a user types, and what comes of mistakes: one sentence with the cure, and nothing lost."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from fastscarce.cli import COMMANDS, _going_on, main
from fastscarce.config import SelftrainConfig

QUICK = ["--cpu=true", "--threads=1", "--tensorboard=false"]
TINY = [
    *QUICK, "--test_fraction=0.85", "--training.steps=3", "--training.batch_size=8",
    "--training.warmup_steps=1",
]  # fmt: skip


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def fastscarce(*words: Any) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:  # --help and --print_config
            code = int(end.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


def refused(answer: Answer, *parts: str) -> None:
    """One sentence on stderr that says each of ``parts``, and exit code 2."""
    assert answer.code == 2, answer
    assert re.fullmatch(r"error: [^\n]+[.!?]\n", answer.err), answer.err
    assert "Traceback" not in answer.err + answer.out
    for part in parts:
        assert part in answer.err, answer.err


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of digits as PNG files, and some without labels."""
    root = tmp_path_factory.mktemp("pictures")
    digits = load_digits()
    count = dict.fromkeys(range(3), 0)
    for image, label in zip(digits.images, digits.target, strict=True):
        if label > 2 or count[label] == 12:
            continue
        count[label] += 1
        part = root / ("unlabelled" if count[label] > 9 else f"digit-{label}")
        part.mkdir(exist_ok=True)
        pixels = np.rint(image * 15.9375).astype(np.uint8)
        Image.fromarray(pixels).save(part / f"{label}-{count[label]}.png")
    return root


def copy_of(folder: Path, place: Path) -> Path:
    for name, content in contents(folder).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


# ---- the words themselves


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["selftrane"], ["no command 'selftrane'", "did you mean selftrain?"]),
        (["zzz"], ["no command 'zzz'", "--help"]),
        ([], ["command"]),
        (["selftrain", "--steps_student", "3"], ["no setting 'steps_student'"]),
        (["selftrain", "--student.step=3"], ["'student.step'", "did you mean student.steps?"]),
        (["selftrain", "--labels-per-clas", "3"], ["did you mean labels_per_class?"]),
        (["finetune", "--qqqqqqqq", "3"], ["no setting 'qqqqqqqq'", "finetune --help"]),
        (["finetune", "--seed", "soon"], ["seed", "soon"]),
        (["finetune", "--training.optimizer", "adam"], ["training.optimizer", "adamw"]),
        (["finetune", "--mixed_precision=fp8"], ["mixed_precision", "bf16"]),
        (["finetune", "--training.steps=many"], ["training.steps", "many"]),
        (["finetune", "stray"], ["stray"]),
        (["finetune", "--seed"], ["seed"]),
    ],
)
def test_words_that_mean_nothing(words: list[str], parts: list[str]) -> None:
    refused(fastscarce(*words), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "labels_per_clas: 3\n",
            ["no setting 'labels_per_clas'", "did you mean labels_per_class?"],
        ),
        ("student:\n  step: 3\n", ["student.step", "did you mean student.steps?"]),
        ("student: {temprature: 3}\n", ["did you mean student.temperature?"]),
        ("seed: soon\n", ["seed", "soon"]),
        ("- 1\n- 2\n", []),
        ("seed: [1\n", []),
    ],
)
def test_files_that_mean_nothing(text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    answer = fastscarce("selftrain", "--config", tmp_path / "config.yaml", "--out", tmp_path / "x")
    refused(answer, *parts)
    assert not (tmp_path / "x").exists()


def test_a_missing_settings_file(tmp_path: Path) -> None:
    refused(fastscarce("selftrain", "--config", tmp_path / "none.yaml"), "none.yaml")


def test_help_names_every_command_and_setting() -> None:
    answer = fastscarce("--help")
    assert answer.code == 0
    for name in ("selftrain", "finetune", "label", "distill", "doctor"):
        assert name in answer.out
    answer = fastscarce("selftrain", "--help")
    assert answer.code == 0
    for name in ("--student.alpha", "--labels_per_class", "Pseudo-labelled rows a step"):
        assert name in answer.out


def test_printed_settings_can_be_read_again(tmp_path: Path) -> None:
    words = ["selftrain", "--labels-per-class", "7", "--student.learning-rate", "0.25"]
    printed = fastscarce(*words, "--print_config")
    assert printed.code == 0
    settings = yaml.safe_load(printed.out)
    assert settings["labels_per_class"] == 7
    assert settings["student"]["learning_rate"] == 0.25
    assert settings["rounds"] == SelftrainConfig().rounds
    (tmp_path / "config.yaml").write_text(printed.out)
    again = fastscarce("selftrain", "--config", tmp_path / "config.yaml", "--print_config")
    assert again.code == 0
    assert yaml.safe_load(again.out) == settings
    # a flag after the file wins
    over = fastscarce(
        "selftrain", "--config", tmp_path / "config.yaml", "--rounds", "9", "--print_config"
    )
    assert yaml.safe_load(over.out) == {**settings, "rounds": 9}


# ---- data


def train(data: str, out: Path, *words: Any) -> Answer:
    return fastscarce("finetune", *TINY, f"--data={data}", f"--out={out}", *words)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(
        train(f"folder:{tmp_path / 'none'}", tmp_path / "x"), "does not exist", "check the path"
    )


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "data" / "cats").mkdir(parents=True)
    refused(train(f"folder:{tmp_path / 'data'}", tmp_path / "x"), "has no images", "put each class")


def test_a_class_without_images(picture_folder: Path, tmp_path: Path) -> None:
    data = copy_of(picture_folder, tmp_path / "data")
    (data / "digit-9").mkdir()
    refused(train(f"folder:{data}", tmp_path / "x"), "digit-9", "has no images")


def test_a_corrupt_image(picture_folder: Path, tmp_path: Path) -> None:
    data = copy_of(picture_folder, tmp_path / "data")
    broken = data / "digit-1" / "1-2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    refused(train(f"folder:{data}", tmp_path / "x"), "1-2.png")
    skipping = train(f"folder:{data}", tmp_path / "y", "--on_error=skip", "--test_fraction=0.4")
    assert skipping.code == 0, skipping.err
    assert "skipped digit-1/1-2.png" in skipping.out


def test_more_labels_than_there_are(tmp_path: Path) -> None:
    refused(train("digits", tmp_path / "x", "--labels_per_class", 5000), "lower --labels-per-class")


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("digit", ["digits", "folder:PATH, idx:PATH, table:PATH or webdataset:PATH"]),
        ("idx:/nowhere/at/all", ["/nowhere/at/all"]),
        ("folder:", ["digits", "folder:PATH, idx:PATH, table:PATH or webdataset:PATH"]),
    ],
)
def test_data_that_is_not_there(data: str, parts: list[str], tmp_path: Path) -> None:
    refused(train(data, tmp_path / "x"), *parts)


def test_missing_folders_of_other_runs(picture_folder: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    refused(fastscarce("label", *QUICK, f"--teacher={none}", f"--out={tmp_path / 'x'}"), "none")
    refused(fastscarce("distill", *QUICK, f"--labels={none}", f"--out={tmp_path / 'y'}"), "none")
    answer = train(f"folder:{picture_folder}", tmp_path / "z", f"--unlabelled={none}")
    refused(answer, "none", "does not exist")


def test_nothing_to_label(tmp_path: Path) -> None:
    words = [*QUICK, "--labels_per_class=null", f"--out={tmp_path / 'x'}"]
    refused(fastscarce("selftrain", *words), "needs unlabelled images", "--unlabelled PATH")


# ---- models and numbers


def test_an_unknown_model(tmp_path: Path) -> None:
    answer = train("digits", tmp_path / "x", "--model.name=resnet_18")
    refused(answer, "'resnet_18' is unknown", "resnet18")
    # the mistake blocks nothing: the same folder serves the mended command
    assert train("digits", tmp_path / "x", "--training.steps=1").code == 0


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    answer = train(
        "digits", tmp_path / "x", "--training.learning_rate=1e30", "--training.steps=8",
        "--checkpoint_every=1",
    )  # fmt: skip
    refused(answer, "The loss of teacher is not finite at step", "lower its learning_rate")
    assert (tmp_path / "x" / "state" / "teacher.checkpoint.safetensors").is_file()
    assert not (tmp_path / "x" / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--training.steps=0"], ["training.steps must be 1 or more, got 0."]),
        (["--training.batch_size=0"], ["batch_size"]),
        (["--training.learning_rate=-1"], ["0 or more"]),
        (["--training.layer_decay=2"], ["layer_decay must be above 0 and at most 1, got 2"]),
        (["--labels_per_class=0"], ["labels_per_class"]),
        (["--test_fraction=1.5"], ["test_fraction"]),
        (["--gradient_accumulation_steps=0"], ["gradient_accumulation_steps"]),
        (["--checkpoint_every=0"], ["checkpoint_every"]),
        (["--log_every=0"], ["log_every"]),
        (["--threads=0"], ["threads"]),
        (["--holdout_per_class=-1"], ["holdout_per_class"]),
        (["--training.ema_decay=2"], ["ema_decay"]),
        (["--training.label_smoothing=2"], ["label_smoothing"]),
        (["--training.warmup_steps=-1"], ["training.warmup_steps must be 0 or more, got -1."]),
        (["--training.weight_decay=nan"], ["weight_decay"]),
    ],
)
def test_numbers_out_of_range(words: list[str], parts: list[str], tmp_path: Path) -> None:
    refused(train("digits", tmp_path / "x", *words), *parts)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--rounds=-1"], ["rounds"]),
        (["--labels.views=0"], ["views"]),
        (["--labels.keep_per_class=0"], ["keep_per_class"]),
        (["--labels.threshold=-1"], ["threshold"]),
        (["--student.temperature=0"], ["temperature"]),
        (["--student.alpha=2"], ["alpha"]),
    ],
)
def test_numbers_of_students_out_of_range(
    words: list[str], parts: list[str], tmp_path: Path
) -> None:
    sizes = [f"--{s}.{k}" for s in ("teacher", "student") for k in ("steps=2", "batch_size=8")]
    answer = fastscarce(
        "selftrain", *QUICK, "--test_fraction=0.85", "--baseline=false", *sizes,
        "--student.unlabelled_batch_size=16", f"--out={tmp_path / 'x'}", *words,
    )  # fmt: skip
    refused(answer, *parts)


def test_a_batch_that_can_not_be_shared_out(tmp_path: Path) -> None:
    words = ["--training.batch_size=9", "--gradient_accumulation_steps=2"]
    refused(train("digits", tmp_path / "x", *words), "batch_size must be a multiple", "got 9")


# ---- the results folder


def test_results_that_exist_are_never_touched(tmp_path: Path) -> None:
    out = tmp_path / "x"
    assert train("digits", out).code == 0
    before = contents(out)
    refused(train("digits", out), "already holds results", "--resume", "--overwrite")
    assert contents(out) == before
    replaced = train("digits", out, "--overwrite", "--seed=5")
    assert replaced.code == 0, replaced.err
    assert contents(out)["student.safetensors"] != before["student.safetensors"]


def test_what_no_run_wrote_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("years of work")
    for words in (["--overwrite"], ["--resume"], []):
        refused(train("digits", tmp_path / "x", *words), "name another --out")
        assert contents(tmp_path / "x") == {"thesis.txt": b"years of work"}
    refused(train("digits", tmp_path / "x" / "thesis.txt"), "is a file")


def test_resuming_with_other_settings(tmp_path: Path) -> None:
    # a run that stops by itself, its state kept
    out = tmp_path / "x"
    bad = ["--training.learning_rate=1e30", "--training.steps=8", "--checkpoint_every=1"]
    assert train("digits", out, *bad).code == 2
    before = contents(out)
    answer = train("digits", out, *bad, "--resume", "--seed=1", "--training.batch_size=16")
    refused(answer, "seed, training.batch_size", "name another --out")
    answer = fastscarce("selftrain", *QUICK, f"--out={out}", "--resume")
    refused(answer, "command")
    assert contents(out) == before
    refused(train("digits", out, *bad, "--resume"), "not finite")  # the same ones: goes on


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    refused(train("digits", Path("/proc/fastscarce/x")), "/proc/fastscarce", "--out")


# Past the limit a write fails as it does on a full disk (EFBIG for ENOSPC).
LIMITED = """
import resource, signal, sys
from fastscarce.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of 2 MB, or None where this process may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True
    )
    if not done or done.returncode:
        yield None
        return
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path | None, tmp_path: Path) -> None:
    out = (small_disk or tmp_path) / "x"
    words = ["finetune", *TINY, "--training.steps=8", "--checkpoint_every=2", f"--out={out}"]
    if small_disk is None:
        code = [sys.executable, "-c", LIMITED, *words]
        done = subprocess.run(code, capture_output=True, text=True)
        answer = Answer(done.returncode, done.stdout, done.stderr)
    else:
        filler = small_disk / "filler"
        filler.write_bytes(bytes(1_500_000))
        answer = fastscarce(*words)
        filler.unlink()
    refused(answer, "could not be written", "free space")
    assert not [name for name in contents(out) if name.endswith(".tmp")]
    # with room again, the same command goes on
    resumed = fastscarce(*words, "--resume")
    assert resumed.code == 0, resumed.err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("finetune --out=x", "the same command with --resume goes on with what was saved"),
        ("cache build --out=x", "run the same command again: what was written is whole"),
        ("bench data", "run the same command again: what was written is whole"),
        ("", "run the same command again: what was written is whole"),
    ],
)
def test_what_goes_on_after_an_interrupt(typed: str, said: str) -> None:
    assert _going_on(typed.split()) == said
    switches = {"finetune": True, "cache build": False}  # as the commands themselves have it
    for command, resumes in switches.items():
        assert ("resume" in {f.name for f in dataclasses.fields(COMMANDS[command])}) == resumes


# ---- importing


def test_importing_costs_next_to_nothing() -> None:
    code = """
import sys, time
import torch
start = time.perf_counter()
import fastscarce
print(time.perf_counter() - start)
heavy = ("timm", "kornia", "accelerate", "sklearn", "numba")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = done.stdout.splitlines()
    assert float(seconds) < 0.3
    assert loaded == "[]"


def test_the_module_runs_as_the_script_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastscarce", "selftrane"], capture_output=True, text=True
    )
    refused(Answer(done.returncode, done.stdout, done.stderr), "did you mean selftrain?")


@pytest.mark.parametrize(("processes", "torn_down"), [("1", True), ("2", False)])
def test_one_of_several_processes_ends_without_teardown(processes: str, torn_down: bool) -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print('torn down'));"
        "from fastscarce.cli import console; print('said before'); console()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "selftrain", "--student.stpes", "5"],
        capture_output=True,
        text=True,
        env={**os.environ, "WORLD_SIZE": processes},
        check=False,
    )
    assert done.returncode == 2
    assert "said before" in done.stdout
    assert ("torn down" in done.stdout) == torn_down
    assert "did you mean student.steps?" in done.stderr
