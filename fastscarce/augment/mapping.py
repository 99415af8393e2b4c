"""From random words to a plan's rows, compiled: a step of the policy after the other.

Parameters are computed in double, on the host, then rounded. Step number s reads the counter's
draws 64 s to 64 s + 63 and no others, so a step that is added at the end leaves those before it as
they were. Each step goes over many rows, a number a row side by side, so that a compiler makes
vectors of its loops; a row's bytes are put together last, in the first cache.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from fastscarce.augment.elementary import cosine_sine, exponential
from fastscarce.augment.lines import add_line, copy_line
from fastscarce.augment.philox import philox4x32, uniform
from fastscarce.augment.program import (
    ENTRIES,
    FIRST_LINE,
    IS_WARP,
    RANDAUGMENT,
    STEP_CODE,
    STEP_DRAWN,
    STEP_LINES,
    STEP_NUMBERS,
    STEP_OUTCOMES,
    STEP_SLOT,
    amount_of,
    compose,
    fill_operation,
    warp_of,
)
from fastscarce.augment.table import byte_of

__all__ = ["UNSOUND_PARTNER", "UNSOUND_VIEW", "draw_rows"]

UNSOUND_VIEW, UNSOUND_PARTNER = 1, 2
"""What `draw_rows` finds."""

_CHUNK = 128  # rows that are worked on in the first cache
_DRAWS = np.uint64(64)  # of a step
_BLOCKS = 4  # of four words, that a step reads at most for every row
_TRIALS = 30  # blocks of a beta's rejection, two trials each: all fail once in 10**18
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)

_ALONE = 4  # in place of a mix, while rows are drawn: there is no other to mix with

# Rows of the numbers that are worked with: random words, a matrix, and all else.
_WORDS, _MATRICES, _SHARE = 0, 4 * _BLOCKS, 4 * _BLOCKS + 6
_NUMBERS = _SHARE + 1
# Of the integers.
_ID_LOW, _ID_HIGH, _VIEW, _SECOND, _MIX, _BOX, _PLACE, _LISTED, _INTEGERS = range(9)

# Where a field begins in a row of numbers of eight, four or one bytes.
_ERASE_WORD, _BOX_WORD = byte_of("erase") // 8, byte_of("box") // 4
_LAM, _MATRIX, _ARGUMENT, _REST, _ERASE_FILL = (
    byte_of(name) // 4 for name in ("lam", "matrix", "argument", "rest", "erase_fill")
)
_MIX_BYTE, _WARP_AT = byte_of("mix"), byte_of("warp_at")


@njit(inline="always")
def _block(k0, k1, low, high, view, draw):  # type: ignore[no-untyped-def]
    words = philox4x32(low, high, view, draw, k0, k1)
    return uniform(words[0]), uniform(words[1]), uniform(words[2]), uniform(words[3])


@njit(cache=True)
def _fill_block(k0, k1, columns, draw, rows, u, first):  # type: ignore[no-untyped-def]
    # All is below 2**32; masked, a compiler knows it too, and takes the cheaper multiplication.
    k0, k1, draw = k0 & _LOW, k1 & _LOW, draw & _LOW
    for i in range(rows):
        a, b, c, d = _block(
            k0, k1, np.uint64(columns[_ID_LOW, i]) & _LOW, np.uint64(columns[_ID_HIGH, i]) & _LOW,
            np.uint64(columns[_VIEW, i]) & _LOW, draw,
        )  # fmt: skip
        u[first, i] = a
        u[first + 1, i] = b
        u[first + 2, i] = c
        u[first + 3, i] = d


@njit(cache=True)
def _beta(alpha, spare, k0, k1, low, high, view, draw):  # type: ignore[no-untyped-def]
    """Beta(alpha, alpha) by bounded rejection within the step's own draws.

    Source: below 1 Jöhnk (1964), above 1 Cheng's BB (1978); at 1 it is ``spare`` itself.
    """
    if alpha == 1.0:
        return spare
    root = math.sqrt(alpha)
    for trial in range(2 * _TRIALS):
        words = _block(k0, k1, low, high, view, draw + np.uint64(1 + trial // 2))
        u, v = (words[0], words[1]) if trial % 2 == 0 else (words[2], words[3])
        if alpha < 1.0:
            x, y = math.log(u) / alpha, math.log(v) / alpha
            largest = max(x, y)
            total = largest + math.log(math.exp(x - largest) + math.exp(y - largest))
            if total <= 0.0:
                return math.exp(x - total)
        else:
            logit = math.log(u / (1.0 - u)) / root
            w = alpha * math.exp(logit)
            r = (alpha + root) * logit - math.log(4.0)
            bound = math.log(u * u * v)
            if r + 2.0 * alpha * math.log(2.0 * alpha / (alpha + w)) >= bound:
                return w / (alpha + w)
    return 0.5


@njit(cache=True)
def _flip(n, u, rows, m):  # type: ignore[no-untyped-def]
    for i in range(rows):
        turned = u[0, i] < n[0]
        m00, m01, m10, m11 = m[0, i], m[1, i], m[3, i], m[4, i]
        # As a product of matrices has it, whose zeros have signs.
        m[0, i] = m01 * 0.0 - m00 if turned else m00
        m[1, i] = m00 * 0.0 + m01 if turned else m01
        m[3, i] = m11 * 0.0 - m10 if turned else m10
        m[4, i] = m10 * 0.0 + m11 if turned else m11


@njit(cache=True)
def _shift(n, u, rows, height, width, m):  # type: ignore[no-untyped-def]
    across = max(1.0, np.rint(n[0] * width)) if n[0] > 0 else 0.0
    down = max(1.0, np.rint(n[0] * height)) if n[0] > 0 else 0.0
    for i in range(rows):
        right = np.floor(u[0, i] * (2.0 * across + 1.0)) - across
        below = np.floor(u[1, i] * (2.0 * down + 1.0)) - down
        compose(m, i, 1.0, 0.0, right, 0.0, 1.0, below)


@njit(cache=True)
def _crop(n, u, rows, height, width, m):  # type: ignore[no-untyped-def]
    widest = math.log(n[2])
    for i in range(rows):
        area = n[0] + (n[1] - n[0]) * u[0, i]
        ratio = exponential((2.0 * u[1, i] - 1.0) * widest)
        ratio = ratio if area < 1.0 else 1.0
        x = min(math.sqrt(area * ratio), 1.0)
        y = min(math.sqrt(area / ratio), 1.0)
        right = (u[2, i] - 0.5) * (1.0 - x) * width
        below = (u[3, i] - 0.5) * (1.0 - y) * height
        compose(m, i, x, 0.0, right, 0.0, y, below)


@njit(cache=True)
def _affine(n, u, rows, height, width, m):  # type: ignore[no-untyped-def]
    for i in range(rows):
        angle = math.radians((2.0 * u[0, i] - 1.0) * n[0])
        scale = exponential((2.0 * u[1, i] - 1.0) * n[1])
        shear_x, shear_y = (2.0 * u[2, i] - 1.0) * n[2], (2.0 * u[3, i] - 1.0) * n[3]
        right = (2.0 * u[4, i] - 1.0) * n[4] * width
        below = (2.0 * u[5, i] - 1.0) * n[4] * height
        cosine, sine = cosine_sine(angle)
        cosine, sine = scale * cosine, scale * sine
        compose(m, i, cosine, -sine, right, sine, cosine, below)
        compose(m, i, 1.0, shear_x, 0.0, 0.0, 1.0, 0.0)
        compose(m, i, 1.0, 0.0, 0.0, shear_y, 1.0, 0.0)


@njit(cache=True)
def _jitter(n, u, rows, slot, floats):  # type: ignore[no-untyped-def]
    for kind in range(4):
        if n[kind] > 0:
            for i in range(rows):
                spread = (2.0 * u[kind, i] - 1.0) * n[kind]
                factor = spread if kind == 3 else 1.0 + spread
                floats[i, _ARGUMENT + slot] = factor
                floats[i, _REST + slot] = 1.0 - factor
            slot += 1


@njit(inline="always")
def _entry(u, first, i):  # type: ignore[no-untyped-def]
    """Which of RandAugment's operations with their signs, 0 to 27."""
    name = min(int(u[first, i] * RANDAUGMENT), RANDAUGMENT - 1)
    return 2 * name + (1 if u[first + 2, i] < 0.5 else 0)


