"""Samples that are ranges of bytes in a few large files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fastscarce.data.index import stamp_numbers, stamp_of
from fastscarce.data.paths import is_remote, system_of
from fastscarce.data.source import Positions
from fastscarce.errors import DataError

__all__ = ["RangeReader"]

_KEPT = 256  # open files
_ODD = np.uint64(0x9E3779B97F4A7C15)  # spreads a place over 64 bits


@dataclass(frozen=True)
class RangeReader:
    """Reads ranges: of local files at one system call each, of remote ones all at once.

    Attributes:
        files: Local paths or URLs.
        file: int64 ``(n,)``: which file each sample is in.
        start: int64 ``(n,)``: its first byte.
        size: int64 ``(n,)``: how many.
        stamps_seen: Of the files as the ranges were found in them, "" of one that is not looked at.
    """

    files: tuple[str, ...]
    file: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    stamps_seen: tuple[str, ...] = ()
    # Open files; a forked process may share them, since reads say where.
    _open: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)

    def read(self, positions: Positions) -> list[bytes]:
        """The samples' bytes.

        Raises:
            DataError: A file is gone, too short or can't be read.
        """
        result: list[bytes] = [b""] * len(positions)
        remote: list[tuple[int, int]] = []
        for row, place in enumerate(positions.tolist()):
            if is_remote(self.files[self.file[place]]):
                remote.append((row, place))
            else:
                result[row] = self._local(place)
        if remote:
            contents = self._remote([place for _, place in remote])
            for (row, _), content in zip(remote, contents, strict=True):
                result[row] = content
        return result

    def stamps(self) -> npt.NDArray[np.uint64]:
        """uint64 ``(n,)``: changes when the file of a sample does, or its place in it."""
        files = stamp_numbers(self.files)[self.file]
        place = self.start.astype(np.uint64) * _ODD + self.size.astype(np.uint64)
        return np.where(files == 0, np.uint64(0), files ^ place)

    def _local(self, place: int) -> bytes:
        number, size = int(self.file[place]), int(self.size[place])
        path = self.files[number]
        try:
            handle = self._open.get(number)
            if handle is None:
                handle = self._opened(number, path)
            try:
                content = os.pread(handle, size, int(self.start[place]))
            finally:
                if self._open.get(number) != handle:
                    os.close(handle)
        except OSError as error:
            raise DataError(f"{path} can't be read: {error.strerror}") from error
        return _whole(content, size, path)

    def _opened(self, number: int, path: str) -> int:
        """A file's handle, kept where there are not too many: a process may have a thousand."""
        handle = os.open(path, os.O_RDONLY)
        if self.stamps_seen and stamp_of(os.fstat(handle)) != self.stamps_seen[number]:
            os.close(handle)
            raise DataError(f"{path} has changed since the data was opened; open it again")
        if len(self._open) >= _KEPT:
            return handle
        kept = self._open.setdefault(number, handle)
        if kept != handle:  # another thread was first
            os.close(handle)
        return kept

    def _remote(self, places: list[int]) -> list[bytes]:
        urls = [self.files[self.file[place]] for place in places]
        starts = [int(self.start[place]) for place in places]
        ends = [start + int(self.size[place]) for start, place in zip(starts, places, strict=True)]
        system, _ = system_of(urls[0])
        paths = [system._strip_protocol(url) for url in urls]
        try:
            contents = system.cat_ranges(paths, starts, ends, on_error="raise")
        except Exception as error:  # each file system raises its own
            raise DataError(f"{urls[0]} can't be read: {error}") from error
        return [
            _whole(bytes(content), end - start, url)
            for content, start, end, url in zip(contents, starts, ends, urls, strict=True)
        ]


def _whole(content: bytes, size: int, path: str) -> bytes:
    if len(content) != size:
        raise DataError(f"{path} ends before the sample does: {len(content)} of {size} bytes")
    return content
