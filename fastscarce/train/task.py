"""What every command prepares: the data, its split, and networks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastscarce.cache import normalisation
from fastscarce.config import DataConfig, LabelConfig, ModelConfig, StageConfig
from fastscarce.data import (
    Decoder,
    Given,
    ImageSet,
    Split,
    load_images,
    open_source,
    relabel,
    split,
)
from fastscarce.data.load import Storage
from fastscarce.errors import ModelError
from fastscarce.models import create, freeze
from fastscarce.pseudo import PseudoLabels, from_logits, select
from fastscarce.pseudo import temperature as find_temperature
from fastscarce.train.pool import Pool, Positions, accuracy, predict
from fastscarce.train.run import Run, derive_seed

__all__ = ["Task", "open_data", "prepare"]

# From how many labels a class some are held out, and which part of them.
HOLDOUT_FROM = 20
HOLDOUT_PART = 5
# Broken images that are named on the terminal; quarantine.csv names all.
FAILURES_SAID = 10

_STORAGE: dict[str, Storage] = {
    "auto": "auto",
    "device": "memory",
    "host": "memory",
    "disk": "disk",
    "off": "off",
}


@dataclass(frozen=True)
class Task:
    """A data set as one run sees it."""

    run: Run
    images: ImageSet
    split: Split
    pool: Pool

    def network(self, config: ModelConfig, stage: str) -> nn.Module:
        """A new network whose weights follow from the seed and the stage's name."""
        height, width = self.images.images.shape[1:3]
        if height != width:
            raise ModelError(
                f"Models need square images, got {height}x{width}; set image_size to bring them "
                "to one."
            )
        model = create(
            config.name,
            classes=self.pool.classes,
            channels=self.images.channels,
            image_size=height,
            seed=derive_seed(self.run.config.seed, stage, "weights"),
            pretrained=config.pretrained,
            drop_rate=config.dropout,
            drop_path_rate=config.stochastic_depth,
        )
        # The layout that convolutions are fastest in, on CPUs as on tensor cores.
        return model.to(memory_format=torch.channels_last)

    def prepared(self, config: ModelConfig, settings: StageConfig, stage: str) -> nn.Module:
        """A new network with the layers frozen that ``settings`` freezes."""
        model = self.network(config, stage)
        freeze(model, settings.freeze)
        return model

    def accuracy(self, model: nn.Module, positions: Positions) -> float | None:
        """Part of the images whose label the model gives, or None where there are no images."""
        if len(positions) == 0:
            return None
        logits = predict(self.run, model, self.pool, positions)[0]
        return accuracy(logits, self.pool.labels[torch.from_numpy(positions)].cpu())

    def label(self, model: nn.Module, config: LabelConfig, stage: str) -> PseudoLabels:
        """What a teacher says of the unlabelled images, the images to learn from chosen."""
        # Numbers that depend on the stage, so that each round's teacher sees other views.
        first = derive_seed(self.run.config.seed, stage, "views") % (1 << 29)
        positions = self.split.unlabelled
        logits = predict(
            self.run,
            model,
            self.pool,
            positions,
            views=config.views,
            policy=config.augmentation,
            first_view=first,
        )
        temperature = 1.0
        if config.calibrate and len(self.split.holdout):
            held_out = predict(self.run, model, self.pool, self.split.holdout)
            labels = self.pool.labels[torch.from_numpy(self.split.holdout)]
            temperature = find_temperature(held_out, labels)
        prior = None
        if config.align:
            known = self.images.labels[self.split.labelled]
            prior = np.bincount(known, minlength=self.pool.classes).astype(np.float64)
        rows = from_logits(self.pool.ids[positions], logits, temperature=temperature, prior=prior)
        return select(rows, threshold=config.threshold, keep_per_class=config.keep_per_class)

    def normalisation(self, model: nn.Module) -> tuple[list[float], list[float]]:
        """Mean and deviation of a model's inputs, one a channel."""
        mean, std = normalisation(model, self.images.channels)
        channels = self.images.channels
        return _spread(mean, channels), _spread(std, channels)


def _spread(value: float | tuple[float, ...], channels: int) -> list[float]:
    return list(value) if isinstance(value, tuple) else [value] * channels


def _holdout_per_class(config: DataConfig, images: ImageSet, given: Given | None) -> int:
    if config.holdout_per_class is not None:
        return config.holdout_per_class
    if config.labels_per_class is not None and given is None:
        fewest = config.labels_per_class
    else:
        trains = (images.labels >= 0) & ~images.is_test
        if given is not None:
            trains &= np.isin(images.ids, given.ids)
        counts = np.bincount(images.labels[trains], minlength=len(images.classes))
        # Of a data set without a test split of its own, a part goes to the test first.
        left = 1.0 if images.is_test.any() else 1.0 - config.test_fraction
        fewest = int(counts.min() * left)
    return fewest // HOLDOUT_PART if fewest >= HOLDOUT_FROM else 0


def _say_failures(say: Callable[[str], None], images: ImageSet, on_error: str) -> None:
    done = "replaced" if on_error == "replace" else "skipped"
    for failure in images.failures[:FAILURES_SAID]:
        say(f"{done} {failure.name}: {failure.reason}")
    if len(images.failures) > FAILURES_SAID:
        say(f"{done} {len(images.failures)} images in all; quarantine.csv lists them")


def prepare(run: Run, config: DataConfig) -> Task:
    """Load and split the data set, and move it to the run's device; see `open_data`."""
    return Task(run, *open_data(config, seed=run.config.seed, device=run.device, say=run.say))


def open_data(
    config: DataConfig, *, seed: int, device: torch.device, say: Callable[[str], None]
) -> tuple[ImageSet, Split, Pool]:
    """A data set, its split, and its images on a device.

    The hold-out is taken from the labels that may be used, never beside them.

    Args:
        config: Which data and which of its labels.
        seed: Of the split and of all views.
        device: Where the images go.
        say: Gets lines for people.

    Raises:
        DataError: The data can't be read, or has fewer labels than are asked for.
    """
    source = open_source(
        config.data,
        unlabelled=config.unlabelled,
        image_key=config.image_key,
        label_key=config.label_key,
        id_key=config.id_key,
        flip={"auto": None, "yes": True, "no": False}[config.flip],
    )
    given = None
    if config.labels_file is not None:
        source, given = relabel(source, config.labels_file)
    images = load_images(
        source,
        image_size=config.image_size,
        on_error=config.on_error,
        storage=_STORAGE[config.pool],
        decoder=Decoder(config.loader, config.workers),
        processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    holdout = _holdout_per_class(config, images, given)
    labels = config.labels_per_class
    parts = split(
        images,
        labels_per_class=labels if labels is None else max(1, labels - holdout),
        holdout_per_class=holdout,
        test_fraction=config.test_fraction,
        seed=seed,
        given=given,
    )
    say(
        f"{images.name}: {len(images.classes)} classes, {len(parts.labelled)} labelled, "
        f"{len(parts.holdout)} held out, {len(parts.unlabelled)} unlabelled, "
        f"{len(parts.test)} test images of {images.images.shape[2]}x{images.images.shape[1]}"
    )
    _say_failures(say, images, config.on_error)
    pool = Pool.of(images, seed=derive_seed(seed, "views"), device=device, kind=config.pool)
    return images, parts, pool
