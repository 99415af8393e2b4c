"""A training state comes back bit for bit, or not at all."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastscarce.errors import ResultsError
from fastscarce.train.checkpoint import load_state, load_weights, save_state, save_weights

SCALER = {"scale": 512.0, "growth_factor": 2.0, "_growth_tracker": 3}


def network(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    images = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
    model(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = optimizer_of(name, model)
    for number in range(3):
        step(model, optimizer, number)
    path = tmp_path / "deep" / "state.safetensors"
    facts = {"step": 3, "seconds": 1.25}
    save_state(path, model=model, average=average, optimizer=optimizer, scaler=SCALER, facts=facts)
    step(model, optimizer, 3)

    other, its_average = network(), network()
    its_optimizer = optimizer_of(name, other)
    read = load_state(path, model=other, average=its_average, optimizer=its_optimizer)
    assert read == (facts, SCALER)
    step(other, its_optimizer, 3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    for key, value in average.state_dict().items():
        assert torch.equal(value, its_average.state_dict()[key]), key


def test_weights_and_facts(tmp_path: Path) -> None:
    model, other = network(), network()
    save_weights(tmp_path / "w", model, seconds=2.5)
    assert load_weights(tmp_path / "w", other) == {"seconds": 2.5}
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_other_files_are_refused(tmp_path: Path) -> None:
    model = network()
    path = tmp_path / "state"
    with pytest.raises(ResultsError, match="can't be read as a checkpoint"):
        load_weights(path, model)
    save_weights(path, model)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"\0" * 64):
        path.write_bytes(broken)
        with pytest.raises(ResultsError, match="delete it to train this stage anew"):
            load_weights(path, model)
    save_file(model.state_dict(), path)
    with pytest.raises(ResultsError, match="has the format None"):
        load_weights(path, model)
    save_file(model.state_dict(), path, metadata={"format": "fastscarce-checkpoint-99"})
    with pytest.raises(ResultsError, match="the version that wrote it"):
        load_weights(path, model)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    model, wider = network(), network(7)
    save_weights(tmp_path / "w", model)
    with pytest.raises(ResultsError, match="another architecture"):
        load_weights(tmp_path / "w", wider)
    path = tmp_path / "s"
    optimizer = optimizer_of("sgd", model)
    save_state(path, model=model, average=model, optimizer=optimizer, scaler=None, facts={})
    with pytest.raises(ResultsError, match="another architecture"):
        load_state(path, model=wider, average=wider, optimizer=optimizer_of("sgd", wider))
    # weights alone are no state to go on from
    with pytest.raises(ResultsError, match="delete it"):
        load_state(tmp_path / "w", model=model, average=model, optimizer=optimizer)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    model = network()
    save_weights(tmp_path / "w", model, step=1)
    with pytest.raises(TypeError):  # a fact that is no JSON: nothing has been written yet
        save_weights(tmp_path / "w", model, step=object())
    assert load_weights(tmp_path / "w", model) == {"step": 1}
    assert list(tmp_path.iterdir()) == [tmp_path / "w"]
