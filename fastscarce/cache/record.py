"""A row of the teacher's table: a fixed number of bytes, little-endian.

========  ==============  =====================================================================
part      bytes           what
========  ==============  =====================================================================
indices   2k, or 4k       u16, u32 where there are more than 65,536 classes; by falling
                          log-probability. Not there in a dense row
values    2k, or k        log-probabilities at T = 1: float16, or u8 codes, see below
scale     0, or 2         float16, of u8 codes alone
tail      2               float16, log of the mean probability of the other classes. Not there in
                          a dense row, which has none
tag       0, or 4         u32, a hash of the plan row that the view was drawn as
========  ==============  =====================================================================

A dense row is one whose k are all classes, of which there are 256 or fewer: its values are in the
order of the classes. A code c stands for ``-c * scale``, 255 for a probability of 0; the scale is
the row's lowest finite log-probability over -254.

Log-probabilities below float16's range count as a probability of 0. What a row of NaN is encoded
as has NaN log-probabilities again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fastscarce.ops import TopK, pack_topk, unpack_topk

__all__ = ["CODECS", "Layout", "decode", "encode", "pack", "tags_of"]

CODECS = ("float16", "uint8")
DENSE_CLASSES = 256
WIDE_CLASSES = 65536
_NOTHING = 255  # the code of a probability of 0
_STEPS = 254.0


@dataclass(frozen=True)
class Layout:
    """What a row's bytes mean.

    Args:
        classes: That the teacher tells apart.
        k: Kept a row, 1 to classes.
        codec: Of the log-probabilities.
        tagged: Whether a row ends in the tag of its view.

    Raises:
        ValueError: A number or the codec is none of these.
    """

    classes: int
    k: int
    codec: Literal["float16", "uint8"] = "float16"
    tagged: bool = False

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"Layout needs codec float16 or uint8, got {self.codec!r}.")
        if not 1 <= self.k <= self.classes:
            raise ValueError(f"Layout needs k in 1 to the {self.classes} classes, got {self.k}.")

    @property
    def dense(self) -> bool:
        """Whether a row has all classes, in their order."""
        return self.k == self.classes <= DENSE_CLASSES

    @property
    def index_bytes(self) -> int:
        """Of one class's number: 0 in a dense row."""
        return 0 if self.dense else 4 if self.classes > WIDE_CLASSES else 2

    @property
    def value_bytes(self) -> int:
        """Of one log-probability."""
        return 2 if self.codec == "float16" else 1

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """First byte and number of bytes of each part that a row has, by name."""
        sizes = {
            "indices": self.index_bytes * self.k,
            "values": self.value_bytes * self.k,
            "scale": 2 if self.codec == "uint8" else 0,
            "tail": 0 if self.dense else 2,
            "tag": 4 if self.tagged else 0,
        }
        found, at = {}, 0
        for name, size in sizes.items():
            if size:
                found[name] = (at, size)
            at += size
        return found

    @cached_property
    def stride(self) -> int:
        """Bytes of a row."""
        return sum(size for _, size in self.parts.values())


def encode(teacher: TopK, layout: Layout, tags: Tensor | None = None) -> Tensor:
    """Rows as bytes.

    Args:
        teacher: ``layout.k`` classes a row, as `fastscarce.ops.topk` gives them.
        layout: What is made.
        tags: Of the rows' views, int64 ``(rows,)``, 0 to 2**32 - 1, where the layout has them.

    Returns:
        uint8 ``(rows, stride)`` on the teacher's device.

    Raises:
        ValueError: The teacher keeps another number of classes, or tags are missing or too many.
    """
    rows = len(teacher)
    if teacher.k != layout.k:
        raise ValueError(f"encode needs {layout.k} classes a row, got {teacher.k}.")
    check_tags("encode", layout, tags, rows)
    values = teacher.log_probs.float()
    values = torch.where(values.isnan(), torch.nan, values)  # without a sign or a payload
    if layout.dense:
        values = torch.empty_like(values).scatter_(1, teacher.indices.long(), values)
    parts = []
    if layout.index_bytes == 2:
        parts.append(_bytes(teacher.indices.to(torch.int16)))
    elif layout.index_bytes == 4:
        parts.append(_bytes(teacher.indices))
    if layout.codec == "float16":
        parts.append(_bytes(values.half()))
    else:
        codes, scale = _quantised(values)
        parts += [codes, _bytes(scale[:, None])]
    if not layout.dense:
        tail = teacher.log_tail.float()
        tail = torch.where(tail.isnan(), torch.nan, tail)
        parts.append(_bytes(tail.half()[:, None]))
    if tags is not None:
        parts.append(_bytes(tags.to(teacher.indices.device).to(torch.int32)[:, None]))
    return torch.cat(parts, dim=1)