@njit(cache=True)
def _begin(ready, steps, k0, k1, columns, rows, u, part, places):  # type: ignore[no-untyped-def]
    """Each row as no step changes it; or of RandAugment's outcome, where that can be looked up."""
    doubles = ready.view(np.float64)
    for step in range(steps):
        own = doubles[FIRST_LINE + step]
        if own[STEP_OUTCOMES] == 0.0:
            continue
        count = int(own[STEP_NUMBERS])
        for block in range(count):
            draw = np.uint64(step) * _DRAWS + np.uint64(block)
            _fill_block(k0, k1, columns, draw, rows, u, 4 * block)
        for i in range(rows):
            places[i] = _entry(u, 0, i)
        if count == 2:
            for i in range(rows):
                places[i] = ENTRIES * places[i] + _entry(u, 4, i)
        lines = ready[int(own[STEP_LINES]) :]
        for i in range(rows):
            copy_line(part, i, lines, places[i])
        return
    for i in range(rows):
        copy_line(part, i, ready, 0)


@njit(cache=True)
def _look_up(u, rows, slot, warps, lines, part, m, small, places, listed):  # type: ignore[no-untyped-def]
    """RandAugment's next operation where its magnitude is fixed."""
    for i in range(rows):
        places[i] = _entry(u, 0, i)
    count = 0  # of warps; listed, not branched to, as no such branch can be foreseen
    for i in range(rows):
        place = places[i]
        add_line(part, i, lines, place)
        listed[count] = i
        count += int(warps[place, IS_WARP])
    for k in range(count):
        i = listed[k]
        w = warps[places[i]]
        small[i, _WARP_AT] = slot
        compose(m, i, w[0], w[1], w[2], w[3], w[4], w[5])


