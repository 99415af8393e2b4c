"""Policies: lists of steps, by name, from YAML or in code."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastscarce.augment.program import prepare
from fastscarce.augment.steps import (
    STEPS,
    Affine,
    CutMix,
    Erase,
    Flip,
    Jitter,
    MixUp,
    RandAugment,
    ResizedCrop,
    Step,
    TrivialAugment,
    step_from,
)
from fastscarce.augment.table import BORDERS, SAMPLINGS, SLOTS
from fastscarce.errors import ConfigError

__all__ = ["POLICIES", "Policy", "get_policy", "read_policy"]

_NUMBERS = 5  # of a step, at most
_SIZES_KEPT = 16
_OF_TYPE = {kind: name for name, kind in STEPS.items()}


@dataclass(frozen=True)
class Policy:
    """What is drawn for a view.

    Attributes:
        steps: In order: geometry becomes one warp, each operation on levels takes a slot.
        sampling: ``bilinear`` or ``nearest``.
        fill: Levels of what a warp uncovers: one, one a channel, or ``reflect`` for the image's
            mirror image.

    Raises:
        ValueError: A step or a setting is unknown or out of range, or there are more than four
            operations on levels.
    """

    steps: tuple[Step, ...] = ()
    sampling: Literal["bilinear", "nearest"] = "bilinear"
    fill: int | tuple[int, ...] | Literal["reflect"] = 0
    program: npt.NDArray[np.float64] = field(init=False, repr=False, compare=False)
    """What `ready` is made of: see `fastscarce.augment.program.prepare`."""
    _ready: dict[tuple[int, int], npt.NDArray[np.int64]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(step_from(entry) for entry in self.steps))
        slots = sum(step.slots for step in self.steps)
        if slots > SLOTS:
            raise ValueError(f"A policy needs at most {SLOTS} operations on levels, got {slots}.")
        if self.sampling not in ("bilinear", "nearest"):
            raise ValueError(
                f"A policy needs sampling of bilinear or nearest, got {self.sampling!r}."
            )
        if self.fill != "reflect":
            levels = self.fill if isinstance(self.fill, tuple) else (self.fill,)
            sound = all(type(x) is int and 0 <= x <= 255 for x in levels)
            if len(levels) not in (1, 3) or not sound:
                raise ValueError(
                    "A policy needs a fill of reflect, or of one or three levels from 0 to 255,"
                    f" got {self.fill!r}."
                )
        program = np.zeros((1 + len(self.steps), 1 + _NUMBERS))
        border = BORDERS.index("reflect" if self.fill == "reflect" else "fill")
        program[0, :5] = SAMPLINGS.index(self.sampling), border, *self.fill_levels
        for place, step in enumerate(self.steps, start=1):
            program[place, 0] = step.code
            program[place, 1 : 1 + len(step.numbers)] = step.numbers
        object.__setattr__(self, "program", program)
        object.__setattr__(self, "_ready", {})

    @property
    def fill_levels(self) -> tuple[int, int, int]:
        """Of three channels; black where the border is reflected."""
        if self.fill == "reflect":
            return (0, 0, 0)
        levels = (self.fill,) if isinstance(self.fill, int) else tuple(self.fill)
        return (levels[0], levels[-1 if len(levels) == 1 else 1], levels[-1])

    def ready(self, image_size: tuple[int, int]) -> npt.NDArray[np.int64]:
        """What the drawing reads for images of a size; kept, which changes nothing but the time.

        Args:
            image_size: Height and width in pixels.

        Returns:
            int64 ``(lines, 16)``; see fastscarce/augment/program.py.
        """
        found = self._ready.get(image_size)
        if found is None:
            if len(self._ready) >= _SIZES_KEPT:
                self._ready.clear()
            found = self._ready[image_size] = prepare(self.program, *image_size)
        return found

    def without(self, *names: str) -> Policy:
        """The policy without the steps of these names.

        Raises:
            ValueError: There is no such step.
        """
        unknown = [name for name in names if name not in STEPS]
        if unknown:
            raise ValueError(f"without needs steps of {', '.join(STEPS)}, got {unknown[0]!r}.")
        kinds = tuple(STEPS[name] for name in names)
        return replace(self, steps=tuple(s for s in self.steps if not isinstance(s, kinds)))

    @property
    def mixes(self) -> bool:
        """Whether an image may get a part of its partner."""
        return any(isinstance(step, (CutMix, MixUp)) for step in self.steps)

    def followed_by(self, *steps: Step) -> Policy:
        """The policy with more steps at its end."""
        return replace(self, steps=(*self.steps, *steps))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as YAML holds it; `from_dict` reads it."""
        steps = [{_OF_TYPE[type(s)]: _plain(asdict(s))} if asdict(s) else _OF_TYPE[type(s)]
                 for s in self.steps]  # fmt: skip
        return {"steps": steps, **_plain({"sampling": self.sampling, "fill": self.fill})}

    @classmethod
    def from_dict(cls, content: dict[str, Any] | Sequence[Any]) -> Policy:
        """From plain data: a list of steps, or a mapping with ``steps``, ``sampling``, ``fill``.

        Raises:
            ValueError: A key, a step or a setting is unknown or out of range.
        """
        if not isinstance(content, dict):
            content = {"steps": content}
        unknown = set(content) - {"steps", "sampling", "fill"}
        if unknown or not isinstance(content.get("steps", []), Sequence):
            raise ValueError(
                "A policy needs a list of steps, or steps, sampling and fill, got"
                f" {sorted(map(str, unknown)) or content!r}."
            )
        fill = content.get("fill", 0)
        return cls(
            steps=tuple(content.get("steps", ())),
            sampling=content.get("sampling", "bilinear"),
            fill=tuple(fill) if isinstance(fill, list) else fill,
        )

    @classmethod
    def from_yaml(cls, text: str) -> Policy:
        """From the text of a YAML file; see `from_dict`.

        Raises:
            ValueError: It is no YAML, or a key, a step or a setting is unknown or out of range.
        """
        import yaml

        try:
            content = yaml.safe_load(text)
        except Exception as error:  # its constructors raise what they like on odd values
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(f"A policy needs YAML text that can be read: {reason}.") from None
        if not isinstance(content, (dict, list)):
            raise ValueError(f"A policy needs a list of steps in its YAML, got {content!r}.")
        return cls.from_dict(content)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


