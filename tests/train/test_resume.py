"""A run that was stopped at any point and resumed ends as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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


# Imports once, then runs the command in children: the first is asked to stop, seven more are
# killed, by turns after some steps and after some time, and the last comes to the end.
DISTURBER = """
import json, os, pathlib, random, signal, sys, time
import fastscarce.cli, fastscarce.train, kornia, accelerate, timm, matplotlib.pyplot
import sklearn.datasets, pyarrow.parquet, jsonargparse

words, metrics = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
draw, codes = random.Random(5), []

def written():
    return metrics.stat().st_size if metrics.exists() else 0

while len(codes) < 100:
    child = os.fork()
    if child == 0:
        os._exit(fastscarce.cli.main(words))
    turn, steps, size, status = len(codes), 0, written(), None
    wanted = 1 if turn == 0 else draw.randint(1, 4) if turn in (1, 3, 5, 7) else 10**9
    end = time.monotonic() + (draw.uniform(0.05, 0.6) if turn in (2, 4, 6) else 600)
    while status is None:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = code
        elif steps >= wanted or time.monotonic() > end:
            time.sleep(draw.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL if turn else signal.SIGTERM)
            status = os.waitpid(child, 0)[1]
        else:
            time.sleep(0.001)
            steps, size = steps + (written() != size), written()
    codes.append(os.waitstatus_to_exitcode(status))
    if codes[-1] not in (143, -9):
        break
print(json.dumps(codes))
"""


def test_disturbed_again_and_again(
    command_words: Any, reference: Any, same_weights: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = command_words("selftrain", folder, {"checkpoint_every": 2, "resume": True})
    done = subprocess.run(
        [sys.executable, "-c", DISTURBER, json.dumps(arguments), str(folder / "metrics.jsonl")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes[0] == 143
    assert codes[-1] == 0, done.stderr
    assert codes.count(-9) >= 3
    assert "Stopped by SIGTERM at " in done.stderr
    assert "Traceback" not in done.stderr
    ended = type(reference)(0, "", "", folder)
    assert same_weights(ended, reference)
    assert ended.losses == reference.losses
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in reference.folder.iterdir()
    }


def test_a_complete_run_is_left_as_it_is(command: Any, tmp_path: Path) -> None:
    first = command("finetune", tmp_path / "run", training__steps=2)
    before = {path: path.read_bytes() for path in first.folder.iterdir()}
    again = command("finetune", tmp_path / "run", training__steps=2, resume=True)
    assert again.code == 0
    assert "is complete already" in again.out
    for changed, name in (({"training__steps": 3}, "training.steps"), ({"seed": 1}, "seed")):
        other = command("finetune", tmp_path / "run", resume=True,
                        **{"training__steps": 2, **changed})  # fmt: skip
        assert other.code == 2
        assert f"holds the results of other settings ({name}); name another --out" in other.err
    other = command("label", tmp_path / "run", resume=True)
    assert other.code == 2
    assert "other settings (command, " in other.err
    assert {path: path.read_bytes() for path in first.folder.iterdir()} == before
