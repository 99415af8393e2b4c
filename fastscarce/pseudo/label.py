"""From a teacher's logits to labels, and how sure of each label the teacher is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastscarce.errors import TrainingError

__all__ = ["PseudoLabels", "align", "alignment", "concatenate", "from_logits", "label_flips"]

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class PseudoLabels:
    """What a teacher says of ``n`` images, a row an image.

    Attributes:
        ids: int64 ``(n,)``, each once.
        log_probs: float32 ``(n, classes)``: log of the mean over views of the softmax.
        labels: int64 ``(n,)``: the most probable class, the lowest number on a tie.
        confidence: float32 ``(n,)`` in [0, 1]: probability of the label.
        margin: float32 ``(n,)`` in [0, 1]: confidence less the second highest probability.
        entropy: float32 ``(n,)`` in nats.
        agreement: float32 ``(n,)`` in [0, 1]: fraction of views that alone give this label.
        chosen: bool ``(n,)``: whether a student is to learn from the row.
        repeats: int64 ``(n,)``: how often the row counts in an epoch; 0 where not chosen.
    """

    ids: IntArray
    log_probs: FloatArray
    labels: IntArray
    confidence: FloatArray
    margin: FloatArray
    entropy: FloatArray
    agreement: FloatArray
    chosen: NDArray[np.bool_]
    repeats: IntArray

    def __post_init__(self) -> None:
        rows = len(self.ids)
        if self.log_probs.ndim != 2 or self.log_probs.shape[1] < 2:
            raise ValueError(
                f"PseudoLabels needs log_probs (rows, classes) with two classes or more, "
                f"got {self.log_probs.shape}."
            )
        for field in fields(self):
            length = len(getattr(self, field.name))
            if length != rows:
                raise ValueError(
                    f"PseudoLabels needs {rows} rows of {field.name}, as of ids, got {length}."
                )
        if len(np.unique(self.ids)) != rows:
            raise ValueError("PseudoLabels needs each id once.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def classes(self) -> int:
        """How many classes a row of ``log_probs`` has."""
        return int(self.log_probs.shape[1])

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> PseudoLabels:
        """The rows at the given places (or of a mask), in that order."""
        return PseudoLabels(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def from_logits(
    ids: ArrayLike,
    logits: Tensor,
    *,
    temperature: float = 1.0,
    prior: ArrayLike | None = None,
) -> PseudoLabels:
    """Labels from a teacher's logits on one or more views of each image; nothing is chosen yet.

    Args:
        ids: int64 ``(n,)``, each once.
        logits: ``(views, n, classes)``, any floating dtype, any device. Gets no gradient.
        temperature: What the logits are divided by, as `calibrate.temperature` finds it. Positive.
        prior: ``(classes,)``, positive: shares of the classes that the mean prediction over all
            rows is made to equal, see `align`. Then all rows must be in this one call, since
            each depends on the others. ``None`` leaves every row as it is, independent of others.

    Returns:
        One row an id, in the order given.

    Raises:
        ValueError: Shapes disagree, or ``temperature`` is not positive.
        TrainingError: A logit is not finite.
    """
    id_array = np.asarray(ids, dtype=np.int64)
    if logits.ndim != 3 or 0 in logits.shape[::2] or logits.shape[1] != len(id_array):
        raise ValueError(
            f"from_logits needs logits (views, {len(id_array)}, classes) for {len(id_array)} ids, "
            f"got {tuple(logits.shape)}."
        )
    if logits.shape[2] < 2:
        raise ValueError(f"from_logits needs two classes or more, got {logits.shape[2]}.")
    if not temperature > 0.0:
        raise ValueError(f"from_logits needs a positive temperature, got {temperature}.")
    with torch.no_grad():
        scaled = logits.detach().float() / temperature
        if not bool(torch.isfinite(scaled).all()):
            raise TrainingError(
                "the teacher's logits on the unlabelled images are not all finite; "
                "train the teacher with a lower learning rate or in float32."
            )
        per_view = torch.log_softmax(scaled, dim=-1)
        mean = torch.logsumexp(per_view, dim=0) - float(np.log(len(logits)))
    view_log_probs = per_view.cpu().numpy()
    log_probs: FloatArray = mean.cpu().numpy()
    if prior is not None:
        shift = alignment(log_probs, prior).astype(np.float32)
        view_log_probs = view_log_probs + shift
        log_probs = _normalised(log_probs + shift)
    log_probs = np.minimum(log_probs, np.float32(0.0))

    labels = log_probs.argmax(axis=1).astype(np.int64)
    agreement = (view_log_probs.argmax(axis=2) == labels).mean(axis=0).astype(np.float32)
    top = np.exp(np.partition(log_probs, -2, axis=1)[:, -2:])
    entropy = -(np.exp(log_probs) * log_probs).sum(axis=1)
    return PseudoLabels(
        ids=id_array,
        log_probs=log_probs,
        labels=labels,
        confidence=top[:, 1],
        margin=top[:, 1] - top[:, 0],
        entropy=np.maximum(entropy, np.float32(0.0)),
        agreement=agreement,
        chosen=np.zeros(len(id_array), dtype=np.bool_),
        repeats=np.zeros(len(id_array), dtype=np.int64),
    )


def alignment(
    log_probs: ArrayLike,
    prior: ArrayLike,
    *,
    iterations: int = 200,
    tolerance: float = 1e-5,
) -> NDArray[np.float64]:
    """What to add to each class's log-probability so that the mean prediction equals ``prior``.

    One iteration is ReMixMatch's distribution alignment, ``q * prior / mean(q)`` made to sum to 1;
    repeated, it is Sinkhorn's algorithm with rows of weight ``1 / n`` and columns of weight
    ``prior``. A teacher trained on few labels says some classes too often; this takes from them
    the rows it is least sure of. Rows that are certain (probabilities of 0 and 1) can't move, so
    the mean may fall short of ``prior`` after ``iterations``.

    Args:
        log_probs: ``(n, classes)``, each row a distribution's logarithm. ``n`` at least 1.
        prior: ``(classes,)``, positive; divided by its sum.
        iterations: The most iterations to make. At least 1.
        tolerance: Stop when no class's mean is farther than this from its prior.

    Returns:
        float64 ``(classes,)``, of mean 0.

    Raises:
        ValueError: Shapes disagree, or a prior is not positive and finite.

    Source: Berthelot et al., "ReMixMatch" (2020), section 3.1; Sinkhorn, "Diagonal equivalence to
    matrices with prescribed row and column sums" (1967).
    """
    rows = np.asarray(log_probs, dtype=np.float64)
    wanted = np.asarray(prior, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 1 or wanted.shape != (rows.shape[1],):
        raise ValueError(
            "alignment needs log_probs (rows, classes) and a prior (classes,), "
            f"got {rows.shape} and {wanted.shape}."
        )
    if not (np.isfinite(wanted).all() and (wanted > 0).all()):
        raise ValueError("alignment needs a prior that is positive and finite for every class.")
    wanted = wanted / wanted.sum()
    shift: NDArray[np.float64] = np.zeros(len(wanted))
    # A class that no row gives any weight has mean 0: the floor keeps its step finite.
    floor = np.finfo(np.float64).tiny
    for _ in range(iterations):
        mean = np.exp(_normalised(rows + shift)).mean(axis=0)
        if np.abs(mean - wanted).max() <= tolerance:
            break
        shift = shift + np.log(wanted) - np.log(np.maximum(mean, floor))
        shift = shift - shift.mean()
    return shift


def align(log_probs: ArrayLike, prior: ArrayLike) -> FloatArray:
    """Predictions whose mean over rows equals ``prior``; see `alignment` for how and its limits.

    Args:
        log_probs: ``(n, classes)``, each row a distribution's logarithm.
        prior: ``(classes,)``, positive; divided by its sum.

    Returns:
        float32 ``(n, classes)``, each row a distribution's logarithm.

    Raises:
        ValueError: Shapes disagree, or a prior is not positive and finite.
    """
    shift = alignment(log_probs, prior)
    aligned = _normalised(np.asarray(log_probs, dtype=np.float64) + shift)
    return aligned.astype(np.float32)


def concatenate(parts: Sequence[PseudoLabels]) -> PseudoLabels:
    """The rows of all parts, lowest id first, whatever order the parts come in.

    Raises:
        ValueError: There are no parts, an id comes twice, or the parts' classes differ.
    """
    if not parts:
        raise ValueError("concatenate needs one part or more, got none.")
    order = np.argsort(np.concatenate([part.ids for part in parts]), kind="stable")
    return PseudoLabels(
        **{
            f.name: np.concatenate([getattr(part, f.name) for part in parts])[order]
            for f in fields(PseudoLabels)
        }
    )


def label_flips(before: PseudoLabels, after: PseudoLabels) -> int:
    """How many of the images that both have got another label."""
    _, old, new = np.intersect1d(before.ids, after.ids, assume_unique=True, return_indices=True)
    return int((before.labels[old] != after.labels[new]).sum())


def _normalised(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows shifted so that their exponentials sum to 1, in the rows' own dtype."""
    shifted = rows - rows.max(axis=1, keepdims=True)
    normalised: NDArray[Any] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalised
