"""Plain-PyTorch twins of the fused operators: what both back ends are tested against.

Written for clearness, from the formulas, in the dtype of the arguments; autograd gives the
gradients. A new loss begins here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastscarce.ops.targets import MixedTarget, MixedTopK, TopK

__all__ = [
    "dist_loss",
    "dist_rows",
    "dkd_rows",
    "kd_loss",
    "kl_rows",
    "label_rows",
    "mixture_rows",
    "row_statistics",
    "standardised",
    "topk_rows",
]


def kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T**2 * KL(softmax(teacher / T) || softmax(student / T))`` of each row.

    A class of teacher probability 0 contributes 0, also where the student's logit is -inf.
    """
    p = (teacher / temperature).softmax(1)
    log_p = (teacher / temperature).log_softmax(1)
    log_q = (student / temperature).log_softmax(1)
    counts = p > 0
    zero = torch.zeros_like(p)
    terms = torch.where(counts, p, zero) * (
        torch.where(counts, log_p, zero) - torch.where(counts, log_q, zero)
    )
    return temperature**2 * terms.sum(1)


def _log(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x)).log()


def mixture_rows(loss: str, p: Tensor, q: Tensor, share: float) -> Tensor:
    """Reverse KL, JSD(share) or skew KL(share) of each row, from probabilities."""
    if loss == "reverse_kl":
        terms = torch.where(p > 0, q * (_log(q) - _log(p)), torch.where(q > 0, torch.inf, 0.0))
        return terms.sum(1)
    m = share * p + (1 - share) * q
    from_teacher = (p * (_log(p) - _log(m))).sum(1)
    if loss == "skew_kl":
        return from_teacher
    return share * from_teacher + (1 - share) * (q * (_log(q) - _log(m))).sum(1)


def standardised(logits: Tensor) -> Tensor:
    """Finite logits of each row less their mean, over their standard deviation + 1e-7."""
    finite = logits > -torch.inf
    count = finite.sum(1, keepdim=True)
    mean = torch.where(finite, logits, 0).sum(1, keepdim=True) / count
    centred = torch.where(finite, logits - mean, 0)
    deviation = (centred.square().sum(1, keepdim=True) / (count - 1)).sqrt()
    return torch.where(finite, centred / (deviation + 1e-7), logits)


def dkd_rows(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | MixedTarget,
    temperature: float,
    weights: tuple[float, float],
    ignore_index: int,
) -> Tensor:
    """``T**2 * (alpha * TCKD + beta * NCKD)`` of each row; a mixed label is two classes apart."""
    rows = student.shape[0]
    if isinstance(target, Tensor):
        target = MixedTarget(target, target, torch.ones(rows, device=target.device))
    named = torch.zeros(student.shape, dtype=torch.bool, device=student.device)
    for index, share in ((target.a, target.lam), (target.b, 1 - target.lam)):
        counts = (index != ignore_index) & (share != 0)
        place = torch.where(counts, index, 0)[:, None]
        named |= torch.zeros_like(named).scatter(1, place, counts[:, None])
    p = (teacher / temperature).softmax(1)
    log_p, log_q = (teacher / temperature).log_softmax(1), (student / temperature).log_softmax(1)
    some = ~named.all(1)
    # A row whose classes are all named keeps one here, so that no softmax is empty.
    rest = ~named | ~some[:, None]
    log_pn = torch.where(rest, log_p, -torch.inf).logsumexp(1)
    log_qn = torch.where(rest, log_q, -torch.inf).logsumexp(1)
    nckd = kl_rows(
        torch.where(rest, student / temperature, -torch.inf),
        torch.where(rest, teacher / temperature, -torch.inf),
        1.0,
    )
    tckd = torch.where(named, p * (log_p - log_q), 0).sum(1)
    tckd = tckd + torch.where(some, log_pn.exp() * (log_pn - log_qn), 0)
    return temperature**2 * (weights[0] * tckd + weights[1] * torch.where(some, nckd, 0))


def _probabilities(teacher: TopK, student: Tensor, temperature: float, tail: str) -> Tensor:
    """``softmax`` at T of a TopK teacher over all classes; 0 everywhere for one without mass."""
    scaled = teacher.dense(student.shape[1]).to(student.dtype) / temperature
    if tail in ("renorm", "support"):
        named = torch.zeros_like(scaled, dtype=torch.bool).scatter(1, teacher.indices.long(), True)
        scaled = torch.where(named, scaled, -torch.inf)
    nothing = (scaled == -torch.inf).all(1, keepdim=True)
    return torch.where(nothing, 0, torch.where(nothing, 0, scaled).softmax(1))


def _entropy_terms(p: Tensor, log_q: Tensor) -> Tensor:
    counts = p > 0
    return torch.where(counts, p, 0) * -torch.where(counts, log_q, 0)


