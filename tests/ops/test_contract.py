"""What holds for every loss and every kind of teacher alike, and sizes that few tests reach."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastscarce.ops import (
    MixedTarget,
    MixedTopK,
    confidence,
    dist_loss,
    kd_loss,
    linear_kd_loss,
    reference,
    topk,
)

TAILS = ("uniform", "renorm", "tail", "support")
# Options of the loss, and the kind of its teacher.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "cross_entropy": ({}, "none"),
    **{
        loss: ({"loss": loss}, "dense")
        for loss in ("kl", "reverse_kl", "jsd", "skew_kl", "dkd", "logit_standard", "dist")
    },
    **{f"topk_{tail}": ({"tail": tail}, "topk") for tail in TAILS},
    **{f"mixed_{tail}": ({"tail": tail}, "mixed") for tail in TAILS[:2]},
}
every_case = pytest.mark.parametrize("name", CASES)
# A batch's loss: its rows are not apart.
of_rows = pytest.mark.parametrize("name", [name for name in CASES if name != "dist"])


def case(
    name: str, rows: int, classes: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Any, Tensor, dict[str, Any]]:
    """Student, teacher, labels, options."""
    generator = torch.Generator().manual_seed(rows * 1009 + classes)
    student, first, second = (
        (2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(3)
    )
    options, kind = CASES[name]
    teacher: Any = {"none": None, "dense": first}.get(kind)
    if kind in ("topk", "mixed"):
        teacher = topk(first, min(5, classes))
    if kind == "mixed":
        lam = torch.rand(rows, generator=generator)
        teacher = MixedTopK(teacher, topk(second, min(3, classes)), lam)
    return student, teacher, torch.arange(rows) % classes, {"temperature": 2.0, **options}


def both(
    student: Tensor, teacher: Any, target: Any, *, function: Any = kd_loss, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient; rows of the same upstream."""
    leaf = student.detach().requires_grad_()
    loss = function(leaf, teacher, target, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("threads", [1, 2])
@every_case
def test_a_hundred_repeats(name: str, threads: int) -> None:
    for rows, classes in ((64, 12), (24, 1500)):
        *arguments, options = case(name, rows, classes)
        torch.set_num_threads(threads)
        try:
            first = both(*arguments, **options)
            for _ in range(100):
                again = both(*arguments, **options)
                assert torch.equal(again[0], first[0])
                assert torch.equal(again[1], first[1])
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("classes", [10, 100])
@of_rows
def test_a_bad_logit_stays_in_its_row(isa: str, name: str, classes: int, bad: float) -> None:
    student, teacher, target, options = case(name, 20, classes)
    options["reduction"] = "none"
    value, gradient = both(student, teacher, target, **options)
    others = torch.arange(20) != 7
    student[7, classes // 2] = bad
    got, got_gradient = both(student, teacher, target, **options)
    assert got[7].isnan()
    assert torch.equal(got[others], value[others])
    assert torch.equal(got_gradient[others], gradient[others])
    assert kd_loss(student, teacher, target, **(options | {"reduction": "mean"})).isnan()


@pytest.mark.parametrize("mode", ["in_forward", "recompute"])
@every_case
def test_backward_twice(name: str, mode: str) -> None:
    student, teacher, target, options = case(name, 9, 40)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, target, gradient=mode, **options)
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    once = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once, rtol=0, atol=0)


