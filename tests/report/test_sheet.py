from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastscarce.augment import Policy, describe, draw, plan_of
from fastscarce.cli import main
from fastscarce.data import load
from fastscarce.report import draw_sheet


def command(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["show-augment", *words])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("operation", "magnitude", "text"),
    [
        ("rotate", 20.0, "rotate +20°"), ("rotate", -90.0, "rotate -90°"), ("flip", 0.0, "flip"),
        ("translate_x", 5.0, "move +5.0,+0.0"), ("translate_y", -3.0, "move +0.0,-3.0"),
        ("crop", 0.5, "scale 2.00"), ("identity", 0.0, "as it is"), ("equalize", 0.0, "equalize"),
        ("solarize", 100.0, "solarize from 100"), ("posterize", 4.0, "posterize 4 bits"),
        ("brightness", 1.5, "brightness x 1.50"), ("hue", -0.1, "hue -0.10 turn"),
        ("cutmix", 0.25, "cutmix with 0.25 of the partner"), ("erase", 0.25, "erase 16x16 at 8,8"),
    ],
)  # fmt: skip
def test_words(operation: str, magnitude: float, text: str) -> None:
    plan = plan_of(operation, range(2), magnitude=magnitude, image_size=32)
    assert describe(plan) == [text, text]


def test_words_are_in_the_order_of_what_is_done() -> None:
    policy = Policy(({"jitter": {"contrast": 0.4}}, {"affine": {"rotate": 30}}, "cutmix"))
    (text, _) = describe(draw(policy, range(2), view=0, seed=0, image_size=32))
    names = [part.split()[0] for part in text.split(", ")]
    assert names == ["contrast", "rotate", "cutmix"]


def test_a_sheet_is_a_picture_that_repeats(tmp_path: Path) -> None:
    code, out, err = command("--policy", "strong+cutmix", "--images", "3", "--views", "2",
                             "--out", str(tmp_path / "a.png"))  # fmt: skip
    assert (code, err) == (0, "")
    assert out.strip() == str(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.std() > 20
    (tmp_path / "policy.yaml").write_text("- jitter: {brightness: 0.4}\n", encoding="utf-8")
    code, _, err = command("--policy", str(tmp_path / "policy.yaml"), "--images=2", "--views=1",
                           "--out", str(tmp_path / "b.png"))  # fmt: skip
    assert (code, err) == (0, "")
    first = (tmp_path / "b.png").read_bytes()
    draw_sheet(load("digits"), Policy(({"jitter": {"brightness": 0.4}},)), tmp_path / "c.png",
               images=2, views=1, seed=0)  # fmt: skip
    assert (tmp_path / "c.png").read_bytes() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "medium"], "policy must be one of"),
        (["--policy", "none.yaml"], "The policy in none.yaml can't be read"),
        (["--images", "0"], "at least 1 image and 1 view, got 0 and 5"),
        (["--data", "folder:none"], "none"),
        (["--polcy", "weak"], "did you mean policy?"),
    ],
)
def test_refusals(words: list[str], message: str, tmp_path: Path) -> None:
    code, _, err = command(*words, "--out", str(tmp_path / "sheet.png"))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
