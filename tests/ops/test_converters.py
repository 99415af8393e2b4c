"""Each converter beside the loss that it stands in for: the same number, the same gradient.

timm and torchdistill are called themselves. The formulas of mdistiller (not on PyPI), DeiT (a
script) and Liger-Kernel (its kernels need a GPU) are written out here in plain PyTorch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscarce.ops import (
    CrossEntropyLoss,
    MixedTarget,
    TokenDistillationLoss,
    WeightedKDLoss,
    converters,
    kd_loss,
)

DTYPES = [torch.float64, torch.float32]
ROWS, CLASSES = 12, 7
PATHS = ("head", "output", "fc", "input")


def logits(seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)).to(dtype)


def labels() -> Tensor:
    return torch.arange(ROWS) * 5 % CLASSES


def soft_labels(dtype: torch.dtype) -> Tensor:
    return logits(5, dtype).softmax(1)


def same(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], dtype: torch.dtype, leaves: int = 1
) -> None:
    """Value and gradient agree on fresh leaves of logits, also where the loss is scaled after."""
    results = []
    for loss in (ours, theirs):
        students = [logits(10 + i, dtype).requires_grad_() for i in range(leaves)]
        value = loss(*students)
        gradients = torch.autograd.grad(3.0 * value, students)
        assert any(bool(gradient.abs().max() > 1e-4) for gradient in gradients)
        results.append((value, *gradients))
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {}
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


class Fixed(nn.Module):
    """A model in timm's sense whose answer is what it was given."""

    num_classes, in_chans = CLASSES, 3

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def forward(self, _: Tensor) -> Any:
        return self.answer

    def set_distilled_training(self, enable: bool) -> None:
        assert enable


# timm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_timm_label_smoothing(dtype: torch.dtype, smoothing: float) -> None:
    from timm.loss import LabelSmoothingCrossEntropy

    ours = converters.timm_label_smoothing_cross_entropy(smoothing)
    theirs = LabelSmoothingCrossEntropy(smoothing)
    same(lambda s: ours(s, labels()), lambda s: theirs(s, labels()), dtype)
    default = inspect.signature(LabelSmoothingCrossEntropy).parameters["smoothing"].default
    assert converters.timm_label_smoothing_cross_entropy().label_smoothing == default


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mass", [1.0, 0.7])
def test_timm_soft_target(dtype: torch.dtype, mass: float) -> None:
    from timm.loss import SoftTargetCrossEntropy

    ours, theirs = converters.timm_soft_target_cross_entropy(), SoftTargetCrossEntropy()
    target = mass * soft_labels(dtype)
    same(lambda s: ours(s, target), lambda s: theirs(s, target), dtype)


def test_timm_soft_target_from_a_mixed_target() -> None:
    from timm.loss import SoftTargetCrossEntropy

    ours, theirs = converters.timm_soft_target_cross_entropy(), SoftTargetCrossEntropy()
    mixed = MixedTarget(labels(), labels().flip(0), torch.linspace(0, 1, ROWS))
    dense = mixed.dense(CLASSES)
    same(lambda s: ours(s, mixed), lambda s: theirs(s, dense), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 2.5}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_timm_logit_distillation(
    dtype: torch.dtype, weights: dict[str, float], smoothing: float
) -> None:
    from timm.task import LogitDistillationTask

    teacher, image = logits(1, dtype), torch.zeros(1, 3, 1, 1)

    def theirs(student: Tensor) -> Tensor:
        task = LogitDistillationTask(
            Fixed(student),
            Fixed(teacher),
            criterion_kwargs={"smoothing": smoothing},
            temperature=3.0,
            device=torch.device("cpu"),
            verbose=False,
            **weights,
        )
        loss: Tensor = task(image, labels())["loss"]
        return loss

    ours = converters.timm_logit_distillation(**weights, temperature=3.0, smoothing=smoothing)
    same(lambda s: ours(s, teacher, labels()), theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("weights", [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 2.5}])
def test_timm_token_distillation(dtype: torch.dtype, kind: str, weights: dict[str, float]) -> None:
    from timm.task import TokenDistillationTask

    teacher, image = logits(1, dtype), torch.zeros(1, 3, 1, 1)

    def theirs(*pair: Tensor) -> Tensor:
        task = TokenDistillationTask(
            Fixed(pair),
            Fixed(teacher),
            distill_type=kind,
            temperature=3.0,
            device=torch.device("cpu"),
            verbose=False,
            **weights,
        )
        loss: Tensor = task(image, labels())["loss"]
        return loss

    ours = converters.timm_token_distillation(kind, **weights, temperature=3.0)
    same(lambda *pair: ours(pair, teacher, labels()), theirs, dtype, leaves=2)


