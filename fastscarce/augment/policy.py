"""What is done to each image: a policy's numbers, and the drawing of a plan from them.

A plan is a NumPy table with one row a sample. It is drawn from (seed, sample id, view) alone;
carrying it out is another module's work and draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastscarce.augment import philox

__all__ = ["MAPPING_VERSION", "OPERATIONS", "PLAN", "POLICIES", "Policy", "draw", "get_policy"]

MAPPING_VERSION = 1
"""Of the mapping from random words to parameters: part of every fingerprint of drawn views."""

OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""RandAugment's 14 operations; a plan's ``operation`` is a place in this tuple."""

SLOTS = 4
"""How many point operations a row of a plan holds."""

PLAN = np.dtype(
    [
        ("id", np.int64),
        ("view", np.uint32),
        ("matrix", np.float32, (2, 3)),  # output to source pixel; a pixel's centre is its index
        ("reflect", np.bool_),  # outside the source: its mirror image, or else black
        ("operation", np.uint8, (SLOTS,)),
        ("argument", np.float32, (SLOTS,)),  # factor, threshold (grey level) or bits
        ("erase", np.int16, (4,)),  # top, left, bottom, right; bottom and right not included
        ("erase_level", np.float32),  # grey level, 0 to 255, that the box is filled with
        ("drawn", np.uint8, (2,)),  # the RandAugment operations as drawn, geometry too
    ]
)

Plan = npt.NDArray[np.void]
Uniforms = npt.NDArray[np.float64]

_GEOMETRY_BLOCKS = 2  # words 0 to 7: flip, crop, translation
_JITTER_BLOCKS = 1  # words 8 to 11
_RANDAUGMENT_BLOCKS = 2  # words 12 to 19: operation, magnitude, sign for two operations
_ERASE_BLOCKS = 2  # words 20 to 27
_AFFINE_BLOCKS = 2  # words 28 to 35: rotation, scale, shear, (one unused), two translations
_BLOCKS = _GEOMETRY_BLOCKS + _JITTER_BLOCKS + _RANDAUGMENT_BLOCKS + _ERASE_BLOCKS + _AFFINE_BLOCKS

_CODE = {name: place for place, name in enumerate(OPERATIONS)}
_ROTATION_DEGREES = 30.0
_SHEAR = 0.3
_TRANSLATION = 0.3  # of the side
_FACTOR = 0.9  # color, contrast, brightness, sharpness: 1 - 0.9 to 1 + 0.9


@dataclass(frozen=True)
class Policy:
    """A policy's numbers; zero or 1 switches a part off.

    Attributes:
        shift: Largest translation, a fraction of the side; drawn in whole pixels.
        flip: Mirrors half of the views, where the data set allows it.
        crop_scale: Smallest area of the random resized crop, a fraction of the image's.
        crop_ratio: Largest aspect ratio of the crop; the smallest is its inverse.
        jitter: Brightness, contrast and saturation factors are from ``1 - jitter`` to
            ``1 + jitter``.
        operations: RandAugment's N, 0 to 2.
        magnitude: RandAugment's M of 10: each magnitude is drawn from 1 to M, as FixMatch does.
        rotate: Largest rotation, degrees.
        scale: The scale is from ``exp(-scale)`` to ``exp(scale)``, uniform in its logarithm.
        shear: Largest shear along x, a fraction of the height.
        translate: Largest translation, a fraction of the side; in parts of pixels.
        erase: Probability of random erasing.
        erase_area: Smallest and largest erased area, fractions of the image's.
    """

    shift: float = 0.0
    flip: bool = False
    crop_scale: float = 1.0
    crop_ratio: float = 4.0 / 3.0
    jitter: float = 0.0
    operations: int = 0
    magnitude: float = 9.0
    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.2)


POLICIES = {
    "eval": Policy(),
    "weak": Policy(flip=True, rotate=8.0, scale=0.05, translate=0.0625),
    "standard": Policy(flip=True, crop_scale=0.6, jitter=0.4),
    "strong": Policy(
        flip=True,
        rotate=25.0,
        scale=0.2,
        shear=0.3,
        translate=0.1,
        jitter=0.4,
        operations=2,
        magnitude=5.0,
        erase=0.5,
    ),
}


def get_policy(policy: str | Policy) -> Policy:
    """The policy of a name, or the policy itself.

    Raises:
        ValueError: No policy has that name.
    """
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}.")
    return POLICIES[policy]


