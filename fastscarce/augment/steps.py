"""The steps that a policy is a list of: what each draws, in the words of a YAML file.

Each step has a code and the numbers that the drawing reads (`numbers`); the drawing itself is in
draw.py. Geometry of all steps is one warp; operations on levels take one of a row's four slots
each, in the policy's order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

__all__ = [
    "STEPS",
    "Affine",
    "CutMix",
    "Erase",
    "Flip",
    "Jitter",
    "MixUp",
    "RandAugment",
    "ResizedCrop",
    "Shift",
    "Step",
    "TrivialAugment",
]

MAGNITUDES = 31
"""RandAugment's and TrivialAugment's magnitudes are 0 to 30."""


@dataclass(frozen=True)
class Step:
    """Part of a policy."""

    code = -1
    slots = 0

    @property
    def numbers(self) -> tuple[float, ...]:
        """What the drawing reads."""
        values: list[float] = []
        for field in fields(self):
            value = getattr(self, field.name)
            values.extend(value if isinstance(value, (tuple, list)) else (value,))
        return tuple(float(value) for value in values)

    def _range(self, name: str, low: float, high: float, *, pair: bool | None = False) -> None:
        """Refuse what isn't a number, or with ``pair`` two rising ones; None: either will do."""
        value = getattr(self, name)
        several = isinstance(value, (tuple, list))
        numbers = list(value) if several else [value]
        sound = pair is None or several == pair
        sound &= all(
            isinstance(x, (int, float)) and not isinstance(x, bool) and low <= x <= high
            for x in numbers
        )
        if not sound or (several and (len(numbers) != 2 or numbers[0] > numbers[1])):
            need = {
                False: "a number",
                True: "two rising numbers",
                None: "a number or two rising ones",
            }[pair]
            raise ValueError(
                f"{type(self).__name__} needs {name}, {need} from {low:g} to {high:g}, got"
                f" {value!r}."
            )
        if several:
            object.__setattr__(self, name, tuple(float(x) for x in numbers))


@dataclass(frozen=True)
class Flip(Step):
    """Mirrors left and right.

    Attributes:
        probability: Part of the views that are mirrored.
    """

    probability: float = 0.5
    code = 0

    def __post_init__(self) -> None:
        self._range("probability", 0, 1)


@dataclass(frozen=True)
class Shift(Step):
    """Moves by whole pixels: a crop of the image padded by as much.

    Attributes:
        part: Largest translation along each axis, a fraction of the side, at least a pixel.
    """

    part: float = 0.125
    code = 1

    def __post_init__(self) -> None:
        self._range("part", 0, 1)


@dataclass(frozen=True)
class ResizedCrop(Step):
    """A crop of random area, aspect ratio and place, brought to the image's size.

    Attributes:
        scale: Smallest and largest area, fractions of the image's; the area is uniform.
        ratio: Largest aspect ratio; the smallest is its inverse, uniform in the logarithm.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: float = 4.0 / 3.0
    code = 2

    def __post_init__(self) -> None:
        self._range("scale", 0.001, 1, pair=True)
        self._range("ratio", 1, 100)


@dataclass(frozen=True)
class Affine(Step):
    """Rotation, scale, shear and translation about the image's centre.

    Attributes:
        rotate: Largest rotation, degrees.
        scale: The scale is from ``exp(-scale)`` to ``exp(scale)``, uniform in its logarithm.
        shear_x: Largest shear along x, a fraction of the height.
        shear_y: Largest shear along y, a fraction of the width.
        translate: Largest translation, a fraction of the side; in parts of pixels.
    """

    rotate: float = 0.0
    scale: float = 0.0
    shear_x: float = 0.0
    shear_y: float = 0.0
    translate: float = 0.0
    code = 3

    def __post_init__(self) -> None:
        self._range("rotate", 0, 180)
        for name in ("scale", "shear_x", "shear_y", "translate"):
            self._range(name, 0, 3)


@dataclass(frozen=True)
class Jitter(Step):
    """Brightness, contrast, saturation and hue, in this order; each by its own factor.

    Attributes:
        brightness: The factor is from ``1 - brightness`` to ``1 + brightness``.
        contrast: Like brightness.
        saturation: Like brightness.
        hue: Largest turn of the hue, a fraction of a whole turn.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    code = 4

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            self._range(name, 0, 1)
        self._range("hue", 0, 0.5)

    @property
    def slots(self) -> int:  # type: ignore[override]
        """One for each that is not 0."""
        return sum(number > 0 for number in self.numbers)


