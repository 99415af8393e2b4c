"""The last layer and its distillation loss, a few rows at a time: the logits never exist whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastscarce.ops.autograd import keeps_graph, refuse_graph
from fastscarce.ops.checks import check_target, class_weights_of, term_weights
from fastscarce.ops.kd import kd_loss
from fastscarce.ops.targets import MixedTarget, MixedTopK, TopK
from fastscarce.ops.tensors import of_size_one, require_numbers, require_tensor

__all__ = ["linear_kd_loss"]

Head = tuple[Tensor, Tensor, Tensor | None]
# MiB for chunks of logits. A chunk of few rows reads and writes the weight's gradient as often as
# its matrix product computes with it: from about 100 rows that no longer shows.
_MEMORY = {"cpu": 20, "cuda": 256}
_ROWS = 96
_COLUMNS = 2048
_ALIGNMENT = 64  # bytes


class _Linear(torch.autograd.Function):
    """Loss and all gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, chunks: _Chunks
    ) -> Tensor:
        """The loss."""
        loss, *gradients = chunks.run(features, weight, bias, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        """Gradients of features, weight and bias."""
        refuse_graph("pass the layer's logits to kd_loss(..., gradient='recompute')")
        gradients = ctx.saved_tensors
        if keeps_graph():
            return (*(None if g is None else g * upstream.to(g.dtype) for g in gradients), None)
        # Their last use: no second copy.
        for gradient in gradients:
            if gradient is not None:
                gradient *= upstream.to(gradient.dtype)
        return (*gradients, None)


class _Chunks:
    """The loop over chunks of rows, and what each of them needs beside its features."""

    def __init__(
        self,
        teacher: Tensor | TopK | MixedTopK | Head | None,
        target: Tensor | MixedTarget | None,
        rows_a_chunk: int,
        weight: Tensor | None,
        class_weight: Tensor | None,
        scale: Tensor | None,
        options: dict[str, Any],
    ) -> None:
        self.teacher = teacher
        self.target = target
        self.rows_a_chunk = rows_a_chunk
        self.weight = weight
        self.class_weight = class_weight
        self.scale = scale  # of the sum over all rows
        self.options = options

    def run(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Loss, and the gradients that are wanted."""
        rows, classes = features.shape[0], weight.shape[0]
        # As many chunks as fit the memory, all of about one size.
        chunks = max(1, -(-rows // self.rows_a_chunk))
        size = max(1, -(-rows // chunks))
        # Rows that begin aligned: the product that makes them is up to a third faster.
        aligned = _ALIGNMENT // features.element_size()
        memory = features.new_empty((size, -(-classes // aligned) * aligned))
        logits = memory[:, :classes]
        by_head = isinstance(self.teacher, tuple)
        # A teacher's logits that are made here are done with once read: the gradient goes there.
        buffer = features.new_empty((size, classes)) if any(wanted) or by_head else None
        # Many small additions in 16 bits would lose what they add.
        total = torch.float32 if features.element_size() == 2 else features.dtype
        of_features = torch.empty_like(features) if wanted[0] else None
        of_weight = torch.zeros_like(weight, dtype=total) if wanted[1] else None
        of_bias = torch.zeros(classes, dtype=total, device=weight.device) if wanted[2] else None
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        loss = features.new_zeros((), dtype=wide)
        for begin in range(0, rows, size):
            end = min(begin + size, rows)
            part = features[begin:end]
            student = logits[: end - begin]
            _head(part, weight, bias, student)
            out = buffer[: end - begin] if buffer is not None else None
            teacher = self._teacher(begin, end, out)
            with torch.enable_grad():
                leaf = student.requires_grad_(any(wanted))
                value = kd_loss(
                    leaf,
                    teacher,
                    _rows(self.target, begin, end),
                    weight=None if self.weight is None else self.weight[begin:end],
                    class_weight=self.class_weight,
                    reduction="sum",
                    out=None if by_head or not any(wanted) else out,
                    reuse_teacher_buffer=by_head and any(wanted),
                    **self.options,
                )
            loss += value.detach()
            if not any(wanted):
                continue
            (gradient,) = torch.autograd.grad(value, leaf)
            student.requires_grad_(False)
            if of_features is not None:
                torch.mm(gradient, weight, out=of_features[begin:end])
            if of_weight is not None:
                # The student's logits are done with: their memory is room for products.
                _add_product(of_weight, gradient, part, memory)
            if of_bias is not None:
                _add_column_sums(of_bias, gradient)
        for made in (loss, of_features, of_weight, of_bias):
            if made is not None and self.scale is not None:
                made *= self.scale
        if of_weight is not None:
            of_weight = of_weight.to(weight.dtype)
        if of_bias is not None:
            of_bias = of_bias.to(weight.dtype)
        return loss, of_features, of_weight, of_bias

    def _teacher(self, begin: int, end: int, out: Tensor | None) -> Any:
        """Of these rows; logits of a head are made in ``out``."""
        teacher = self.teacher
        if isinstance(teacher, tuple):
            assert out is not None
            features, weight, bias = teacher
            _head(features[begin:end], weight, bias, out)
            return out
        return _rows(teacher, begin, end)


def _head(features: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(features, weight.t(), out=out)
    else:
        torch.addmm(bias, features, weight.t(), out=out)


def _add_product(total: Tensor, gradient: Tensor, features: Tensor, room: Tensor) -> None:
    """``total += gradient.T @ features``; where ``total`` is wider, by way of ``room``."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), features)
        return
    classes, width = total.shape
    if room.numel() < width:
        room = room.new_empty(width)
    step = min(classes, room.numel() // width)
    products = room.view(-1)[: step * width].view(step, width)
    for begin in range(0, classes, step):
        end = min(begin + step, classes)
        product = products[: end - begin]
        torch.mm(gradient[:, begin:end].t(), features, out=product)
        total[begin:end] += product


def _add_column_sums(total: Tensor, gradient: Tensor) -> None:
    """``total += gradient.sum(0)``."""
    classes = gradient.shape[1]
    # A CPU converts a copy before it sums in another dtype: of few columns at a time.
    step = _COLUMNS if total.dtype != gradient.dtype and total.device.type == "cpu" else classes
    for begin in range(0, classes, step):
        part = gradient[:, begin : begin + step]
        total[begin : begin + step] += part.sum(0, dtype=total.dtype)


def _rows(value: Any, begin: int, end: int) -> Any:
    """Rows of a tensor, or of an object of tensors by row."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value[begin:end]
    return type(value)(*(_rows(part, begin, end) for part in vars(value).values()))


def linear_kd_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | TopK | MixedTopK | tuple[Tensor | None, ...] | None,
    target: Tensor | MixedTarget | None = None,
    *,
    memory: float | None = None,
    row_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    alpha: float | tuple[float, float] = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """:func:`kd_loss` of ``features @ weight.T + bias``, whose logits never exist whole.

    The layer, the loss and their gradients are made a chunk of rows after the other, in memory for
    two chunks of logits, which serve every chunk in turn; the backward pass scales the gradients.
    For many classes (from about 20 000), where logits and their gradient are what fills the memory.
    The gradients of a weight and bias of 16 bits are summed over the chunks in float32.

    Args:
        features: What the last layer takes, float32, bfloat16, float16 or float64, shape
            ``(rows, width)``.
        weight: The layer's weight, ``(classes, width)``, of the same dtype.
        bias: Its bias, ``(classes,)``, or None.
        teacher: As in :func:`kd_loss`; or ``(features, weight)`` or ``(features, weight, bias)`` of
            the teacher's own last layer, ``(rows, its width)`` and ``(classes, its width)``, in
            the student's dtype: its logits are made a chunk at a time too.
        target: As in :func:`kd_loss`.
        memory: MiB for chunks of logits and their gradient together, of 16 rows at least; None: 20
            on a CPU, 256 on a GPU, or what 96 rows take where that is more.
        row_weight: Weight of each row, :func:`kd_loss`'s ``weight``.
        class_weight: As in :func:`kd_loss`.
        alpha: As in :func:`kd_loss`.
        ignore_index: As in :func:`kd_loss`.
        reduction: ``"mean"`` or ``"sum"``. The means are those of all rows, whatever the chunks.
        options: Other options of :func:`kd_loss`: ``loss``, ``temperature``, ``tail`` and so on,
            without ``gradient``, ``out`` and ``reuse_teacher_buffer``.

    Returns:
        Loss, float32 (float64 for float64 features), a scalar. Under autocast the layer runs in
        autocast's dtype.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or :func:`kd_loss` refuses what it gets.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_kd_loss needs reduction 'mean' or 'sum', got {reduction!r}.")
    for name in ("gradient", "out", "reuse_teacher_buffer", "statistics", "weight"):
        if name in options:
            raise ValueError(f"linear_kd_loss needs no {name}, got one.")
    if options.get("loss") == "dist":
        raise ValueError("linear_kd_loss needs a loss of rows, got 'dist', which needs all rows.")
    require_tensor("linear_kd_loss", "features", features)
    require_tensor("linear_kd_loss", "weight", weight)
    for name, given in (("bias", bias), ("row_weight", row_weight)):
        if given is not None:
            require_tensor("linear_kd_loss", name, given)
    if target is not None and not isinstance(target, MixedTarget):
        require_tensor("linear_kd_loss", "target", target)
    device = features.device.type
    head: Head | None = None
    if isinstance(teacher, tuple):
        head = _head_of(teacher)
        teacher = None
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features, weight, bias = _cast(features, weight, bias, dtype)
        head = None if head is None else _cast(*head, dtype)
    _check_layer("the student's", features, weight, bias, features)
    if head is not None:
        _check_layer("the teacher's", *head, features)
    distil, label = term_weights(alpha, target is not None, head is not None or teacher is not None)
    rows, classes = features.shape[0], weight.shape[0]
    if classes == 0:
        raise ValueError("linear_kd_loss needs a weight of one class or more, got none.")
    weighted = class_weight is not None
    if class_weight is not None:
        class_weight = class_weights_of(class_weight, weight.t())
    for name, value in (
        ("teacher", teacher if head is None else head),
        ("target", target),
        ("row_weight", row_weight),
    ):
        if value is not None and _length(value) != rows:
            raise ValueError(
                f"linear_kd_loss needs {name} of as many rows as features, {rows}, got "
                f"{_length(value)}."
            )
    least = _ROWS if memory is None else 16
    if memory is None:
        memory = _MEMORY.get(device, _MEMORY["cuda"])
    require_numbers("linear_kd_loss", memory=memory)
    if not memory > 0:
        raise ValueError(f"linear_kd_loss needs memory above 0 MiB, got {memory}.")
    if not features.is_cuda:
        check_target(target, classes, ignore_index, name="linear_kd_loss")
    if row_weight is not None and features.dtype == torch.float16 and reduction == "mean":
        row_weight = of_size_one(row_weight)
    rows_a_chunk = max(least, int(memory * 2**20) // (2 * classes * features.element_size()))

    # What the sum over all rows is multiplied by. A number goes into the kernel's own weights, but
    # for 16 bits, where the gradients of a row would round to zero.
    scale: Tensor | None = None
    if reduction == "mean" and rows > 0:
        total: Tensor | float = float(rows)
        if row_weight is not None:
            total = row_weight.to(torch.float32).sum()
            total = torch.where(total == 0, 1, total)
        if isinstance(total, Tensor) or features.element_size() == 2:
            scale = torch.as_tensor(1 / total, device=features.device)
        else:
            distil, label = distil / total, label / total
        if target is not None and not (isinstance(target, Tensor) and target.is_floating_point()):
            # Its own denominator reaches the label term as class weights: no number has to leave
            # the device.
            mass = _label_mass(target, row_weight, class_weight, classes, ignore_index)
            ratio = torch.where(mass == 0, 0, total / torch.where(mass == 0, 1, mass))
            if options.get("loss") == "dkd" and options.get("label_smoothing") and not weighted:
                label = label * float(ratio)  # DKD has no smoothed label with class weights
            else:
                by_class = ratio if class_weight is None else ratio * class_weight
                class_weight = by_class.to(torch.float32).expand(classes)
    chunks = _Chunks(
        teacher if head is None else head,
        target,
        rows_a_chunk,
        row_weight,
        class_weight,
        scale,
        {"alpha": (distil, label), "ignore_index": ignore_index, **options},
    )
    loss: Tensor
    if torch.is_grad_enabled():
        loss = _Linear.apply(features, weight, bias, chunks)
    else:
        loss = chunks.run(features, weight, bias, (False, False, False))[0]
    return loss


def _head_of(teacher: tuple[Tensor | None, ...]) -> Head:
    """Features, weight and bias of a teacher's last layer, without their graph."""
    for part in teacher:
        if part is not None:
            require_tensor("linear_kd_loss", "each part of the teacher's layer", part)
    parts = [None if x is None else x.detach() for x in teacher]
    if len(parts) == 2:
        parts.append(None)
    if len(parts) != 3 or parts[0] is None or parts[1] is None:
        raise ValueError(
            "linear_kd_loss needs a teacher of (features, weight) or (features, weight, bias), got "
            f"{len(teacher)} parts."
        )
    return parts[0], parts[1], parts[2]


def _cast(features: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Head:
    return features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _length(value: Any) -> int:
    if isinstance(value, tuple):
        return int(value[0].shape[0])
    return len(value)


def _check_layer(
    whose: str, features: Tensor, weight: Tensor, bias: Tensor | None, student: Tensor
) -> None:
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_kd_loss needs {whose} features (rows, width) and weight (classes, width), got "
            f"{tuple(features.shape)} and {tuple(weight.shape)}."
        )
    parts = [features, weight]
    if isinstance(bias, Tensor):
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"linear_kd_loss needs {whose} bias of shape ({weight.shape[0]},), got "
                f"{tuple(bias.shape)}."
            )
        parts.append(bias)
    for part in parts:
        if part.dtype != student.dtype or part.device != student.device:
            raise ValueError(
                f"linear_kd_loss needs {whose} layer in one dtype on one device, {student.dtype} "
                f"on {student.device}, got {part.dtype} on {part.device}."
            )


def _label_mass(
    target: Tensor | MixedTarget,
    row_weight: Tensor | None,
    class_weight: Tensor | None,
    classes: int,
    ignore_index: int,
) -> Tensor:
    """Sum over rows of what their labels count in the mean; a scalar on their device."""
    halves: list[tuple[Tensor, Tensor | float]]
    if isinstance(target, MixedTarget):
        halves = [(target.a, target.lam), (target.b, 1 - target.lam)]
    else:
        halves = [(target, 1.0)]
    mass = torch.zeros((), device=halves[0][0].device)
    for index, share in halves:
        counts = (index != ignore_index).to(torch.float32) * share
        if class_weight is not None:
            counts = counts * class_weight[index.clamp(0, classes - 1)]
        if row_weight is not None:
            counts = counts * row_weight
        mass = mass + counts.sum()
    return mass
