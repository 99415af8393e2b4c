from __future__ import annotations

import pytest
import yaml

from fastscarce.augment import (
    POLICIES,
    STEPS,
    Affine,
    CutMix,
    Erase,
    Flip,
    Jitter,
    MixUp,
    Policy,
    RandAugment,
    ResizedCrop,
    Shift,
    get_policy,
)


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_policy_survives_yaml(name: str) -> None:
    policy = get_policy(name).followed_by(CutMix(0.7), MixUp(probability=0.5))
    assert Policy.from_yaml(yaml.safe_dump(policy.to_dict())) == policy


def test_from_yaml() -> None:
    text = """
    - resized_crop: {scale: [0.2, 1.0]}
    - flip
    - randaugment: {operations: 1, magnitude: [3, 15]}
    - cutmix: {alpha: 0.5}
    """
    expected = Policy((ResizedCrop((0.2, 1.0)), Flip(), RandAugment(1, (3.0, 15.0)), CutMix(0.5)))
    assert Policy.from_yaml(text) == expected
    assert get_policy(yaml.safe_load(text)) == expected
    with_fill = Policy.from_yaml("{steps: [shift], sampling: nearest, fill: [1, 2, 3]}")
    assert with_fill == Policy((Shift(),), sampling="nearest", fill=(1, 2, 3))


def test_names_with_numbers_and_additions() -> None:
    assert get_policy("randaugment(3, 12)").steps == (RandAugment(3, 12.0),)
    mixed = get_policy("strong+cutmix+mixup(0.2)")
    assert mixed.steps == (*POLICIES["strong"].steps, CutMix(), MixUp(0.2))
    assert get_policy(mixed) is mixed
    assert get_policy("strong+erase(1)").steps[-1] == Erase(1.0)
    assert mixed.without("cutmix", "mixup") == POLICIES["strong"]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("medium", "policy must be one of eval, weak"),
        ("weak(3)", "policy must be one of eval, weak"),
        ("randaugment(2)", r"randaugment needs \(n, m\)"),
        ("randaugment(2.5, 9)", r"randaugment needs \(n, m\)"),
        ("randaugment(5, 9)", "1 to 4 operations, got 5"),
        ("randaugment(2, 31)", "magnitude, a number or two rising ones from 0 to 30, got 31"),
        ("randaugment(inf, 9)", r"randaugment needs \(n, m\)"),
        ("weak+blur", r"\+ adds one of cutmix"),
        ("strong!", "policy needs a name"),
        (["blur"], "needs steps of flip, .*, got 'blur'"),
        ([{"flip": {"part": 1}}], "step flip needs settings"),
        ([{"flip": {"probability": 1.5}}], "Flip needs probability, a number from 0 to 1"),
        ([{"resized_crop": {"scale": [0.9, 0.5]}}], "scale, two rising numbers"),
        ([{"cutmix": {"alpha": 0}}], "CutMix needs a positive, finite alpha, got 0"),
        ([{"mixup": {"alpha": -1}}], "MixUp needs a positive, finite alpha"),
        ([3], "needs steps such as"),
        ({"stpes": []}, "stpes"),
        ({"steps": [], "sampling": "cubic"}, "bilinear or nearest, got 'cubic'"),
        ({"steps": [], "fill": 256}, "levels from 0 to 255, got 256"),
        ({"steps": [], "fill": [1, 2]}, "one or three levels"),
        ([{"jitter": {"brightness": 2}}], "brightness, a number from 0 to 1"),
        ([{"affine": {"rotate": -1}}], "rotate, a number from 0 to 180"),
        ([{"affine": {"rotate": [1, 2]}}], r"rotate, a number from 0 to 180, got \(1, 2\)"),
        ([{"flip": {"probability": [0, 1]}}], r"probability, a number from 0 to 1, got \(0, 1\)"),
        ([{"erase": {"area": 0.1}}], "area, two rising numbers from 0 to 1, got 0.1"),
        ([{"resized_crop": {"scale": 0.5}}], "scale, two rising numbers"),
        ([{"mixup": {"alpha": True}}], "positive, finite alpha, got True"),
        ({"steps": [], "fill": None}, "levels from 0 to 255, got None"),
        ({"steps": [], "fill": 1.5}, "levels from 0 to 255, got 1.5"),
    ],
)
def test_refusals(policy: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        get_policy(policy)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_more_operations_than_a_row_holds() -> None:
    with pytest.raises(ValueError, match="at most 4 operations on levels, got 5"):
        Policy((Jitter(0.1, 0.1, 0.1), RandAugment(2)))
    assert len(Policy((Jitter(0.1, 0.1), RandAugment(2), Affine(rotate=3))).steps) == 3


@pytest.mark.parametrize(
    "text",
    ["3", "'weak'", "a: b: c", "[{flip: {probability: x}}]", "a: [", "- {[1]: 2}", b"\xff", None],
)
def test_yaml_that_is_no_policy(text: str) -> None:
    with pytest.raises(ValueError, match=r"needs.*\.$") as caught:
        Policy.from_yaml(text)
    assert "\n" not in str(caught.value)


def test_every_step_has_its_own_code() -> None:
    codes = [step.code for step in STEPS.values()]
    assert sorted(codes) == list(range(len(STEPS)))
