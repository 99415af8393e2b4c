from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastscarce.data import load
from fastscarce.errors import DataError


def paint(path: Path, level: int | tuple[int, int, int], size: tuple[int, int] = (12, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(level, int) else "RGB", size, level).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    for label, name in enumerate(("cat", "dog")):
        for number in range(3):
            paint(folder / name / f"{number}.png", 100 * label + number)
        paint(folder / "test" / name / "0.png", 100 * label + 50)
    paint(folder / "unlabelled" / "deep" / "a.PNG", 200)
    (folder / "cat" / "notes.txt").write_text("no image", encoding="utf-8")
    return folder


def test_classes_test_and_unlabelled(root: Path, tmp_path: Path) -> None:
    paint(tmp_path / "more" / "b" / "c.png", 201)
    pool = load(f"folder:{root}", unlabelled=str(tmp_path / "more"))
    assert pool.paths is not None
    found = dict(zip(pool.paths, range(len(pool)), strict=True))
    assert pool.classes == ("cat", "dog")
    assert pool.images.shape == (10, 12, 12, 1)
    assert pool.flip
    place = found["dog/2.png"]
    assert (pool.labels[place], pool.is_test[place]) == (1, False)
    assert (pool.images[place] == 102).all()
    place = found["test/cat/0.png"]
    assert (pool.labels[place], pool.is_test[place]) == (0, True)
    for name, level in (("unlabelled/deep/a.PNG", 200), ("unlabelled:b/c.png", 201)):
        assert pool.labels[found[name]] == -1
        assert (pool.images[found[name]] == level).all()


def test_a_linked_image_is_listed_once(tmp_path: Path) -> None:
    """Labelled and test images that are links into the unlabelled ones are not these as well."""
    for number in range(9):
        paint(tmp_path / "all" / f"{number}.png", 20 * number)
    for number, place in enumerate(("a", "a", "b", "b", "test/a", "test/b", "unlabelled")):
        folder = tmp_path / "set" / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").symlink_to(tmp_path / "all" / f"{number}.png")
    pool = load(f"folder:{tmp_path / 'set'}", unlabelled=str(tmp_path / "all"))
    assert sorted(pool.images[:, 0, 0, 0].tolist()) == [20 * number for number in range(9)]
    assert sorted(pool.images[pool.labels < 0, 0, 0, 0].tolist()) == [120, 140, 160]
    assert sorted(pool.images[pool.is_test, 0, 0, 0].tolist()) == [80, 100]
    inner = tmp_path / "other"
    for place in ("a/0.png", "b/1.png"):
        paint(inner / "unlabelled" / place, 10)
        (inner / place).parent.mkdir(parents=True)
        (inner / place).symlink_to(inner / "unlabelled" / place)
    paint(inner / "unlabelled" / "2.png", 30)
    assert load(f"folder:{inner}").labels.tolist() == [0, 1, -1]


def test_a_pipe_is_no_image(root: Path) -> None:
    os.mkfifo(root / "cat" / "9.png")
    with pytest.raises(DataError, match=r"cat/9\.png can't be decoded \(it is no file\)"):
        load(f"folder:{root}")
    assert len(load(f"folder:{root}", on_error="skip")) == 9


def test_ids_belong_to_names(root: Path, tmp_path: Path) -> None:
    first = load(f"folder:{root}")
    root.rename(tmp_path / "moved")
    paint(tmp_path / "moved" / "ant" / "0.png", 7)
    second = load(f"folder:{tmp_path / 'moved'}")
    assert first.paths is not None
    assert second.paths is not None
    ids = dict(zip(second.paths, second.ids.tolist(), strict=True))
    assert all(ids[path] == id_ for path, id_ in zip(first.paths, first.ids.tolist(), strict=True))


def test_the_same_folder_given_twice_is_read_once(root: Path) -> None:
    again = load(f"folder:{root}", unlabelled=str(root / "unlabelled"))
    assert again.fingerprint() == load(f"folder:{root}").fingerprint()


def test_colour_and_sizes(root: Path) -> None:
    paint(root / "cat" / "wide.png", (10, 20, 30), (300, 250))
    pool = load(f"folder:{root}")
    assert pool.images.shape[1:] == (224, 224, 3)
    assert load(f"folder:{root}", image_size=16).images.shape[1:] == (16, 16, 3)
    assert pool.paths is not None
    assert pool.images[pool.paths.index("cat/wide.png"), 100, 100].tolist() == [10, 20, 30]


def test_shorter_side_is_resized_then_the_centre_cropped(root: Path) -> None:
    strip = np.zeros((10, 30), dtype=np.uint8)
    strip[:, 10:20] = 255
    Image.fromarray(strip).save(root / "cat" / "strip.png")
    pool = load(f"folder:{root}", image_size=10)
    assert pool.paths is not None
    assert (pool.images[pool.paths.index("cat/strip.png")] == 255).all()


def test_exif_rotation(root: Path) -> None:
    upright = np.zeros((12, 12, 3), dtype=np.uint8)
    upright[:4] = 250  # a bright top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right for showing
    turned = np.ascontiguousarray(np.rot90(upright))
    Image.fromarray(turned).save(root / "dog" / "turned.jpg", exif=exif, quality=95)
    pool = load(f"folder:{root}")
    assert pool.paths is not None
    image = pool.images[pool.paths.index("dog/turned.jpg")].astype(int)
    assert np.abs(image - upright).max() < 40


def test_sixteen_bits_keep_their_contrast(root: Path) -> None:
    ramp = np.linspace(0, 65535, 144).reshape(12, 12).astype(np.uint16)
    Image.fromarray(ramp).save(root / "cat" / "ramp.png")
    pool = load(f"folder:{root}")
    assert pool.paths is not None
    image = pool.images[pool.paths.index("cat/ramp.png"), ..., 0]
    assert np.abs(image - ramp / 257.0).max() <= 0.51


@pytest.mark.parametrize("damage", ["header", "body"])
def test_corrupt_image(root: Path, damage: str) -> None:
    path = root / "dog" / "bad.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(b"no image" if damage == "header" else content[: len(content) * 3 // 4])
    with pytest.raises(DataError, match=r"dog/bad\.jpg can't be decoded .* set on_error to skip"):
        load(f"folder:{root}")
    pool = load(f"folder:{root}", on_error="skip")
    assert [failure.name for failure in pool.failures] == ["dog/bad.jpg"]
    assert len(pool) == 9
    assert pool.paths is not None
    assert "dog/bad.jpg" not in pool.paths


def test_missing_and_empty(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; check the path"):
        load(f"folder:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images; put each class's"):
        load(f"folder:{tmp_path / 'empty'}")
    with pytest.raises(DataError, match=r"unlabelled images .* does not exist"):
        load(f"folder:{root}", unlabelled=str(tmp_path / "none"))
    (root / "eel").mkdir()
    with pytest.raises(DataError, match=r"pets/eel has no images; add some"):
        load(f"folder:{root}")


def test_one_class_or_a_strange_test_class(root: Path, tmp_path: Path) -> None:
    paint(tmp_path / "one" / "cat" / "0.png", 1)
    with pytest.raises(DataError, match=r"at least 2 classes, got 1 \(cat\)"):
        load(f"folder:{tmp_path / 'one'}")
    paint(root / "test" / "cow" / "0.png", 1)
    with pytest.raises(DataError, match="test/cow is no class of"):
        load(f"folder:{root}")


def test_a_class_whose_every_image_is_skipped(root: Path) -> None:
    (root / "eel").mkdir()
    (root / "eel" / "0.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"Class eel of .* has no readable image"):
        load(f"folder:{root}", on_error="skip")


@pytest.mark.parametrize("options", [{"on_error": "ignore"}, {"image_size": 0}])
def test_refusals(root: Path, options: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"on_error|image size"):
        load(f"folder:{root}", **options)


def test_odd_names(tmp_path: Path) -> None:
    root = tmp_path / "a [1]{b,c} ü"
    raw = b"\xff\xfe.png".decode("utf-8", "surrogateescape")
    odd = ["sp ace.png", "new\nline.png", 'co,mma"q.png', "#%?.png", "x" * 240 + ".png", raw]
    for name in odd:
        paint(root / "10" / name, 5)
    paint(root / "9" / "0.png", 6)
    paint(root / "9" / ".hidden.png", 7)
    pool = load(f"folder:{root}")
    assert pool.classes == ("10", "9")  # names and not numbers, as they are listed
    assert pool.paths is not None
    assert len(pool) == 7
    assert "10/\\xff\\xfe.png" in pool.paths  # which can be printed and written down
    assert "10/new\nline.png" in pool.paths


def test_images_beside_the_classes_are_unlabelled(root: Path) -> None:
    paint(root / "loose.png", 9)
    pool = load(f"folder:{root}")
    assert pool.paths is not None
    assert pool.labels[pool.paths.index("loose.png")] == -1


def test_links_are_followed_and_loops_are_not(root: Path, tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere" / "deep" / "far.png", 9)
    (root / "cat" / "link").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "up").symlink_to(root)
    (root / "unlabelled" / "round").symlink_to(root / "unlabelled")
    pool = load(f"folder:{root}")
    assert pool.paths is not None
    assert len(pool) == 10
    assert pool.labels[pool.paths.index("cat/link/deep/far.png")] == 0
