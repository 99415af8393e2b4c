from __future__ import annotations

import inspect

import pytest
import torch

from fastscarce.ops import KDLoss, kd_loss


def test_options_are_those_of_the_function() -> None:
    function = inspect.signature(kd_loss).parameters
    module = inspect.signature(KDLoss).parameters
    of_the_batch = set(inspect.signature(KDLoss.forward).parameters) - {"self"}
    assert set(function) - of_the_batch == set(module)
    for name, parameter in module.items():
        assert parameter.default == function[name].default


def test_every_option_reaches_the_function() -> None:
    torch.manual_seed(0)
    student, teacher, weight = torch.randn(6, 9), torch.randn(6, 9), torch.rand(6)
    target = torch.tensor([0, 1, 2, 3, 7, 8])
    common = {"temperature": 2.0, "alpha": 0.7, "threshold": 0.2, "label_smoothing": 0.1}
    for options in (
        {"loss": "jsd", "beta": 0.2},
        {"loss": "skew_kl", "skew": 0.3},
        {"loss": "dkd", "dkd_alpha": 0.5, "dkd_beta": 3.0},
        {"loss": "kl", "ignore_index": 7, "reduction": "none", "gradient": "recompute"},
    ):
        module = KDLoss(**common, **options)  # type: ignore[arg-type]
        expected = kd_loss(
            student,
            teacher,
            target,
            weight=weight,
            **common,
            **options,  # type: ignore[arg-type]
        )
        assert torch.equal(module(student, teacher, target, weight), expected)
    assert "temperature=2.0" in repr(module)
    module.temperature = -1.0
    with pytest.raises(ValueError, match="temperature"):
        module(student, teacher, target)
