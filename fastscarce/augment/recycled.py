"""Memory of large plans: what one gave back, a later one gets.

A loop that draws many batches at once asks for the same few MiB again and again. Fresh pages for
them would cost more than the drawing, and so would the look-up of small pages' addresses.
"""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["recycled_rows"]

_LEAST = 4 << 20  # bytes: smaller ones the allocator keeps
_PAGE = 2 << 20  # bytes of a huge page
_KEPT = 2  # blocks: those in use and the next ones take turns

Block = npt.NDArray[np.uint8]

_waiting: list[Block] = []


def recycled_rows(rows: int, row_bytes: int) -> Tensor:
    """``torch.empty`` of uint8 ``(rows, row_bytes)``.

    From 4 MiB on the memory is kept when the last tensor that shares it is gone, of two results at
    most.
    """
    size = rows * row_bytes
    if size < _LEAST:
        return torch.empty((rows, row_bytes), dtype=torch.uint8)
    block = _block(size + _PAGE)
    start = -block.ctypes.data % _PAGE
    content = block[start : start + size].reshape(rows, row_bytes)
    weakref.finalize(content, _give_back, block).atexit = False
    return torch.from_numpy(content)


def _block(size: int) -> Block:
    for place, block in enumerate(_waiting):
        if size <= block.size <= 2 * size:
            try:
                # Another thread may have been faster: then this is another block, or none.
                found = _waiting.pop(place)
            except IndexError:
                break
            if size <= found.size:
                return found
    return np.empty(size, dtype=np.uint8)


def _give_back(block: Block) -> None:
    _waiting.append(block)
    del _waiting[:-_KEPT]