@every_case
def test_a_gradient_made_in_the_forward_pass_has_no_graph(name: str) -> None:
    student, teacher, target, options = case(name, 9, 40)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, target, **options).sum()
    with pytest.raises(RuntimeError, match="pass gradient='recompute'"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@every_case
def test_no_rows(name: str) -> None:
    for reduction in ("mean", "sum", "none") if name != "dist" else ("mean",):
        student, teacher, target, options = case(name, 0, 12)
        for mode in ("in_forward", "recompute"):
            options.update(reduction=reduction, gradient=mode)
            loss, gradient = both(student, teacher, target, **options)
            assert loss.shape == ((0,) if reduction == "none" else ())
            assert not loss.any()
            assert gradient.shape == (0, 12)


def labels(form: str, rows: int, classes: int) -> Any:
    index = torch.arange(rows) % classes
    if form == "index":
        return index.masked_fill(index == 1, -100)
    if form == "mixed":
        return MixedTarget(index, index.flip(0), torch.linspace(0, 1, rows))
    if form == "dense":
        return torch.linspace(-1, 2, rows * classes).reshape(rows, classes).double().softmax(1)
    return None


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", ["index", "mixed", "dense", "none"])
def test_each_term_alone_is_differentiated_twice(form: str, reduction: str) -> None:
    student, teacher, _, _ = case("kl", 4, 6, torch.float64)
    target, leaf = labels(form, 4, 6), student.requires_grad_()

    def loss_of(logits: Tensor) -> Tensor:
        return kd_loss(
            logits,
            teacher if form == "none" else None,
            target,
            temperature=3.0,
            label_smoothing=0.1,
            gradient="recompute",
            reduction=reduction,
        )

    assert torch.autograd.gradgradcheck(loss_of, (leaf,))


@of_rows
def test_arguments_with_gaps(isa: str, name: str) -> None:
    for classes in (12, 150):
        student, teacher, target, options = case(name, 14, classes)
        weight, share = torch.linspace(0, 2, 14), torch.linspace(1, 0, 14)
        of_class = torch.linspace(0.5, 1.5, classes)

        def gaps(x: Any) -> Any:
            """The same values, every other of which belongs to something else."""
            if isinstance(x, Tensor):
                wide = torch.stack([x, torch.full_like(x, 7)], dim=-1)
                return wide[..., 0]
            return None if x is None else type(x)(*(gaps(part) for part in vars(x).values()))

        soft = student.flip(0).softmax(1)
        for label in (target, MixedTarget(target, target.flip(0), share), soft):
            if name == "dkd" and label is soft:
                continue
            own = {"weight": weight, "class_weight": of_class, "reduction": "none", **options}
            expected = both(student, teacher, label, **own)
            own |= {"weight": gaps(weight), "class_weight": gaps(of_class)}
            got = both(gaps(student), gaps(teacher), gaps(label), **own)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
    leaf = student.requires_grad_()
    # An upstream that is one number, seen as many.
    loss = kd_loss(leaf, teacher, target, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones(()).expand(14))
    assert torch.equal(gradient, both(student, teacher, target, reduction="none", **options)[1])


@every_case
def test_autocast_around_a_model(name: str) -> None:
    _, teacher, target, options = case(name, 16, 20)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 8, 8, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 20))
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(images)
            loss = kd_loss(logits, teacher, target, **options)
        assert torch.equal(loss, kd_loss(logits, teacher, target, **options))
        assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert loss.dtype == torch.float32
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        assert float((exact - rounded).norm()) <= 0.15 * float(exact.norm()) + 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, "target on one device"),
        ({"target": torch.zeros(4, 10, device="meta")}, "dense target on one device"),
        ({"weight": torch.ones(4, device="meta")}, "weight on one device, got cpu and meta"),
        ({"class_weight": torch.ones(10, device="meta")}, "class_weight on one device"),
        ({"out": torch.ones(4, 10, device="meta")}, "on cpu, got .* on meta"),
        (
            {"target": MixedTarget(*[torch.zeros(4).long()] * 2, torch.ones(4)).to("meta")},
            r"target\.a on one device",
        ),
        ({"temperature": -1.0}, "positive, finite temperature, got -1"),
        ({"temperature": math.inf}, "positive, finite temperature, got inf"),
        ({"alpha": -0.1}, "alpha in 0 to 1, got -0.1"),
        ({"alpha": math.nan}, "alpha in 0 to 1, got nan"),
        ({"alpha": (math.nan, 1.0)}, "finite weights of 0 or more"),
        ({"threshold": 1.5}, "threshold in 0 to 1, got 1.5"),
        ({"weight": torch.ones(4, 1)}, r"weight of shape \(rows,\)"),
        ({"student": torch.randn(2, 4, 10)}, r"\(rows, classes\).*\(2, 4, 10\)"),
        ({"student": torch.ones(4, 10, dtype=torch.complex64)}, "got torch.complex64"),
        (
            {"target": torch.full((4,), 2**40)},
            "0 to 9 or ignore_index, -100, got 1099511627776 in row 0",
        ),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {
        "student": torch.randn(4, 10, requires_grad=True),
        "teacher": torch.randn(4, 10),
        "target": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=words) as raised:
        kd_loss(**(good | change))
    assert str(raised.value).startswith("kd_loss needs")


