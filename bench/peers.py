"""What kd_loss and its relatives are measured against: eager PyTorch and other libraries.

A peer is called ``peer(student, teacher, target)`` with raw logits. A library that is not there is
named on stderr, with what installs it, and left out.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from harness import ALPHA, TEMPERATURE, Loss
from torch import Tensor

__all__ = ["EAGER", "liger", "liger_head", "torchdistill"]


def eager_kl(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    distil = F.kl_div(
        F.log_softmax(student / TEMPERATURE, 1),
        F.softmax(teacher / TEMPERATURE, 1),
        reduction="batchmean",
    )
    return _with_label(distil, student, target)


def eager_jsd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    log_q = F.log_softmax(student / TEMPERATURE, 1)
    p = F.softmax(teacher / TEMPERATURE, 1)
    log_m = (0.5 * (p + log_q.exp())).log()
    distil = 0.5 * F.kl_div(log_m, p, reduction="batchmean")
    distil = distil + 0.5 * F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return _with_label(distil, student, target)


def eager_dkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    label = F.one_hot(target, student.shape[1]).to(student.dtype)
    q, p = (F.softmax(x / TEMPERATURE, 1) for x in (student, teacher))
    q_label, p_label = (q * label).sum(1), (p * label).sum(1)
    binary_q = torch.stack([q_label, (q * (1 - label)).sum(1)], 1)
    binary_p = torch.stack([p_label, (p * (1 - label)).sum(1)], 1)
    tckd = F.kl_div(binary_q.log(), binary_p, reduction="batchmean")
    nckd = F.kl_div(
        F.log_softmax(student / TEMPERATURE - 1000 * label, 1),
        F.softmax(teacher / TEMPERATURE - 1000 * label, 1),
        reduction="batchmean",
    )
    return _with_label(tckd + 8 * nckd, student, target)


def eager_dist(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    q, p = (F.softmax(x / TEMPERATURE, 1) for x in (student, teacher))

    def apart(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - F.cosine_similarity(a, b, dim=1, eps=1e-8).mean()

    return _with_label(apart(q, p) + apart(q.T, p.T), student, target)


def _with_label(distil: Tensor, student: Tensor, target: Tensor) -> Tensor:
    return ALPHA * TEMPERATURE**2 * distil + (1 - ALPHA) * F.cross_entropy(student, target)


EAGER: dict[str, Loss] = {
    "kl": eager_kl,
    "jsd": eager_jsd,
    "dkd": eager_dkd,
    "dist": eager_dist,
}


def torchdistill() -> dict[str, Loss]:
    try:
        from torchdistill.losses.mid_level import KDLoss
    except ImportError as error:
        return _missing("torchdistill", error)
    # Its alpha weighs the cross entropy.
    kd = KDLoss("", "output", "", "output", TEMPERATURE, alpha=1 - ALPHA)

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        value: Tensor = kd({"": {"output": student}}, {"": {"output": teacher}}, target)
        return value

    return {"torchdistill": loss}


def liger(name: str) -> dict[str, Loss]:
    """Liger-Kernel's KL divergence or JSD: of log-probabilities, so both softmaxes stay outside.

    The label term is PyTorch's: Liger's cross entropy writes its gradient over the logits.
    """
    try:
        from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss
    except (ImportError, RuntimeError) as error:
        return _missing("liger-kernel", error)
    divergence: Any = LigerJSD(beta=0.5)
    if name == "kl":
        divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        log_q, log_p = (F.log_softmax(x / TEMPERATURE, 1) for x in (student, teacher))
        return _with_label(divergence(log_q, log_p), student, target)

    return {"Liger": loss}


def liger_head() -> dict[str, Any]:
    """Liger's fused last layers and JSD, ``(features, weight, teacher features and weight)``."""
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except (ImportError, RuntimeError) as error:
        return _missing("liger-kernel", error)
    fused: Any = LigerFusedLinearJSD(jsd_beta=0.5, temperature=TEMPERATURE)

    def loss(features: Tensor, weight: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
        value: Tensor = fused(features, weight, *teacher, None)
        return value

    return {"Liger": loss}


def _missing(package: str, error: Exception) -> dict[str, Any]:
    print(
        f"{package} cannot be imported ({error}); its figures are left out. It comes with "
        "`pip install -e .[bench]`.",
        file=sys.stderr,
    )
    return {}
