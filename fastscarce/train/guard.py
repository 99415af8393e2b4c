"""Is a student worse than its teacher? Decided without the test split.

Where labels can be spared, both are judged on labelled images that trained neither. Where they
can't, both are judged by agreement over views: each weak view of an unlabelled image votes for a
class, and the score is the mutual information between image and vote. A model whose answer changes
from view to view scores low, and so does one that gives every image the same answer. Votes are
counted and not probabilities, because a model that is only more sure of itself must not win.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastscarce.data import Split
from fastscarce.train.pool import Pool, Positions, predict
from fastscarce.train.run import Run

__all__ = ["Guard", "Verdict", "count_votes", "vote_information"]

Judge = Literal["holdout", "agreement"]

_VIEWS = 6
_IMAGES = 2000
# Numbers of views that no training stage reaches, so that the judge sees fresh ones.
_FIRST_VIEW = 1 << 30
_RESAMPLES = 200


def count_votes(logits: Tensor) -> NDArray[np.int64]:
    """How many views of each image vote for each class.

    Args:
        logits: ``(views, rows, classes)``.

    Returns:
        int64 ``(rows, classes)``; a view whose logits are not finite votes for no class.
    """
    votes = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
    votes = votes * torch.isfinite(logits).all(-1, keepdim=True)
    return np.asarray(votes.sum(0).numpy(), dtype=np.int64)


def vote_information(votes: NDArray[np.int64]) -> float:
    """Mutual information between an image and the class that its views vote for.

    Args:
        votes: int64 ``(rows, classes)``, as :func:`count_votes` gives them.

    Returns:
        ``(H(mean vote) - mean H(votes of an image)) / log(classes)``, from 0 to 1: 1 where the
        views of each image agree and all classes are equally many, 0 where votes don't depend on
        the image.

    Source: Bridle, Heading and MacKay, "Unsupervised Classifiers, Mutual Information and
    'Phantom Targets'" (1991).
    """
    shares = votes / np.maximum(votes.sum(1, keepdims=True), 1)
    within = _entropy(shares).mean()
    return float((_entropy(shares.mean(0)) - within) / math.log(votes.shape[1]))


def _entropy(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    logs = np.log(np.where(shares > 0, shares, 1.0))
    result: NDArray[np.float64] = -(shares * logs).sum(-1)
    return result


@dataclass(frozen=True)
class Verdict:
    """What the judge saw of one model.

    Attributes:
        score: From 0 to 1, higher is better.
        evidence: int64, a row an image: whether it was right ``(rows, 1)``, or its votes
            ``(rows, classes)``.
    """

    score: float
    evidence: NDArray[np.int64]


@dataclass(frozen=True)
class Guard:
    """Scores models by the judge that the number of labels allows.

    Attributes:
        judge: ``holdout``: accuracy on held-out labelled images. ``agreement``:
            :func:`vote_information` on unlabelled images.
    """

    run: Run
    pool: Pool
    judge: Judge
    positions: Positions

    @classmethod
    def of(cls, run: Run, pool: Pool, split: Split) -> Guard:
        """The hold-out where there is one, and agreement over views otherwise."""
        if len(split.holdout):
            return cls(run, pool, "holdout", split.holdout)
        images = split.unlabelled if len(split.unlabelled) else split.labelled
        # Evenly spread over the positions: the order of a listing must not choose the judges.
        places = np.linspace(0, len(images) - 1, min(len(images), _IMAGES)).astype(np.int64)
        return cls(run, pool, "agreement", images[places])

    def judge_model(self, model: nn.Module) -> Verdict:
        """Judge one model. All models see the same images and the same views of them."""
        views = 1 if self.judge == "holdout" else _VIEWS
        logits = predict(
            self.run,
            model,
            self.pool,
            self.positions,
            views=views,
            policy="weak",
            first_view=_FIRST_VIEW,
        )
        votes = count_votes(logits)
        if self.judge == "agreement":
            return Verdict(vote_information(votes), votes)
        labels = self.pool.labels[torch.from_numpy(self.positions)].cpu().numpy()
        right = np.take_along_axis(votes, labels[:, None], axis=1)
        return Verdict(float(right.mean()), right)

    def score(self, model: nn.Module) -> float:
        """The judge's score, from 0 to 1, higher is better."""
        return self.judge_model(model).score

    def is_worse(self, student: Verdict, teacher: Verdict) -> bool:
        """Whether the student's score is lower by more than the judge's own uncertainty.

        On a hold-out every image counts: one right answer fewer is worse. Agreement is an
        estimate: there the difference must exceed its standard error, from a paired bootstrap
        over the images.
        """
        difference = student.score - teacher.score
        if difference >= 0.0 or self.judge == "holdout":
            return difference < 0.0
        draw = np.random.Generator(np.random.Philox(len(self.positions)))
        rows = len(student.evidence)
        resampled = []
        for _ in range(_RESAMPLES):
            places = draw.integers(0, rows, rows)
            resampled.append(
                vote_information(student.evidence[places])
                - vote_information(teacher.evidence[places])
            )
        return bool(difference < -np.std(resampled))
