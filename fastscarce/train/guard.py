"""Is a student better than its teacher? Decided without the test split.

Where labels can be spared, both are judged on labelled images that trained neither. Where they
can't, both are judged by how much they know of the unlabelled images whatever is done to them:
the mutual information between an image and its predicted class, averaged over strong views.
A model that answers differently from view to view, or the same for every image, scores low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastscarce.data import Split
from fastscarce.train.pool import Pool, Positions, accuracy, predict
from fastscarce.train.run import Run

__all__ = ["Guard", "view_information"]

Judge = Literal["holdout", "agreement"]

# Views and images that the second judge looks at.
_VIEWS = 8
_IMAGES = 2000
# Numbers of views that no training stage reaches, so that the judge sees fresh ones.
_FIRST_VIEW = 1 << 30


def view_information(logits: Tensor) -> float:
    """Mutual information between image and predicted class, with predictions averaged over views.

    Args:
        logits: ``(views, rows, classes)``.

    Returns:
        ``(H(mean p) - mean H(p)) / log(classes)``, from 0 to 1: 1 where all views of every image
        agree with certainty and all classes are predicted equally often, 0 where predictions
        don't depend on the image.

    Source: Bridle, Heading and MacKay, "Unsupervised Classifiers, Mutual Information and
    'Phantom Targets'" (1991).
    """
    probs = torch.softmax(logits.double(), dim=-1).mean(0)
    rows = torch.special.entr(probs).sum(1).mean()
    marginal = torch.special.entr(probs.mean(0)).sum()
    return float((marginal - rows) / math.log(logits.shape[-1]))


@dataclass(frozen=True)
class Guard:
    """Scores models by the judge that the number of labels allows.

    Attributes:
        judge: ``holdout``: accuracy on held-out labelled images. ``agreement``:
            :func:`view_information` on unlabelled images.
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

    def score(self, model: nn.Module) -> float:
        """From 0 to 1, higher is better."""
        if self.judge == "holdout":
            logits = predict(self.run, model, self.pool, self.positions)[0]
            return accuracy(logits, self.pool.labels[torch.from_numpy(self.positions)].cpu())
        logits = predict(
            self.run,
            model,
            self.pool,
            self.positions,
            views=_VIEWS + 1,
            policy="strong",
            first_view=_FIRST_VIEW,
        )
        return view_information(logits[1:])
