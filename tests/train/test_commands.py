"""Every command from end to end, at the smallest size that is still real."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from fastscarce.cli import main
from fastscarce.data import load as load_data
from fastscarce.models import load
from fastscarce.pseudo import read_parquet

FASHION = Path("/usr/share/datasets/fashion-mnist")
EVERY = {
    "config.yaml",
    "manifest.json",
    "metrics.jsonl",
    "report.html",
    "result.json",
    "curves.png",
    "split.csv",
}
MODEL = {"student.safetensors", "config.json"}
TABLE = {"pseudo_labels", "pseudo_labels.parquet"}
TINY_TIMM = "test_resnet.r160_in1k"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check_common(outcome: Any, command: str) -> None:
    """What is true of any command's folder."""
    folder = outcome.folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["command"] == command
    assert manifest["seed"] == 0
    assert manifest["processes"] == 1
    assert {"torch", "timm", "fastscarce", "python"} <= manifest["versions"].keys()
    assert manifest["data"]["fingerprint"] == load_data("digits").fingerprint()
    with Image.open(folder / "curves.png") as curves:
        assert curves.format == "PNG"
        assert min(curves.size) > 100
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:|//|file:)""", page)
    assert not re.search(r"@import|url\(\s*['\"]?(https?:|//)|<script[^>]+src|<link", page)
    assert f"fastscarce {command} --config" in page
    assert outcome.result["seconds"] > 0
    assert not (folder / "state").exists()