def draw(
    ids: npt.ArrayLike,
    view: npt.ArrayLike,
    *,
    policy: str | Policy,
    seed: int,
    height: int,
    width: int,
    flip: bool,
    reflect: bool,
) -> Plan:
    """Draw a plan.

    Args:
        ids: Sample ids, int64 ``(rows,)``.
        view: View numbers, int64 ``(rows,)`` or one number for all.
        policy: A policy or its name.
        seed: Any integer.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        flip: Whether a mirrored image keeps its label.
        reflect: Fill what a warp uncovers with the image's mirror image, or else with black.

    Returns:
        A table of dtype `PLAN`, ``(rows,)``.

    Raises:
        ValueError: The policy is unknown or a view is out of range.
    """
    chosen = get_policy(policy)
    places = np.asarray(ids, dtype=np.int64)
    rows = places.shape[0]
    plan = np.zeros(rows, dtype=PLAN)
    plan["id"] = places
    plan["view"] = np.asarray(view, dtype=np.int64)
    plan["reflect"] = reflect
    plan["matrix"][:] = np.eye(2, 3, dtype=np.float32)
    if chosen == Policy():
        return plan
    uniform = philox.uniforms(seed, places, view, first=0, count=_BLOCKS)
    # Source from output: the crop's frame, then the affine's and RandAugment's warps in it, each
    # about the centre.
    matrix = _placement(uniform[:, :8], chosen, height, width, flip)
    if max(chosen.rotate, chosen.scale, chosen.shear, chosen.translate) > 0:
        matrix = matrix @ _affine(uniform[:, 28:36], chosen, height, width)
    if chosen.jitter > 0:
        _draw_jitter(plan, uniform[:, 8:12], chosen)
    if chosen.operations > 0:
        warp = _draw_randaugment(plan, uniform[:, 12:20], chosen, height, width)
        matrix = matrix @ warp
    if chosen.erase > 0:
        _draw_erasing(plan, uniform[:, 20:28], chosen, height, width)
    plan["matrix"] = _from_centred(matrix, height, width)[:, :2]
    return plan


def _placement(
    uniform: Uniforms, policy: Policy, height: int, width: int, flip: bool
) -> npt.NDArray[np.float64]:
    """Crop, flip and translation: output to source, ``(rows, 3, 3)``, pixels from the centre."""
    rows = uniform.shape[0]
    area = policy.crop_scale + (1.0 - policy.crop_scale) * uniform[:, 1]
    log_ratio = np.log(policy.crop_ratio) if policy.crop_scale < 1.0 else 0.0
    ratio = np.exp((2.0 * uniform[:, 2] - 1.0) * log_ratio)
    scale_x = np.minimum(np.sqrt(area * ratio), 1.0)
    scale_y = np.minimum(np.sqrt(area / ratio), 1.0)
    mirrored = flip & policy.flip & (uniform[:, 0] < 0.5)
    matrix = np.zeros((rows, 3, 3))
    matrix[:, 0, 0] = np.where(mirrored, -scale_x, scale_x)
    matrix[:, 1, 1] = scale_y
    matrix[:, 2, 2] = 1.0
    for axis, side, scale, column in ((0, width, scale_x, 3), (1, height, scale_y, 4)):
        most = max(1, round(policy.shift * side)) if policy.shift > 0 else 0
        pixels = np.floor(uniform[:, column + 2] * (2 * most + 1)) - most
        matrix[:, axis, 2] = (uniform[:, column] - 0.5) * (1.0 - scale) * side + pixels
    return matrix


def _affine(uniform: Uniforms, policy: Policy, height: int, width: int) -> npt.NDArray[np.float64]:
    """Rotation, scale, shear and translation: output to source, ``(rows, 3, 3)``."""
    spread = 2.0 * uniform - 1.0
    angle = spread[:, 0] * np.pi * policy.rotate / 180.0
    scale = np.exp(spread[:, 1] * policy.scale)
    matrix = np.zeros((uniform.shape[0], 3, 3))
    matrix[:, 0, 0] = scale * np.cos(angle)
    matrix[:, 0, 1] = scale * (spread[:, 2] * policy.shear - np.sin(angle))
    matrix[:, 0, 2] = spread[:, 4] * policy.translate * width
    matrix[:, 1, 0] = scale * np.sin(angle)
    matrix[:, 1, 1] = scale * np.cos(angle)
    matrix[:, 1, 2] = spread[:, 5] * policy.translate * height
    matrix[:, 2, 2] = 1.0
    return matrix


def _draw_jitter(plan: Plan, uniform: Uniforms, policy: Policy) -> None:
    for slot, name in enumerate(("brightness", "contrast", "color")):
        plan["operation"][:, slot] = _CODE[name]
        plan["argument"][:, slot] = 1.0 + policy.jitter * (2.0 * uniform[:, slot] - 1.0)


