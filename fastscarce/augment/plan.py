"""A plan: what is done to each image of a batch, and the labels that follow from it."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastscarce.augment.table import MAPPING_VERSION, PLAN, PlanTable, byte_of, checked_size
from fastscarce.ops import MixedTarget, MixedTopK, TopK
from fastscarce.ops.tensors import require_tensor

__all__ = ["Plan", "concatenate", "planned", "require_plan"]

_new = object.__new__
_LAM, _PARTNER = (byte_of(name) // 4 for name in ("lam", "partner"))


@dataclass(eq=False, init=False)
class Plan:
    """A row a result: which images are read is said where the plan is carried out.

    Args:
        table: Of dtype `PLAN`, ``(rows,)``; see fastscarce/augment/table.py for its fields.
        image_size: Height and width in pixels of the images that it is for.
        version: Of the mapping from random words to parameters.

    Raises:
        ValueError: The table has another dtype or shape.
    """

    image_size: tuple[int, int]
    rows: Tensor = field(repr=False)
    """The table as the kernels read it, uint8 ``(rows, 128)``, on the device of `to`."""
    version: int = MAPPING_VERSION
    _host: Tensor | None = field(default=None, repr=False)
    """The same on the CPU, where ``rows`` are elsewhere."""

    def __init__(
        self, table: PlanTable, image_size: tuple[int, int], version: int = MAPPING_VERSION
    ) -> None:
        if not isinstance(table, np.ndarray) or table.dtype != PLAN or table.ndim != 1:
            got = np.asarray(table)
            raise ValueError(
                f"Plan needs a table of dtype PLAN and shape (rows,), got {got.dtype} {got.shape}."
            )
        table = np.ascontiguousarray(table)
        rows = torch.from_numpy(table.view(np.uint8).reshape(len(table), PLAN.itemsize))
        if rows.data_ptr() % 8:
            rows = rows.clone()
        self.image_size, self.version, self.rows = image_size, version, rows

    @functools.cached_property
    def table(self) -> PlanTable:
        """The rows by field, of dtype `PLAN`, ``(rows,)``: the same memory, where it is the CPU's.

        See fastscarce/augment/table.py for the fields.
        """
        host = self.rows if self._host is None else self._host
        return host.numpy().view(PLAN)[:, 0]

    def __len__(self) -> int:
        return self.rows.shape[0]  # not the table's length: torch.compile knows tensors alone

    @property
    def partner(self) -> Tensor:
        """Places in the batch, int64 ``(rows,)``, on the device of `to`."""
        return self.rows.view(torch.int32)[:, _PARTNER].long()

    @property
    def lam(self) -> Tensor:
        """Weight of each row's own image, exact, float32 ``(rows,)``, on the device of `to`."""
        return self.rows.view(torch.float32)[:, _LAM].contiguous()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Plan:
        """The same plan with what the kernels read on ``device``."""
        rows = self.rows.to(device, non_blocking=non_blocking)
        plan = planned(rows, self.image_size)
        plan.version = self.version
        plan._host = self.rows if self._host is None else self._host
        return plan

    def mixed_target(self, labels: Tensor) -> MixedTarget:
        """The labels of the mixed images.

        Args:
            labels: Of the rows' own images, int64 ``(rows,)``.

        Returns:
            `MixedTarget` of each row's label and its partner's, with the plan's exact weights, on
            the labels' device.

        Raises:
            ValueError: There is not one int64 label a row.
        """
        require_tensor("mixed_target", "labels", labels)
        if labels.dtype != torch.int64 or labels.shape != (len(self),):
            raise ValueError(
                f"mixed_target needs int64 labels of shape ({len(self)},), got {labels.dtype} "
                f"{tuple(labels.shape)}."
            )
        partner = self.partner.to(labels.device)
        return MixedTarget(labels, labels[partner], self.lam.to(labels.device))

    def mixed_topk(self, teacher: TopK) -> MixedTopK:
        """The teacher of the mixed images.

        Args:
            teacher: What a teacher says of the rows' own images, a row a row.

        Returns:
            `MixedTopK` with the plan's weights, on the teacher's device.

        Raises:
            ValueError: There is not one teacher row a row.
        """
        if not isinstance(teacher, TopK):
            raise ValueError(
                f"mixed_topk needs a TopK, such as topk returns, got {type(teacher).__name__}."
            )
        if len(teacher) != len(self):
            raise ValueError(f"mixed_topk needs a teacher of {len(self)} rows, got {len(teacher)}.")
        device = teacher.indices.device
        partner = self.partner.to(device)
        other = TopK(
            teacher.indices[partner], teacher.log_probs[partner], teacher.log_tail[partner]
        )
        return MixedTopK(teacher, other, self.lam.to(device))

    def save(self, path: str | Path) -> None:
        """Write the plan to one file that `load` reads, without pickle."""
        facts = json.dumps({"version": self.version, "image_size": list(self.image_size)})
        content = io.BytesIO()
        np.savez(content, table=self.table, facts=np.array(facts))
        Path(path).write_bytes(content.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            ValueError: There is no such file, it is no plan, or its rows are laid out as another
            version's.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
                facts = json.loads(str(content["facts"]))
                version, size = facts["version"], checked_size("a plan", facts["image_size"])
                if type(version) is not int or not 1 <= version <= MAPPING_VERSION:
                    raise ValueError(
                        f"version {version}, and this fastscarce reads up to {MAPPING_VERSION}"
                    )
                return cls(content["table"], size, version)
        except OSError as error:
            raise ValueError(
                f"Plan.load can't read {path} ({error.strerror or error}); check the path."
            ) from None
        except Exception as error:  # NumPy raises what it likes on broken bytes
            raise ValueError(f"Plan.load needs a plan's file, got {path}: {error}") from None


def require_plan(name: str, plan: object) -> None:
    """Refuse what is no plan.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(plan, Plan):
        raise ValueError(f"{name} needs a Plan, such as draw returns, got {type(plan).__name__}.")


def planned(rows: Tensor, image_size: tuple[int, int]) -> Plan:
    """A plan of rows that were drawn, uint8 ``(rows, 128)``, by no more than it takes."""
    plan = _new(Plan)
    plan.image_size = image_size
    plan.rows = rows
    return plan


def concatenate(plans: Sequence[Plan]) -> Plan:
    """One plan of several, such as a weak and a strong view of each image.

    Partners stay within their own plan.

    Raises:
        ValueError: There is none, or their image sizes or versions differ.
    """
    for plan in plans:
        require_plan("concatenate", plan)
    kinds = {(plan.image_size, plan.version) for plan in plans}
    if len(kinds) != 1:
        raise ValueError(
            f"concatenate needs plans of one image size and version, got {sorted(kinds)}."
        )
    table = np.concatenate([plan.table for plan in plans])
    starts = np.cumsum([0, *(len(plan) for plan in plans[:-1])])
    table["partner"] += np.repeat(starts, [len(plan) for plan in plans]).astype(np.int32)
    return Plan(table, plans[0].image_size, plans[0].version)