@njit(cache=True)
def _operation(n, wide, u, rows, slot, drawn, height, width, m, floats, small):  # type: ignore[no-untyped-def]
    """RandAugment's next operation at a magnitude of its own, or TrivialAugment's."""
    for i in range(rows):
        name = min(int(u[0, i] * RANDAUGMENT), RANDAUGMENT - 1)
        magnitude = math.floor(u[1, i] * 31.0) if wide else n[1] + (n[2] - n[1]) * u[1, i]
        amount = amount_of(name, magnitude / 30.0, u[2, i] < 0.5, wide, height, width)
        warps, a, b, c, d, e, f = warp_of(name, amount, height, width)
        fill_operation(floats[i], small[i], name, amount, warps, slot, drawn)
        if warps:
            small[i, _WARP_AT] = slot
            compose(m, i, a, b, c, d, e, f)


@njit(cache=True)
def _erase(n, u, rows, height, width, part, integers):  # type: ignore[no-untyped-def]
    widest = math.log(10.0 / 3.0)
    for i in range(rows):
        taken = u[0, i] < n[0]
        area = (n[1] + (n[2] - n[1]) * u[1, i]) * height * width
        ratio = exponential((2.0 * u[2, i] - 1.0) * widest)
        tall = min(max(np.rint(math.sqrt(area * ratio)), 1.0), height)
        broad = min(max(np.rint(math.sqrt(area / ratio)), 1.0), width)
        top = np.floor(u[3, i] * (height - tall + 1))
        left = np.floor(u[4, i] * (width - broad + 1))
        box = _packed(top, left, top + tall, left + broad)
        level = np.int64(np.floor(u[5, i] * 256.0)) * 0x010101
        part[i, _ERASE_WORD] = box if taken else part[i, _ERASE_WORD]
        integers[i, _ERASE_FILL] = level if taken else integers[i, _ERASE_FILL]


@njit(inline="always")
def _packed(top, left, bottom, right):  # type: ignore[no-untyped-def]
    """Four int16 as they lie in memory."""
    low = np.int64(top) | (np.int64(left) << 16)
    return low | (np.int64(bottom) << 32) | (np.int64(right) << 48)


@njit(cache=True)
def _mix(cuts, n, u, k0, k1, columns, draw, rows, height, width, lams, shares):  # type: ignore[no-untyped-def]
    """CutMix, or MixUp: of rows that have a partner and are not mixed yet."""
    for i in range(rows):
        shares[i] = u[3, i]
    if n[0] != 1.0:
        for i in range(rows):
            if u[0, i] < n[1] and columns[_MIX, i] == 0:
                shares[i] = _beta(
                    n[0], u[3, i], k0, k1, np.uint64(columns[_ID_LOW, i]),
                    np.uint64(columns[_ID_HIGH, i]), np.uint64(columns[_VIEW, i]), draw,
                )  # fmt: skip
    if not cuts:
        for i in range(rows):
            taken = u[0, i] < n[1] and columns[_MIX, i] == 0
            lams[i] = np.float32(shares[i]) if taken else lams[i]
            columns[_MIX, i] = 2 if taken else columns[_MIX, i]
        return
    for i in range(rows):  # a box of the share's area about a uniform centre, clipped
        taken = (u[0, i] < n[1]) & (columns[_MIX, i] == 0)
        side = math.sqrt(1.0 - shares[i])
        down, across = np.floor(height * side) / 2.0, np.floor(width * side) / 2.0
        y, x = np.floor(u[1, i] * height), np.floor(u[2, i] * width)
        top = min(max(np.floor(y - down), 0.0), height)
        left = min(max(np.floor(x - across), 0.0), width)
        bottom = min(max(np.floor(y + down), 0.0), height)
        right = min(max(np.floor(x + across), 0.0), width)
        lam = np.float32(1.0 - (bottom - top) * (right - left) / (height * width))
        lams[i] = lam if taken else lams[i]
        columns[_BOX, i] = _packed(top, left, bottom, right) if taken else columns[_BOX, i]
        columns[_MIX, i] = 1 if taken else columns[_MIX, i]


@njit(cache=True)
def _blocks_of(code, n):  # type: ignore[no-untyped-def]
    if code == 5:
        return int(n[0])
    return 2 if code in (3, 7) else 1


@njit(cache=True)
def _steps(  # type: ignore[no-untyped-def]
    ready, steps, k0, k1, rows, height, width, numbers, columns, lams, part
):  # fmt: skip
    """All steps of some rows; whether they have matrices, and whether some may be mixed."""
    doubles = ready.view(np.float64)
    floats, integers, small = part.view(np.float32), part.view(np.int32), part.view(np.uint8)
    u, m = numbers[_WORDS:_MATRICES], numbers[_MATRICES:_SHARE]
    warped = mixed = False
    _begin(ready, steps, k0, k1, columns, rows, u, part, columns[_PLACE])
    for step in range(steps):
        own = doubles[FIRST_LINE + step]
        if own[STEP_OUTCOMES]:
            continue  # `_begin` has done it
        code, n = int(own[STEP_CODE]), own[STEP_NUMBERS:STEP_SLOT]
        slot, drawn, line = int(own[STEP_SLOT]), int(own[STEP_DRAWN]), int(own[STEP_LINES])
        draw = np.uint64(step) * _DRAWS
        for block in range(_blocks_of(code, n)):
            _fill_block(k0, k1, columns, draw + np.uint64(block), rows, u, 4 * block)
        if not warped and (code <= 3 or code == 5 or code == 6):
            warped = True
            for i in range(rows):
                m[0, i] = m[4, i] = 1.0
                m[1, i] = m[2, i] = m[3, i] = m[5, i] = 0.0
        if code <= 3 and slot > 0:
            for i in range(rows):
                if code > 0 or u[0, i] < n[0]:  # a flip that is not drawn moves nothing
                    small[i, _WARP_AT] = slot
        if code == 0:
            _flip(n, u, rows, m)
        elif code == 1:
            _shift(n, u, rows, height, width, m)
        elif code == 2:
            _crop(n, u, rows, height, width, m)
        elif code == 3:
            _affine(n, u, rows, height, width, m)
        elif code == 4:
            _jitter(n, u, rows, slot, floats)
        elif code == 5 or code == 6:
            for number in range(1 if code == 6 else int(n[0])):
                words = u[4 * number : 4 * number + 4]
                if line:
                    _look_up(
                        words, rows, slot + number, doubles[line : line + ENTRIES],
                        ready[line + ENTRIES * (1 + number) :], part, m, small, columns[_PLACE],
                        columns[_LISTED],
                    )  # fmt: skip
                else:
                    _operation(
                        n, code == 6, words, rows, slot + number, drawn + number, height, width, m,
                        floats, small,
                    )  # fmt: skip
        elif code == 7:
            _erase(n, u, rows, height, width, part, integers)
        else:
            if not mixed:
                for i in range(rows):
                    lams[i] = 1.0
                    columns[_BOX, i] = 0
            mixed = True
            _mix(code == 8, n, u, k0, k1, columns, draw, rows, height, width, lams, numbers[_SHARE])
    return warped, mixed