def _draw_randaugment(
    plan: Plan, uniform: Uniforms, policy: Policy, height: int, width: int
) -> npt.NDArray[np.float64]:
    """Fill in the point operations; return the warps, output to source, ``(rows, 3, 3)``."""
    warp = np.tile(np.eye(3), (uniform.shape[0], 1, 1))
    for number in range(policy.operations):
        which, size, side = (uniform[:, number * 4 + k] for k in range(3))
        operation = np.minimum((which * len(OPERATIONS)).astype(np.uint8), len(OPERATIONS) - 1)
        magnitude = (1.0 + (policy.magnitude - 1.0) * size) / 10.0
        sign = np.where(side < 0.5, -1.0, 1.0)
        plan["drawn"][:, number] = operation
        slot = SLOTS - policy.operations + number  # the last slots: after any jitter
        _fill_slot(plan, slot, operation, magnitude, sign)
        # A later operation acts on the earlier one's output, so its matrix stands to the right.
        warp = warp @ _warp_of(operation, magnitude * sign, height, width)
    return warp


def _fill_slot(
    plan: Plan, slot: int, operation: npt.NDArray[np.uint8], magnitude: Uniforms, sign: Uniforms
) -> None:
    argument = np.zeros_like(magnitude)
    for name in ("color", "contrast", "brightness", "sharpness"):
        argument = np.where(operation == _CODE[name], 1.0 + sign * _FACTOR * magnitude, argument)
    argument = np.where(operation == _CODE["solarize"], 256.0 * (1.0 - magnitude), argument)
    argument = np.where(operation == _CODE["posterize"], np.ceil(8.0 - 4.0 * magnitude), argument)
    geometric = (operation >= _CODE["shear_x"]) | (operation == _CODE["rotate"])
    plan["operation"][:, slot] = np.where(geometric, _CODE["identity"], operation)
    plan["argument"][:, slot] = argument


def _warp_of(
    operation: npt.NDArray[np.uint8], amount: Uniforms, height: int, width: int
) -> npt.NDArray[np.float64]:
    """The matrix of each row's geometric operation, the unit matrix for the others."""

    def only(name: str, scale: float) -> Uniforms:
        return np.where(operation == _CODE[name], amount * scale, 0.0)

    angle = only("rotate", np.pi * _ROTATION_DEGREES / 180.0)
    warp = np.zeros((operation.shape[0], 3, 3))
    warp[:, 0, 0] = np.cos(angle)
    warp[:, 0, 1] = only("shear_x", _SHEAR) - np.sin(angle)
    warp[:, 0, 2] = only("translate_x", _TRANSLATION * width)
    warp[:, 1, 0] = only("shear_y", _SHEAR) + np.sin(angle)
    warp[:, 1, 1] = np.cos(angle)
    warp[:, 1, 2] = only("translate_y", _TRANSLATION * height)
    warp[:, 2, 2] = 1.0
    return warp


def _draw_erasing(plan: Plan, uniform: Uniforms, policy: Policy, height: int, width: int) -> None:
    """A box of random area, aspect ratio (0.3 to 3.3) and level, whole inside the image.

    Source: Zhong et al., "Random Erasing Data Augmentation" (2020); one level a box.
    """
    least, most = policy.erase_area
    area = (least + (most - least) * uniform[:, 1]) * height * width
    ratio = np.exp((2.0 * uniform[:, 2] - 1.0) * np.log(10.0 / 3.0))
    box_height = np.clip(np.rint(np.sqrt(area * ratio)), 1, height)
    box_width = np.clip(np.rint(np.sqrt(area / ratio)), 1, width)
    top = np.floor(uniform[:, 3] * (height - box_height + 1))
    left = np.floor(uniform[:, 4] * (width - box_width + 1))
    box = np.stack((top, left, top + box_height, left + box_width), axis=1)
    plan["erase"] = np.where((uniform[:, 0] < policy.erase)[:, None], box, 0)
    plan["erase_level"] = np.floor(uniform[:, 5] * 256.0)


def _from_centred(
    matrix: npt.NDArray[np.float64], height: int, width: int
) -> npt.NDArray[np.float64]:
    """From pixels about the image's centre to pixel indices."""
    centre = np.array([(width - 1) / 2.0, (height - 1) / 2.0])
    result = matrix.copy()
    # Written out, not a matrix product, so that a row's bits can't depend on its neighbours.
    for axis in range(2):
        moved = matrix[:, axis, 0] * centre[0] + matrix[:, axis, 1] * centre[1]
        result[:, axis, 2] = matrix[:, axis, 2] + centre[axis] - moved
    return result