@pytest.mark.parametrize("classes", [8142, 11821, 128256])
@every_case
def test_as_many_classes_as_there_are(name: str, classes: int) -> None:
    student, teacher, target, options = case(name, 3, classes)
    value, gradient = both(student, teacher, target, **options)
    wide = teacher.double() if isinstance(teacher, Tensor) else teacher
    exact, exact_gradient = both(
        student.double(), wide, target, function=reference.kd_loss, **options
    )
    torch.testing.assert_close(value.double(), exact, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-7)


def _free_bytes() -> int:
    """Memory that is free, or that the system would free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))


@pytest.mark.skipif(_free_bytes() < 10 * 2**30, reason="needs 10 GiB of free memory")
def test_more_logits_than_32_bits_count() -> None:
    # Zeros that nobody wrote take no memory; the gradient does, 4 GiB of it. The teacher's rows are
    # the student's next ones.
    rows, classes = 65537, 32769
    assert rows * classes > 2**31
    last, of_teacher, target, options = case("kl", 2, classes, torch.bfloat16)
    memory = torch.zeros(rows + 1, classes, dtype=torch.bfloat16)
    memory[-3:-1], memory[-1] = last, of_teacher[1]
    of_teacher[0] = last[1]
    labels = torch.cat([torch.zeros(rows - 2, dtype=torch.int64), target])
    options["reduction"] = "none"
    leaf = memory[:-1].requires_grad_()
    loss, found = kd_loss(leaf, memory[1:].detach(), labels, statistics=True, **options)
    expected, expected_found = kd_loss(last, of_teacher, target, statistics=True, **options)
    assert torch.equal(loss[-2:].detach(), expected)
    torch.testing.assert_close(loss[0].item(), 0.5 * math.log(classes), rtol=1e-6, atol=0)
    for a, b in zip(found, expected_found, strict=True):
        assert a is not None
        assert torch.equal(a[-2:], b)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.equal(gradient[-2:], both(last, of_teacher, target, **options)[1])
    assert gradient[rows - 4, 0] == -0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@every_case
def test_cuda_graph(name: str) -> None:
    student, teacher, target, options = case(name, 64, 300)
    leaf = student.cuda().requires_grad_()
    given = None if teacher is None else teacher.to("cuda")
    label = target.cuda()

    def step() -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        loss, found = kd_loss(leaf, given, label, statistics=True, **options)
        return loss, torch.autograd.grad(loss, leaf)[0], found

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient, found = step()
    for scale in (1.0, 0.5):
        with torch.no_grad():
            leaf.copy_(scale * student)
        graph.replay()
        expected, expected_gradient, expected_found = step()
        assert torch.equal(loss, expected)
        assert torch.equal(gradient, expected_gradient)
        for a, b in zip(found, expected_found, strict=True):
            assert a is b is None or torch.equal(a, b)  # type: ignore[arg-type]


LOGITS, LABELS = torch.randn(3, 5), torch.arange(3)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: kd_loss(LOGITS.numpy(), LOGITS, LABELS), "student as a tensor, got ndarray"),
        (lambda: kd_loss("logits", LOGITS, LABELS), "student as a tensor, got str"),
        (lambda: kd_loss(LOGITS, LOGITS.numpy(), LABELS), "teacher as a tensor, got ndarray"),
        (lambda: kd_loss(LOGITS, LOGITS, [0, 1, 2]), "target as a tensor, got list"),
        (lambda: kd_loss(LOGITS, LOGITS, LABELS, weight=[1, 1, 1]), "weight as a tensor, got list"),
        (lambda: kd_loss(LOGITS, LOGITS, LABELS, class_weight=[1] * 5), "class_weight as a tensor"),
        (lambda: kd_loss(LOGITS, LOGITS, LABELS, out=[0]), "out as a tensor, got list"),
        (lambda: dist_loss(LOGITS, LOGITS.numpy()), "teacher logits as a tensor, got ndarray"),
        (lambda: topk(LOGITS.numpy(), 2), "logits as a tensor, got ndarray"),
        (lambda: confidence(LOGITS.numpy()), "logits as a tensor, got ndarray"),
        (
            lambda: linear_kd_loss(LOGITS.numpy(), LOGITS, None, LOGITS),
            "features as a tensor, got ndarray",
        ),
    ],
)
def test_what_is_no_tensor_is_refused(call: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call()
