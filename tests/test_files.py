"""A file is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastscarce.errors import ResultsError
from fastscarce.files import write_whole


def test_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    place = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        assert write_whole(place, lambda path, text=text: path.write_text(text)) == place
        assert place.read_text() == text
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_when_writing_fails(tmp_path: Path, error: BaseException) -> None:
    place = tmp_path / "file.txt"
    place.write_text("old")

    def half(path: Path) -> None:
        path.write_text("ha")
        raise error

    wanted = ResultsError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        write_whole(place, half)
    assert place.read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]
