"""Rows to bytes and back."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastscarce import _ops
from fastscarce.cache import Layout, decode, encode, pack
from fastscarce.cache.record import tags_of
from fastscarce.ops import kd_loss, pack_topk, topk, unpack_topk

# Every form of a row: dense, short and wide indices, all of more classes than a dense row has.
FORMS = [(10, 10), (10, 5), (1000, 16), (70000, 3), (300, 300)]


@pytest.mark.parametrize("codec", ["float16", "uint8"])
@pytest.mark.parametrize(("classes", "k"), FORMS)
def test_gives_back_what_was_said(classes: int, k: int, codec: str) -> None:
    generator = torch.Generator().manual_seed(classes + k)
    logits = torch.randn(9, classes, generator=generator) * 3
    said = topk(logits, k)
    for tagged in (False, True):
        layout = Layout(classes, k, codec, tagged=tagged)  # type: ignore[arg-type]
        tags = torch.randint(2**32, (9,), generator=generator) if tagged else None
        records = encode(said, layout, tags)
        assert records.dtype == torch.uint8
        assert records.shape == (9, layout.stride)
        rows = decode(records, layout)
        # float16 rounds a log-probability by 2**-11 of it, a code by half a step of its row's 254.
        span = said.log_probs.amin(1, keepdim=True).abs()
        bound = span * (2**-11 if codec == "float16" else 0.51 / 254 + 2**-11)
        dense, expected = rows.dense(classes).float(), said.dense(classes)
        chosen = said.indices.long()
        assert (dense.gather(1, chosen) - expected.gather(1, chosen)).abs().le(bound).all()
        if k < classes:
            assert torch.equal(rows.indices, said.indices)
            assert torch.equal(rows.log_tail, said.log_tail.half())
        assert tags is None or torch.equal(tags_of(records, layout), tags)
        # Bit for bit what the bytes mean.
        parts = {
            part: records[:, at : at + size].contiguous()
            for part, (at, size) in layout.parts.items()
        }
        if codec == "float16":
            assert torch.equal(rows.log_probs, parts["values"].view(torch.float16))
        else:
            scale = parts["scale"].view(torch.float16).float()
            value = 0.0 - parts["values"].float() * scale
            value[parts["values"] == 255] = -torch.inf
            assert torch.equal(rows.log_probs.view(torch.int32), value.view(torch.int32))
        if layout.dense:
            assert torch.equal(rows.indices, torch.arange(k, dtype=torch.int32).expand(9, -1))
            assert torch.equal(rows.log_tail, torch.full((9,), -torch.inf, dtype=torch.float16))


@pytest.mark.parametrize("name", ["scalar", ""])
@pytest.mark.parametrize("codec", ["float16", "uint8"])
@pytest.mark.parametrize(("classes", "k"), FORMS)
def test_the_kernel_packs_bit_for_bit(name: str, classes: int, k: int, codec: str) -> None:
    _ops.set_isa(name)
    try:
        generator = torch.Generator().manual_seed(classes + k)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            logits = (torch.randn(37, classes, generator=generator) * 6).to(dtype)
            logits[1, classes // 3 :] = -torch.inf
            logits[2] = -torch.inf
            logits[3, -1] = torch.nan
            logits[4] = 2.0
            for tags in (None, torch.randint(2**32, (37,), generator=generator)):
                layout = Layout(classes, k, codec, tagged=tags is not None)  # type: ignore[arg-type]
                packed = pack(logits, layout, tags)
                assert torch.equal(packed, encode(topk(logits, k), layout, tags))
    finally:
        _ops.set_isa("")


@pytest.mark.parametrize("codec", ["float16", "uint8"])
def test_every_size_of_log_probability_is_rounded_alike(codec: str) -> None:
    """From those near 0, below float16's normal range, to those far below its lowest number."""
    gap = torch.logspace(-6, 5.2, 60000)
    logits = torch.stack([torch.zeros_like(gap), -gap, -0.3 * gap], dim=1)
    layout = Layout(3, 3, codec)  # type: ignore[arg-type]
    assert torch.equal(pack(logits, layout), encode(topk(logits, 3), layout))
    values = decode(pack(logits, layout), layout).log_probs
    assert (float(values[-1, 1]) == -torch.inf) == (codec == "float16")