@njit(cache=True)
def draw_rows(  # type: ignore[no-untyped-def]
    ready, steps, seed, ids, view, views, partners, batch, height, width, table
):  # fmt: skip
    """Fill a plan.

    Args:
        ready: int64 ``(lines, 16)``, of `prepare`.
        steps: How many the policy has.
        seed: uint64.
        ids: int64 ``(rows,)``.
        view: Of all rows where ``views`` is empty.
        views: int64, one a row, one a batch, or ``(0,)``.
        partners: int64 ``(rows,)``, places in the batch; or ``(0,)`` for neighbours.
        batch: Rows of a batch; the last may have fewer.
        height: Of the images in pixels.
        width: Of the images in pixels.
        table: uint8 ``(rows, 128)``: is filled.

    Returns:
        0; or what is unsound: a view that is not from 0 to 2**32 - 1, a partner outside its batch.
    """
    words = table.view(np.int64)
    k0, k1 = seed & _LOW, seed >> _HALF
    total = ids.shape[0]
    numbers = np.empty((_NUMBERS, _CHUNK))
    columns = np.empty((_INTEGERS, _CHUNK), dtype=np.int64)
    lams = np.empty(_CHUNK, dtype=np.float32)
    chunk_views, second, mixes = columns[_VIEW], columns[_SECOND], columns[_MIX]
    unsound = np.uint64(view) >> _HALF
    for number in views:
        unsound |= np.uint64(number) >> _HALF
    if unsound:
        return UNSOUND_VIEW
    for begin in range(0, total, batch):
        last = min(batch, total - begin) - 1
        for start in range(begin, begin + last + 1, _CHUNK):
            rows = min(_CHUNK, begin + last + 1 - start)
            part = words[start : start + rows]
            first = start - begin
            if views.shape[0] == total:
                for i in range(rows):
                    chunk_views[i] = views[start + i]
            else:
                number = np.int64(view) if views.shape[0] == 0 else views[begin // batch]
                for i in range(rows):
                    chunk_views[i] = number
            for i in range(rows):
                sample = np.uint64(ids[start + i])
                columns[_ID_LOW, i] = sample & _LOW
                columns[_ID_HIGH, i] = sample >> _HALF
            if partners.shape[0]:
                for i in range(rows):
                    if not 0 <= partners[start + i] <= last:
                        return UNSOUND_PARTNER
                for i in range(rows):
                    partner = partners[start + i]
                    second[i] = chunk_views[i] | (partner << 32)
                    mixes[i] = _ALONE if partner == first + i else 0
            else:
                for i in range(rows):
                    partner = min((first + i) ^ 1, last)
                    second[i] = chunk_views[i] | (partner << 32)
                    mixes[i] = _ALONE if partner == first + i else 0
            warped, mixed = _steps(
                ready, steps, k0, k1, rows, height, width, numbers, columns, lams, part
            )
            _finish(rows, warped, mixed, ids[start : start + rows], numbers, columns, lams, part)
    return 0


@njit(cache=True)
def _finish(rows, warped, mixed, ids, numbers, columns, lams, part):  # type: ignore[no-untyped-def]
    floats, integers, small = part.view(np.float32), part.view(np.int32), part.view(np.uint8)
    m = numbers[_MATRICES:_SHARE]
    for i in range(rows):
        part[i, 0] = ids[i]
        part[i, 1] = columns[_SECOND, i]
    if warped:
        for i in range(rows):
            for place in range(6):
                floats[i, _MATRIX + place] = m[place, i]
    if mixed:
        for i in range(rows):
            floats[i, _LAM] = lams[i]
            integers[i, _BOX_WORD] = np.int32(columns[_BOX, i])
            integers[i, _BOX_WORD + 1] = np.int32(columns[_BOX, i] >> 32)
            small[i, _MIX_BYTE] = columns[_MIX, i] & 3
