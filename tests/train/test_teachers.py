"""Teachers by name, their class maps, and numbers of their tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastscarce.cache import Layout, Teacher, TeacherTable, build
from fastscarce.config import TeacherConfig
from fastscarce.errors import DataError, ModelError
from fastscarce.train.tables import samples_of
from fastscarce.train.task import Task
from fastscarce.train.teacher import load_teacher


def test_class_maps_that_make_no_sense(task: Task, teacher: Path, tmp_path: Path) -> None:
    same = {str(n): str(n) for n in range(10)}
    path = tmp_path / "map.json"
    for changed, message in (
        ({"9": True}, "names True for '9', which is no class"),
        ({"0": False}, "names False for '0', which is no class"),
        ({"1": "0"}, "gives the teacher's class '0' to both '0' and '1'; give it to one"),
        ({"4": []}, "needs an entry for the class '4'"),
    ):
        path.write_text(json.dumps({**same, **changed}))
        with pytest.raises(DataError, match=message):
            load_teacher(
                TeacherConfig(teacher=str(teacher), class_map=str(path)),
                classes=task.images.classes, channels=1, device=torch.device("cpu"),
            )  # fmt: skip
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="can't be read"):
        load_teacher(
            TeacherConfig(teacher=str(teacher), class_map=str(path)),
            classes=task.images.classes, channels=1, device=torch.device("cpu"),
        )  # fmt: skip
    # Before weights are fetched from a network that is not there.
    with pytest.raises(DataError, match="resnet18 knows other classes"):
        load_teacher(
            TeacherConfig(teacher="resnet18"),
            classes=task.images.classes, channels=1, device=torch.device("cpu"),
        )  # fmt: skip


def test_teachers_by_name(task: Task, teacher: Path, tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "classes": task.images.classes, "channels": 1, "device": torch.device("cpu")
    }  # fmt: skip

    def of(name: str | Path, **changed: Any) -> Teacher:
        return load_teacher(TeacherConfig(teacher=str(name), **changed), **facts)

    one, both = of(teacher), of(f"{teacher}, {teacher}")
    assert (len(one.models), len(both.models), one.image_size) == (1, 2, (8,))
    plan = task.pool.draw(np.arange(6), "eval", 0)
    index = torch.arange(6)
    said, twice = (each.logits(plan, task.pool.whole(), index) for each in (one, both))
    torch.testing.assert_close(twice, said.log_softmax(1))

    turned = tmp_path / "map.yaml"
    turned.write_text(json.dumps({str(n): [str((n + 1) % 10)] for n in range(10)}))
    mapped = of(teacher, class_map=str(turned)).logits(plan, task.pool.whole(), index)
    torch.testing.assert_close(mapped.roll(1, 1), said.log_softmax(1), rtol=1e-4, atol=1e-4)

    import timm

    folder = tmp_path / "timm"
    folder.mkdir()
    network = timm.create_model("test_efficientnet", num_classes=12)
    from timm.models import save_for_hf

    save_for_hf(network, folder, model_config={"num_classes": 12})
    with pytest.raises(DataError, match=r"knows other classes .12 classes. than the data"):
        of(f"local-dir:{folder}")
    twelve = tmp_path / "twelve.json"
    known = {str(n): n for n in range(10)}
    twelve.write_text(json.dumps({**known, "9": [9, 11]}))
    assert of(f"local-dir:{folder}", class_map=str(twelve), teacher_image_size=32).classes == 10
    for content, message in (
        ({"0": 1}, "needs an entry for the class '1'"),
        ({**known, "9": 12}, "names 12 for '9', which is no class"),
        ([1], "needs a mapping"),
    ):
        twelve.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            of(f"local-dir:{folder}", class_map=str(twelve))
    with pytest.raises(ModelError, match="is unknown; near names are"):
        of("small_cnnn")


def test_a_table_of_several_teachers_and_half_precision(
    task: Task, teacher: Path, tmp_path: Path
) -> None:
    config = TeacherConfig(teacher=f"{teacher},{teacher}", teacher_precision="bfloat16")
    loaded = load_teacher(
        config, classes=task.images.classes, channels=1, device=torch.device("cpu")
    )
    samples = samples_of(task.images, task.split, task.pool)
    settings: dict[str, Any] = {"policy": "weak", "seed": 1, "k": 10}
    built = build(loaded, samples, tmp_path / "a", views=1, **settings)
    full = build(replace(loaded, precision="float32"), samples, tmp_path / "b", views=1, **settings)
    with TeacherTable.open(built.folder) as half, TeacherTable.open(full.folder) as whole:
        assert half.manifest.content["teacher"]["precision"] == "bfloat16"
        assert half.layout == Layout(10, 10)
        a, b = (x.rows(samples.ids, 0).log_probs.float().exp() for x in (half, whole))
    assert 0.0 < float((a - b).abs().max()) < 0.1
