from __future__ import annotations

from pathlib import Path

import pytest

from fastscarce.data.paths import expand, mark_test
from fastscarce.errors import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-00.tar", ["a-00.tar"]),
        ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("{a-00,b}.tar", ["a-00.tar", "b.tar"]),
        ("a-{00,0{1..2}}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("a-0[01].tar", ["a-00.tar", "a-01.tar"]),
        ("**/c.tar", ["deep/c.tar"]),
        ("", ["a-00.tar", "a-01.tar", "a-02.tar", "b.TAR", "b.tar", "deep/c.tar", "x[1]{2}.tar"]),
        ("x[1]{2}.tar", ["x[1]{2}.tar"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    touch(tmp_path, "a-00.tar", "a-01.tar", "a-02.tar", "b.tar", "b.TAR", "deep/c.tar", "d.txt")
    touch(tmp_path, "x[1]{2}.tar", ".hidden.tar")
    found = expand(str(tmp_path / pattern), (".tar",))
    assert [Path(path).relative_to(tmp_path).as_posix() for path in found] == expected


@pytest.mark.parametrize("pattern", ["none.tar", "a-{0..1}.tar", "*.zip", "deep"])
def test_a_part_that_is_missing_is_an_error(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, "a-0.tar", "deep/d.txt")
    with pytest.raises(DataError, match="names no file"):
        expand(str(tmp_path / pattern), (".tar",))


@pytest.mark.parametrize(
    ("files", "test"),
    [
        (["x/train-0.tar", "x/test-0.tar", "x/validation-0.tar"], "010"),
        (["x/train.csv", "x/val.csv"], "01"),
        (["train/0.tar", "test/0.tar"], "01"),
        (["test/train.csv", "test/test.csv"], "01"),  # a folder that happens to be called so
        (["test/0.tar", "test/1.tar"], "00"),  # nothing would be left to train
        (["testing-0.tar", "attest.tar"], "00"),
        (["a.csv"], "0"),
    ],
)
def test_which_files_are_the_test(files: list[str], test: str) -> None:
    assert mark_test(files) == [mark == "1" for mark in test]
