from __future__ import annotations

import gc
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fastscarce.augment import apply
from fastscarce.data import Loader, LoaderBatch, Sampler, Source, decode_crop, open_source
from fastscarce.data.standin import stand_ins
from fastscarce.errors import DataError

POLICY = "standard+cutmix"


def loader(source: Source, *, world: int = 1, rank: int = 0, **options: Any) -> Loader:
    sampler = Sampler(source.ids, seed=4, batch_size=8, pairs=True, rank=rank, world_size=world)
    return Loader(source, sampler, **{"image_size": 32, "workers": 0, **options})


def same(one: LoaderBatch, other: LoaderBatch) -> bool:
    pairs = [(one.images, other.images), (one.ids, other.ids), (one.labels, other.labels)]
    pairs += [(one.mask, other.mask)]
    if one.plan is not None and other.plan is not None:
        pairs.append((one.plan.rows, other.plan.rows))
    return all(torch.equal(a, b) for a, b in pairs)


def test_batches_are_the_samples_and_their_views(source: Source) -> None:
    seen = {}
    for batch in loader(source, policy=POLICY):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (8, 32, 32, 3)
        assert batch.plan is not None
        views = apply(batch.plan, batch.images)
        target = batch.plan.mixed_target(batch.labels)
        assert views.shape == (8, 3, 32, 32)
        assert torch.equal(target.b, batch.labels[torch.from_numpy(batch.rows.partners)])
        for row in torch.nonzero(batch.mask)[:, 0].tolist():
            seen[int(batch.ids[row])] = int(batch.labels[row])
    assert seen == dict(zip(source.ids.tolist(), source.labels.tolist(), strict=True))


def test_without_a_policy_the_centre_is_shown(source: Source) -> None:
    position = {int(number): place for place, number in enumerate(source.ids)}
    batch = next(iter(loader(source)))
    assert batch.plan is None
    for row in range(8):
        content = source.read([position[int(batch.ids[row])]])[0]
        assert isinstance(content, bytes)
        expected = decode_crop(content, image_size=(32, 32), channels=3)
        assert torch.equal(batch.images[row], expected)


def test_workers_change_nothing_and_resume_anywhere(source: Source) -> None:
    alone = loader(source, policy=POLICY)
    expected = [batch for _ in range(2) for batch in alone]
    with loader(source, policy=POLICY, workers=2) as several:
        assert len(several) == 3
        found = [batch for _ in range(2) for batch in several]
        states = [batch.rows.state for batch in found]
        assert len(found) == len(expected) == 6
        assert all(same(one, other) for one, other in zip(found, expected, strict=True))
        several.load_state_dict(states[3])  # back into the second epoch, as a new process would
        assert several.state_dict()["epoch"] == 1
        rest = list(several)
        assert [same(one, other) for one, other in zip(rest, expected[4:], strict=True)] == [
            True
        ] * 2
        several.set_epoch(0)
        first = next(iter(several))
        assert same(first, expected[0])
        assert several.state_dict() == expected[0].rows.state


def test_processes_share_a_batch(source: Source) -> None:
    together = list(zip(*(loader(source, world=2, rank=rank) for rank in range(2)), strict=True))
    ids = [int(i) for step in together for batch in step for i in batch.ids[batch.mask]]
    assert ids == [int(i) for batch in loader(source) for i in batch.ids[batch.mask]]
    assert sorted(ids) == sorted(source.ids.tolist())


def test_arrays_are_a_source_too() -> None:
    digits = open_source("digits")
    sampler = Sampler(digits.ids[:20], seed=0, batch_size=20)
    batch = next(iter(Loader(digits, sampler, image_size=8, channels=1, workers=0)))
    content = digits.read(batch.ids.numpy())
    assert np.array_equal(batch.images.numpy(), content)
    wide = Loader(digits, sampler, image_size=16, channels=3, workers=0)
    assert next(iter(wide)).images.shape == (20, 16, 16, 3)


def test_a_broken_image_is_named(broken: Callable[[], Source]) -> None:
    with pytest.raises(DataError, match=r"city/3\.jpg can't be decoded .*Truncated"):
        list(loader(broken()))


def test_a_broken_image_is_skipped(broken: Callable[[], Source]) -> None:
    source = broken()
    with loader(source, policy=POLICY, workers=1, on_error="skip") as batches:
        seen = []
        for batch in batches:
            seen += batch.ids[batch.mask].tolist()
            for row in torch.nonzero(batch.mask)[:, 0].tolist():
                partner = int(batch.rows.partners[row])
                assert bool(batch.mask[partner])
        lost = set(source.ids.tolist()) - set(seen)
        assert len(seen) == 20
        assert lost == set(batches.failures)
        assert [failure.name for failure in batches.failures.values()] == ["city/3.jpg"]


