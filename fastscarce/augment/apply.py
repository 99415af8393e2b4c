"""Carrying a plan out, by either executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastscarce.augment.plan import Plan, require_plan
from fastscarce.ops.augment import augment, check_index, check_result, checked_normalisation
from fastscarce.ops.tensors import require_tensor

__all__ = ["apply"]


def apply(
    plan: Plan,
    images: Tensor,
    *,
    index: Tensor | None = None,
    executor: Literal["native", "kornia"] = "native",
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    colour: Literal["exact", "fast"] = "exact",
    out: Tensor | None = None,
) -> Tensor:
    """Carry a plan out.

    Args:
        plan: A row a result, drawn for the images' size.
        images: uint8 ``(n, height, width, channels)``, 1 or 3 channels: a batch, or with
            ``index`` a pool. Kornia also takes floating-point levels, 0 to 255, and passes their
            gradient on; it doesn't round them.
        index: Which image each row reads, int64 ``(rows,)``. None: row i reads image i.
        executor: ``native``: one fused kernel, see `fastscarce.ops.augment`. ``kornia``: Kornia's
            functional operations one after the other.
        mean: Subtracted from levels scaled to 0..1: one number or one a channel.
        std: What the difference is divided by: one number or one a channel.
        dtype: float32, bfloat16 or float16; or uint8 for levels, which are not normalised.
        layout: ``torch.contiguous_format`` or ``torch.channels_last``.
        colour: ``exact`` or ``fast``; Kornia has no such choice.
        out: Where the result is written.

    Returns:
        ``(rows, channels, height, width)``; ``out`` where it is given. On a CPU the memory of a
        result of 4 MiB or more is kept when the result is gone, two of them at most, and the next
        ones are written there.

    Raises:
        ValueError: A dtype, a shape or a number is none of these, the images have another size
            than the plan, or an index is outside the pool.
    """
    require_plan("apply", plan)
    require_tensor("apply", "images", images)
    for name, given in (("index", index), ("out", out)):
        if given is not None:
            require_tensor("apply", name, given)
    if images.dim() == 4 and tuple(images.shape[1:3]) != plan.image_size:
        raise ValueError(
            "apply needs images of the plan's size, {}x{}, got {}x{}.".format(
                *plan.image_size, *images.shape[1:3]
            )
        )
    if executor not in ("native", "kornia"):
        raise ValueError(f"apply needs executor native or kornia, got {executor!r}.")
    if index is not None and not torch.compiler.is_compiling() and not index.is_cuda:
        _check_places(index, images.shape[0])
    if executor == "native":
        rows = plan.rows if plan.rows.device == images.device else plan.rows.to(images.device)
        return augment(
            images,
            rows,
            index=index,
            mean=mean,
            std=std,
            dtype=dtype,
            layout=layout,
            colour=colour,
            out=out,
        )
    from fastscarce.augment.kornia import carry_out

    if images.dim() == 4:  # as the native executor refuses them
        count, height, width, channels = images.shape
        check_index("apply", index, count, len(plan))
        shape = (len(plan), channels, height, width)
        check_result("apply", shape, dtype, layout, colour, out)
        checked_normalisation("apply", mean, std, channels)
    result = carry_out(plan, images, index=index, mean=mean, std=std, dtype=dtype)
    result = result.contiguous(memory_format=layout)
    return result if out is None else out.copy_(result)


def _check_places(index: Tensor, count: int) -> None:
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= count):
        least, most = int(index.min()), int(index.max())
        if count == 0:
            raise ValueError(f"apply needs one image or more for an index of {least} to {most}.")
        raise ValueError(f"apply needs an index from 0 to {count - 1}, got {least} to {most}.")
