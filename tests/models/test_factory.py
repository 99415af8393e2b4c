from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastscarce.errors import ModelError
from fastscarce.models import create

SIZES = {"classes": 5, "channels": 1, "image_size": 32}


@pytest.mark.parametrize("name", ["small_cnn", "small_cnn_gn"])
@pytest.mark.parametrize("side", [8, 9, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_cnn(name: str, side: int, channels: int) -> None:
    model = create(name, classes=10, channels=channels, image_size=side, seed=0)
    images = torch.randn(4, channels, side, side)
    logits = model(images)
    assert logits.shape == (4, 10)
    assert sum(p.numel() for p in model.parameters()) < 0.3e6
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "vit_tiny_patch16_224"])
def test_the_seed_alone_decides_the_weights(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = create(name, seed=3, **SIZES).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = create(name, seed=3, **SIZES).state_dict()
    other = create(name, seed=4, **SIZES).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_timm_models_take_the_sizes(name: str) -> None:
    model = create(name, classes=5, channels=1, image_size=64, seed=0, drop_rate=0.1).eval()
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)


def test_dropout_and_stochastic_depth_act_in_training_alone() -> None:
    images = torch.randn(8, 1, 32, 32)
    for rates in ({"drop_rate": 0.5}, {"drop_path_rate": 0.5}):
        model = create("small_cnn_gn", seed=0, **SIZES, **rates)
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))
        plain = create("small_cnn_gn", seed=0, **SIZES).eval()
        assert torch.equal(model(images), plain(images))


def test_a_model_without_stochastic_depth_is_made_without_it() -> None:
    model = create("vgg11", classes=5, channels=3, image_size=32, seed=0, drop_path_rate=0.1)
    assert model.get_classifier().out_features == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt18", "near names are resnet18"),
        ("smal_cnn", "near names are small_cnn"),
        ("local-dir:/nonexistent", "needs a readable config.json"),
    ],
)
def test_unknown(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create(name, seed=0, **SIZES)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("small_cnn", {"image_size": 4}, "at least 8 pixels"),
        ("small_cnn", {"pretrained": True}, "no published weights"),
        ("small_cnn", {"drop_rate": 1.0}, "drop_rate must be"),
        ("vit_tiny_patch16_224", {"image_size": 8}, "can't be made for 1 channels of 8 pixels"),
        ("inception_v3", {}, "can't be made for 1 channels of 32 pixels"),
    ],
)
def test_refusals(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create(name, seed=0, **{**SIZES, **options})


def test_weights_without_a_network(tmp_path: Path) -> None:
    code = (
        "from fastscarce.models import create;"
        "create('resnet18', classes=2, channels=3, image_size=32, seed=0, pretrained=True)"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "ModelError: The weights of resnet18 can't be read" in last
    assert last.endswith("by local-dir:PATH, or set pretrained to false.")


def test_a_folder_whose_weights_are_broken(tmp_path: Path) -> None:
    config = {"architecture": "resnet18", "num_classes": 2, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nothing.")
    with pytest.raises(ModelError, match=r"weights of local-dir:.*name a folder that timm or"):
        create(f"local-dir:{tmp_path}", seed=0, **SIZES)


def test_small_cnn_needs_no_timm() -> None:
    code = (
        "import sys; from fastscarce.models import create, groups, freeze;"
        "m = create('small_cnn', classes=2, channels=1, image_size=8, seed=0);"
        "freeze(m, 'backbone');"
        "groups(m, head_rate=1, backbone_rate=1, weight_decay=0);"
        "assert not {'timm', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