def test_row_sizes() -> None:
    sizes = {
        (1000, 16, "float16"): 66,
        (1000, 16, "uint8"): 52,
        (21841, 16, "float16"): 66,
        (70000, 16, "float16"): 98,
        (10, 10, "float16"): 20,
        (10, 10, "uint8"): 12,
    }
    for (classes, k, codec), size in sizes.items():
        assert Layout(classes, k, codec).stride == size  # type: ignore[arg-type]
        assert Layout(classes, k, codec, tagged=True).stride == size + 4  # type: ignore[arg-type]


@pytest.mark.parametrize(("codec", "k"), list(itertools.product(["float16", "uint8"], [2, 4])))
def test_strange_rows(codec: str, k: int) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[0.0, -inf, -inf, -inf], [-inf] * 4, [nan, 0, 0, 0], [1e30, 0, 0, -1e30], [5.0] * 4]
    )
    layout = Layout(4, k, codec)  # type: ignore[arg-type]
    rows = decode(pack(logits, layout), layout)
    dense = rows.dense(4).float().exp()
    assert dense[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert dense[1].tolist() == [0.0] * 4
    assert dense[2].isnan().all()
    assert dense[3].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert dense[4].tolist() == pytest.approx([0.25] * 4, rel=2e-3)


@pytest.mark.parametrize(("codec", "bound"), [("float16", 1e-3), ("uint8", 3e-2)])
@pytest.mark.parametrize("k", [10, 50])
def test_loss_and_gradient_are_those_of_the_teacher(codec: str, bound: float, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 50, generator=generator) * 3
    layout = Layout(50, k, codec)  # type: ignore[arg-type]
    values, gradients = [], []
    for said in (topk(teacher, k), decode(pack(teacher, layout), layout)):
        student = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
        student.requires_grad_()
        loss = kd_loss(student, said, None, temperature=2.0)
        loss.backward()
        assert student.grad is not None
        values.append(float(loss.detach()))
        gradients.append(student.grad)
    assert values[1] == pytest.approx(values[0], rel=bound)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert float(error) < bound


def test_refusals() -> None:
    said = topk(torch.randn(3, 10), 4)
    with pytest.raises(ValueError, match="k in 1 to the 10 classes, got 11"):
        Layout(10, 11)
    with pytest.raises(ValueError, match="codec float16 or uint8, got 'int4'"):
        Layout(10, 4, "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="encode needs 5 classes a row, got 4"):
        encode(said, Layout(10, 5))
    with pytest.raises(ValueError, match="needs 3 tags for this layout, got none"):
        encode(said, Layout(10, 4, tagged=True))
    with pytest.raises(ValueError, match=r"needs no tags for this layout, got \(3,\)"):
        encode(said, Layout(10, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"logits of shape \(rows, 10\), got \(3, 9\)"):
        pack(torch.zeros(3, 9), Layout(10, 4))
    with pytest.raises(ValueError, match=r"int64 tags of shape \(3,\), got torch.int32 \(3,\)"):
        pack_topk(torch.zeros(3, 9), 2, tags=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="pack_topk needs k in 1 to 9"):
        pack_topk(torch.zeros(3, 9), 10)
    with pytest.raises(ValueError, match=r"uint8 records of shape .*, got torch.int8 \(3, 18\)"):
        unpack_topk(torch.zeros((3, 18), dtype=torch.int8), 10, 4)
    with pytest.raises((RuntimeError, ValueError), match=r"records .* of this layout"):
        unpack_topk(torch.zeros((3, 17), dtype=torch.uint8), 10, 4)
    with pytest.raises(ValueError, match=r"shape \(rows, 18\), got torch.uint8 \(3, 17\)"):
        decode(torch.zeros(3, 17, dtype=torch.uint8), Layout(10, 4))