@pytest.fixture(scope="module")
def teacher(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    outcome = command("finetune", tmp_path_factory.mktemp("teacher") / "run", training__steps=60)
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def table(command: Any, teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("table") / "run"
    outcome = command("label", out, teacher=teacher.folder, labels__keep_per_class=6)
    assert outcome.code == 0, outcome.err
    return outcome


def test_selftrain(reference: Any) -> None:
    check_common(reference, "selftrain")
    assert names(reference.folder) == EVERY | MODEL | TABLE
    result = reference.result
    assert result["supervised_accuracy"] is None  # no baseline was asked for
    for key in ("teacher_accuracy", "student_accuracy"):
        assert 0.0 <= result[key] <= 1.0
    (row,) = result["rounds"]
    assert row["round"] == 1
    assert row["judge"] == result["judge"] == "agreement"
    assert row["label_flips"] is None
    labels = read_parquet(reference.folder / "pseudo_labels.parquet").labels
    assert row["chosen"] == int(labels.chosen.sum())
    model, info = load(reference.folder)
    assert info.class_names == tuple(str(digit) for digit in range(10))
    images = load_data("digits").images.transpose(0, 3, 1, 2) / 255.0
    batch = (torch.from_numpy(images[:4]).float() - info.mean[0]) / info.std[0]
    assert model(batch).shape == (4, 10)


def test_what_is_reported_is_the_returned_model(teacher: Any) -> None:
    """The accuracy in the result is that of the saved weights on the images named as the test."""
    from fastscarce.config import DataConfig
    from fastscarce.data import split

    images = load_data("digits")
    parts = split(images, labels_per_class=4, holdout_per_class=0, test_fraction=0.85, seed=0)
    assert DataConfig().labels_per_class == 4
    model, info = load(teacher.folder)
    levels = torch.from_numpy(images.images[parts.test].transpose(0, 3, 1, 2)).float() / 255
    with torch.no_grad():
        guess = model((levels - info.mean[0]) / info.std[0]).argmax(1).numpy()
    accuracy = float((guess == images.labels[parts.test]).mean())
    assert teacher.result["accuracy"] == pytest.approx(accuracy, abs=2 / len(guess))
    assert accuracy > 0.5


def test_the_settings_repeat_the_run(reference: Any, same_weights: Any, tmp_path: Path) -> None:
    saved = reference.folder / "config.yaml"
    settings = yaml.safe_load(saved.read_text())
    assert settings["student"]["unlabelled_batch_size"] == 16
    assert settings["resume"] is False
    assert main(["selftrain", "--config", str(saved), "--out", str(tmp_path / "again")]) == 0
    again = type(reference)(0, "", "", tmp_path / "again")
    assert same_weights(again, reference)
    assert again.losses == reference.losses


def test_rounds_with_a_baseline_and_tensorboard(command: Any, tmp_path: Path) -> None:
    outcome = command(
        "selftrain", tmp_path / "run", rounds=2, baseline=True, tensorboard=True,
        teacher__steps=4, student__steps=4, supervised__steps=4,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    result = outcome.result
    assert 0.0 <= result["supervised_accuracy"] <= 1.0
    assert [row["round"] for row in result["rounds"]] == [1, 2]
    assert isinstance(result["rounds"][1]["label_flips"], int)
    stages = [stage for stage, *_ in outcome.losses]
    assert list(dict.fromkeys(stages)) == ["supervised", "teacher", "student-1", "student-2"]
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
    assert "supervised baseline: " in outcome.out


def test_finetune_label_distill(command: Any, teacher: Any, table: Any, tmp_path: Path) -> None:
    check_common(teacher, "finetune")
    assert names(teacher.folder) == EVERY | MODEL
    check_common(table, "label")
    assert names(table.folder) - {"metrics.jsonl"} == (EVERY | TABLE) - {"metrics.jsonl"}
    labels = read_parquet(table.folder / "pseudo_labels.parquet").labels
    assert table.result["labelled"] == len(labels)
    assert table.result["chosen"] == int(labels.chosen.sum()) > 0
    truth = load_data("digits").labels[labels.ids]
    assert (labels.labels == truth).mean() > 0.5

    outcome = command("distill", tmp_path / "run", labels=table.folder)
    assert outcome.code == 0, outcome.err
    check_common(outcome, "distill")
    assert names(outcome.folder) == EVERY | MODEL
    assert 0.0 <= outcome.result["accuracy"] <= 1.0

    stranger = command("distill", tmp_path / "other", labels=table.folder, seed=1)
    assert stranger.code == 2
    assert "are not among this run's unlabelled images" in stranger.err


def test_a_frozen_backbone_keeps_every_bit(command: Any, teacher: Any, tmp_path: Path) -> None:
    outcome = command(
        "finetune", tmp_path / "run", model__name=f"local-dir:{teacher.folder}",
        training__freeze="backbone", training__ema_decay=0.5,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    changed = {
        name for name, value in outcome.weights.items()
        if not torch.equal(value, teacher.weights[name])
    }  # fmt: skip
    assert changed
    assert all(name.startswith("head.") for name in changed), changed


@pytest.mark.parametrize("name", ["finetune", "selftrain"])
def test_timm_loads_its_own_model(command: Any, tmp_path: Path, name: str) -> None:
    training = "training" if name == "finetune" else "student"
    outcome = command(name, tmp_path / "run", **{
        "model.name": TINY_TIMM, f"{training}.steps": 3, f"{training}.backbone_rate": 0.01,
        f"{training}.layer_decay": 0.8,
    })  # fmt: skip
    assert outcome.code == 0, outcome.err
    theirs = timm.create_model(f"local-dir:{outcome.folder}", pretrained=True)
    assert theirs.num_classes == 10
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, outcome.weights[name]), name


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three digits as PNG files: class folders, a test, unlabelled ones inside and elsewhere."""
    root = tmp_path_factory.mktemp("pictures")
    digits = load_digits()
    count = dict.fromkeys(range(3), 0)
    for image, label in zip(digits.images, digits.target, strict=True):
        if label > 2 or count[label] == 40:
            continue
        number = count[label]
        count[label] += 1
        places = [f"data/digit-{label}", f"data/test/digit-{label}", "data/unlabelled", "more/deep"]
        folder = root / places[number // 10]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.rint(image * 15.9375).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{label}-{number}.png")
    return root


def test_a_folder_of_images(command: Any, pictures: Path, tmp_path: Path) -> None:
    sizes = {"student__batch_size": 4, "teacher__batch_size": 4, "labels_per_class": None}
    inside = command("selftrain", tmp_path / "inside", data=f"folder:{pictures / 'data'}", **sizes)
    assert inside.code == 0, inside.err
    facts = json.loads((inside.folder / "manifest.json").read_text())["data"]
    assert facts["classes"] == ["digit-0", "digit-1", "digit-2"]
    assert (facts["labelled"], facts["unlabelled"], facts["test"]) == (30, 30, 30)
    table = read_parquet(inside.folder / "pseudo_labels.parquet")
    assert table.paths is not None
    assert all(path.startswith("unlabelled/") for path in table.paths)

    both = command(
        "selftrain", tmp_path / "both", data=f"folder:{pictures / 'data'}",
        unlabelled=pictures / "more", **sizes,
    )  # fmt: skip
    assert both.code == 0, both.err
    facts = json.loads((both.folder / "manifest.json").read_text())["data"]
    assert facts["unlabelled"] == 60


def test_fashion_mnist(command: Any, tmp_path: Path) -> None:
    if not FASHION.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    outcome = command("finetune", tmp_path / "run", data=f"idx:{FASHION}", training__steps=3)
    assert outcome.code == 0, outcome.err
    facts = json.loads((outcome.folder / "manifest.json").read_text())["data"]
    assert (facts["labelled"], facts["unlabelled"], facts["test"]) == (40, 59960, 10000)