POLICIES = {
    "eval": Policy(),
    "weak": Policy((Flip(), Affine(rotate=8.0, scale=0.05, translate=0.0625))),
    "standard": Policy((
        ResizedCrop(scale=(0.6, 1.0)),
        Flip(),
        Jitter(brightness=0.4, contrast=0.4, saturation=0.4),
    )),
    "randaugment": Policy((RandAugment(),), sampling="nearest"),
    "trivialaugment": Policy((TrivialAugment(),), sampling="nearest"),
    "strong": Policy((
        Flip(),
        Affine(rotate=25.0, scale=0.2, shear_x=0.3, translate=0.1),
        Jitter(brightness=0.4, contrast=0.4),
        RandAugment(operations=2, magnitude=(3.0, 15.0)),
        Erase(),
    )),
}  # fmt: skip
"""By name; ``randaugment(n, m)`` gives its numbers, ``+cutmix`` and ``+mixup`` add mixing."""

_NAME = re.compile(r"^([a-z_]+)(?:\(([^()]*)\))?$")
_ADDED = {"cutmix": CutMix, "mixup": MixUp, "erase": Erase, "flip": Flip}


def get_policy(policy: str | Sequence[Any] | Policy) -> Policy:
    """The policy of a name, of a list of steps, or the policy itself.

    Args:
        policy: A name of `POLICIES`, such as ``"weak"`` or ``"randaugment(2, 9)"``, with parts
            added by ``+``: ``"strong+cutmix"``, ``"standard+mixup(0.2)"``; a list of steps as YAML
            has them; or a `Policy`.

    Raises:
        ValueError: There is no such policy, or a number is out of range.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        return Policy.from_dict(policy)
    return _named(policy)


def read_policy(text: str) -> Policy:
    """The policy that a command is given: a name as of `get_policy`, or a YAML file.

    Raises:
        ConfigError: There is no such policy or file, or what it says is out of range.
    """
    try:
        if not text.endswith((".yaml", ".yml")):
            return get_policy(text)
        return Policy.from_yaml(Path(text).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The policy in {text} can't be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The policy in {text} can't be read: it is no UTF-8 text.") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


@functools.lru_cache(maxsize=64)
def _named(policy: str) -> Policy:
    first, *added = policy.split("+")
    name, numbers = _name_and_numbers(first, policy)
    if name not in POLICIES or (numbers and name != "randaugment"):
        raise ValueError(
            f"policy must be one of {', '.join(POLICIES)}, or randaugment(n, m), got {policy!r}."
        )
    chosen = POLICIES[name]
    if numbers:
        if len(numbers) != 2 or not numbers[0].is_integer():
            raise ValueError(f"randaugment needs (n, m), got {policy!r}.")
        chosen = replace(chosen, steps=(RandAugment(int(numbers[0]), numbers[1]),))
    for part in added:
        name, numbers = _name_and_numbers(part, policy)
        if name not in _ADDED or len(numbers) > 1:
            raise ValueError(f"+ adds one of {', '.join(_ADDED)} to a policy, got {policy!r}.")
        chosen = chosen.followed_by(_ADDED[name](*numbers))
    return chosen


def _name_and_numbers(part: str, whole: str) -> tuple[str, list[float]]:
    found = _NAME.match(part.strip())
    try:
        numbers = [float(x) for x in found[2].split(",")] if found and found[2] else []
    except ValueError:
        found = None
    if found is None:
        hint = "; read_policy reads a file" if whole.endswith((".yaml", ".yml")) else ""
        raise ValueError(
            f"policy needs a name such as weak or randaugment(2, 9), got {whole!r}{hint}."
        )
    return found[1], numbers
