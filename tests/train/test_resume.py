"""A run that was stopped at any point and resumed ends as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastscarce.train.run import Run


def stop_after(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, number: int) -> None:
    """Send this process a real signal when it has logged a step."""
    log = Run.log

    def logged(self: Run, at_stage: str, at_step: int, **values: float) -> None:
        log(self, at_stage, at_step, **values)
        if (at_stage, at_step) == (stage, step):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "log", logged)


@pytest.mark.parametrize(
    ("optimizer", "stage", "step", "number"),
    [
        ("sgd", "teacher", 7, signal.SIGTERM),  # the second epoch of the labelled images
        ("sgd", "student-1", 8, signal.SIGINT),  # the second of them, the fourth of the lessons
        ("adamw", "teacher", 11, signal.SIGTERM),  # the last checkpoint there can be
        ("adamw", "student-1", 6, signal.SIGTERM),
    ],
)
def test_a_stopped_run_ends_as_one_that_was_not(
    command: Any,
    reference: Any,
    adamw_reference: Any,
    same_weights: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    stage: str,
    step: int,
    number: int,
) -> None:
    settings = {"teacher__optimizer": optimizer, "student__optimizer": optimizer}
    with monkeypatch.context() as patch:
        stop_after(patch, stage, step - 1, number)
        stopped = command("selftrain", tmp_path / "run", **settings)
    assert stopped.code == 128 + number
    name = signal.Signals(number).name
    assert stopped.err == (
        f"Stopped by {name} at {stage}, step {step} of 12; the state is saved: the same command "
        "with --resume goes on from there.\n"
    )
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = command("selftrain", tmp_path / "run", resume=True, **settings)
    assert resumed.code == 0, resumed.err
    undisturbed = reference if optimizer == "sgd" else adamw_reference
    assert same_weights(resumed, undisturbed)
    assert resumed.losses == undisturbed.losses
    assert len({entry[:2] for entry in resumed.losses}) == len(resumed.losses)
    for key in ("teacher_accuracy", "student_accuracy", "rounds"):
        assert resumed.result[key] == undisturbed.result[key]
    assert not (tmp_path / "run" / "state").exists()


@pytest.fixture(scope="module")
def adamw_reference(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = {"teacher__optimizer": "adamw", "student__optimizer": "adamw"}
    return command("selftrain", tmp_path_factory.mktemp("adamw") / "run", **settings)


def test_dropout_draws_the_same_after_a_stop(
    command: Any, same_weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model__dropout": 0.5, "training__steps": 6}
    whole = command("finetune", tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, "teacher", 2, signal.SIGTERM)
        assert command("finetune", tmp_path / "run", **settings).code == 143
    resumed = command("finetune", tmp_path / "run", resume=True, **settings)
    assert same_weights(whole, resumed)


def test_a_signal_to_a_process_of_its_own(
    command: Any, command_words: Any, reference: Any, same_weights: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastscarce", *command_words("selftrain", folder, {})],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert err.startswith("Stopped by SIGTERM at ")
    resumed = command("selftrain", folder, resume=True)
    assert resumed.code == 0, resumed.err
    assert same_weights(resumed, reference)
    assert resumed.losses == reference.losses


# Imports once, then runs the command in children that it kills, until one has come to the end.
KILLER = """
import json, os, random, signal, sys, time
import fastscarce.cli, fastscarce.train, kornia, accelerate, timm, matplotlib.pyplot
import sklearn.datasets, pyarrow.parquet, jsonargparse
words, draw, kills = json.loads(sys.argv[1]), random.Random(5), 0
while True:
    child = os.fork()
    if child == 0:
        os._exit(fastscarce.cli.main(words))
    ends = time.monotonic() + (draw.uniform(0.05, 1.5) if kills < 8 else 600)
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            print(json.dumps({"code": os.waitstatus_to_exitcode(status), "kills": kills}))
            sys.exit()
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
"""


def test_killed_at_any_moment(
    command: Any, command_words: Any, reference: Any, same_weights: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = command_words("selftrain", folder, {"checkpoint_every": 2, "resume": True})
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["code"] == 0, done.stderr
    assert last["kills"] >= 3
    killed = type(reference)(0, "", "", folder)
    assert same_weights(killed, reference)
    assert killed.losses == reference.losses
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in reference.folder.iterdir()
    }


def test_a_complete_run_is_left_as_it_is(command: Any, tmp_path: Path) -> None:
    first = command("finetune", tmp_path / "run", training__steps=2)
    before = {path: path.read_bytes() for path in first.folder.iterdir()}
    again = command("finetune", tmp_path / "run", training__steps=2, resume=True)
    assert again.code == 0
    assert "is complete already" in again.out
    assert {path: path.read_bytes() for path in first.folder.iterdir()} == before
