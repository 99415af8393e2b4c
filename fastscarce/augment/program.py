"""A policy made ready for drawing: what every row has in common, and what it looks up.

One array of int64 ``(lines, 16)``, a line as long as a plan's row:

- line 0: a row's bytes where no step touches them,
- a line a step (see the places below): its code, its numbers, and where its operations are written,
- for a RandAugment of one magnitude, a line each for its 28 operations (14, each with either sign):
  the warp, or nothing; then for each of its N draws, 28 lines of bytes to be added to a row,
- or, where it is all of the policy's geometry and draws one operation or two, a line for each of
  its 28 or 784 outcomes: a row's bytes, which come instead of line 0's.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from fastscarce.augment.table import OPERATIONS, byte_of

__all__ = [
    "CODE",
    "ENTRIES",
    "FIRST_LINE",
    "IS_WARP",
    "RANDAUGMENT",
    "STEP_CODE",
    "STEP_DRAWN",
    "STEP_LINES",
    "STEP_NUMBERS",
    "STEP_OUTCOMES",
    "STEP_SLOT",
    "amount_of",
    "compose",
    "fill_operation",
    "prepare",
    "warp_of",
]

RANDAUGMENT = 14
"""The first operations, which RandAugment and TrivialAugment draw from."""

ENTRIES = 2 * RANDAUGMENT
"""Of a table: operation ``n`` is entry ``2 n``, and ``2 n + 1`` with its sign turned."""

CODE = {name: place for place, name in enumerate(OPERATIONS)}
_ROTATE, _SOLARIZE, _COLOR = CODE["rotate"], CODE["solarize"], CODE["color"]
_POSTERIZE, _CONTRAST, _BRIGHTNESS = CODE["posterize"], CODE["contrast"], CODE["brightness"]
_SHARPNESS, _SHEAR_X, _SHEAR_Y = CODE["sharpness"], CODE["shear_x"], CODE["shear_y"]
_TRANSLATE_X, _TRANSLATE_Y, _HUE = CODE["translate_x"], CODE["translate_y"], CODE["hue"]
# What jitter changes, in its order.
_JITTER = (_BRIGHTNESS, _CONTRAST, _COLOR, _HUE)

# Places in a step's line: all float64.
STEP_CODE, STEP_NUMBERS, STEP_SLOT, STEP_DRAWN, STEP_LINES, STEP_OUTCOMES = 0, 1, 6, 7, 8, 9
FIRST_LINE = 1
"""Line of the first step."""

IS_WARP = 6
"""Place in a warp's line, float64, after the six numbers of its matrix."""

_LAM, _MATRIX, _ARGUMENT, _REST, _AMOUNT = (
    byte_of(name) // 4 for name in ("lam", "matrix", "argument", "rest", "amount")
)
_OPERATION, _DRAWN, _FILL, _SAMPLING, _BORDER, _WARP_AT = (
    byte_of(name) for name in ("operation", "drawn", "fill", "sampling", "border", "warp_at")
)


@njit(cache=True)
def warp_of(code, amount, height, width):  # type: ignore[no-untyped-def]
    """Whether an operation is a warp, and its matrix.

    Shear is about the top left corner, as torchvision's is.
    """
    if code == _ROTATE:
        cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
        return True, cos, -sin, 0.0, sin, cos, 0.0
    if code == _SHEAR_X:
        return True, 1.0, amount, amount * height * 0.5, 0.0, 1.0, 0.0
    if code == _SHEAR_Y:
        return True, 1.0, 0.0, 0.0, amount, 1.0, amount * width * 0.5
    if code == _TRANSLATE_X:
        return True, 1.0, 0.0, -amount, 0.0, 1.0, 0.0
    if code == _TRANSLATE_Y:
        return True, 1.0, 0.0, 0.0, 0.0, 1.0, -amount
    return False, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0


@njit(cache=True)
def amount_of(code, part, negative, wide, height, width):  # type: ignore[no-untyped-def]
    """An operation's argument at a magnitude that is ``part`` of the largest."""
    sign = -1.0 if negative else 1.0
    if code in (_SHEAR_X, _SHEAR_Y):
        return sign * part * (0.99 if wide else 0.3)
    if code in (_TRANSLATE_X, _TRANSLATE_Y):
        side = width if code == _TRANSLATE_X else height
        # Whole pixels that rounding puts just below their number are not one less.
        return sign * math.floor(part * (32.0 if wide else 150.0 / 331.0 * side) + 1e-6)
    if code == _ROTATE:
        return sign * part * (135.0 if wide else 30.0)
    if code in (_BRIGHTNESS, _COLOR, _CONTRAST, _SHARPNESS):
        return 1.0 + sign * part * (0.99 if wide else 0.9)
    if code == _POSTERIZE:
        return 8.0 - np.rint(part * (6.0 if wide else 4.0))
    if code == _SOLARIZE:
        return 255.0 * (1.0 - part)
    return 0.0


@njit(cache=True)
def fill_operation(  # type: ignore[no-untyped-def]
    floats, small, code, amount, warps, slot, drawn
):  # fmt: skip
    """Write an operation into a row: a warp's slot holds the identity."""
    small[_DRAWN + drawn] = code
    floats[_AMOUNT + drawn] = amount
    if not warps:
        small[_OPERATION + slot] = code
        floats[_ARGUMENT + slot] = amount
        floats[_REST + slot] = 1.0 - amount


