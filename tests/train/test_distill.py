"""A student of a table, of the teacher itself, and of both."""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from fastscarce.augment import CutMix, get_policy
from fastscarce.cache import TeacherTable, decode, pack
from fastscarce.cli import main
from fastscarce.config import ModelConfig, StudentConfig, TeacherConfig
from fastscarce.data import StreamBatch, partner_ids
from fastscarce.ops import MixedTopK, TopK, kd_loss
from fastscarce.train.objectives import SelfTraining, Supervised
from fastscarce.train.tables import samples_of
from fastscarce.train.task import Task
from fastscarce.train.teacher import load_teacher
from fastscarce.train.teaching import Teaching, mixed_rows, with_mixing

DATA = ["--test_fraction=0.85", "--cpu=true", "--threads=1"]


def fastscarce(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def table(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of three views of the 269 training images, made by two processes."""
    return built(teacher, tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def mixed_table(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of mixed images."""
    return built(teacher, tmp_path_factory.mktemp("table"), "--policy=standard+cutmix")


def built(teacher: Path, folder: Path, *more: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        for rank in ("1", "0"):
            patch.setenv("RANK", rank)
            code, out, err = fastscarce(
                "cache", "build", f"--teacher={teacher}", f"--out={folder}", "--views=3",
                "--k=5", "--teacher-batch-size=64", *more, *DATA,
            )  # fmt: skip
            assert code == 0, err
    assert "complete" in out
    return folder


def test_the_commands_of_a_table(teacher: Path, table: Path, tmp_path: Path) -> None:
    deep = ["--deep=20", f"--teacher={teacher}", *DATA]
    code, out, err = fastscarce("cache", "verify", str(table), *deep)
    assert code == 0, err
    assert "0 missing" in out
    assert "asked again about 20 rows: KL" in out
    code, out, _ = fastscarce("cache", "info", str(table))
    assert code == 0
    assert "k: 5\n" in out
    assert "teacher_top1:" in out
    copy = shutil.copytree(table, tmp_path / "copy")
    code, out, _ = fastscarce("cache", "compact", str(copy))
    assert (code, out) == (0, "6 shards became 3\n")
    code, out, _ = fastscarce("cache", "diff", str(table), str(copy))
    assert code == 0
    assert "but for: nothing" in out
    code, out, _ = fastscarce("cache", "export", str(copy), "--to", "parquet", "--out",
                              str(tmp_path / "rows.parquet"))  # fmt: skip
    assert code == 0
    assert (tmp_path / "rows.parquet").is_file()
    shard = next(copy.rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, out, _ = fastscarce("cache", "verify", str(copy))
    assert code == 1
    assert "its checksum does not match" in out or "samples.safetensors" in out
    if shard.parent.name.startswith("view"):
        code, out, _ = fastscarce("cache", "gc", str(copy))
        assert code == 0
        assert "dropped" in out
    for words, message in (
        (["vrify", "x"], "did you mean verify?"),
        (["info", "--pth=x"], "cache info has no setting 'pth'; did you mean path?"),
        (["info", str(tmp_path / "no")], "holds no teacher's table"),
    ):
        code, _, err = fastscarce("cache", *words)
        assert code == 2
        assert message in err


def test_a_student_of_the_table_and_of_the_teacher_are_one(
    command: Any, same_weights: Any, teacher: Path, table: Path, tmp_path: Path
) -> None:
    """Same views, same rows: only the teacher's batches differ, and the table's are of 64."""
    settings = {"model__name": "small_cnn_gn", "student__steps": 6}
    cached = command("distill", tmp_path / "cached", cache=table, **settings)
    assert cached.code == 0, cached.err
    assert "3 views, 32 remembered ones are equal" in cached.out
    assert cached.result["filled_rows"] == 0
    assert len(cached.result["table"]) == 32
    live = command(
        "distill", tmp_path / "live", teacher=teacher, policy="standard", k=5, views=3, **settings
    )
    assert live.code == 0, live.err
    for (*_, left), (*_, right) in zip(cached.losses, live.losses, strict=True):
        assert left == pytest.approx(right, rel=1e-3)


def test_missing_rows_are_counted_or_said_by_the_teacher(
    command: Any, teacher: Path, table: Path, tmp_path: Path
) -> None:
    settings = {"model__name": "small_cnn_gn", "student__steps": 6}
    whole = command("distill", tmp_path / "whole", cache=table, **settings)
    copy = shutil.copytree(table, tmp_path / "copy")
    lost = sorted(copy.rglob("view-00000/*"))[0]
    lost.unlink()
    assert fastscarce("cache", "gc", str(copy))[0] == 0
    refused = command("distill", tmp_path / "refused", cache=copy, **settings)
    assert refused.code == 2
    assert "lacks 141 rows; run the same `fastscarce cache build` again, or give" in refused.err
    filled = command("distill", tmp_path / "filled", cache=copy, teacher=teacher, **settings)
    assert filled.code == 0, filled.err
    assert filled.result["filled_rows"] > 0
    for (*_, left), (*_, right) in zip(filled.losses, whole.losses, strict=True):
        assert left == pytest.approx(right, rel=1e-3)


def test_a_table_of_mixed_images_and_its_teacher_are_one(
    command: Any, in_two_processes: Any, teacher: Path, mixed_table: Path, tmp_path: Path
) -> None:
    """More than an epoch of an odd number of images, rows that are missing, two processes."""
    settings = {"model.name": "small_cnn_gn", "student.steps": 20, "student.alpha": 1.0}
    cached = command("distill", tmp_path / "cached", cache=mixed_table, **settings)
    assert cached.code == 0, cached.err
    assert "3 views, 32 remembered ones are equal" in cached.out
    live = {"teacher": teacher, "policy": "standard+cutmix", "k": 5, "views": 3}
    others = [command("distill", tmp_path / "live", **live, **settings)]
    copy = shutil.copytree(mixed_table, tmp_path / "copy")
    sorted(copy.rglob("view-00000/*"))[0].unlink()
    assert fastscarce("cache", "gc", str(copy))[0] == 0
    others.append(command("distill", tmp_path / "fill", cache=copy, teacher=teacher, **settings))
    assert others[-1].result["filled_rows"] > 100
    others.append(in_two_processes("distill", tmp_path / "two", cache=mixed_table, **settings))
    for other in others:
        assert other.code == 0, other.err
        for (*_, left), (*_, right) in zip(cached.losses, other.losses, strict=True):
            assert left == pytest.approx(right, rel=2e-3)
    # The same policy from a file; another that the table is not of.
    written = tmp_path / "policy.yaml"
    for probability, code in ((1.0, 0), (0.5, 2)):
        policy = get_policy("standard").followed_by(CutMix(probability=probability))
        written.write_text(yaml.safe_dump(policy.to_dict()))
        read = command("distill", tmp_path / f"read{code}", cache=mixed_table, policy=written,
                       **settings)  # fmt: skip
        assert read.code == code, read.err
        if code == 0:
            assert read.losses == cached.losses
        else:
            assert "transform.policy.steps.2.cutmix.probability differs" in read.err
    # Others' rows would be of other pairs.
    refused = command("distill", tmp_path / "refused", cache=mixed_table, holdout_per_class=1,
                      allow_mismatch="data", **settings)  # fmt: skip
    assert refused.code == 2
    assert "made of something else: transform.pairs differs" in refused.err


def test_the_consistent_preset_is_one_crop_and_one_mix(
    command: Any, teacher: Path, table: Path, mixed_table: Path, tmp_path: Path
) -> None:
    few = {"student.unlabelled_batch_size": 264, "model.name": "small_cnn_gn"}
    mix = {"student.augmentation": "standard", "student.cutmix_probability": 1.0, "k": 5}
    live = command("distill", tmp_path / "live", preset="consistent", teacher=teacher, **few, **mix)
    assert live.code == 0, live.err
    cached = command("distill", tmp_path / "mixed", preset="consistent", cache=mixed_table, **few)
    assert cached.code == 0, cached.err
    assert len(live.losses) == len(cached.losses) == 31  # 30 epochs of 269 images
    assert live.losses[0][2] == pytest.approx(cached.losses[0][2], rel=1e-3)
    unmixed = command("distill", tmp_path / "unmixed", preset="consistent", cache=table, **few)
    assert "the teacher saw unmixed views, and so does the student" in unmixed.out
    assert "unmixed" not in cached.out
    none = {"student.cutmix_probability": 0.0}
    plain = command("distill", tmp_path / "plain", preset="consistent", cache=table, **few, **none)
    assert plain.losses == unmixed.losses


def test_two_processes_build_and_distill(
    command: Any, in_two_processes: Any, launched: Any, teacher: Path, table: Path, tmp_path: Path
) -> None:
    code, _, err = launched(
        ["-m", "fastscarce", "cache", "build", f"--teacher={teacher}",
         f"--out={tmp_path / 'table'}", "--views=3", "--k=5", "--teacher-batch-size=64",
         "--test_fraction=0.85", "--threads=1"]
    )  # fmt: skip
    assert code == 0, err
    with TeacherTable.open(tmp_path / "table") as built, TeacherTable.open(table) as expected:
        assert built.missing() == 0
        assert built.manifest.content == expected.manifest.content
        for view in range(3):
            rows, lacking = built.records(expected.ids, view)
            assert len(lacking) == 0
            assert torch.equal(rows, expected.records(expected.ids, view)[0])
    # Without a few rows, which the teacher says: each of them counts in one of the processes.
    sorted((tmp_path / "table").rglob("view-00000/*"))[0].unlink()
    assert fastscarce("cache", "gc", str(tmp_path / "table"))[0] == 0
    settings = {
        "cache": tmp_path / "table", "teacher": teacher, "model.name": "small_cnn_gn",
        "student.cutmix_probability": 1.0, "student.steps": 40, "student.learning_rate": 0.02,
    }  # fmt: skip
    two = in_two_processes("distill", tmp_path / "two", **settings)
    assert two.code == 0, two.err
    one = command("distill", tmp_path / "one", **settings)
    assert one.code == 0, one.err
    assert two.result["filled_rows"] == one.result["filled_rows"] > 0
    assert [entry[:2] for entry in two.losses] == [entry[:2] for entry in one.losses]
    for (*_, left), (*_, right) in zip(two.losses, one.losses, strict=True):
        assert left == pytest.approx(right, rel=1e-3)
    for name, value in one.weights.items():
        assert torch.allclose(two.weights[name], value, atol=1e-3)
    # Over all test images, each once, in both; and better than a guess, which is right in 0.1.
    assert two.result["accuracy"] == pytest.approx(one.result["accuracy"], abs=0.002)
    assert two.result["accuracy"] > 0.3
    first, last = (sum(x[2] for x in two.losses[part]) for part in (slice(5), slice(-5, None)))
    assert last < first


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"seed": 1}, "transform.seed"),
        ({"labels_per_class": 5}, None),  # the same training images: nothing differs
        ({"holdout_per_class": 1}, "data.ids"),
        ({"policy": "weak"}, "transform.policy"),
        ({"teacher": "other"}, "teacher.tensors"),
        ({"k": 4}, "cache.k"),
    ],
)
def test_refusals_of_a_table_name_the_key(
    command: Any, table: Path, tmp_path: Path, settings: dict[str, Any], key: str | None
) -> None:
    if "teacher" in settings:
        other = command("finetune", tmp_path / "other", training__steps=2)
        settings = {"teacher": other.folder}
    outcome = command("distill", tmp_path / "run", cache=table, student__steps=1, **settings)
    if key is None:
        assert outcome.code == 0, outcome.err
        return
    assert outcome.code == 2
    assert f"made of something else: {key}" in outcome.err or f"{key}" in outcome.err
    assert "--allow-mismatch" in outcome.err