@dataclass(frozen=True)
class RandAugment(Step):
    """Operations drawn uniformly, with replacement, from 14.

    Attributes:
        operations: How many, N: 1 to 4.
        magnitude: M, 0 to 30: one number, or the least and the most of a uniform draw for each.

    Source: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search
    space" (2020); torchvision's table of magnitudes.
    """

    operations: int = 2
    magnitude: float | tuple[float, float] = 9.0
    code = 5

    def __post_init__(self) -> None:
        if isinstance(self.operations, bool) or self.operations not in (1, 2, 3, 4):
            raise ValueError(f"RandAugment needs 1 to 4 operations, got {self.operations!r}.")
        self._range("magnitude", 0, MAGNITUDES - 1, pair=None)

    @property
    def slots(self) -> int:  # type: ignore[override]
        """One an operation."""
        return self.operations

    @property
    def numbers(self) -> tuple[float, ...]:
        """N, and the least and the most magnitude."""
        m = self.magnitude
        least, most = m if isinstance(m, tuple) else (m, m)
        return (float(self.operations), float(least), float(most))


@dataclass(frozen=True)
class TrivialAugment(Step):
    """One operation of RandAugment's 14 at a magnitude drawn from 31, over wider ranges.

    Source: Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation"
    (2021); torchvision's table of magnitudes.
    """

    code = 6
    slots = 1


@dataclass(frozen=True)
class Erase(Step):
    """Fills a box of random area, aspect ratio (0.3 to 3.3) and level, whole inside the image.

    Attributes:
        probability: Part of the views that get one.
        area: Smallest and largest area, fractions of the image's.

    Source: Zhong et al., "Random Erasing Data Augmentation" (2020); one level a box.
    """

    probability: float = 0.5
    area: tuple[float, float] = (0.02, 0.2)
    code = 7

    def __post_init__(self) -> None:
        self._range("probability", 0, 1)
        self._range("area", 0, 1, pair=True)


@dataclass(frozen=True)
class _Mix(Step):
    alpha: float = 1.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        self._range("probability", 0, 1)
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not (number and 0.0 < self.alpha < math.inf):
            raise ValueError(
                f"{type(self).__name__} needs a positive, finite alpha, got {self.alpha!r}."
            )


@dataclass(frozen=True)
class CutMix(_Mix):
    """Pastes a box of the partner's view; its share before clipping is ``1 - Beta(alpha, alpha)``.

    Attributes:
        alpha: Both parameters of the Beta distribution. Positive.
        probability: Part of the views that are mixed.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers" (2019),
    section 3.
    """

    code = 8


@dataclass(frozen=True)
class MixUp(_Mix):
    """Blends with the partner's view: the own weight is ``Beta(alpha, alpha)``.

    Attributes:
        alpha: Both parameters of the Beta distribution. Positive.
        probability: Part of the views that are mixed, of those that CutMix leaves alone.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018).
    """

    code = 9


STEPS: dict[str, type[Step]] = {
    "flip": Flip,
    "shift": Shift,
    "resized_crop": ResizedCrop,
    "affine": Affine,
    "jitter": Jitter,
    "randaugment": RandAugment,
    "trivialaugment": TrivialAugment,
    "erase": Erase,
    "cutmix": CutMix,
    "mixup": MixUp,
}
"""A step's name in YAML."""


def step_from(entry: object) -> Step:
    """A step from its name, or from a mapping of its name to its settings.

    Raises:
        ValueError: There is no such step or setting.
    """
    if isinstance(entry, Step):
        return entry
    if isinstance(entry, str):
        name, settings = entry, None
    elif isinstance(entry, dict) and len(entry) == 1:
        name, settings = next(iter(entry.items()))
    else:
        raise ValueError(f"A policy needs steps such as 'flip' or {{flip: ...}}, got {entry!r}.")
    if name not in STEPS:
        raise ValueError(f"A policy needs steps of {', '.join(STEPS)}, got {name!r}.")
    kind = STEPS[name]
    settings = {} if settings is None else settings
    known = [field.name for field in fields(kind)]
    if not isinstance(settings, dict) or not set(settings) <= set(known):
        raise ValueError(f"The step {name} needs settings of {known}, got {settings!r}.")
    return kind(**{k: tuple(v) if isinstance(v, Sequence) else v for k, v in settings.items()})
