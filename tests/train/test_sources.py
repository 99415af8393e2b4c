"""Self-training and distillation from every source, by both loaders, in two processes.

To start two processes takes longer than a run this small, so all runs of a loader share two.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

KINDS = ("folder", "csv", "parquet", "webdataset", "arrays", "idx", "digits")
STEPS: dict[str, dict[str, Any]] = {
    "selftrain": {"teacher.steps": 3, "supervised.steps": 3, "student.steps": 3},
    "distill": {"student.steps": 3},
}
WORDS = Callable[[str, Path, dict[str, Any]], list[str]]


@pytest.fixture(scope="module", params=["torch", "dali"])
def runs(
    request: pytest.FixtureRequest,
    sources: dict[str, str],
    command_words: WORDS,
    launched: Callable[..., tuple[int, str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """The loader, and the folder of its runs: a folder a source, in it a folder a command."""
    loader: str = request.param
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    root = tmp_path_factory.mktemp(loader)
    commands = []
    for kind in KINDS:
        shared = {
            "data": {**sources, "digits": "digits"}[kind],
            "loader": loader,
            "workers": 1,
            "model.name": "small_cnn_gn",
            "labels_per_class": 4,
            "test_fraction": 0.85 if kind == "digits" else 0.3,
        }
        teacher = root / kind / "selftrain"
        given = {"selftrain": {}, "distill": {"teacher": teacher}}
        for command, steps in STEPS.items():
            # A teacher reads any image at any time; self-training decodes ahead of its steps.
            pool = "off" if command == "selftrain" else "host"
            settings = {**shared, **steps, **given[command], "pool": pool}
            words = command_words(command, root / kind / command, settings)
            commands.append([word for word in words if not word.startswith("--cpu")])
    listed = root / "commands.json"
    with ExitStack() as stack:  # all at once, so that no port is given twice
        free = [stack.enter_context(socket.socket()) for _ in commands]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in free]
    content = list(zip(ports, commands, strict=True))
    listed.write_text(json.dumps(content), encoding="utf-8")
    program = str(Path(__file__).with_name("commands_in_turn.py"))
    status, printed, errors = launched([program, str(listed)])
    assert status == 0, printed[-2000:] + errors[-9000:]
    return loader, root


@pytest.mark.parametrize("command", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_from_every_source(
    runs: tuple[str, Path], first: dict[tuple[str, str], Any], kind: str, command: str
) -> None:
    loader, root = runs
    folder = root / kind / command
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["processes"] == 2
    result = json.loads((folder / "result.json").read_text())
    assert manifest["command"] == command
    assert result
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stages = {line["stage"]: line["step"] for line in lines if "loss" in line}
    assert len(stages) == (2 if command == "selftrain" else 1)
    assert set(stages.values()) == {3}
    # Grey PNGs and arrays are the same pixels to every decoder: the loaders' runs are one.
    weights = load_file(folder / "student.safetensors")
    other = first.setdefault((kind, command), weights)
    assert all(torch.equal(weights[name], other[name]) for name in weights), loader


@pytest.fixture(scope="module")
def first() -> dict[tuple[str, str], Any]:
    """Weights of the loader whose turn came first."""
    return {}