def pack(logits: Tensor, layout: Layout, tags: Tensor | None = None) -> Tensor:
    """Rows of a teacher's logits as bytes: `encode` of their `topk`, in one pass.

    Args:
        logits: float32, bfloat16, float16 or float64, shape ``(rows, classes)``.
        layout: What is made.
        tags: As of `encode`.

    Raises:
        ValueError: As of `topk` and `encode`.
    """
    check_tags("pack", layout, tags, logits.shape[0])
    if logits.dim() != 2 or logits.shape[1] != layout.classes:
        raise ValueError(
            f"pack needs logits of shape (rows, {layout.classes}), got {tuple(logits.shape)}."
        )
    return pack_topk(logits, layout.k, codes=layout.codec == "uint8", tags=tags)


def decode(records: Tensor, layout: Layout) -> TopK:
    """What the teacher said, from bytes.

    Args:
        records: uint8 ``(rows, stride)``, on any device.
        layout: That they were made with.

    Returns:
        `TopK` with float16 log-probabilities (float32 of u8 codes), on the same device.

    Raises:
        ValueError: The rows have another length.
    """
    if records.dtype != torch.uint8 or records.dim() != 2 or records.shape[1] != layout.stride:
        raise ValueError(
            f"decode needs uint8 records of shape (rows, {layout.stride}), got {records.dtype} "
            f"{tuple(records.shape)}."
        )
    codes = layout.codec == "uint8"
    return unpack_topk(records, layout.classes, layout.k, codes=codes, tagged=layout.tagged)


def tags_of(records: Tensor, layout: Layout) -> Tensor | None:
    """The rows' tags, int64 ``(rows,)``, where the layout has them."""
    if not layout.tagged:
        return None
    return _numbers(records, layout, "tag", torch.int32)[:, 0].long() & 0xFFFFFFFF


def check_tags(name: str, layout: Layout, tags: Tensor | None, rows: int) -> None:
    """Refuse tags that the layout has no place for, or lacks.

    Raises:
        ValueError: There is not one a row where the layout has them, or any where it has not.
    """
    if layout.tagged != (tags is not None) or (tags is not None and tags.shape != (rows,)):
        needed = f"{rows} tags" if layout.tagged else "no tags"
        got = "none" if tags is None else str(tuple(tags.shape))
        raise ValueError(f"{name} needs {needed} for this layout, got {got}.")


def _quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8, and the rows' scales, float16; csrc/math/record.h says the same."""
    finite = torch.where(values.isinf(), 0.0, 0.0 - values)  # not -0
    scale = (finite.amax(1) / _STEPS).clamp(max=torch.finfo(torch.float16).max)
    scale = torch.where(scale.isnan(), torch.nan, scale).half()
    divisor = scale.float()[:, None]
    codes = torch.where(divisor > 0.0, finite / divisor, 0.0).round().clamp(0.0, _STEPS)
    codes = torch.where(values.isinf(), float(_NOTHING), codes.nan_to_num(0.0))
    return codes.to(torch.uint8), scale


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _numbers(records: Tensor, layout: Layout, part: str, kind: torch.dtype) -> Tensor:
    first, size = layout.parts[part]
    return records[:, first : first + size].contiguous().view(kind)