def test_a_broken_image_is_replaced(broken: Callable[[], Source]) -> None:
    source = broken()
    epochs = []
    for workers in (0, 1):
        with loader(source, policy=POLICY, workers=workers, on_error="replace") as batches:
            epochs.append([batch for _ in range(2) for batch in batches])
            lost = next(iter(batches.failures))
    assert all(same(one, other) for one, other in zip(*epochs, strict=True))
    for batches in (epochs[0][:3], epochs[0][3:]):
        ids = [int(i) for batch in batches for i in batch.ids[batch.mask]]
        assert sorted(ids) == sorted(source.ids.tolist())  # the broken one too
        for batch in batches:
            assert bool((batch.images.flatten(1).float().std(1) > 0).all())
    position = int(np.flatnonzero(source.ids == lost)[0])
    other = int(stand_ins(source, position)[0])
    assert source.labels[other] == source.labels[position] == 1
    with loader(source, workers=0, on_error="replace") as plain:
        rows = {int(i): image for x in plain for i, image in zip(x.ids, x.images, strict=True)}
    assert torch.equal(rows[lost], rows[int(source.ids[other])])


def test_nothing_to_stand_in_for_a_broken_image(broken: Callable[[], Source]) -> None:
    source = broken()
    labels = source.labels.copy()
    labels[labels == 1] = -1
    position = next(place for place in range(21) if source.name_of(place) == "city/3.jpg")
    labels[position] = 1  # the only one of its class
    alone = replace(source, labels=labels)
    with pytest.raises(DataError, match=r"no readable image .* stand in for city/3\.jpg"):
        list(loader(alone, on_error="replace"))


def children(of: int | None = None) -> list[int]:
    return [child.pid for child in psutil.Process(of).children()]


def test_a_restored_seed_is_that_of_the_views(source: Source) -> None:
    options: dict[str, Any] = {"image_size": 32, "policy": "standard"}
    expected = list(Loader(source, Sampler(source.ids, seed=5, batch_size=8), workers=0, **options))
    with Loader(source, Sampler(source.ids, seed=0, batch_size=8), workers=2, **options) as other:
        next(iter(other))
        other.load_state_dict({"seed": 5, "epoch": 0, "position": 0})
        for one, two in zip(expected, other, strict=True):
            assert same(one, two)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_loader_that_is_let_go_of_ends_its_workers(source: Source) -> None:
    before = set(children())
    for _ in range(3):
        next(iter(loader(source, workers=2)))
    gc.collect()
    deadline = time.monotonic() + 20
    while set(children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(children()) <= before


def test_a_worker_that_dies_is_an_error_and_leaves_nobody(source: Source) -> None:
    before = set(children())
    batches = loader(source, workers=1)
    iterator = iter(batches)
    next(iterator)
    (worker,) = set(children()) - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises((DataError, RuntimeError), match=r"[Ww]orker"):
        [list(batches) for _ in range(100)]  # what was decoded before it died is still given
    batches.close()
    assert set(children()) <= before
    assert len(list(loader(source))) == 3


SCRIPT = """
import signal, sys, time
from fastscarce.data import Loader, Sampler, open_source
source = open_source("folder:" + sys.argv[1])
loader = Loader(source, Sampler(source.ids, seed=0, batch_size=4), image_size=32, workers=2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
while True:
    for batch in loader:
        print("batch", flush=True)
        time.sleep(0.05)
"""


def test_ctrl_c_ends_parent_and_workers(photographs: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(photographs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    workers = children(process.pid)
    assert len(workers) >= 2
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode != 0
    assert err.count("KeyboardInterrupt") == 1
    deadline = time.monotonic() + 15
    while any(psutil.pid_exists(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


FULL = """
import sys
from fastscarce.data import Loader, Sampler, open_source
from fastscarce.errors import DataError
source = open_source("folder:" + sys.argv[1])
loader = Loader(source, Sampler(source.ids, seed=0, batch_size=21), image_size=224, workers=1)
try:
    for _ in range(3):
        list(loader)
except DataError as error:
    print(error)
"""
_OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*_OWN_MOUNTS, "true"]).returncode != 0,
    reason="needs user namespaces (unshare), to have a small /dev/shm of its own",
)
def test_full_shared_memory_is_an_error(photographs: Path) -> None:
    words = [sys.executable, "-c", FULL, str(photographs)]
    command = f"mount -t tmpfs -o size=2m tmpfs /dev/shm && exec {shlex.join(words)}"
    done = subprocess.run(
        [*_OWN_MOUNTS, "sh", "-c", command], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("Shared memory is full"), done.stderr
    assert "enlarge /dev/shm" in done.stdout
    assert "\n" not in done.stdout.strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size of at least 1"),
        ({"channels": 2}, "1 or 3 channels"),
        ({"workers": -1}, "workers of 0 or more"),
        ({"prefetch": 0}, "prefetch of 1 or more"),
        ({"on_error": "ignore"}, "on_error raise, skip or replace"),
        ({"backend": "tape"}, "backend torch or dali, got 'tape'"),
    ],
)
def test_refusals(source: Source, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(source, **options)


def test_refuses_to_mix_without_partners(source: Source) -> None:
    with pytest.raises(ValueError, match="a sampler with pairs=True for a policy that mixes"):
        Loader(source, Sampler(source.ids, seed=0, batch_size=8), image_size=32, policy=POLICY)


def test_refuses_a_sampler_of_other_ids(source: Source) -> None:
    with pytest.raises(ValueError, match=r"make it by Sampler\(source\.ids"):
        Loader(source, Sampler(5, seed=0, batch_size=2), image_size=8)
