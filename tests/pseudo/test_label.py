"""Labels from logits against plain formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastscarce.errors import TrainingError
from fastscarce.pseudo import align, concatenate, from_logits, label_flips


def draw(views: int, rows: int, classes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4.0 * torch.randn(views, rows, classes, generator=generator)


@pytest.mark.parametrize("views", [1, 2, 5])
@pytest.mark.parametrize("classes", [2, 10, 37])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_formulas(views: int, classes: int, temperature: float) -> None:
    logits = draw(views, 200, classes)
    ids = np.random.default_rng(0).permutation(10_000)[:200]
    found = from_logits(ids, logits, temperature=temperature)

    odds = np.exp(logits.double().numpy() / temperature)
    per_view = odds / odds.sum(-1, keepdims=True)
    mean = per_view.mean(0)
    ranked = np.sort(mean, axis=1)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(np.exp(found.log_probs), mean, rtol=2e-5, atol=1e-9)
    # Two views that contradict each other may tie to within float32.
    tied = ranked[:, -1] - ranked[:, -2] < 1e-6
    np.testing.assert_array_equal(found.labels[~tied], mean.argmax(1)[~tied])
    assert tied.mean() < 0.05
    np.testing.assert_allclose(found.confidence, ranked[:, -1], rtol=1e-5)
    np.testing.assert_allclose(found.margin, ranked[:, -1] - ranked[:, -2], atol=1e-5)
    np.testing.assert_allclose(found.entropy, -(mean * np.log(mean)).sum(1), rtol=1e-4, atol=1e-6)
    agreement = (per_view.argmax(-1) == found.labels).mean(0)
    np.testing.assert_allclose(found.agreement, agreement, rtol=1e-6)
    assert not found.chosen.any()
    assert not found.repeats.any()


def test_dtypes() -> None:
    found = from_logits([1, 2], draw(2, 2, 3).bfloat16())
    assert {name: str(value.dtype) for name, value in vars(found).items()} == {
        "ids": "int64",
        "log_probs": "float32",
        "labels": "int64",
        "confidence": "float32",
        "margin": "float32",
        "entropy": "float32",
        "agreement": "float32",
        "chosen": "bool",
        "repeats": "int64",
    }


def test_views_that_disagree() -> None:
    logits = torch.tensor([[[4.0, 0.0, 0.0]], [[0.0, 3.0, 0.0]], [[4.0, 0.0, 0.0]]])
    found = from_logits([7], logits)
    assert found.labels[0] == 0
    assert found.agreement[0] == pytest.approx(2 / 3)


def test_certain_rows_stay_within_bounds() -> None:
    found = from_logits(range(3), torch.eye(3).mul(1e4).expand(4, 3, 3))
    assert (found.confidence <= 1).all()
    assert (found.entropy >= 0).all()
    assert (found.log_probs <= 0).all()
    np.testing.assert_array_equal(found.confidence, 1)


def test_a_row_does_not_depend_on_the_others() -> None:
    logits, ids = draw(3, 64, 10), np.arange(64)
    whole = from_logits(ids, logits)
    parts = [from_logits(ids[i : i + 7], logits[:, i : i + 7]) for i in range(0, 64, 7)]
    joined = concatenate(parts[::-1])
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(joined, name), value, err_msg=name)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_alignment_reaches_the_prior(scale: float) -> None:
    logits = draw(1, 2000, 10).mul(scale) + torch.linspace(-3, 3, 10)
    prior = np.linspace(2, 1, 10)
    plain = from_logits(range(2000), logits)
    aligned = from_logits(range(2000), logits, prior=prior)
    wanted = prior / prior.sum()
    assert np.abs(np.exp(plain.log_probs).mean(0) - wanted).max() > 0.05
    np.testing.assert_allclose(np.exp(aligned.log_probs).mean(0), wanted, atol=3e-5)
    np.testing.assert_allclose(np.exp(aligned.log_probs).sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(align(plain.log_probs, prior), aligned.log_probs, atol=1e-4)
    # One view alone agrees with itself, before and after.
    np.testing.assert_array_equal(aligned.agreement, 1)


def test_alignment_mends_a_biased_teacher() -> None:
    """A bias of one class, as a teacher of few labels has it, is taken off again."""
    truth = np.arange(3000) % 3
    generator = torch.Generator().manual_seed(1)
    logits = 3.0 * torch.eye(3)[torch.from_numpy(truth)]
    logits = logits + torch.randn(3000, 3, generator=generator)
    logits = logits + torch.tensor([4.0, 0.0, 0.0])
    plain = from_logits(range(3000), logits[None])
    aligned = from_logits(range(3000), logits[None], prior=[1, 1, 1])
    assert (plain.labels == truth).mean() < 0.65
    assert (aligned.labels == truth).mean() > 0.95


def test_flips_count_shared_images_only() -> None:
    eye = 5.0 * torch.eye(4)
    before = from_logits([1, 2, 3, 4], eye[None, [0, 1, 2, 3]])
    after = from_logits([9, 4, 3, 2], eye[None, [0, 3, 0, 0]])
    assert label_flips(before, after) == 2
    assert label_flips(before, before) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refuses_logits_that_are_not_finite(bad: float) -> None:
    logits = draw(2, 5, 3)
    logits[1, 3, 2] = bad
    with pytest.raises(TrainingError, match="not all finite"):
        from_logits(range(5), logits)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"logits \(views, 4, classes\)"):
        from_logits(range(4), draw(2, 5, 3))
    with pytest.raises(ValueError, match=r"logits \(views, 5, classes\)"):
        from_logits(range(5), draw(1, 5, 3)[0])
    with pytest.raises(ValueError, match="positive temperature"):
        from_logits(range(5), draw(1, 5, 3), temperature=0.0)
    with pytest.raises(ValueError, match="each id once"):
        from_logits([1, 2, 2], draw(1, 3, 3))
    with pytest.raises(ValueError, match="two classes or more"):
        from_logits(range(5), draw(1, 5, 1))
    with pytest.raises(ValueError, match="positive and finite"):
        from_logits(range(5), draw(1, 5, 3), prior=[1, 0, 1])
    with pytest.raises(ValueError, match=r"a prior \(classes,\)"):
        from_logits(range(5), draw(1, 5, 3), prior=[1, 1])
    with pytest.raises(ValueError, match="one part or more"):
        concatenate([])
    part = from_logits(range(5), draw(1, 5, 3))
    with pytest.raises(ValueError, match="each id once"):
        concatenate([part, part])
