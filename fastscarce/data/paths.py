"""Files by a path, a folder, a pattern or a URL."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from fastscarce.errors import DataError

__all__ = ["expand", "is_remote", "local", "mark_test", "open_file", "system_of"]

_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WORDS = re.compile(r"\{([^{}]*,[^{}]*)\}")


def is_remote(path: str) -> bool:
    """Whether a path is a URL that fsspec opens."""
    return "://" in path


def local(path: str | Path) -> Path:
    """A local path, ``~`` resolved where there is such a user."""
    return Path(os.path.expanduser(path))


def system_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        DataError: The protocol is unknown, or its package isn't installed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} can't be opened: {error}.") from error
    return system, path


def open_file(path: str) -> IO[bytes]:
    """Open a local file or a URL for reading.

    Raises:
        DataError: It can't be opened.
    """
    try:
        if is_remote(path):
            system, inner = system_of(path)
            file: IO[bytes] = system.open(inner, "rb")
            return file
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} can't be opened: {error.strerror or error}.") from error


def expand(pattern: str, suffixes: Sequence[str]) -> list[str]:
    """Files that a path, a folder, a pattern or a URL names, sorted.

    Args:
        pattern: A file; a folder, of which every file at any depth that ends in one of
            ``suffixes`` counts; or a pattern of ``*``, ``?``, ``[...]``, ``{00..09}`` and
            ``{a,b}``. A file that has these signs in its own name is itself.
        suffixes: With their dot, small letters.

    Raises:
        DataError: There is no such file.
    """
    found = _remote(pattern, suffixes) if is_remote(pattern) else _local(pattern, suffixes)
    if not found:
        raise DataError(
            f"{pattern} names no file; give a path, a folder of {suffixes[0]} files,"
            " a pattern or a URL."
        )
    return sorted(set(found))


def _local(pattern: str, suffixes: Sequence[str]) -> list[str]:
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        return [
            os.path.join(parent, name)
            for parent, _, names in os.walk(pattern)
            for name in names
            if name.lower().endswith(tuple(suffixes)) and not name.startswith(".")
        ]
    if os.path.exists(pattern):
        return [pattern]
    found: list[str] = []
    for part in _braces(pattern):
        here = [part] if os.path.isfile(part) else glob.glob(part, recursive=True)
        if not here:
            raise DataError(f"{part} names no file.")
        found += here
    return found


def _remote(pattern: str, suffixes: Sequence[str]) -> list[str]:
    found: list[str] = []
    for part in _braces(pattern):
        system, path = system_of(part)
        try:
            if glob.has_magic(path):
                here = system.glob(path)
            elif system.isdir(path):
                here = [
                    name for name in system.find(path) if name.lower().endswith(tuple(suffixes))
                ]
            else:
                here = [path]
        except OSError as error:
            raise DataError(f"{part} can't be listed: {error}.") from error
        found += [system.unstrip_protocol(name) for name in here]
    return found


def _braces(pattern: str) -> list[str]:
    """``{00..09}`` and ``{a,b}`` written out, as a shell does."""
    match = _NUMBERS.search(pattern)
    if match:
        low, high = match[1], match[2]
        values = [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    else:
        match = _WORDS.search(pattern)
        if not match:
            return [pattern]
        values = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [text for value in values for text in _braces(head + value + tail)]


def mark_test(files: Sequence[str]) -> list[bool]:
    """Which files are a test split: those named ``test...`` or in a folder ``test``.

    Where there are none, those of a validation split. Where all of them would be, none is.
    """
    parts = [("", "", *path.replace(os.sep, "/").lower().split("/"))[-2:] for path in files]
    stems = [re.split(r"[-_.\d]", name, maxsplit=1)[0] for _, name in parts]
    for words in (("test",), ("validation", "valid", "val")):
        for names in (stems, [parent for parent, _ in parts]):
            marked = [name in words for name in names]
            if any(marked) and not all(marked):
                return marked
    return [False] * len(files)
