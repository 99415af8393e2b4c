"""The commands that make and look at a teacher's table."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch

from fastscarce.augment import read_policy
from fastscarce.cache import Built, Samples, Teacher, Verification, build, verify
from fastscarce.data import ImageSet, Split
from fastscarce.errors import ConfigError
from fastscarce.table_config import CacheBuildConfig, CacheVerifyConfig, TableConfig
from fastscarce.train.pool import Pool
from fastscarce.train.task import open_data
from fastscarce.train.teacher import load_teacher

__all__ = ["build_table", "samples_of", "verify_table"]

Say = Callable[[str], None]


def build_table(config: CacheBuildConfig, say: Say) -> Built:
    """Make a table of the training images, or this process's part of one.

    The processes of ``torchrun`` or ``accelerate launch`` share the work; they need not meet.

    Args:
        config: Of the table.
        say: Gets lines for people; of the first process alone.

    Raises:
        FastscarceError: As `fastscarce.cache.build`, the data and the teacher say.
    """
    rank = int(os.environ.get("RANK", "0"))
    said = say if rank == 0 else _nothing
    policy = read_policy(config.policy)
    if policy.mixes and config.teacher_batch_size % 2:
        raise ConfigError(
            "teacher_batch_size must be even where the policy mixes two images, got "
            f"{config.teacher_batch_size}."
        )
    pool, samples, teacher = _prepared(config, said)
    return build(
        teacher,
        samples,
        config.out,
        policy=pool.policy(policy),
        views=config.views,
        seed=pool.seed,
        k=config.k,
        codec=config.codec,
        tagged=config.tagged,
        batch_size=config.teacher_batch_size,
        rows_per_shard=config.rows_per_shard,
        rank=rank,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        allow_mismatch=keys_of(config.allow_mismatch),
        say=said,
    )


def verify_table(config: CacheVerifyConfig, say: Say) -> Verification:
    """Compare a table with its checksums and, where asked, with the teacher.

    Raises:
        FastscarceError: As `fastscarce.cache.verify`, the data and the teacher say.
    """
    if config.deep == 0:
        return verify(config.path)
    _, samples, teacher = _prepared(config, say)
    return verify(
        config.path,
        deep=config.deep,
        teacher=teacher,
        samples=samples,
        allow_mismatch=keys_of(config.allow_mismatch),
    )


def samples_of(images: ImageSet, split: Split, pool: Pool) -> Samples:
    """The images that train, labelled or not; labels of those alone that may be used."""
    positions = np.sort(np.concatenate([split.labelled, split.unlabelled]))
    labels = np.full(len(images), -1, dtype=np.int64)
    labels[split.labelled] = images.labels[split.labelled]
    return Samples(pool.whole(), pool.ids[positions], positions, labels[positions], images.classes)


def keys_of(text: str) -> tuple[str, ...]:
    """The keys of ``allow_mismatch``."""
    return tuple(key.strip() for key in text.split(",") if key.strip())


def _prepared(config: TableConfig, say: Say) -> tuple[Pool, Samples, Teacher]:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)  # as a run does, which asks the same teacher
    device = torch.device("cpu")
    if torch.cuda.is_available() and not config.cpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    images, split, pool = open_data(config, seed=config.seed, device=device, say=say)
    teacher = load_teacher(config, classes=images.classes, channels=images.channels, device=device)
    return pool, samples_of(images, split, pool), teacher


def _nothing(text: str) -> None:
    """Say nothing."""