@pytest.mark.parametrize(
    ("preset", "alpha", "loss"), [("consistent", 1.0, "kl"), ("deit", 0.5, "hard"),
                                  ("dkd", 0.5, "dkd")]
)  # fmt: skip
def test_presets_train(
    command: Any, table: Path, tmp_path: Path, preset: str, alpha: float, loss: str
) -> None:
    outcome = command(
        "distill", tmp_path / "run", cache=table, preset=preset, student__steps=3,
        student__unlabelled_batch_size=264, student__learning_rate=0.01,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    steps = {"consistent": 31}.get(preset, 3)  # 30 epochs of 269 images
    assert [step for stage, step, _ in outcome.losses] == list(range(1, steps + 1))


def teaching(task: Task, source: Any, **settings: Any) -> Teaching:
    policy = task.pool.policy("standard")
    return Teaching(
        task.pool,
        samples_of(task.images, task.split, task.pool).positions,
        policy=policy,
        mixing=with_mixing(policy, StudentConfig(**settings)),
        source=source,
        views=3,
    )


LOSSES = {
    "kl": lambda logits, p, label: kd_loss(logits, p.log(), None, temperature=2.0),
    "hard": lambda logits, p, label: kd_loss(logits, None, p.argmax(1)),
    "dkd": lambda logits, p, label: kd_loss(
        logits, p.log(), label, loss="dkd", temperature=2.0, alpha=(1.0, 0.0)
    ),
}


def test_a_teacher_needs_the_images_in_memory(command: Any, teacher: Path, tmp_path: Path) -> None:
    refused = command("distill", tmp_path / "out", teacher=teacher, pool="off", student__steps=2)
    assert refused.code == 2
    assert "needs the images on the device; set pool to auto, host or disk." in refused.err
    for pool in ("host", "disk"):
        outcome = command("distill", tmp_path / pool, teacher=teacher, pool=pool, student__steps=2)
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_those_of_the_rows(task: Task, table: Path, loss: str) -> None:
    settings = StudentConfig(
        unlabelled_batch_size=24, alpha=1.0, temperature=2.0, cutmix_probability=0.0,
        loss=loss,  # type: ignore[arg-type]
    )  # fmt: skip
    model = task.network(ModelConfig(name="small_cnn_gn"), "teacher")
    with TeacherTable.open(table) as source:
        taught = teaching(task, source, cutmix_probability=0.0)
        objective = SelfTraining(task.run, task.pool, task.split.labelled, taught, settings)
        value = objective(model, 20, 0, 1)  # of the second epoch
        value.backward()
        batch = objective._stream.batch(20)
        ids = task.pool.ids[batch.positions]
        rows = source.rows(ids, batch.view % 3)
    images = task.pool.views(batch.positions, "standard", batch.view % 3, model)
    label = torch.full((24,), -100)
    known = np.isin(batch.positions, task.split.labelled)
    label[torch.from_numpy(known)] = task.pool.labels[torch.from_numpy(batch.positions[known])]
    assert 0 < known.sum() < 24
    dense = torch.log_softmax(rows.dense(10).float(), dim=1).exp()
    expected = LOSSES[loss](model(images), dense, label)
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=1e-5)
    assert all(bool((p.grad != 0).any()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cached", [True, False])
def test_losses_of_a_teacher_that_sees_mixed_images(
    task: Task, teacher: Path, mixed_table: Path, loss: str, cached: bool
) -> None:
    settings = StudentConfig(
        unlabelled_batch_size=24, alpha=1.0, temperature=2.0,
        loss=loss,  # type: ignore[arg-type]
    )  # fmt: skip
    model = task.network(ModelConfig(name="small_cnn_gn"), "teacher")
    facts = {"classes": task.images.classes, "channels": 1, "device": torch.device("cpu")}
    live = load_teacher(TeacherConfig(teacher=str(teacher)), **facts)
    policy = task.pool.policy("standard+cutmix")
    with TeacherTable.open(mixed_table) as source:
        layout = source.layout
        rows = {"source": source} if cached else {"live": live, "layout": layout}
        lessons = samples_of(task.images, task.split, task.pool).positions
        taught = Teaching(task.pool, lessons, policy=policy, mixing=policy, views=3, **rows)
        objective = SelfTraining(task.run, task.pool, task.split.labelled, taught, settings)
        step = 50  # of the fifth epoch, which sees the second view again
        value = objective(model, step, 0, 1)
        value.backward()
    batch = objective._stream.batch(step)
    assert (batch.view == 1).all()
    ids = task.pool.ids[batch.positions]
    mates = dict(zip(task.pool.ids[lessons].tolist(),
                     partner_ids(task.pool.ids[lessons], seed=task.pool.seed, view=1).tolist(),
                     strict=True))  # fmt: skip
    assert ids[batch.partners].tolist() == [mates[int(number)] for number in ids]
    plan = task.pool.draw(batch.positions, policy, 1, batch.partners)
    assert int((plan.lam < 1.0).sum()) > 12
    index = torch.from_numpy(batch.positions)
    said = decode(pack(live.logits(plan, task.pool.whole(), index), layout), layout)
    images = task.pool.carry_out(plan, task.pool.take(batch.positions), model)
    label = torch.full((24,), -100)
    known = np.isin(batch.positions, task.split.labelled)
    label[torch.from_numpy(known)] = task.pool.labels[torch.from_numpy(batch.positions[known])]
    assert 0 < known.sum() < 24
    dense = torch.log_softmax(said.dense(10).float(), dim=1).exp()
    expected = LOSSES[loss](model(images), dense, plan.mixed_target(label))
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=1e-5)


class Made(TorchDispatchMode):
    """The shapes of the numbers that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.shapes.add(tuple(value.shape))
        return out


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_dense_teacher_never_appears(task: Task, table: Path, probability: float) -> None:
    """From the table to the loss, rows of 5 of the 10 classes are all that is made."""
    model = torch.nn.Identity()
    with TeacherTable.open(table) as source:
        taught = teaching(task, source, cutmix_probability=probability)
        none, place = np.zeros(24, dtype=np.int64), np.arange(24)
        batch = StreamBatch(taught.lessons[:24], epoch=none, view=none, partners=place ^ 1)
        taken = task.pool.take(batch.positions)
        with Made() as made:
            plan = task.pool.draw(batch.positions, taught.mixing, batch.view, batch.partners)
            task.pool.carry_out(plan, taken, model)
            rows = taught.rows(batch)
            said = mixed_rows(rows, plan)
        assert isinstance(said, MixedTopK if probability else TopK)
    assert (24, 5) in made.shapes
    assert not {(24, 10), (10, 24)} & made.shapes
    kd_loss(torch.zeros(24, 10), said, None)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that PyTorch holds at a time of what it allocates during a call."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held)


def test_peaks_are_of_what_is_held_at_a_time() -> None:
    def run() -> None:
        first = torch.zeros(250_000)
        second = first + 1
        del first
        _ = second + 1

    assert 2_000_000 <= peak_bytes(run) < 2_001_000


def test_a_step_takes_the_memory_of_the_students(table: Path, task: Task) -> None:
    """Beside the supervised step of the same images: its rows and no more, let alone a teacher."""
    rows = 128
    settings = StudentConfig(
        batch_size=rows, unlabelled_batch_size=rows, alpha=1.0, cutmix_probability=0.0
    )
    model = task.network(ModelConfig(name="small_cnn_gn"), "student")
    with TeacherTable.open(table) as source:
        taught = teaching(task, source, cutmix_probability=0.0)
        plain = Supervised(task.run, task.pool, taught.lessons, settings)
        from_table = SelfTraining(task.run, task.pool, task.split.labelled, taught, settings)
        peaks = []
        for objective in (plain, from_table):

            def step(objective: Any = objective) -> None:
                objective(model, 1, 0, 1).backward()

            step()
            peaks.append(peak_bytes(step))
        layout = source.layout
    row = layout.stride + layout.k * (4 + 2) + 2  # its bytes; classes, log-probabilities, tail
    assert peaks[0] > 20 * rows * row
    assert peaks[1] <= peaks[0] + rows * row


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "--views=0"], "views must be 1 or more, got 0"),
        (["build", "--k=0"], "k must be 1 or more, got 0"),
        (["build", "--rows-per-shard=0"], "rows_per_shard must be 1 or more"),
        (["build", "--teacher-image-size=-4"], "teacher_image_size must be 1 or more"),
        (["build", "--policy=standrd"], "policy must be one of"),
        (["build", "--policy=weak+mixup", "--teacher-batch-size=3"], "batch_size must be even"),
        (["compact", "--rows-per-shard=0"], "rows_per_shard must be 1 or more"),
        (["verify", "--deep=-5"], "deep must be 0 or more, got -5"),
    ],
)  # fmt: skip
def test_numbers_of_a_table_that_make_no_sense(words: list[str], message: str) -> None:
    code, _, err = fastscarce("cache", *words)
    assert code == 2
    assert message in err