def topk_rows(
    student: Tensor, teacher: TopK | MixedTopK, temperature: float, tail: str
) -> tuple[Tensor, Tensor]:
    """``T**2`` times the divergence from a TopK teacher, and the teacher's confidence, a row each.

    A mixture gives the cross entropy with the mixed probabilities.
    """
    log_q = (student / temperature).log_softmax(1)
    if isinstance(teacher, MixedTopK):
        lam = teacher.lam.to(student.dtype)[:, None]
        p = lam * _probabilities(teacher.a, student, temperature, tail)
        p = p + (1 - lam) * _probabilities(teacher.b, student, temperature, tail)
        sure = [_probabilities(x, student, temperature, "uniform") for x in (teacher.a, teacher.b)]
        confidence = lam[:, 0] * sure[0].amax(1) + (1 - lam[:, 0]) * sure[1].amax(1)
        return temperature**2 * _entropy_terms(p, log_q).sum(1), confidence
    sure_of = _probabilities(teacher, student, temperature, "uniform")
    indices = teacher.indices.long()
    p = _probabilities(teacher, student, temperature, tail)
    if tail == "tail":
        rest = torch.ones_like(p, dtype=torch.bool).scatter(1, indices, False)
        bucket = torch.where(rest, p, 0).sum(1, keepdim=True)
        if indices.shape[1] < p.shape[1]:
            log_rest = torch.where(rest, log_q, -torch.inf).logsumexp(1, keepdim=True)
        else:
            log_rest = torch.zeros_like(bucket)
        p = torch.cat([p.gather(1, indices), bucket], 1)
        log_q = torch.cat([log_q.gather(1, indices), log_rest], 1)
    elif tail == "support":
        p = p.gather(1, indices)
        log_q = (student.gather(1, indices) / temperature).log_softmax(1)
    rows = _entropy_terms(p, log_q) - _entropy_terms(p, _log(p))
    return temperature**2 * rows.sum(1), sure_of.gather(1, indices).amax(1)


def _labels(logits: Tensor) -> Tensor:
    """First class of the largest logit; -100 for a row of NaN or +inf, or without a finite one."""
    answers = (logits < torch.inf).all(1) & (logits > -torch.inf).any(1)
    return torch.where(answers, logits.argmax(1), -100)


