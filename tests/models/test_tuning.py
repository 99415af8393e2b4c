from __future__ import annotations

import pytest
import torch

from fastscarce.errors import ModelError
from fastscarce.models import create, freeze, groups, train_mode

MODELS = ["small_cnn", "small_cnn_gn", "resnet18", "vit_tiny_patch16_224"]


def make(name: str) -> torch.nn.Module:
    return create(name, classes=5, channels=1, image_size=32, seed=0, drop_rate=0.2)


@pytest.mark.parametrize("name", MODELS)
def test_groups_hold_each_parameter_once_at_its_rate(name: str) -> None:
    model = make(name)
    parts = groups(model, head_rate=1.0, backbone_rate=0.1, weight_decay=0.05, layer_decay=0.5)
    grouped = [id(p) for part in parts for p in part["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    rates = {id(p): part["lr"] for part in parts for p in part["params"]}
    decays = {id(p): part["weight_decay"] for part in parts for p in part["params"]}
    head = model.get_classifier()
    assert rates[id(head.weight)] == rates[id(head.bias)] == 1.0
    assert decays[id(head.weight)] == 0.05
    assert all(decays[id(p)] == 0.0 for p in model.parameters() if p.ndim == 1)
    backbone = [rates[id(p)] for p in model.parameters() if p not in set(head.parameters())]
    assert max(backbone) == pytest.approx(0.05)
    steps = sorted(set(backbone), reverse=True)
    assert steps == pytest.approx([0.1 * 0.5 ** (k + 1) for k in range(len(steps))])
    assert len(steps) >= 3
    first = next(
        p for n, p in model.named_parameters() if "conv1" in n or "enter.0" in n or "proj" in n
    )
    assert rates[id(first)] == min(backbone)
    torch.optim.AdamW(parts).step()


def test_one_rate_by_default() -> None:
    parts = groups(make("small_cnn"), head_rate=0.3, backbone_rate=None, weight_decay=0.1)
    assert {part["lr"] for part in parts} == {0.3}


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_backbone_stands_still(name: str) -> None:
    model = make(name)
    freeze(model, "backbone")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parts = groups(model, head_rate=0.1, backbone_rate=0.1, weight_decay=0.1)
    optimizer = torch.optim.SGD(parts)
    train_mode(model)
    assert model.training
    model(torch.randn(8, 1, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(before[key], value)
    }
    head = model.get_classifier()
    assert moved == {key for key, value in model.state_dict(keep_vars=True).items()
                     if value is head.weight or value is head.bias}  # fmt: skip
    freeze(model, "none")
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in train_mode(model).modules())


def test_dropout_before_the_head_still_acts() -> None:
    model = make("small_cnn")
    freeze(model, "backbone")
    train_mode(model)
    assert model.dropout.training
    assert not model.stages.training


def test_batch_norm_can_be_frozen_alone() -> None:
    model = train_mode(make("resnet18"), freeze_batch_norm=True)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert model.layer1.training


def test_refusals() -> None:
    model = make("small_cnn")
    with pytest.raises(ModelError, match="freeze must be none or backbone"):
        freeze(model, "half")
    for rates in ((-1.0, 1.0, 0.0, 1.0), (1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 0.0, 1.5)):
        names = ("head_rate", "backbone_rate", "weight_decay", "layer_decay")
        with pytest.raises(ModelError, match="layer_decay above 0"):
            groups(model, **dict(zip(names, rates, strict=True)))
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter left"):
        groups(model, head_rate=1.0, backbone_rate=1.0, weight_decay=0.0)
    with pytest.raises(ModelError, match="which layer is its head"):
        freeze(torch.nn.Linear(2, 2), "backbone")