@njit(inline="always")
def compose(m, i, a, b, c, d, e, f):  # type: ignore[no-untyped-def]
    """Matrix ``i`` of ``m``, float64 ``(6, n)``, and after it another one.

    A later step acts on the earlier one's output, so its matrix stands to the right.
    """
    m00, m01, m10, m11 = m[0, i], m[1, i], m[3, i], m[4, i]
    m[0, i], m[1, i] = m00 * a + m01 * d, m00 * b + m01 * e
    m[2, i] += m00 * c + m01 * f
    m[3, i], m[4, i] = m10 * a + m11 * d, m10 * b + m11 * e
    m[5, i] += m10 * c + m11 * f


@njit(cache=True)
def _fill_tables(lines, count, magnitude, slot, drawn, height, width):  # type: ignore[no-untyped-def]
    """Warps, then the bytes of each draw's operations."""
    doubles, floats, small = lines.view(np.float64), lines.view(np.float32), lines.view(np.uint8)
    for entry in range(ENTRIES):
        name = entry // 2
        amount = amount_of(name, magnitude / 30.0, entry % 2 == 1, False, height, width)
        warps, a, b, c, d, e, f = warp_of(name, amount, height, width)
        warp = doubles[entry]
        warp[0], warp[1], warp[2], warp[3], warp[4], warp[5] = a, b, c, d, e, f
        warp[IS_WARP] = 1.0 if warps else 0.0
        for number in range(count):
            at = ENTRIES * (1 + number) + entry
            fill_operation(
                floats[at], small[at], name, amount, warps, slot + number, drawn + number
            )


@njit(cache=True)
def _fill_outcomes(lines, count, tables, slot):  # type: ignore[no-untyped-def]
    """Every outcome's bytes: those of its operations, and of their warps' product."""
    floats, small, warps = lines.view(np.float32), lines.view(np.uint8), tables.view(np.float64)
    m = np.empty((6, 1))
    for outcome in range(ENTRIES**count):
        m[0, 0] = m[4, 0] = 1.0
        m[1, 0] = m[2, 0] = m[3, 0] = m[5, 0] = 0.0
        for number in range(count):
            entry = (outcome // ENTRIES ** (count - 1 - number)) % ENTRIES
            for word in range(16):
                lines[outcome, word] |= tables[ENTRIES * (1 + number) + entry, word]
            w = warps[entry]
            if w[IS_WARP]:
                small[outcome, _WARP_AT] = slot + number
                compose(m, 0, w[0], w[1], w[2], w[3], w[4], w[5])
        for place in range(6):
            floats[outcome, _MATRIX + place] = m[place, 0]


@njit(cache=True)
def _tables_of(program, step):  # type: ignore[no-untyped-def]
    """How many draws a step has that are looked up; whether all of their outcomes are."""
    if program[step, 0] != 5 or program[step, 2] != program[step, 3]:
        return 0, False
    count = int(program[step, 1])
    warps = 0
    for other in range(1, program.shape[0]):
        code = program[other, 0]
        warps += int(code <= 3 or code == 5 or code == 6)
    return count, warps == 1 and count <= 2


@njit(cache=True)
def prepare(program, height, width):  # type: ignore[no-untyped-def]
    """The array for images of one size.

    Args:
        program: A policy's, float64 ``(1 + steps, 6)``. First sampling, border and three levels of
            the fill; then a row a step: its code and numbers.
        height: Of the images in pixels.
        width: Of the images in pixels.

    Returns:
        int64 ``(lines, 16)``.
    """
    steps = program.shape[0] - 1
    lines = FIRST_LINE + steps
    for step in range(1, steps + 1):
        count, whole = _tables_of(program, step)
        if count:
            lines += ENTRIES**count if whole else ENTRIES * (1 + count)
    ready = np.zeros((lines, 16), dtype=np.int64)
    doubles, floats = ready.view(np.float64), ready.view(np.float32)
    small = ready.view(np.uint8)
    floats[0, _LAM] = floats[0, _MATRIX] = floats[0, _MATRIX + 4] = 1.0
    small[0, _SAMPLING], small[0, _BORDER] = int(program[0, 0]), int(program[0, 1])
    for channel in range(3):
        small[0, _FILL + channel] = int(program[0, 2 + channel])
    slot, drawn, line = 0, 0, FIRST_LINE + steps
    for step in range(1, steps + 1):
        code, n = int(program[step, 0]), program[step, 1:]
        own = doubles[step]
        own[STEP_CODE], own[STEP_SLOT], own[STEP_DRAWN], own[STEP_LINES] = code, slot, drawn, line
        for place in range(5):
            own[STEP_NUMBERS + place] = n[place]
        if code == 4:
            for kind in range(4):
                if n[kind] > 0:
                    small[0, _OPERATION + slot] = _JITTER[kind]
                    slot += 1
        elif code == 5 or code == 6:
            count, whole = _tables_of(program, step)
            if count == 0:
                own[STEP_LINES] = 0
            elif whole:
                tables = np.zeros((ENTRIES * (1 + count), 16), dtype=np.int64)
                _fill_tables(tables, count, n[1], slot, drawn, height, width)
                _fill_outcomes(ready[line : line + ENTRIES**count], count, tables, slot)
                own[STEP_OUTCOMES] = 1.0
                floats[0, _MATRIX] = floats[0, _MATRIX + 4] = 0.0
                line += ENTRIES**count
            else:
                _fill_tables(ready[line:], count, n[1], slot, drawn, height, width)
                line += ENTRIES * (1 + count)
            count = 1 if code == 6 else int(n[0])
            slot += count
            drawn += count
    for step in range(1, steps + 1):
        if doubles[step, STEP_OUTCOMES]:
            first = int(doubles[step, STEP_LINES])
            for outcome in range(ENTRIES ** int(program[step, 1])):
                for word in range(16):
                    ready[first + outcome, word] |= ready[0, word]
    return ready