def row_statistics(
    student: Tensor, teacher: Tensor | TopK | MixedTopK, temperature: float, tail: str = "uniform"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels of student and teacher, confidence and entropy, as ``RowStatistics`` has them."""
    if isinstance(teacher, MixedTopK):
        lam = teacher.lam.to(student.dtype)
        a, b = (row_statistics(student, x, temperature, tail) for x in (teacher.a, teacher.b))
        mixed = [
            torch.where(lam > 0, lam * x, 0) + torch.where(lam < 1, (1 - lam) * y, 0)
            for x, y in zip(a[2:], b[2:], strict=True)
        ]
        label = torch.where(lam >= 0.5, a[1], b[1])
        return a[0], torch.where(mixed[0].isnan(), -100, label), mixed[0], mixed[1]
    if isinstance(teacher, TopK):
        named = torch.full_like(student, -torch.inf)
        label = _labels(named.scatter(1, teacher.indices.long(), teacher.log_probs.to(named.dtype)))
        p = _probabilities(teacher, student, temperature, "uniform" if tail == "tail" else tail)
    else:
        label = _labels(teacher)
        p = (teacher / temperature).softmax(1)
    answers = label >= 0
    confidence = torch.where(answers, p.amax(1), torch.nan)
    return _labels(student), label, confidence, torch.where(answers, _entropy(p), torch.nan)


def _entropy(p: Tensor) -> Tensor:
    return -(p * _log(p)).sum(1)


def dist_rows(a: Tensor, b: Tensor) -> Tensor:
    """``1 - rho`` of each row, ``rho = <a0, b0> / (|a0| |b0| + 1e-8)``, both less their means.

    The norm of a constant row has gradient 0.
    """
    a0, b0 = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)

    def norm(x: Tensor) -> Tensor:
        square = x.square().sum(1)
        some = square != 0
        return torch.where(some, torch.where(some, square, 1).sqrt(), 0)

    return 1 - (a0 * b0).sum(1) / (norm(a0) * norm(b0) + 1e-8)


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
    t_squared: bool = True,
) -> Tensor:
    """Twin of :func:`fastscarce.ops.dist_loss`; same arguments and result, no checks."""
    if student.shape[0] == 0:
        return student.sum()
    q = (student / temperature).softmax(1)
    p = (teacher.to(student.dtype) / temperature).softmax(1)
    scale = temperature**2 if t_squared else 1.0
    rows, columns = dist_rows(q, p).mean(), dist_rows(q.T, p.T).mean()
    return scale * (inter * rows + intra * columns)


def label_rows(
    student: Tensor,
    target: Tensor | MixedTarget,
    label_smoothing: float,
    ignore_index: int,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row with ``Y = (1 - eps) * label + eps / classes``, and its label mass.

    A mixed label is two rows of weight ``lam`` and ``1 - lam``; the ignored ones fall out. The mass
    is what is left: what the row counts in the mean. A dense label counts 1. A class weight
    multiplies the class in ``Y``, and of index labels in the mass.
    """
    rows, classes = student.shape
    by_class = student.new_ones(classes) if class_weight is None else class_weight
    by_class = by_class.to(student.dtype)
    if isinstance(target, Tensor) and target.is_floating_point():
        label = target.to(student.dtype)
        mass = student.new_ones(rows)
        soft = (1 - label_smoothing) * label + label_smoothing / classes
    else:
        if isinstance(target, Tensor):
            target = MixedTarget(target, target, torch.ones(rows, device=target.device))
        label = student.new_zeros(rows, classes)
        valid = student.new_zeros(rows)
        mass = student.new_zeros(rows)
        lam = target.lam.to(student.dtype)
        for index, share in ((target.a, lam), (target.b, 1 - lam)):
            share = torch.where(index == ignore_index, torch.zeros_like(share), share)
            place = torch.where(index == ignore_index, torch.zeros_like(index), index)
            label = label.scatter_add(1, place[:, None], share[:, None])
            valid = valid + share
            mass = mass + share * by_class[place]
        soft = (1 - label_smoothing) * label + label_smoothing * valid[:, None] / classes
    soft = soft * by_class
    log_q = student.log_softmax(1)
    zero = torch.zeros_like(log_q)
    return -(soft * torch.where(soft != 0, log_q, zero)).sum(1), mass


def kd_loss(
    student: Tensor,
    teacher: Tensor | TopK | MixedTopK | None,
    target: Tensor | MixedTarget | None = None,
    *,
    loss: str = "kl",
    tail: str = "uniform",
    temperature: float = 1.0,
    alpha: float = 0.5,
    beta: float = 0.5,
    skew: float = 0.1,
    dkd_alpha: float = 1.0,
    dkd_beta: float = 8.0,
    inter: float = 1.0,
    intra: float = 1.0,
    threshold: float = 0.0,
    t_squared: bool = True,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Twin of :func:`fastscarce.ops.kd_loss`; same arguments and result, no checks."""
    if loss == "dist" and teacher is not None:
        whole = dist_loss(
            student,
            teacher,  # type: ignore[arg-type]
            temperature=temperature,
            inter=inter,
            intra=intra,
            t_squared=t_squared,
        )
        if target is None:
            return whole
        label = kd_loss(
            student,
            None,
            target,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
        return alpha * whole + (1 - alpha) * label
    rows = student.shape[0]
    weights = student.new_ones(rows) if weight is None else weight.to(student.dtype)
    distil = label = student.new_zeros(rows)
    distil_mass, label_mass = weights, student.new_zeros(rows)
    share = alpha if target is not None else 1.0
    share = share if t_squared else share / temperature**2
    if isinstance(teacher, (TopK, MixedTopK)):
        rows_of, confidence = topk_rows(student, teacher, temperature, tail)
        sure = ~(confidence < threshold)
        distil = share * weights * torch.where(sure, rows_of, torch.zeros_like(rows_of))
    elif teacher is not None:
        teacher = teacher.to(student.dtype)
        seen = (standardised(student), standardised(teacher))
        if loss != "logit_standard":
            seen = (student, teacher)
        p = (seen[1] / temperature).softmax(1)
        if loss == "dkd":
            assert target is not None
            of = (dkd_alpha, dkd_beta)
            rows_of = dkd_rows(student, teacher, target, temperature, of, ignore_index)
        elif loss in ("kl", "logit_standard"):
            rows_of = kl_rows(*seen, temperature)
        else:
            q = (student / temperature).softmax(1)
            rows_of = temperature**2 * mixture_rows(loss, p, q, skew if loss == "skew_kl" else beta)
        sure = p.amax(1) >= threshold if threshold > 0 else torch.ones_like(weights) > 0
        distil = share * weights * torch.where(sure, rows_of, torch.zeros_like(rows_of))
    if target is not None:
        share = 1 - alpha if teacher is not None else 1.0
        label, mass = label_rows(student, target, label_smoothing, ignore_index, class_weight)
        label, label_mass = share * weights * label, weights * mass
    if reduction == "none":
        return distil + label
    if reduction == "sum":
        return (distil + label).sum()

    def mean(values: Tensor, masses: Tensor) -> Tensor:
        total = masses.sum()
        return values.sum() / torch.where(total == 0, torch.ones_like(total), total)

    return mean(distil, distil_mass) + mean(label, label_mass)
