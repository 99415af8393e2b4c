"""Loads the compiled libraries and registers what they leave to Python; private.

``_C.so`` holds the schemas and the CPU kernels and has to be there; ``_C_cuda.so`` holds the
CUDA kernels and is loaded where torch has CUDA. Fake kernels (shapes without data, for
``torch.compile``) and gradients are registered here, one function an operator.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["cuda_status", "isa", "set_isa"]


def _library(name: str) -> str | None:
    spec = importlib.util.find_spec(f"fastscarce.{name}")
    return spec.origin if spec else None


def _load_cpu() -> None:
    path = _library("_C")
    if path is None:
        raise ImportError(
            "fastscarce needs its compiled library, which is not built: run `pip install .` in the "
            "source folder."
        )
    torch.ops.load_library(path)


def _load_cuda() -> str:
    if torch.version.cuda is None:
        return "not loaded: this torch is built without CUDA"
    path = _library("_C_cuda")
    if path is None:
        reason = "not built: nvcc was not found when fastscarce was installed"
        if torch.cuda.is_available():
            warnings.warn(
                f"fastscarce's CUDA kernels are {reason}; install the CUDA toolkit, then run "
                "`pip install .` again.",
                stacklevel=2,
            )
        return reason
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"not loaded: {error}"
        warnings.warn(f"fastscarce's CUDA kernels are {reason}", stacklevel=2)
        return reason
    return "loaded"


_load_cpu()
_CUDA_STATUS = _load_cuda()
_ops = torch.ops.fastscarce


def isa() -> str:
    """Instruction set of the CPU kernels: ``scalar``, ``avx2`` or ``avx512``.

    The environment variable ``FASTSCARCE_ISA`` overrides the choice.

    Raises:
        ValueError: ``FASTSCARCE_ISA`` names none that this processor has.
    """
    try:
        return str(_ops.isa())
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def set_isa(name: str) -> str:
    """Sets the instruction set for the process; ``""`` goes back to the best. For tests.

    Raises:
        ValueError: The processor lacks it, or the name is not known.
    """
    try:
        return str(_ops.set_isa(name))
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def cuda_status() -> str:
    """``loaded``, or why the CUDA library is not."""
    return _CUDA_STATUS


# ---- kd_loss; the gradients of dist_loss are scaled as its own are


def _kd_results(
    student: Tensor, reduction: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = student.shape
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    loss = student.new_empty((rows,) if reduction == 0 else (), dtype=dtype)
    gradient = student.new_empty((rows if with_gradient else 0, classes))
    return loss, gradient, student.new_empty((), dtype=dtype)


# The arguments end in `reduction` and `with_gradient`, and in what is written to: schemas.cpp.
@torch.library.register_fake("fastscarce::kd_loss_topk")
@torch.library.register_fake("fastscarce::kd_loss")
def _kd_loss_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, reduction, with_gradient = arguments
    return _kd_results(student, reduction, with_gradient)


@torch.library.register_fake("fastscarce::kd_loss_topk_out")
@torch.library.register_fake("fastscarce::kd_loss_out")
def _kd_loss_out_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, with_gradient, out, *_statistics = arguments[-8:]
    return _kd_results(student, reduction, with_gradient and out is None)


@torch.library.register_fake("fastscarce::kd_statistics")
def _kd_statistics_fake(
    student: Tensor, teacher: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, log_probs, _, _, second_log_probs, *_ = arguments
    given = [x for x in (teacher, log_probs, second_log_probs) if x is not None]
    wide = any(x.dtype == torch.float64 for x in given)
    dtype = torch.float64 if wide else torch.float32
    rows = student.shape[0]
    of_teacher = rows if given else 0
    return (
        student.new_empty((rows,), dtype=torch.int64),
        student.new_empty((of_teacher,), dtype=torch.int64),
        student.new_empty((of_teacher,), dtype=dtype),
        student.new_empty((of_teacher,), dtype=dtype),
        student.new_empty((of_teacher,), dtype=torch.bool),
    )


@torch.library.register_fake("fastscarce::kd_loss_backward")
def _kd_loss_backward_fake(gradient: Tensor, factor: Tensor, upstream: Tensor) -> Tensor:
    return torch.empty_like(gradient)


@torch.library.register_fake("fastscarce::kd_loss_backward_")
def _kd_loss_backward_in_place_fake(gradient: Tensor, factor: Tensor, upstream: Tensor) -> None:
    return None


def _kd_loss_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gradient, factor = output
    ctx.mark_non_differentiable(gradient, factor)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, factor)


def _kd_loss_gradient(ctx: Any, upstream: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * len(ctx.needs_input_grad)
    gradient, factor = ctx.saved_tensors
    student = _ops.kd_loss_backward.default(gradient, factor, upstream.contiguous())
    return (student, *(None,) * (len(ctx.needs_input_grad) - 1))


def _no_second_gradient(ctx: Any, *unused: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        "The loss made its gradient in the forward pass, which can't be differentiated again; pass "
        "gradient='recompute' (outside torch.compile)."
    )


for _name in ("kd_loss", "kd_loss_topk", "dist_loss"):
    torch.library.register_autograd(
        f"fastscarce::{_name}", _kd_loss_gradient, setup_context=_kd_loss_save
    )
torch.library.register_autograd("fastscarce::kd_loss_backward", _no_second_gradient)


# ---- topk, pack_topk, unpack_topk, table_rows, confidence


@torch.library.register_fake("fastscarce::topk")
def _topk_fake(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty((rows, k), dtype=torch.int32),
        logits.new_empty((rows, k), dtype=dtype),
        logits.new_empty((rows,), dtype=dtype),
    )


_DENSE_CLASSES, _SHORT_CLASSES = 256, 65536  # csrc/math/record.h


@torch.library.register_fake("fastscarce::pack_topk")
def _pack_topk_fake(logits: Tensor, k: int, codes: bool, tags: Tensor | None) -> Tensor:
    rows, classes = logits.shape
    dense = k == classes and classes <= _DENSE_CLASSES
    index_bytes = 0 if dense else 4 if classes > _SHORT_CLASSES else 2
    rest = 2 * codes + 2 * (not dense) + 4 * (tags is not None)
    stride = k * (index_bytes + (1 if codes else 2)) + rest
    return logits.new_empty((rows, stride), dtype=torch.uint8)


@torch.library.register_fake("fastscarce::unpack_topk")
def _unpack_topk_fake(
    records: Tensor, classes: int, k: int, codes: bool, tagged: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = records.shape[0]
    return (
        records.new_empty((rows, k), dtype=torch.int32),
        records.new_empty((rows, k), dtype=torch.float32 if codes else torch.float16),
        records.new_empty((rows,), dtype=torch.float16),
    )


@torch.library.register_fake("fastscarce::confidence")
def _confidence_fake(
    logits: Tensor, threshold: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty((rows,), dtype=torch.int64),
        logits.new_empty((rows,), dtype=dtype),
        logits.new_empty((rows,), dtype=dtype),
        logits.new_empty((rows,), dtype=dtype),
        logits.new_empty((rows,), dtype=torch.bool),
    )


# ---- dist_loss


_MEAN = 2


@torch.library.register_fake("fastscarce::dist_loss")
def _dist_loss_fake(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    inter: float,
    intra: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kd_results(student, _MEAN, with_gradient)


# ---- augment


_PIXELS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


@torch.library.register_fake("fastscarce::augment")
def _augment_fake(
    images: Tensor,
    plan: Tensor,
    index: Tensor | None,
    mean: list[float],
    std: list[float],
    pixels: int,
    channels_last: bool,
    fast: bool,
) -> Tensor:
    rows, (height, width, channels) = plan.shape[0], images.shape[1:]
    if channels_last:
        shape = (rows, height, width, channels)
        return images.new_empty(shape, dtype=_PIXELS[pixels]).permute(0, 3, 1, 2)
    return images.new_empty((rows, channels, height, width), dtype=_PIXELS[pixels])


@torch.library.register_fake("fastscarce::augment_out")
def _augment_out_fake(
    images: Tensor,
    plan: Tensor,
    index: Tensor | None,
    mean: list[float],
    std: list[float],
    channels_last: bool,
    fast: bool,
    out: Tensor,
) -> None:
    return None
