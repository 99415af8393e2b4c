"""Make confidence mean what it says, and turn a wanted precision into a threshold."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["expected_calibration_error", "temperature", "threshold_for_precision"]

COLDEST, HOTTEST = 0.05, 20.0
GRID_POINTS = 49
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def temperature(logits: Tensor, labels: Tensor, *, imagined: float = 1.0) -> float:
    """The temperature that makes a teacher's predictions on held-out images most likely.

    Minimises the negative log-likelihood of the mean over views of ``softmax(logits / T)``, in
    float64, over ``T`` in [0.05, 20]: a grid on ``log T``, then golden sections of its best cell.

    A small hold-out that the teacher gets wholly right asks for ``T = 0``, and every confidence
    becomes 1. So the hold-out is thought to have ``imagined`` images more whose label may be any
    class: each label counts ``n / (n + imagined)``, and all classes share the rest. The effect
    fades as the hold-out grows.

    Args:
        logits: ``(n, classes)`` or ``(views, n, classes)``, any floating dtype, images that did
            not train the teacher. Finite.
        labels: int64 ``(n,)``, ``n`` at least 1.
        imagined: How many images are imagined, 0 or more; 0 is plain maximum likelihood.

    Returns:
        ``T``, to be divided by; above 1 where the teacher was too sure.

    Raises:
        ValueError: Shapes disagree, there are no images, or a label or logit is out of range.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), section 4.2; the
    imagined images after Platt, "Probabilistic Outputs for Support Vector Machines" (1999).
    """
    views = logits.detach().double().cpu()
    views = views.unsqueeze(0) if views.ndim == 2 else views
    truth = labels.detach().long().cpu()
    if views.ndim != 3 or truth.shape != views.shape[1:2] or views.numel() == 0:
        raise ValueError(
            "temperature needs logits (rows, classes) or (views, rows, classes) and labels (rows,) "
            f"of one row or more, got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    rows, classes = views.shape[1:]
    if int(truth.min()) < 0 or int(truth.max()) >= classes:
        raise ValueError(f"temperature needs labels from 0 to {classes - 1}.")
    if not bool(torch.isfinite(views).all()):
        raise ValueError("temperature needs finite logits.")
    if not imagined >= 0.0:
        raise ValueError(f"temperature needs imagined of 0 or more, got {imagined}.")
    blend = imagined / (rows + imagined)

    def loss(log_temperature: float) -> float:
        log_probs = torch.log_softmax(views / math.exp(log_temperature), dim=-1)
        log_probs = torch.logsumexp(log_probs, dim=0) - math.log(len(views))
        right = log_probs.gather(1, truth[:, None]).mean()
        return -float((1.0 - blend) * right + blend * log_probs.mean())

    grid = np.linspace(math.log(COLDEST), math.log(HOTTEST), GRID_POINTS)
    best = int(np.argmin([loss(float(point)) for point in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, GRID_POINTS - 1)])
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    loss_left, loss_right = loss(left), loss(right)
    while high - low > 1e-6:
        if loss_left <= loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - GOLDEN * (high - low)
            loss_left = loss(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + GOLDEN * (high - low)
            loss_right = loss(right)
    return math.exp((low + high) / 2.0)


def expected_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = 15
) -> float:
    """Mean distance between confidence and accuracy, over bins of equal width.

    Args:
        confidence: ``(n,)`` in [0, 1], ``n`` at least 1.
        correct: bool ``(n,)``: whether each label was right.
        bins: How many bins [0, 1] is cut into. Bin ``b`` holds ``(b / bins, (b + 1) / bins]``.

    Returns:
        Sum over bins of ``rows in bin / n * |mean confidence - accuracy|``, in [0, 1].

    Raises:
        ValueError: Shapes disagree, there are no rows, or a confidence is outside [0, 1].

    Source: Naeini, Cooper and Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian
    Binning" (2015).
    """
    sure, right = _pairs("expected_calibration_error", confidence, correct)
    if bins < 1:
        raise ValueError(f"expected_calibration_error needs one bin or more, got {bins}.")
    places = np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)
    # A bin's share times its gap is the absolute sum of its rows' gaps over n.
    gaps = np.bincount(places, weights=sure - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(sure))


def threshold_for_precision(
    confidence: ArrayLike, correct: ArrayLike, *, precision: float
) -> float:
    """The lowest threshold at which the labels kept on the hold-out are precise enough.

    Args:
        confidence: ``(n,)`` in [0, 1], of images that did not train the teacher, ``n`` at least 1.
        correct: bool ``(n,)``: whether each label was right.
        precision: Wanted fraction of right labels among those with ``confidence >= threshold``,
            in (0, 1].

    Returns:
        A confidence that occurs in ``confidence``; ``inf`` where no threshold is precise enough.

    Raises:
        ValueError: Shapes disagree, there are no rows, or a number is out of its range.
    """
    sure, right = _pairs("threshold_for_precision", confidence, correct)
    if not 0.0 < precision <= 1.0:
        raise ValueError(f"threshold_for_precision needs precision in (0, 1], got {precision}.")
    order = np.argsort(-sure, kind="stable")
    sure, right = sure[order], right[order]
    kept_precision = np.cumsum(right) / np.arange(1, len(sure) + 1)
    # Rows of equal confidence are kept together, so only the last of them is a place to cut.
    cut = np.append(sure[1:] != sure[:-1], True)
    good = np.flatnonzero(cut & (kept_precision >= precision))
    return float(sure[good[-1]]) if len(good) else math.inf


def _pairs(
    name: str, confidence: ArrayLike, correct: ArrayLike
) -> tuple[
    np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.bool_]]
]:
    """Both as arrays, checked."""
    sure = np.asarray(confidence, dtype=np.float64)
    right = np.asarray(correct, dtype=np.bool_)
    if sure.ndim != 1 or sure.shape != right.shape or len(sure) == 0:
        raise ValueError(
            f"{name} needs confidence and correct of one shape, (rows,), with one row or more, "
            f"got {sure.shape} and {right.shape}."
        )
    if not bool(((sure >= 0.0) & (sure <= 1.0)).all()):
        raise ValueError(f"{name} needs confidence in [0, 1].")
    return sure, right
