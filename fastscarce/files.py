"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastscarce.errors import ResultsError

__all__ = ["flush", "write_whole"]


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a file beside its place, flush it to the disk and rename it into its place.

    Whoever reads ``path`` sees the file as it was or the file as it is now, and never a part of
    it, whatever instant the process dies at.

    Args:
        path: Where the file is to be. Its folder is made where it is missing.
        write: Gets a temporary path in the same folder and writes the file there.

    Returns:
        ``path``.

    Raises:
        ResultsError: The file can't be written; what was at ``path`` is untouched.
    """
    place = Path(path)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        flush(temporary)
        temporary.replace(place)
        flush(place.parent)
    except OSError as error:
        raise ResultsError(
            f"{place} could not be written ({error.strerror or error}); "
            "free space or choose a folder that can be written to."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return place


def flush(path: Path) -> None:
    """Wait until ``path``, a file or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
