"""The largest classes of a row and how sure they are.

Tables of a teacher's outputs and pseudo-labels are written from these.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastscarce import _ops  # noqa: F401  loads the kernels
from fastscarce.ops.targets import TopK
from fastscarce.ops.tensors import (
    require_floats,
    require_numbers,
    require_temperature,
    require_tensor,
    without_gaps,
)

__all__ = ["Confidence", "confidence", "pack_topk", "topk", "unpack_topk"]

# Chosen logits of a row are sorted in a GPU's shared memory.
_MOST_ON_GPU = 2048

_pack_topk = torch.ops.fastscarce.pack_topk.default
_unpack_topk = torch.ops.fastscarce.unpack_topk.default
_topk = torch.ops.fastscarce.topk.default
_confidence = torch.ops.fastscarce.confidence.default


class Confidence(NamedTuple):
    """How sure each row is; every field has shape ``(rows,)``."""

    label: Tensor
    """Most probable class, int64, the lower one of equals; -100 for a row without an answer."""
    confidence: Tensor
    """Its probability, float32 (float64 for float64 logits)."""
    margin: Tensor
    """Its probability less that of the next class."""
    entropy: Tensor
    """Of the distribution, in nats."""
    mask: Tensor
    """Whether the confidence reaches the threshold, bool."""


def topk(logits: Tensor, k: int) -> TopK:
    """The ``k`` largest classes of each row, their log-probabilities, and what the others share.

    Each logit is read from memory once. The rest is summed on its own, not as 1 less a sum, so a
    tail far below the precision of 1 is still right. No gradient.

    Args:
        logits: float32, bfloat16, float16 or float64, shape ``(rows, classes)``.
        k: Classes to keep, 1 to classes (on a GPU to 2048).

    Returns:
        :class:`TopK` with log-probabilities at T = 1 in float32 (float64 for float64 logits), by
        falling logit, equal logits by rising class. A row of NaN or +inf has NaN log-probabilities
        and tail; one without a finite logit has probability 0 everywhere.

    Raises:
        ValueError: Shape, dtype or ``k`` is none of these.
    """
    logits = _rows("topk", logits)
    _check_k("topk", logits, k)
    return TopK(*_topk(logits, k))


def pack_topk(logits: Tensor, k: int, *, codes: bool = False, tags: Tensor | None = None) -> Tensor:
    """`topk` of each row as the bytes that a teacher's table keeps, in one pass.

    What the bytes mean is said in fastscarce/cache/record.py. No gradient.

    Args:
        logits: float32, bfloat16, float16 or float64, shape ``(rows, classes)``.
        k: Classes to keep, 1 to classes (on a GPU to 2048).
        codes: Keep log-probabilities as u8 codes of a scale a row, not as float16.
        tags: A number a row, 0 to 2**32 - 1, that is kept at its end, int64 ``(rows,)``.

    Returns:
        uint8 ``(rows, stride)`` on the logits' device.

    Raises:
        ValueError: Shape, dtype, ``k`` or ``tags`` is none of these.
    """
    logits = _rows("pack_topk", logits)
    _check_k("pack_topk", logits, k)
    if tags is not None:
        require_tensor("pack_topk", "tags", tags)
        if tags.dtype != torch.int64 or tags.shape != logits.shape[:1]:
            raise ValueError(
                f"pack_topk needs int64 tags of shape ({logits.shape[0]},), got {tags.dtype} "
                f"{tuple(tags.shape)}."
            )
        tags = tags.to(logits.device, non_blocking=True).contiguous()
    packed: Tensor = _pack_topk(logits, k, codes, tags)
    return packed


def unpack_topk(
    records: Tensor, classes: int, k: int, *, codes: bool = False, tagged: bool = False
) -> TopK:
    """What `pack_topk` kept of each row, in one pass.

    Args:
        records: uint8 ``(rows, stride)``, as `pack_topk` gave them.
        classes: Of the logits that they were made of.
        k: Classes kept.
        codes: Whether log-probabilities are u8 codes.
        tagged: Whether rows end in a tag.

    Returns:
        :class:`TopK` with float16 log-probabilities (float32 of codes) on the records' device, as
        `topk` gives them; all classes of a dense row in their own order.

    Raises:
        ValueError: The records have another dtype or number of dimensions.
        RuntimeError: Rows have another length.
    """
    require_tensor("unpack_topk", "records", records)
    if records.dtype != torch.uint8 or records.dim() != 2:
        raise ValueError(
            f"unpack_topk needs uint8 records of shape (rows, stride), got {records.dtype} "
            f"{tuple(records.shape)}."
        )
    return TopK(*_unpack_topk(records.contiguous(), classes, k, codes, tagged))


def confidence(logits: Tensor, threshold: float = 0.0, *, temperature: float = 1.0) -> Confidence:
    """Label, confidence, margin and entropy of each row's ``softmax(logits / temperature)``.

    Each logit is read from memory once. No gradient.

    Args:
        logits: float32, bfloat16, float16 or float64, shape ``(rows, classes)``.
        threshold: Confidence from which a row's mask is set, in 0 to 1.
        temperature: What the logits are divided by. Positive.

    Returns:
        :class:`Confidence`. A row with NaN or +inf, or without a finite logit, has no answer: label
        -100 (which the losses ignore), NaN numbers, mask not set.

    Raises:
        ValueError: Shape or dtype do not fit, or a number is out of its range.
    """
    logits = _rows("confidence", logits)
    require_numbers("confidence", threshold=threshold, temperature=temperature)
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"confidence needs threshold in 0 to 1, got {threshold}.")
    require_temperature("confidence", temperature)
    return Confidence(*_confidence(logits, float(threshold), float(temperature)))


def _check_k(name: str, logits: Tensor, k: int) -> None:
    most = min(logits.shape[1], _MOST_ON_GPU) if logits.is_cuda else logits.shape[1]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
        raise ValueError(
            f"{name} needs k in 1 to {most} for logits of {logits.shape[1]} classes, got {k}."
        )


def _rows(name: str, logits: Tensor) -> Tensor:
    """A detached matrix whose rows lie without gaps."""
    require_floats(name, "logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"{name} needs logits of shape (rows, classes), classes at least 1, got "
            f"{tuple(logits.shape)}."
        )
    return without_gaps(logits.detach())
