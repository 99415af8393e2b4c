"""linear_kd_loss against the layer and kd_loss one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastscarce.ops import MixedTarget, MixedTopK, TopK, kd_loss, linear_kd_loss, topk

SMALL = 0.02  # MiB: several chunks


def example(rows: int = 70, classes: int = 60, width: int = 8) -> Any:
    generator = torch.Generator().manual_seed(rows + classes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(classes, (rows,), generator=generator)
    labels[::4] = -100
    layer = (normal(rows, width), normal(classes, width), normal(classes))
    return layer, (normal(rows, 5), normal(classes, 5), normal(classes)), labels


def gradients(loss: Tensor, layer: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(3 * loss, layer))


def compare(layer: Any, teacher: Any, target: Any, dense: Any, **options: Any) -> None:
    leaves = tuple(x.clone().requires_grad_() for x in layer)
    for bias in (leaves[2], None):
        used = leaves if bias is not None else leaves[:2]
        given = dict(options)
        given["row_weight"] = given.pop("weight", None)
        got = gradients(linear_kd_loss(*leaves[:2], bias, teacher, target, **given), used)
        whole = kd_loss(F.linear(*leaves[:2], bias), dense, target, **_without_memory(options))
        torch.testing.assert_close(got, gradients(whole, used))


def _without_memory(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "memory"}


@pytest.mark.parametrize("memory", [SMALL, 32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_teachers(reduction: str, memory: float) -> None:
    layer, head, labels = example()
    logits = F.linear(*head)
    options: Any = {"reduction": reduction, "memory": memory, "temperature": 2.0}
    compare(layer, logits, labels, logits, **options)
    compare(layer, head, labels, logits, **options)
    compare(layer, head[:2], labels, F.linear(*head[:2]), **options)
    compare(layer, None, labels, None, **options)
    compare(layer, logits, None, logits, **options)
    record = topk(logits, 6)
    compare(layer, record, labels, record, tail="tail", **options)
    mixture = MixedTopK(record, topk(-logits, 4), torch.linspace(0, 1, 70))
    compare(layer, mixture, labels, mixture, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_and_weights(smoothing: float) -> None:
    layer, head, labels = example()
    logits = F.linear(*head)
    mixed = MixedTarget(labels, labels.roll(1), torch.linspace(0, 1, 70))
    soft = logits.flip(0).softmax(1)
    for target in (labels, mixed, soft):
        for weight in (None, torch.linspace(0, 2, 70)):
            for class_weight in (None, torch.linspace(0, 3, 60)):
                compare(
                    layer,
                    logits,
                    target,
                    logits,
                    memory=SMALL,
                    weight=weight,
                    class_weight=class_weight,
                    label_smoothing=smoothing,
                )


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd", "skew_kl", "dkd", "logit_standard"])
def test_other_divergences(loss: str) -> None:
    layer, head, labels = example()
    logits = F.linear(*head)
    options: Any = {"loss": loss, "threshold": 0.5, "t_squared": False, "temperature": 2.0}
    compare(layer, logits, labels, logits, memory=SMALL, **options)
    compare(layer, head, labels, logits, memory=SMALL, **options)


def test_no_label_at_all_and_no_rows() -> None:
    layer, head, labels = example()
    logits = F.linear(*head)
    nobody = torch.full_like(labels, -100)
    compare(layer, logits, nobody, logits, memory=SMALL)
    leaves = [x.requires_grad_() for x in layer]
    loss = linear_kd_loss(leaves[0][:0], *leaves[1:], logits[:0], labels[:0])
    loss.backward()
    assert loss == 0
    assert not leaves[1].grad.any()


def test_gradcheck() -> None:
    layer, head, labels = example(34, 6, 3)
    logits = F.linear(*head)
    leaves = tuple(x.requires_grad_() for x in layer)

    def function(*parts: Tensor) -> Tensor:
        return linear_kd_loss(*parts, logits, labels, memory=1e-6, temperature=2.0)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    layer, head, labels = example()
    exact = tuple(x.to(dtype).double().requires_grad_() for x in layer)
    teacher = F.linear(*head).to(dtype)
    expected = gradients(
        kd_loss(F.linear(*exact), teacher.double(), labels, temperature=4.0), exact
    )
    leaves = tuple(x.to(dtype).requires_grad_() for x in layer)
    got = gradients(
        linear_kd_loss(*leaves, teacher, labels, memory=SMALL / 2, temperature=4.0), leaves
    )
    step = 4 * torch.finfo(dtype).eps
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=step, atol=step * float(b.abs().max()))


def test_many_chunks_of_16_bits_add_up() -> None:
    # 64 chunks whose gradients are alike: sums in 16 bits would stop growing.
    generator = torch.Generator().manual_seed(0)
    features = torch.ones(1024, 8, dtype=torch.bfloat16)
    weight = torch.randn(5000, 8, generator=generator).to(torch.bfloat16).requires_grad_()
    bias = torch.zeros(5000, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(1, 5000, generator=generator).to(torch.bfloat16).expand(1024, 5000)
    exact = [x.detach().double().requires_grad_() for x in (weight, bias)]
    options: Any = {"reduction": "sum", "temperature": 2.0}
    got = torch.autograd.grad(
        linear_kd_loss(features, weight, bias, teacher, memory=1e-6, **options), (weight, bias)
    )
    logits = F.linear(features.double(), *exact)
    expected = torch.autograd.grad(kd_loss(logits, teacher.double(), **options), exact)
    for a, b in zip(got, expected, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < 0.01, error


def test_wide_features_of_16_bits() -> None:
    # A chunk of logits is smaller than a row of the weight.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 900, generator=generator).to(torch.bfloat16)
    weight = (torch.randn(3, 900, generator=generator) / 30).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(3, (20,), generator=generator)
    (got,) = torch.autograd.grad(
        linear_kd_loss(features, weight, None, None, labels, memory=1e-6), weight
    )
    exact = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        F.cross_entropy(F.linear(features.double(), exact), labels), exact
    )
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=1e-3)


def test_autocast() -> None:
    layer, head, labels = example()
    leaves = tuple(x.float().requires_grad_() for x in layer)
    teacher = tuple(x.float() for x in head)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_kd_loss(*leaves, teacher, labels)
    loss.backward()
    exact = kd_loss(F.linear(*(x.double() for x in leaves)), F.linear(*head), labels)
    torch.testing.assert_close(loss.double(), exact, rtol=0.02, atol=0.02)
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves)


def test_frozen_parts_and_no_grad() -> None:
    layer, head, labels = example()
    logits = F.linear(*head)
    features = layer[0].clone().requires_grad_()
    loss = linear_kd_loss(features, *layer[1:], logits, labels, memory=SMALL)
    loss.backward()
    assert features.grad is not None
    with torch.no_grad():
        assert linear_kd_loss(*layer, logits, labels, memory=SMALL) == loss
    weight = layer[1].clone().requires_grad_()
    linear_kd_loss(layer[0], weight, None, head, labels, memory=SMALL).backward()
    assert weight.grad is not None


def test_the_teacher_is_left_as_it_is() -> None:
    layer, head, labels = example()
    logits = F.linear(*head)
    before = [x.clone() for x in (logits, *head)]
    leaves = tuple(x.requires_grad_() for x in layer)
    linear_kd_loss(*leaves, logits, labels, memory=SMALL).backward()
    linear_kd_loss(*leaves, head, labels, memory=SMALL).backward()
    for a, b in zip(before, (logits, *head), strict=True):
        assert torch.equal(a, b)


def test_refusals() -> None:
    (features, weight, bias), head, _ = example()
    logits = F.linear(*head)
    with pytest.raises(ValueError, match="reduction 'mean' or 'sum', got 'none'"):
        linear_kd_loss(features, weight, bias, logits, reduction="none")
    with pytest.raises(ValueError, match=r"the student's features .* and weight"):
        linear_kd_loss(features, weight[:, 1:], bias, logits)
    with pytest.raises(ValueError, match=r"the student's bias of shape \(60,\), got \(59,\)"):
        linear_kd_loss(features, weight, bias[1:], logits)
    with pytest.raises(ValueError, match="the teacher's layer in one dtype"):
        linear_kd_loss(features, weight, bias, tuple(x.float() for x in head))
    with pytest.raises(ValueError, match=r"or \(features, weight, bias\), got 1 parts"):
        linear_kd_loss(features, weight, bias, (features,))
    with pytest.raises(ValueError, match="teacher of as many rows as features, 70, got 69"):
        linear_kd_loss(features, weight, bias, logits[1:])
    with pytest.raises(ValueError, match="needs no out, got one"):
        linear_kd_loss(features, weight, bias, logits, out=logits)
    with pytest.raises(ValueError, match="needs no statistics, got one"):
        linear_kd_loss(features, weight, bias, logits, statistics=True)
    with pytest.raises(ValueError, match="a loss of rows, got 'dist'"):
        linear_kd_loss(features, weight, bias, logits, loss="dist")
    with pytest.raises(ValueError, match="memory above 0 MiB, got 0"):
        linear_kd_loss(features, weight, bias, logits, memory=0)
    record = topk(logits, 3)
    wrong = TopK(record.indices + 58, record.log_probs, record.log_tail)
    with pytest.raises(ValueError, match="teacher's indices in 0 to 59"):
        linear_kd_loss(features, weight, bias, wrong)
    loss = linear_kd_loss(features.requires_grad_(), weight, bias, logits)
    with pytest.raises(RuntimeError, match="can't be differentiated again; pass the layer's"):
        torch.autograd.grad(loss, features, create_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda() -> None:
    layer, head, labels = example()
    leaves = tuple(x.requires_grad_() for x in layer)
    expected = gradients(linear_kd_loss(*leaves, head, labels, memory=SMALL), leaves)
    device = tuple(x.detach().cuda().requires_grad_() for x in layer)
    teacher = tuple(x.cuda() for x in head)
    got = gradients(linear_kd_loss(*device, teacher, labels.cuda(), memory=SMALL), device)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)
