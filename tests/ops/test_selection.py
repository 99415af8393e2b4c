"""topk and confidence against PyTorch in float64.

Class counts: less than a vector, whole vectors, a tail, more than the candidates kept at a time,
and many pieces of a sum.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastscarce.ops import TopK, confidence, pack_topk, topk

CLASSES = [1, 2, 7, 8, 10, 16, 31, 100, 1000, 1001, 5000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def normal(rows: int, classes: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1009 + classes)
    return spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


def by_sorting(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Classes, log-probabilities and log tail from a stable sort in float64."""
    logits = logits.double()
    order = logits.sort(dim=1, descending=True, stable=True).indices
    chosen, rest = order[:, :k], order[:, k:]
    log_p = logits.log_softmax(1)
    tail = log_p.gather(1, rest).logsumexp(1) - math.log(max(rest.shape[1], 1))
    return chosen, log_p.gather(1, chosen), tail


@pytest.mark.parametrize("classes", CLASSES)
def test_topk(isa: str, classes: int) -> None:
    for dtype in DTYPES:
        logits = normal(9, classes).to(dtype)
        for k in sorted({1, min(3, classes), min(32, classes), min(700, classes), classes}):
            got = topk(logits, k)
            chosen, log_probs, log_tail = by_sorting(logits, k)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert got.indices.dtype == torch.int32
            assert got.log_probs.dtype == got.log_tail.dtype == wide
            assert torch.equal(got.indices.long(), chosen)
            tolerance = 1e-12 if dtype == torch.float64 else 3e-6
            torch.testing.assert_close(
                got.log_probs.double(), log_probs, rtol=tolerance, atol=tolerance
            )
            torch.testing.assert_close(
                got.log_tail.double(), log_tail, rtol=tolerance, atol=tolerance
            )


