"""What is built is the same whoever builds it, and what is of something else is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from fastscarce.augment import Policy, apply, draw, get_policy
from fastscarce.cache import (
    Layout,
    Samples,
    Teacher,
    TeacherTable,
    check_sentinels,
    decode,
    expectation,
    info,
    pack,
    verify,
)
from fastscarce.cache.tag import plan_tags
from fastscarce.data import Sampler
from fastscarce.errors import CacheError, TrainingError

ROOT = Path(__file__).parents[2]


def rows_of(folder: Path, samples: Samples, views: int = 2) -> torch.Tensor:
    with TeacherTable.open(folder) as table:
        parts = [table.records(samples.ids, view) for view in range(views)]
    assert not any(len(lacking) for _, lacking in parts)
    return torch.cat([records for records, _ in parts])


def test_rows_are_what_the_teacher_says_of_the_views(
    make: Any, samples: Samples, network: Any, tmp_path: Path
) -> None:
    built = make(tmp_path, network)
    assert (built.written, built.kept, built.missing) == (300, 0, 0)
    ids = samples.ids[[3, 100, 7]]
    plan = draw("standard", ids, view=1, seed=5, image_size=8)
    views = apply(plan, samples.images, index=torch.from_numpy(samples.positions[[3, 100, 7]]))
    with torch.inference_mode():
        logits = network(views)
    layout = Layout(10, 5)
    expected = decode(pack(logits, layout), layout)
    for residency in ("device", "mmap"):
        with TeacherTable.open(tmp_path, residency=residency) as table:
            rows = table.rows(ids, 1)
            assert torch.equal(rows.indices, expected.indices)
            # The last bits of a row depend on its batch.
            assert torch.allclose(rows.log_probs, expected.log_probs, atol=2e-3)
            mixed = table.rows(ids, [1, 0, 1])
            assert torch.equal(mixed.log_probs[::2], rows.log_probs[::2])
            assert torch.equal(mixed.log_probs[1:2], table.rows(ids[1:2], 0).log_probs)
    assert network.asked == 10 * 32 + 3  # the last of five units a view is filled up


@pytest.mark.parametrize("count", [150, 149, 21])
def test_rows_of_a_policy_that_mixes_are_of_mixed_images(
    make: Any, samples: Samples, network: Any, tmp_path: Path, count: int
) -> None:
    """Pairs are those of the sampler, whatever its batches; an odd one out is not mixed."""
    part = Samples(samples.images, samples.ids[:count], samples.positions[:count],
                   samples.labels[:count], samples.class_names)  # fmt: skip
    built = make(tmp_path, network, part, policy="standard+cutmix", tagged=True)
    assert (built.written, built.missing) == (2 * count, 0)
    assert "teacher_top1" not in info(built.folder)["quality"]
    place = {int(i): int(p) for i, p in zip(part.ids, part.positions, strict=True)}
    sampler = Sampler(part.ids, seed=5, batch_size=20, pairs=True, views=2)
    mixed, alone = 0, 0
    with TeacherTable.open(tmp_path) as table:
        for _ in range(3):  # the third epoch reads the first view, in another order
            for batch in sampler:
                plan = draw("standard+cutmix", batch.ids, view=batch.view, seed=5, image_size=8,
                            partners=batch.partners)  # fmt: skip
                index = torch.tensor([place[int(number)] for number in batch.ids])
                with torch.inference_mode():
                    said = pack(network(apply(plan, samples.images, index=index)), Layout(10, 5))
                expected = decode(said, Layout(10, 5)).dense(10)[batch.mask]
                rows = table.rows(batch.ids, batch.view)
                assert torch.allclose(rows.dense(10)[batch.mask], expected, atol=2e-2)
                tags = table.tags(table.records(batch.ids, batch.view)[0])
                assert tags is not None
                own = plan_tags(plan, batch.ids[batch.partners])
                assert np.array_equal(own[batch.mask], tags.numpy()[batch.mask])
                mixed += int((plan.lam < 1.0)[batch.mask].sum())
                alone += int((batch.partners == np.arange(len(batch.ids)))[batch.mask].sum())
        assert mixed > 2 * count
        assert alone == (3 if count % 2 else 0)
        policy = get_policy("standard+cutmix")
        found = check_sentinels(table, part, policy=policy, seed=5, views=range(2))
        assert found == 2 * min(16, count)
        # With one sample less each is mixed with another one.
        fewer = Samples(part.images, part.ids[1:], part.positions[1:], part.labels[1:],
                        part.class_names)  # fmt: skip
        with pytest.raises(CacheError, match=r"remembered views \d+ have other pixels"):
            check_sentinels(table, fewer, policy=policy, seed=5, views=range(2))
    found = verify(built.folder, deep=60, teacher=Teacher.of(network), samples=part).deep
    assert found is not None
    assert (found.rows, found.flips) == (min(60, 2 * count), 0)
    assert abs(found.kl) < 1e-2  # of five classes of ten
    with pytest.raises(CacheError, match=r"data\.pixels, data\.rows, transform\.pairs differ"):
        verify(built.folder, deep=60, teacher=Teacher.of(network), samples=fewer,
               allow_mismatch=("data.ids",))  # fmt: skip


@pytest.mark.parametrize("policy", ["standard", "weak+mixup"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_do_not_depend_on_the_processes(
    make: Any, samples: Samples, tmp_path: Path, world_size: int, policy: str
) -> None:
    alone = make(tmp_path / "alone", policy=policy)
    for rank in reversed(range(world_size)):
        built = make(tmp_path / "shared", rank=rank, world_size=world_size, policy=policy)
    assert built.missing == 0
    assert torch.equal(rows_of(built.folder, samples), rows_of(alone.folder, samples))
    a, b = info(alone.folder), info(built.folder)
    assert a["quality"] == pytest.approx(b["quality"])
    assert {**a, "folder": 0, "quality": 0, "shards": 0, "bytes": 0} == {
        **b, "folder": 0, "quality": 0, "shards": 0, "bytes": 0
    }  # fmt: skip


@pytest.mark.parametrize("policy", ["standard", "standard+cutmix"])
def test_resume_with_another_number_of_processes(
    make: Any, samples: Samples, tmp_path: Path, network: Any, policy: str
) -> None:
    alone = make(tmp_path / "alone", policy=policy)
    first = make(tmp_path / "shared", rank=1, world_size=3, policy=policy)
    assert 0 < first.written < 300
    assert first.missing == 300 - first.written
    assert info(first.folder)["quality"] is None
    for rank in range(2):
        last = make(tmp_path / "shared", network, rank=rank, world_size=2, policy=policy)
    assert (last.folder, last.missing) == (first.folder, 0)
    assert network.asked <= 300 - first.written + 2 * 32  # nothing is asked twice
    assert torch.equal(rows_of(last.folder, samples), rows_of(alone.folder, samples))
    again = make(tmp_path / "shared", policy=policy)
    assert (again.written, again.kept) == (0, 300)
    assert ("teacher_top1" in info(first.folder)["quality"]) == (policy == "standard")


def test_writers_killed_at_any_instant(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "kill_writers.py", "--kills=4", "--writers=2",
         f"--folder={tmp_path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 kills of 2 writers" in done.stdout


def changed_tensor(network: Any, samples: Samples) -> dict[str, Any]:
    with torch.no_grad():
        network.layer.bias[3] += 1e-6
    return {"teacher": network}


def changed_policy(network: Any, samples: Samples) -> dict[str, Any]:
    policy = get_policy("standard").to_dict()
    policy["steps"][0]["resized_crop"]["scale"][0] = 0.61
    return {"policy": Policy.from_dict(policy)}


def changed_ids(network: Any, samples: Samples) -> dict[str, Any]:
    ids = samples.ids.copy()
    ids[0] += 1
    return {"of": Samples(samples.images, ids, samples.positions, samples.labels,
                          samples.class_names)}  # fmt: skip


def changed_pixel(network: Any, samples: Samples) -> dict[str, Any]:
    images = samples.images.clone()
    images[samples.positions[9], 4, 4] ^= 1
    return {"of": Samples(images, samples.ids, samples.positions, samples.labels,
                          samples.class_names)}  # fmt: skip


CHANGES: dict[str, Any] = {
    "teacher.tensors.layer.bias": changed_tensor,
    "transform.policy.steps.0.resized_crop.scale.0": changed_policy,
    "data.ids": changed_ids,
    "data.pixels": changed_pixel,
    "cache.k": lambda network, samples: {"k": 6},
    "transform.seed": lambda network, samples: {"seed": 6},
}


@pytest.mark.parametrize("key", CHANGES)
def test_refusals_name_the_changed_key(
    make: Any, samples: Samples, network: Any, tmp_path: Path, key: str
) -> None:
    make(tmp_path / "first")
    settings = {"teacher": network, "of": samples, **CHANGES[key](network, samples)}
    said: list[str] = []
    other = make(tmp_path / "first", **settings, say=said.append, views=2)
    assert f"differs in {key}; a new table is made beside it" in said[0]
    # A reader that has the new things does not take the old table for its own.
    content = TeacherTable.open(other.folder).manifest.content
    folder = make(tmp_path / "only").folder
    expect = {key.split(".")[0]: content[key.split(".")[0]]}
    with pytest.raises(CacheError, match=f"made of something else: {key} differs; build"):
        TeacherTable.open(tmp_path / "only", expect=expect)
    allowed = TeacherTable.open(tmp_path / "only", expect=expect, allow_mismatch=[key])
    assert allowed.folder == folder
    assert TeacherTable.open(tmp_path / "first", expect=expect).folder == other.folder


def test_more_views_go_on_with_the_table(make: Any, samples: Samples, tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    more = make(tmp_path / "a", views=3, allow_mismatch=["cache.views"])
    assert (more.folder, more.written) == (first.folder, 150)
    whole = make(tmp_path / "b", views=3)
    assert torch.equal(rows_of(more.folder, samples, 3), rows_of(whole.folder, samples, 3))
    assert verify(more.folder).sound
    with pytest.raises(CacheError, match="can't be gone on with: cache"):
        make(tmp_path / "a", k=3, allow_mismatch=["cache"])


def test_an_ensemble_says_the_mean_of_probabilities(
    make: Any, samples: Samples, tmp_path: Path, network: Any
) -> None:
    second = type(network)(seed=1)
    built = make(tmp_path, Teacher((network, second)), k=10)
    one = make(tmp_path / "one", network, k=10)
    two = make(tmp_path / "two", second, k=10)

    def probabilities(folder: Path) -> torch.Tensor:
        with TeacherTable.open(folder) as table:
            return table.rows(samples.ids, 0).log_probs.float().exp()

    mean = (probabilities(one.folder) + probabilities(two.folder)) / 2
    assert torch.allclose(probabilities(built.folder), mean, atol=2e-3)


def test_teachers_precision_resolution_and_class_map(
    make: Any, samples: Samples, tmp_path: Path
) -> None:
    class Pooled(nn.Module):
        pretrained_cfg: ClassVar[dict[str, Any]] = {"mean": (0.2,), "std": (0.3,)}

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 12, 4, stride=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[2:] == (16, 16)
            out: torch.Tensor = self.layer(x).mean((2, 3))
            assert out.dtype == torch.bfloat16
            return out

    groups = np.array([*range(10), 3, -1])
    teacher = Teacher((Pooled(),), "bfloat16", image_size=(16,), class_map=groups, classes=10)
    built = make(tmp_path, teacher, k=10)
    content = TeacherTable.open(built.folder).manifest.content["teacher"]
    assert (content["precision"], content["image_size"]) == ("bfloat16", 16)
    assert (content["mean"], content["class_map"]) == ([0.2], groups.tolist())
    with TeacherTable.open(built.folder) as table:
        sums = table.rows(samples.ids, 0).log_probs.float().exp().sum(1)
    assert torch.allclose(sums, torch.ones(150), atol=2e-3)


def test_tags_and_sentinels_see_other_views(make: Any, samples: Samples, tmp_path: Path) -> None:
    make(tmp_path, tagged=True)
    part = samples.sorted()
    policy = get_policy("standard")
    with TeacherTable.open(tmp_path) as table:
        records, _ = table.records(part.ids, 1)
        tags = table.tags(records)
        assert tags is not None
        plan = draw("standard+cutmix", part.ids, view=1, seed=5, image_size=8)
        assert np.array_equal(plan_tags(plan), tags.numpy())
        other = draw("standard+cutmix", part.ids, view=0, seed=5, image_size=8)
        assert (plan_tags(other) != tags.numpy()).all()

        check = {"policy": policy, "seed": 5, "views": range(2)}
        assert check_sentinels(table, part, **check) == 32
        changed = part.images.clone()
        known = np.isin(part.ids, [entry[0] for entry in table.sentinels(0)])
        changed[torch.from_numpy(part.positions[known])] ^= 255
        with pytest.raises(CacheError, match=r"of 32 remembered views \d+ have other pixels"):
            check_sentinels(table, replace(part, images=changed), **check)
        with pytest.raises(CacheError, match=r"of 32 remembered views 3[0-2] have other pixels"):
            check_sentinels(table, part, **{**check, "seed": 6})


class Says(nn.Module):
    """Gives what a function says."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: torch.Tensor) -> Any:
        return self.output(images)


