"""The page is one file, says what it was given, and runs nothing that it was given."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastscarce.report import ReportContext, RoundRow, draw_curves, write_report

VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Collects tags, text and images, and holds that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def context(folder: Path) -> ReportContext:
    draw_curves([{"stage": "teacher", "step": 1, "loss": 1.0}], folder / "curves.png")
    confidences = np.linspace(0.3, 1.0, 30)
    return ReportContext(
        command="fastscarce selftrain --seed 3",
        title="Digits <b>& more</b>",
        summary={"Supervised": 0.9214, "Student": 0.962, "Hold-out": None},
        rounds=[
            RoundRow(1, 0.94, 0.955, "holdout", True, 1100, 0.93),
            RoundRow(2, 0.955, 0.95, "agreement", False, 0, None, 31),
        ],
        curves_png=folder / "curves.png",
        confidences=confidences,
        chosen=confidences > 0.6,
        labels=np.arange(30) % 3,
        class_names=("a", "b", "c"),
        sheet=[
            (np.full((8, 8, 1), 200, dtype=np.uint8), "<script>alert(1)</script>"),
            (np.zeros((300, 200, 3), dtype=np.uint8), "large"),
        ],
        versions={"torch": "2.0"},
        config_yaml="seed: 3\nnote: <none>\n",
    )


def read(folder: Path, given: ReportContext) -> Reader:
    return Reader(write_report(folder / "report.html", given).read_text(encoding="utf-8"))


def test_says_what_it_was_given(tmp_path: Path) -> None:
    page = read(tmp_path, context(tmp_path))
    for text in (
        "92.1 %",
        "96.2 %",
        "Digits <b>& more</b>",
        "fastscarce selftrain --seed 3",
        "hold-out images",
        "agreement over views",
        "no, teacher kept",
        "1,100",
        "0.930",
        "31",
        "torch 2.0",
        "seed: 3\nnote: <none>",
    ):
        assert text in page.text
    assert len(page.all("tr")) == 3


def test_is_one_file_and_every_image_opens(tmp_path: Path) -> None:
    page = read(tmp_path, context(tmp_path))
    images = page.all("img")
    assert len(images) == 5
    for image in images:
        head, _, data = str(image["src"]).partition(",")
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).verify()
        assert image["alt"]
    for _, attributes in page.tags:
        assert "href" not in attributes
        assert str(attributes.get("src", "data:")).startswith("data:")
    style = (tmp_path / "report.html").read_text(encoding="utf-8").split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_runs_nothing_that_it_was_given(tmp_path: Path) -> None:
    page = read(tmp_path, context(tmp_path))
    assert page.all("script") == []
    assert "<script>alert(1)</script>" in page.text


def test_thumbnails_keep_pixels_and_shape(tmp_path: Path) -> None:
    page = read(tmp_path, context(tmp_path))
    small, large = (
        Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition(",")[2])))
        for image in page.all("img")[3:]
    )
    assert small.size == (64, 64)
    assert set(np.asarray(small).ravel().tolist()) == {200}
    assert large.size == (85, 128)


def test_a_run_without_rounds_or_labels(tmp_path: Path) -> None:
    empty = replace(
        context(tmp_path),
        rounds=[],
        curves_png=tmp_path / "absent.png",
        confidences=np.zeros(0),
        chosen=np.zeros(0, dtype=bool),
        labels=np.zeros(0, dtype=np.int64),
        sheet=[],
        versions={},
        config_yaml="",
    )
    page = read(tmp_path, empty)
    assert "No round was run." in page.text
    assert page.all("img") == []


def test_refusals(tmp_path: Path) -> None:
    good = context(tmp_path)
    with pytest.raises(ValueError, match="as many confidences"):
        write_report(tmp_path / "a.html", replace(good, labels=good.labels[:2]))
    for image in (
        np.zeros((8, 8), dtype=np.uint8),
        np.zeros((8, 8, 1)),
        np.zeros((8, 8, 4), dtype=np.uint8),
    ):
        with pytest.raises(ValueError, match="uint8 images"):
            write_report(tmp_path / "a.html", replace(good, sheet=[(image, "x")]))  # type: ignore[list-item]
    assert not (tmp_path / "a.html").exists()
