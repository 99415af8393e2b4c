"""A teacher: one network or several, what they look at and in which precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastscarce.augment import Plan, apply
from fastscarce.cache.fingerprint import of_module
from fastscarce.errors import CacheError

__all__ = ["PRECISIONS", "Teacher", "normalisation"]

PRECISIONS = ("float32", "bfloat16", "float16")

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Levels = float | tuple[float, ...]


@dataclass(frozen=True)
class Teacher:
    """Networks whose probabilities are averaged.

    Args:
        models: One or more, of as many classes each, in evaluation mode and on one device.
        precision: Of the forward passes: autocast to ``bfloat16`` or ``float16``, or none.
        image_size: Side in pixels that views are brought to for each network, one a network; None
            leaves views as they are.
        class_map: What class of the student each of the networks' classes belongs to, int64
            ``(classes,)``, -1 for none. The classes of one are added up, and the sum over all is
            made 1. None: the classes are the student's.
        classes: Of the student, where there is a class map.

    Raises:
        ValueError: There is no network, not one size a network, or the precision is unknown.
    """

    models: tuple[nn.Module, ...]
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    image_size: tuple[int | None, ...] = ()
    class_map: npt.NDArray[np.int64] | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("Teacher needs one network or more, got none.")
        if not self.image_size:
            object.__setattr__(self, "image_size", (None,) * len(self.models))
        if len(self.image_size) != len(self.models):
            raise ValueError(
                f"Teacher needs one image_size a network ({len(self.models)}), got "
                f"{len(self.image_size)}."
            )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"Teacher needs precision {', '.join(PRECISIONS)}, got {self.precision!r}."
            )
        if (self.class_map is None) != (self.classes is None):
            raise ValueError("Teacher needs class_map and classes, or neither.")
        for model in self.models:
            model.eval()

    @classmethod
    def of(cls, teacher: Teacher | nn.Module | Sequence[nn.Module], **settings: Any) -> Teacher:
        """A teacher as it is, or of a network or several."""
        if isinstance(teacher, Teacher):
            return teacher
        models = (teacher,) if isinstance(teacher, nn.Module) else tuple(teacher)
        return cls(models, **settings)

    def content(self, channels: int) -> dict[str, Any]:
        """The teacher's part of a fingerprint."""
        parts = []
        for model, size in zip(self.models, self.image_size, strict=True):
            mean, std = normalisation(model, channels)
            parts.append(
                {**of_module(model), "mean": _plain(mean), "std": _plain(std), "image_size": size}
            )
        shared: dict[str, Any] = {"precision": self.precision}
        if self.class_map is not None:
            shared["class_map"] = self.class_map.tolist()
        if len(parts) == 1:
            return {**parts[0], **shared}
        return {**{str(place): part for place, part in enumerate(parts)}, **shared}

    @torch.inference_mode()
    def logits(self, plan: Plan, images: Tensor, index: Tensor) -> Tensor:
        """What the teacher says of views.

        Args:
            plan: A row a view, on the images' device.
            images: The pool, uint8 ``(n, height, width, channels)``.
            index: Image of each row, int64 ``(rows,)``.

        Returns:
            Logits ``(rows, classes)`` of one network, as it gives them; of several, the logarithm
            of the mean of their probabilities, float32.
        """
        seen: dict[tuple[Levels, Levels, int | None], Tensor] = {}
        said = []
        for model, size in zip(self.models, self.image_size, strict=True):
            mean, std = normalisation(model, int(images.shape[3]))
            views = seen.get((mean, std, size))
            if views is None:
                views = apply(
                    plan, images, index=index, mean=mean, std=std, layout=torch.channels_last
                )
                views = seen[mean, std, size] = _resized(views, size)
            with self._autocast(images.device):
                output = model(views)
            if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(plan):
                got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise CacheError(
                    f"A teacher needs to give logits (rows, classes), of {len(plan)} rows here, got"
                    f" {got}; wrap the network so that it does."
                )
            said.append(output)
        logits = said[0]
        if len(said) > 1:
            each = torch.stack([torch.log_softmax(one.float(), dim=1) for one in said])
            logits = torch.logsumexp(each, dim=0) - math.log(len(said))
        return logits if self.class_map is None else self._mapped(logits)

    def _mapped(self, logits: Tensor) -> Tensor:
        assert self.class_map is not None
        assert self.classes is not None
        known = np.flatnonzero(self.class_map >= 0)
        columns = torch.from_numpy(known).to(logits.device)
        target = torch.from_numpy(self.class_map[known]).to(logits.device)
        probabilities = torch.softmax(logits.float(), dim=1)
        sums = probabilities.new_zeros((len(logits), self.classes))
        return sums.index_add_(1, target, probabilities[:, columns]).log()

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The teacher's own precision, also within a student's autocast."""
        dtype = _DTYPES.get(self.precision)
        return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def normalisation(model: nn.Module, channels: int) -> tuple[Levels, Levels]:
    """Mean and deviation that a model's inputs are normalised by: timm's own, else one half."""
    inner = getattr(model, "module", model)
    facts = getattr(inner, "pretrained_cfg", None) or {}
    mean, std = facts.get("mean"), facts.get("std")
    if mean is None or std is None or len(mean) != channels:
        return 0.5, 0.5
    return tuple(mean), tuple(std)


def _resized(views: Tensor, size: int | None) -> Tensor:
    if size is None or tuple(views.shape[2:]) == (size, size):
        return views
    return interpolate(
        views, size=(size, size), mode="bicubic", align_corners=False, antialias=True
    )


def _plain(levels: Levels) -> float | list[float]:
    return list(levels) if isinstance(levels, tuple) else levels
