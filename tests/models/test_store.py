from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from fastscarce.errors import ModelError, ResultsError
from fastscarce.models import ModelInfo, create, load, save

NAMES = tuple("abcde")
SIZES = {"classes": 5, "channels": 1, "image_size": 64}


def saved(name: str, folder: Path) -> torch.nn.Module:
    model = create(name, seed=1, **SIZES)
    with torch.no_grad():  # statistics that differ from a fresh model's
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.25)
    save(model, folder, name=name, class_names=NAMES, mean=0.3, std=0.2, **SIZES)
    return model.eval()


@pytest.mark.parametrize(
    "name", ["small_cnn", "small_cnn_gn", "resnet18", "vit_tiny_patch16_224", "efficientnet_lite0"]
)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "student.safetensors",
    ]
    again, info = load(tmp_path / "out")
    assert info == ModelInfo(name, 5, 1, 64, NAMES, (0.3,), (0.2,))
    images = torch.randn(2, 1, 64, 64)
    assert not again.training
    assert torch.equal(model(images), again(images))
    place = f"local-dir:{tmp_path / 'out'}"
    same = create(place, seed=9, **SIZES).eval()
    assert torch.equal(model(images), same(images))
    if not name.startswith("small_cnn"):
        theirs = timm.create_model(place, pretrained=True).eval()
        assert torch.equal(model(images), theirs(images))
        assert theirs.pretrained_cfg["label_names"] == list(NAMES)
        assert tuple(theirs.pretrained_cfg["mean"]) == (0.3,)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18"])
def test_a_new_head_for_other_classes(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    other = create(f"local-dir:{tmp_path}", classes=3, channels=1, image_size=64, seed=0)
    own, new = model.state_dict(), other.state_dict()
    differ = {key for key in own if own[key].shape != new[key].shape}
    assert len(differ) == 2
    assert all(torch.equal(own[key], new[key]) for key in own if key not in differ)
    # and what came of it can be saved under its true name
    save(
        other, tmp_path / "next", name=f"local-dir:{tmp_path}", classes=3, channels=1,
        image_size=64, class_names=("x", "y", "z"),
    )  # fmt: skip
    assert load(tmp_path / "next")[1].name == name


def test_other_channels_are_refused(tmp_path: Path) -> None:
    saved("small_cnn", tmp_path)
    with pytest.raises(ModelError, match="weights for other images"):
        create(f"local-dir:{tmp_path}", classes=5, channels=3, image_size=64, seed=0)


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"needs a readable config\.json"):
        load(tmp_path)
    saved("small_cnn", tmp_path)
    weights = tmp_path / "student.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(ModelError, match=r"student\.safetensors can't be read"):
        load(tmp_path)
    weights.write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_classes": 7}))
    with pytest.raises(ModelError, match="does not hold the weights of small_cnn"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="was not written by fastscarce"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="needs a JSON object, got list"):
        load(tmp_path)


def test_can_not_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    model = create("small_cnn", seed=0, **SIZES)
    with pytest.raises(ResultsError, match="could not be written"):
        save(model, tmp_path / "file", name="small_cnn", class_names=NAMES, **SIZES)
    with pytest.raises(ValueError, match="5 class names, got 2"):
        save(model, tmp_path / "out", name="small_cnn", class_names="ab", **SIZES)


FULL_DISK = """
import resource, signal, sys
from fastscarce.errors import ResultsError
from fastscarce.models import create, save
sizes = {"classes": 2, "channels": 1, "image_size": 8}
model = create("small_cnn", seed=0, **sizes)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save(model, sys.argv[1], name="small_cnn", class_names=("a", "b"), **sizes)
except ResultsError as error:
    sys.exit(0 if "could not be written" in str(error) else 3)
sys.exit(4)
"""


def test_full_disk_leaves_the_old_model_alone(tmp_path: Path) -> None:
    model = saved("small_cnn", tmp_path)
    subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "student.safetensors",
    ]
    images = torch.randn(2, 1, 64, 64)
    assert torch.equal(load(tmp_path)[0](images), model(images))