def test_what_can_not_be_built(make: Any, samples: Samples, tmp_path: Path, network: Any) -> None:
    for changed, message in (
        ({"policy": "weak+cutmix", "batch_size": 33}, "an even batch_size for a policy that mix"),
        ({"views": 0}, "views of at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank from 0 to 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, **changed)
    with torch.no_grad():
        network.layer.weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"output on sample \d+, view 0, is not finite"):
        make(tmp_path, network)
    with pytest.raises(
        CacheError, match=r"needs 10 classes, as the data has, .* got .* \(32, 64\)"
    ):
        make(tmp_path, nn.Flatten())
    for output, message in (
        (lambda x: (network(x), 1), r"needs to give logits .* of 32 rows here, got tuple"),
        (lambda x: network(x)[:1], r"of 32 rows here, got \(1, 10\)"),
        (lambda x: network(x).repeat(2, 1), r"of 32 rows here, got \(64, 10\)"),
    ):
        with pytest.raises(CacheError, match=message):
            make(tmp_path, Says(output))
    with pytest.raises(TrainingError, match=r"output on sample \d+, view 0, is not finite"):
        make(tmp_path, Says(lambda x: torch.full((len(x), 10), -torch.inf)))
    assert not list(tmp_path.rglob("*.safetensors.tmp"))
    # Rows of mixed images are none of a table of unmixed ones, whatever is allowed.
    make(tmp_path / "unmixed")
    with pytest.raises(CacheError, match=r"can't be gone on with: transform\.pairs differ"):
        make(tmp_path / "unmixed", policy="standard+cutmix", allow_mismatch=["transform"])


def test_expectation_is_the_tables_own(make: Any, samples: Samples, tmp_path: Path) -> None:
    folder = make(tmp_path).folder
    content = TeacherTable.open(folder).manifest.content
    expected = expectation(samples, "standard", 5)
    assert expected == {part: content[part] for part in ("transform", "data")}


def test_samples_that_are_none(samples: Samples) -> None:
    with pytest.raises(
        ValueError, match="positions from 0 to 1796 in the pool of images, got 0 to"
    ):
        replace(samples, positions=np.arange(150) * 100)
    with pytest.raises(ValueError, match="labels as whole numbers, got float64"):
        replace(samples, labels=np.zeros(150))
    taken = replace(samples, labels=torch.from_numpy(samples.labels))  # type: ignore[arg-type]
    assert np.array_equal(taken.labels, samples.labels)
