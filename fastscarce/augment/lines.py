"""Lines of 128 bytes, the length of a plan's row, as one vector each.

numba leaves loops over so few words scalar; these say what is meant to LLVM, which has two
registers for it with AVX-512 and four with AVX2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["add_line", "copy_line"]

_LINE = ir.VectorType(ir.IntType(64), 16)


def _place(context: Any, builder: Any, kind: Any, array: Any, line: Any) -> Any:
    """Pointer to a line of an int64 ``(lines, 16)`` array in C order."""
    data = context.make_array(kind)(context, builder, array).data
    first = builder.mul(line, ir.Constant(line.type, 16))
    return builder.bitcast(builder.gep(data, [first]), _LINE.as_pointer())


def _of_lines(typing: Any, change: Callable[[Any, Any, Any], Any], kinds: tuple[Any, ...]) -> Any:
    """An intrinsic of (array, line, array, line), each array int64 and contiguous."""
    sound = all(
        isinstance(kind, types.Array) and kind.layout == "C" and kind.dtype == types.int64
        for kind in kinds[::2]
    )
    if not sound:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second = (
            _place(
                context, builder, signature.args[at], arguments[at],
                context.cast(builder, arguments[at + 1], signature.args[at + 1], types.int64),
            )
            for at in (0, 2)
        )  # fmt: skip
        # Eight bytes are what NumPy aligns to.
        line = change(builder, first, builder.load(second, align=8))
        builder.store(line, first, align=8)
        return context.get_dummy_value()

    return types.void(*kinds), generate


@intrinsic
def copy_line(typing, array, line, source, its_line):  # type: ignore[no-untyped-def]
    """``array[line] = source[its_line]``, both int64 ``(lines, 16)``; no bounds are checked."""
    return _of_lines(typing, lambda builder, first, value: value, (array, line, source, its_line))


@intrinsic
def add_line(typing, array, line, source, its_line):  # type: ignore[no-untyped-def]
    """``array[line] |= source[its_line]``, both int64 ``(lines, 16)``; no bounds are checked."""
    return _of_lines(
        typing,
        lambda builder, first, value: builder.or_(builder.load(first, align=8), value),
        (array, line, source, its_line),
    )
