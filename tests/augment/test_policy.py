from __future__ import annotations

import numpy as np
import pytest

from fastscarce.augment import OPERATIONS, PLAN, Policy, draw

SIZE = {"height": 28, "width": 28}


def plan_of(policy: str | Policy, rows: int = 7000, **options: object) -> np.ndarray:
    settings = {"seed": 3, "flip": False, "reflect": False, **SIZE, **options}
    return draw(np.arange(rows), 1, policy=policy, **settings)


def test_operations_are_equally_frequent() -> None:
    drawn = plan_of("strong")["drawn"]
    for slot in range(2):
        counts = np.bincount(drawn[:, slot], minlength=len(OPERATIONS))
        assert ((counts - 500) ** 2 / 500).sum() < 34.5  # 99.9 %, 13 degrees of freedom
    pairs = np.bincount(drawn[:, 0] * 14 + drawn[:, 1], minlength=196)
    assert ((pairs - 7000 / 196) ** 2 / (7000 / 196)).sum() < 263  # 99.9 %, 195 degrees


def test_eval_is_the_identity() -> None:
    plan = plan_of("eval", 5)
    assert plan.dtype == PLAN
    assert (plan["matrix"] == np.eye(2, 3)).all()
    assert not plan["operation"].any()
    assert not plan["erase"].any()


@pytest.mark.parametrize("side", [8, 28, 64])
def test_shift_moves_by_whole_pixels(side: int) -> None:
    matrix = plan_of(Policy(shift=0.125), height=side, width=side)["matrix"]
    assert (matrix[:, :, :2] == np.eye(2)).all()
    most = side // 8 if side != 28 else 4  # round(28 / 8)
    for axis in range(2):
        counts = np.unique(matrix[:, axis, 2], return_counts=True)
        assert counts[0].tolist() == list(range(-most, most + 1))
        assert counts[1].min() > 0.7 * 7000 / (2 * most + 1)


def test_flip_is_asked_for() -> None:
    assert (plan_of("weak", flip=False)["matrix"][:, 0, 0] > 0).all()
    mirrored = plan_of("weak", flip=True)["matrix"][:, 0, 0] < 0
    assert 0.47 < mirrored.mean() < 0.53


def test_weak_moves_a_little() -> None:
    matrix = plan_of("weak")["matrix"].astype(float)
    scale = np.sqrt(np.linalg.det(matrix[:, :, :2]))
    degrees = np.degrees(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    centre = matrix @ np.array([13.5, 13.5, 1.0]) - 13.5
    for values, most in ((np.log(scale), 0.05), (degrees, 8.0), (centre, 0.0625 * 28)):
        assert np.abs(values).max() < most * 1.001
        assert values.min() < -0.98 * most
        assert values.max() > 0.98 * most
        assert abs(values.mean()) < 0.03 * most


def test_shear_keeps_the_area() -> None:
    matrix = plan_of(Policy(shear=0.3))["matrix"].astype(float)
    assert np.allclose(np.linalg.det(matrix[:, :, :2]), 1.0)
    assert 0.29 < matrix[:, 0, 1].max() < 0.3001


def test_crops_stay_inside() -> None:
    matrix = plan_of("standard", flip=True)["matrix"].astype(float)
    corners = matrix @ np.array([[-0.5, 27.5, 1], [27.5, -0.5, 1]]).T
    assert corners.min() > -0.501
    assert corners.max() < 27.501
    area = np.abs(np.linalg.det(matrix[:, :, :2]))
    assert 0.5 < area.min() < 0.62
    assert area.max() > 0.97


def test_erased_boxes_lie_inside_half_of_the_views() -> None:
    box = plan_of("strong")["erase"]
    erased = box[:, 2] > box[:, 0]
    assert 0.47 < erased.mean() < 0.53
    assert (box >= 0).all()
    assert (box <= 28).all()
    assert (box[erased, 3] > box[erased, 1]).all()
    level = plan_of("strong")["erase_level"]
    assert level.min() == 0
    assert level.max() == 255
    assert 120 < level.mean() < 135


def test_rotation_is_at_most_27_degrees() -> None:
    plan = plan_of(Policy(operations=1, magnitude=9.0))
    rotated = plan[plan["drawn"][:, 0] == OPERATIONS.index("rotate")]["matrix"]
    degrees = np.degrees(np.arctan2(rotated[:, 1, 0], rotated[:, 0, 0]))
    assert degrees.min() < -26
    assert degrees.max() > 26
    assert np.abs(degrees).max() < 27.01
    assert np.abs(degrees).min() > 2.9


def test_views_differ_and_repeat() -> None:
    one = plan_of("strong", 50)
    assert np.array_equal(one, plan_of("strong", 50))
    other = draw(np.arange(50), 2, policy="strong", seed=3, flip=False, reflect=False, **SIZE)
    assert (one["matrix"] != other["matrix"]).any(axis=(1, 2)).mean() > 0.9


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="policy must be one of eval, weak"):
        plan_of("medium", 1)
