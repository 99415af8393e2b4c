"""One self-contained page of a run."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from fastscarce.files import write_whole
from fastscarce.report.context import ReportContext
from fastscarce.report.curves import confidence_png, kept_png

__all__ = ["write_report"]

THUMBNAIL = 64
GUARDS = {
    "holdout": "hold-out images",
    "folds": "folds of the labelled images",
    "agreement": "agreement over views",
}


def write_report(path: str | Path, context: ReportContext) -> Path:
    """Write the page of a run: one HTML file that needs no other file and no network.

    Args:
        path: Where the page is to be.
        context: What it shows.

    Returns:
        ``path``.

    Raises:
        ValueError: Lengths disagree, or an image is not uint8 of 1 or 3 channels.
        ResultsError: The file can't be written.
    """
    lengths = {len(context.confidences), len(context.chosen), len(context.labels)}
    if len(lengths) != 1:
        raise ValueError(
            "write_report needs as many confidences as chosen and labels, "
            f"got {len(context.confidences)}, {len(context.chosen)} and {len(context.labels)}."
        )
    chosen = np.asarray(context.chosen, dtype=np.bool_)
    sheet = [(_uri(_thumbnail(image)), caption) for image, caption in context.sheet]
    environment = Environment(
        loader=PackageLoader("fastscarce.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    figures = []
    if context.curves_png.is_file():
        figures.append(("Loss and score by step", _uri(context.curves_png.read_bytes()), "wide"))
    if len(chosen):
        figures += [
            (
                f"Histogram of {len(chosen):,} confidences, of which {int(chosen.sum()):,} kept",
                _uri(confidence_png(context.confidences, chosen)),
                "half",
            ),
            (
                f"Pseudo-labels of each of {len(context.class_names)} classes, all and kept",
                _uri(kept_png(context.labels, chosen, context.class_names)),
                "half",
            ),
        ]
    text = environment.get_template("page.html.j2").render(
        context=context,
        figures=figures,
        guards=GUARDS,
        sheet=sheet,
    )
    return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _percent(value: float | None) -> str:
    """0.955 as 95.5 %, and nothing as a dash."""
    return "\N{EN DASH}" if value is None else f"{100.0 * value:.1f} %"


def _uri(png: bytes) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _thumbnail(image: NDArray[np.uint8]) -> bytes:
    """A PNG of an image, its longer side 64 pixels; whole multiples keep small pixels square."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(
            "write_report needs uint8 images (height, width, channels) of 1 or 3 channels, "
            f"got {image.dtype} {image.shape}."
        )
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    longest = max(picture.size)
    if longest <= THUMBNAIL:
        factor = THUMBNAIL // longest
        size = (picture.width * factor, picture.height * factor)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    else:
        picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