# torchdistill


# PyTorch announces that reduction="mean" will change.
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("name", ["KDLoss", "LogitStdKDLoss"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize(
    "weights",
    [
        {"alpha": 0.3},
        {"alpha": 0.5, "beta": 9.0},
        {"alpha": 1.0},
        {"alpha": 0.0},
        {"beta": 2.0},
        {"alpha": 0.4, "label_smoothing": 0.1, "ignore_index": 3},
    ],
)
def test_torchdistill(
    name: str, dtype: torch.dtype, reduction: str, weights: dict[str, Any]
) -> None:
    from torchdistill.losses import mid_level

    convert = {
        "KDLoss": converters.torchdistill_kd,
        "LogitStdKDLoss": converters.torchdistill_logit_std_kd,
    }[name]
    original = getattr(mid_level, name)
    ours = convert(*PATHS, temperature=2.0, reduction=reduction, **weights)
    theirs = original(*PATHS, temperature=2.0, reduction=reduction, **weights)
    teacher = {"fc": {"input": logits(1, dtype)}}
    for targets in (labels(), None):
        same(
            lambda s, t=targets: ours({"head": {"output": s}}, teacher, t),
            lambda s, t=targets: theirs({"head": {"output": s}}, teacher, t),
            dtype,
        )
    expected = inspect.signature(original).parameters
    for option, parameter in inspect.signature(convert).parameters.items():
        if option in expected:
            assert parameter.default == expected[option].default, option


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_torchdistill_class_weights(smoothing: float) -> None:
    from torchdistill.losses import mid_level

    options: dict[str, Any] = {"temperature": 2.0, "alpha": 0.3, "label_smoothing": smoothing}
    for dtype in (torch.float64, torch.float32):
        options["weight"] = torch.arange(CLASSES, dtype=dtype) % 4 / 2
        ours = converters.torchdistill_kd(*PATHS, **options)
        theirs = mid_level.KDLoss(*PATHS, **options)
        teacher = {"fc": {"input": logits(1, dtype)}}
        same(
            lambda s, f=ours, t=teacher: f({"head": {"output": s}}, t, labels()),
            lambda s, f=theirs, t=teacher: f({"head": {"output": s}}, t, labels()),
            dtype,
        )


# mdistiller


def mdistiller_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = torch.softmax(teacher / temperature, 1)
    elements = F.kl_div(torch.log_softmax(student / temperature, 1), p, reduction="none")
    return elements.sum(1).mean() * temperature**2


def mdistiller_dkd(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """TCKD on (label, rest), NCKD on logits whose label was pushed down by 1000."""
    chosen = F.one_hot(target, student.shape[1]).to(student.dtype)
    scale = temperature**2 / target.shape[0]

    def two(x: Tensor) -> Tensor:
        probabilities = torch.softmax(x / temperature, 1)
        one = (probabilities * chosen).sum(1)
        return torch.stack([one, (probabilities * (1 - chosen)).sum(1)], 1)

    def rest(x: Tensor) -> Tensor:
        return x / temperature - 1000.0 * chosen

    tckd = F.kl_div(two(student).log(), two(teacher), reduction="sum")
    nckd = F.kl_div(
        torch.log_softmax(rest(student), 1), torch.softmax(rest(teacher), 1), reduction="sum"
    )
    return scale * (alpha * tckd + beta * nckd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(0.1, 0.9), (1.0, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_mdistiller_kd(dtype: torch.dtype, weights: tuple[float, float]) -> None:
    teacher = logits(1, dtype)
    ours = converters.mdistiller_kd(4.0, *weights)

    def theirs(student: Tensor) -> Tensor:
        label = weights[0] * F.cross_entropy(student, labels())
        return label + weights[1] * mdistiller_kd(student, teacher, 4.0)

    same(lambda s: ours(s, teacher, labels()), theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ce_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_mdistiller_dkd(dtype: torch.dtype, ce_weight: float, factor: float) -> None:
    teacher = logits(1, dtype)
    ours = converters.mdistiller_dkd(ce_weight, 0.5, 8.0, 4.0)
    ours.distil_weight = factor

    def theirs(student: Tensor) -> Tensor:
        label = ce_weight * F.cross_entropy(student, labels())
        return label + factor * mdistiller_dkd(student, teacher, labels(), 0.5, 8.0, 4.0)

    same(lambda s: ours(s, teacher, labels()), theirs, dtype)


def test_mdistiller_dkd_before_its_warm_up() -> None:
    ours = converters.mdistiller_dkd()
    ours.distil_weight = 0.0
    same(
        lambda s: ours(s, logits(1, torch.float64), labels()),
        lambda s: F.cross_entropy(s, labels()),
        torch.float64,
    )


# DeiT


def deit(
    base: Tensor, distillation: Tensor, teacher: Tensor, kind: str, alpha: float, tau: float
) -> Tensor:
    """DeiT's sum, whose soft term is divided by rows and classes."""
    if kind == "hard":
        term = F.cross_entropy(distillation, teacher.argmax(1))
    else:
        term = F.kl_div(
            torch.log_softmax(distillation / tau, 1),
            torch.log_softmax(teacher / tau, 1),
            reduction="sum",
            log_target=True,
        )
        term = term * tau**2 / distillation.numel()
    return (1 - alpha) * base + alpha * term


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("alpha", [0.5, 0.9])
@pytest.mark.parametrize("fused", [False, True])
def test_deit(dtype: torch.dtype, kind: str, alpha: float, fused: bool) -> None:
    base: Callable[[Tensor, Tensor], Tensor] = nn.CrossEntropyLoss(label_smoothing=0.1)
    chosen = converters.timm_label_smoothing_cross_entropy(0.1) if fused else base
    teacher = nn.Linear(4, CLASSES, dtype=dtype)
    images = torch.linspace(-1, 1, 4 * ROWS, dtype=dtype).reshape(ROWS, 4)
    ours = converters.deit_distillation(chosen, teacher, kind, alpha, 3.0)

    def theirs(label: Tensor, distillation: Tensor) -> Tensor:
        with torch.no_grad():
            answer = teacher(images)
        return deit(base(label, labels()), distillation, answer, kind, alpha, 3.0)

    same(lambda *pair: ours(images, pair, labels()), theirs, dtype, leaves=2)
    assert teacher.weight.grad is None


def test_deit_without_distillation_is_the_base_criterion() -> None:
    student = logits(0, torch.float64)
    ours = converters.deit_distillation(F.cross_entropy, nn.Identity(), "none", 0.5, 1.0)
    expected = F.cross_entropy(student, labels())
    assert torch.equal(ours(student, student, labels()), expected)
    assert torch.equal(ours(student, (student, student), labels()), expected)


# Liger-Kernel. The student's leaf is its logits: a log_softmax stands before both.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("log_target", [False, True])
def test_liger_kl_div(dtype: torch.dtype, reduction: str, log_target: bool) -> None:
    log_p = logits(1, dtype).log_softmax(1)
    y_true = log_p if log_target else log_p.exp()
    ours = converters.liger_kl_div(reduction, log_target)

    def theirs(student: Tensor) -> Tensor:
        total = (log_p.exp() * (log_p - student.log_softmax(1))).sum()
        return total / {"batchmean": ROWS, "sum": 1, "mean": ROWS * CLASSES}[reduction]

    same(lambda s: ours(s.log_softmax(1), y_true), theirs, dtype)
    if log_target:
        same(lambda s: ours(s, logits(1, dtype)), theirs, dtype)


def test_liger_kl_div_of_a_target_with_zeros() -> None:
    y_true = F.one_hot(labels(), CLASSES).double()
    ours = converters.liger_kl_div("batchmean")
    same(
        lambda s: ours(s.log_softmax(1), y_true), lambda s: F.cross_entropy(s, labels()), DTYPES[0]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("ignore_index", [None, -100, 3])
def test_liger_jsd(dtype: torch.dtype, beta: float, ignore_index: int | None) -> None:
    log_p = logits(1, dtype).log_softmax(1)
    shift_labels = None
    if ignore_index is not None:
        shift_labels = torch.where(torch.arange(ROWS) % 3 == 0, ignore_index, 5)
    ours = converters.liger_jsd(beta, -100 if ignore_index is None else ignore_index)

    def theirs(student: Tensor) -> Tensor:
        log_q = student.log_softmax(1)
        p, q = log_p.exp(), log_q.exp()
        if beta == 0:
            elements = p * (log_p - log_q)
        elif beta == 1:
            elements = q * (log_q - log_p)
        else:
            log_m = (beta * p + (1 - beta) * q).log()
            elements = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
        rows = elements.sum(1)
        return (rows if shift_labels is None else rows[shift_labels != ignore_index]).mean()

    same(lambda s: ours(s.log_softmax(1), log_p, shift_labels), theirs, dtype)
    same(lambda s: ours(s, logits(1, dtype), shift_labels), theirs, dtype)


def test_liger_jsd_of_ignored_rows_alone_is_zero() -> None:
    student = logits(0, torch.float32).requires_grad_()
    loss = converters.liger_jsd()(student, logits(1, torch.float32), torch.full((ROWS,), -100))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert bool((gradient == 0).all())


# What they are made of


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "jsd", "beta": 0.2},
        {"loss": "skew_kl", "skew": 0.3},
        {"loss": "dkd", "dkd_alpha": 0.5, "dkd_beta": 3.0},
        {"loss": "kl", "ignore_index": 5, "reduction": "none", "gradient": "recompute"},
        {"threshold": 0.4, "label_smoothing": 0.2, "temperature": 2.0},
    ],
)
def test_weighted_is_the_sum_of_its_terms(options: dict[str, Any]) -> None:
    student, teacher = logits(0, torch.float64), logits(1, torch.float64)
    weight = torch.linspace(0, 1, ROWS)
    module = WeightedKDLoss(2.5, 0.5, **options)

    def term(alpha: float) -> Tensor:
        return kd_loss(student, teacher, labels(), alpha=alpha, weight=weight, **options)

    expected = 2.5 * term(1.0) + 0.5 * term(0.0)
    torch.testing.assert_close(module(student, teacher, labels(), weight), expected)


def test_weighted_with_one_term_keeps_its_weight() -> None:
    student, teacher = logits(0, torch.float64), logits(1, torch.float64)
    module = WeightedKDLoss(2.5, 0.5)
    assert torch.equal(module(student, teacher), 2.5 * kd_loss(student, teacher))
    label = kd_loss(student, None, labels())
    assert torch.equal(module(student, None, labels()), 0.5 * label)
    assert "distil_weight=2.5" in repr(module)
    assert "label_smoothing=0.1" in repr(CrossEntropyLoss(0.1))


def test_weighted_under_compile() -> None:
    module = WeightedKDLoss(1.0, 0.5, temperature=2.0, over_classes=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    teacher = logits(1, torch.float32)
    same(
        lambda s: compiled(s, teacher, labels()),
        lambda s: module(s, teacher, labels()),
        torch.float32,
    )


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: WeightedKDLoss(-0.1, 1.0), "finite weights of 0 or more"),
    (lambda: WeightedKDLoss(0.0, 0.0), "one above 0"),
    (lambda: WeightedKDLoss(float("nan"), 1.0), "finite weights"),
    (lambda: TokenDistillationLoss(0.5, 0.5, kind="medium"), "kind 'soft' or 'hard'"),
    (lambda: converters.timm_logit_distillation(1.5), "finite weights of 0 or more"),
    (lambda: converters.timm_token_distillation("none"), "kind 'soft' or 'hard'"),
    (lambda: converters.torchdistill_kd(*PATHS, 1.0, 0.5, reduction="none"), "got 'none'"),
    (lambda: converters.torchdistill_kd(*PATHS, 0.0, 0.5), "positive, finite temperature"),
    (lambda: converters.torchdistill_kd(*PATHS, 1.0, 1.5), "finite weights of 0 or more"),
    (lambda: converters.torchdistill_logit_std_kd(*PATHS, 1.0, eps=0.1), "eps 1e-7, got 0.1"),
    (lambda: converters.deit_distillation(F.cross_entropy, nn.Identity(), "x", 0.5, 1), "got 'x'"),
    (lambda: converters.deit_distillation(F.cross_entropy, nn.Identity(), "soft", 2, 1), "got 2"),
    (
        lambda: converters.deit_distillation(F.cross_entropy, nn.Identity(), "soft", 0.5, 1)(
            torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
        ),
        "outputs of a pair",
    ),
    (lambda: converters.liger_kl_div("none"), "a loss a row"),
    (lambda: converters.liger_jsd(1.1), "beta in 0 to 1, got 1.1"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refuses_what_cannot_be_mapped(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def moving_over() -> list[str]:
    """Our calls in the README's table."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.split("### Moving over\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [row.split(" | ")[1].strip("`") for row in rows]


def test_every_converter_is_in_the_readme_and_its_call_runs() -> None:
    calls = moving_over()
    names = {"temperature": 4.0, "smoothing": 0.1, "alpha": 0.5, "beta": 0.5, "tau": 3.0}
    names |= {"criterion": CrossEntropyLoss(), "teacher": nn.Identity(), "paths": PATHS}
    scope = {name: getattr(converters, name) for name in converters.__all__}
    for call in calls:
        assert isinstance(eval(call, {**scope, **names}), nn.Module), call
    assert {call.split("(")[0] for call in calls} == set(converters.__all__)
