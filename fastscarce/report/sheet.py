"""A sheet of images by view, with what was done to each written under it."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastscarce.augment import Policy, apply, concatenate, describe, draw, read_policy
from fastscarce.config import ShowAugmentConfig
from fastscarce.data import ImageSet, load
from fastscarce.errors import ConfigError
from fastscarce.files import write_whole

__all__ = ["draw_sheet", "show_augment"]

_INCHES = 1.7  # of an image
_LETTERS = 26  # of a line under it


def show_augment(config: ShowAugmentConfig, say: Callable[[str], None]) -> Path:
    """Draw views of images of a data set, spread over its classes, into a PNG.

    Args:
        config: Of the sheet.
        say: Gets a line for each image that can't be decoded.

    Raises:
        ConfigError: The policy is unknown, or a number is out of range.
        DataError: The data can't be read.
    """
    if config.images < 1 or config.views < 1:
        raise ConfigError(
            f"show-augment needs at least 1 image and 1 view, got {config.images} and"
            f" {config.views}."
        )
    if not Path(config.out).name:
        raise ConfigError(f"show-augment needs the name of a PNG file as out, got {config.out!r}.")
    policy = read_policy(config.policy)
    images = load(
        config.data,
        image_key=config.image_key,
        label_key=config.label_key,
        id_key=config.id_key,
        image_size=config.image_size,
        flip={"auto": None, "yes": True, "no": False}[config.flip],
        on_error="skip",
    )
    for failure in images.failures:
        say(f"{failure.name} is left out ({failure.reason})")
    if not images.flip:
        policy = policy.without("flip")
    if images.channels == 3 and policy.fill == 0:
        policy = replace(policy, fill="reflect")
    return draw_sheet(
        images, policy, config.out, images=config.images, views=config.views, seed=config.seed
    )


def draw_sheet(
    data: ImageSet, policy: Policy, path: str | Path, *, images: int, views: int, seed: int
) -> Path:
    """Draw a sheet: a row an image, first as it is, then its views 0, 1, 2...

    Args:
        data: Where the images come from; evenly spread in the order of their labels.
        policy: What is drawn. Partners are the neighbours on the sheet.
        path: Where the PNG is to be.
        images: How many rows.
        views: How many views a row.
        seed: Any integer.

    Returns:
        ``path``.

    Raises:
        ResultsError: The file can't be written.
    """
    order = np.argsort(data.labels, kind="stable")
    rows = min(images, len(order))
    chosen = order[np.linspace(0, len(order) - 1, rows).astype(np.int64)]
    pool = torch.from_numpy(np.ascontiguousarray(data.images[chosen]))
    height, width = data.images.shape[1:3]
    plans = [
        draw(
            Policy() if view < 0 else policy,
            data.ids[chosen],
            view=max(view, 0),
            seed=seed,
            image_size=(height, width),
        )
        for view in range(-1, views)
    ]
    plan = concatenate(plans)
    index = torch.arange(rows).repeat(views + 1)
    shown = apply(plan, pool, index=index, dtype=torch.uint8).permute(0, 2, 3, 1).numpy()
    texts = describe(plan)
    figure = Figure(
        figsize=(_INCHES * (views + 1), (_INCHES + 0.55) * rows), layout="constrained", dpi=150
    )
    axes = figure.subplots(rows, views + 1, squeeze=False)
    for place, (image, text) in enumerate(zip(shown, texts, strict=True)):
        column, row = divmod(place, rows)
        cell = axes[row, column]
        cell.imshow(image[..., 0] if data.channels == 1 else image, cmap="gray", vmin=0, vmax=255)
        cell.set_xticks([])
        cell.set_yticks([])
        label = data.labels[chosen[row]]
        name = data.classes[label] if label >= 0 else "unlabelled"
        words = textwrap.fill(text, _LETTERS) if column else name
        cell.set_xlabel(words, fontsize=6)
        if row == 0:
            cell.set_title(f"view {column - 1}" if column else "image", fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", metadata={"Software": "fastscarce"})
    return write_whole(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))