def test_topk_of_equal_logits(isa: str) -> None:
    # Half of the classes share the k-th value; rising, falling and constant rows.
    steps = torch.arange(4000, dtype=torch.float32)
    rows = torch.stack([steps // 500, -(steps // 500), torch.zeros(4000), steps % 3])
    for k in (1, 20, 499, 500, 501, 1700, 4000):
        got = topk(rows, k)
        chosen, log_probs, log_tail = by_sorting(rows, k)
        assert torch.equal(got.indices.long(), chosen)
        torch.testing.assert_close(got.log_probs.double(), log_probs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.log_tail.double(), log_tail, rtol=1e-5, atol=1e-5)


def test_topk_keeps_a_tiny_tail(isa: str) -> None:
    # The tail is 1e-26 of the whole: 1 less the sum of the others would be 0.
    logits = torch.full((1, 100), -60.0)
    logits[0, 17] = 0
    got = topk(logits, 1)
    torch.testing.assert_close(got.log_tail, torch.tensor([-60.0]))


def test_topk_edges(isa: str) -> None:
    infinite = torch.tensor([[1.0, -math.inf, -math.inf, 2.0], [-math.inf] * 4])
    got = topk(infinite, 3)
    assert got.indices.tolist() == [[3, 0, 1], [0, 1, 2]]
    torch.testing.assert_close(got.log_probs[0, :2], torch.tensor([2.0, 1.0]).log_softmax(0))
    assert got.log_probs[0, 2] == -math.inf
    assert (got.log_tail == -math.inf).all()
    assert (got.log_probs[1] == -math.inf).all()
    bad = torch.zeros(3, 40)
    bad[0, 39] = math.nan
    bad[1, 3] = math.inf
    for k in (2, 40):
        got = topk(bad, k)
        assert got.log_probs[:2].isnan().any(1).all()
        assert got.log_tail[:2].isnan().all()
        assert got.log_probs[2].isfinite().all()
        assert ((got.indices >= 0) & (got.indices < 40)).all()
    assert topk(torch.zeros(0, 5), 2).indices.shape == (0, 2)


@pytest.mark.parametrize("classes", CLASSES)
def test_confidence(isa: str, classes: int) -> None:
    for dtype in DTYPES:
        logits = normal(9, classes).to(dtype)
        logits[2] = 0  # equal logits: the first class
        if classes > 3:
            logits[3, 3] = logits[3, 1] = 40  # margin 0
        for temperature in (1.0, 2.5):
            got = confidence(logits, 0.5, temperature=temperature)
            p = (logits.double() / temperature).softmax(1)
            top = p.sort(1, descending=True).values
            tolerance = 1e-12 if dtype == torch.float64 else 3e-6
            close = {"rtol": tolerance, "atol": tolerance}
            assert torch.equal(got.label, logits.double().argmax(1))
            torch.testing.assert_close(got.confidence.double(), top[:, 0], **close)
            second = top[:, 1] if classes > 1 else torch.zeros(9, dtype=torch.float64)
            torch.testing.assert_close(got.margin.double(), top[:, 0] - second, **close)
            entropy = -(p * p.clamp(min=1e-300).log()).sum(1)
            torch.testing.assert_close(got.entropy.double(), entropy, **close)
            assert torch.equal(got.mask, got.confidence >= 0.5)


def test_confidence_edges(isa: str) -> None:
    logits = torch.zeros(5, 20)
    logits[0, 4] = math.nan
    logits[1, 19] = math.nan
    logits[2] = -math.inf
    logits[3, 5:] = -math.inf
    logits[4, 2] = math.inf
    got = confidence(logits)
    assert got.label.tolist() == [-100, -100, -100, 0, -100]
    assert got.mask.tolist() == [False, False, False, True, False]
    torch.testing.assert_close(got.entropy[3], torch.tensor(math.log(5)))
    assert got.confidence[:3].isnan().all()
    assert confidence(torch.zeros(0, 3)).label.shape == (0,)


def test_rows_with_gaps_and_transposed(isa: str) -> None:
    wide = normal(12, 90).float()
    for view in (wide[::2, 5:60], wide.t()):
        dense = view.contiguous()
        for a, b in zip(
            (*confidence(view), topk(view, 4).log_probs, topk(view, 4).indices),
            (*confidence(dense), topk(dense, 4).log_probs, topk(dense, 4).indices),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_repeats_for_any_number_of_threads() -> None:
    logits = normal(64, 3001).float()
    first = topk(logits, 16)
    sure = confidence(logits)
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            again = topk(logits, 16)
            assert torch.equal(again.indices, first.indices)
            assert torch.equal(again.log_probs, first.log_probs)
            assert torch.equal(again.log_tail, first.log_tail)
            for a, b in zip(confidence(logits), sure, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(1)


def test_opcheck_and_compile() -> None:
    logits = normal(6, 33).float()
    torch.library.opcheck(torch.ops.fastscarce.topk.default, (logits, 4))
    torch.library.opcheck(torch.ops.fastscarce.confidence.default, (logits, 0.5, 1.0))
    tags = torch.arange(6)
    for k, codes, tagged in ((4, False, None), (33, True, None), (4, True, tags)):
        torch.library.opcheck(torch.ops.fastscarce.pack_topk.default, (logits, k, codes, tagged))
        layout = (33, k, codes, tagged is not None)
        records = torch.ops.fastscarce.pack_topk.default(logits, k, codes, tagged)
        torch.library.opcheck(torch.ops.fastscarce.unpack_topk.default, (records, *layout))

    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = topk(2 * x, 4)
        return chosen.log_probs, pack_topk(x, 4), confidence(x, 0.3).mask

    for a, b in zip(torch.compile(both, fullgraph=True)(logits), both(logits), strict=True):
        torch.testing.assert_close(a, b)


def test_refusals() -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"topk needs k in 1 to 5 .*, got 6"):
        topk(logits, 6)
    with pytest.raises(ValueError, match="got 0"):
        topk(logits, 0)
    with pytest.raises(ValueError, match=r"got 2\.0"):
        topk(logits, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"topk needs logits in float32.*int64"):
        topk(logits.long(), 1)
    with pytest.raises(ValueError, match=r"confidence needs logits of shape .*\(5,\)"):
        confidence(logits[0])
    with pytest.raises(ValueError, match=r"at least 1, got \(2, 0\)"):
        topk(logits[:, :0], 1)
    with pytest.raises(ValueError, match=r"threshold in 0 to 1, got 1\.5"):
        confidence(logits, 1.5)
    with pytest.raises(ValueError, match="positive, finite temperature, got 0"):
        confidence(logits, temperature=0)
    # Past the Python door the operators hold memory safe on their own.
    with pytest.raises((RuntimeError, ValueError), match="k in 1 to classes"):
        torch.ops.fastscarce.topk(logits, 6)


def test_topk_object() -> None:
    logits = normal(4, 9).float()
    whole = topk(logits, 9)
    torch.testing.assert_close(whole.dense(9), logits.log_softmax(1))
    part = topk(logits, 3)
    assert len(part) == 4
    assert part.k == 3
    torch.testing.assert_close(part.dense(9).exp().sum(1), torch.ones(4))
    assert torch.equal(part.to("cpu").indices, part.indices)
    with pytest.raises(ValueError, match="indices in int32"):
        TopK(part.indices.long(), part.log_probs, part.log_tail)
    with pytest.raises(ValueError, match=r"log_tail of shape \(rows,\)"):
        TopK(part.indices, part.log_probs, part.log_tail[:2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("classes", [1, 10, 1000, 1025, 21841])
def test_cuda(classes: int) -> None:
    for dtype in DTYPES:
        logits = normal(37, classes).to(dtype)
        logits[3] = 0
        logits[4, classes // 2] = math.nan
        for a, b in zip(confidence(logits.cuda(), 0.5), confidence(logits, 0.5), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6, equal_nan=True)
        for k in {1, min(16, classes), min(700, classes)}:
            device, host = topk(logits.cuda(), k).to("cpu"), topk(logits, k)
            sound = ~logits.isnan().any(1)
            assert torch.equal(device.indices[sound], host.indices[sound])
            for x, y in ((device.log_probs, host.log_probs), (device.log_tail, host.log_tail)):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)
