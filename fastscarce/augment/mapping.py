"""From random words to a plan's rows, compiled: a step of the policy after the other.

Parameters are computed in double, on the host, then rounded. Step number s reads the counter's
draws 64 s to 64 s + 63 and no others, so a step that is added at the end leaves those before it as
they were. Each step goes over many rows, so that a compiler can make vectors of its words.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from fastscarce.augment.philox import philox4x32, uniform
from fastscarce.augment.table import OPERATIONS, byte_of

__all__ = ["draw_rows", "warp_of"]

_CHUNK = 128  # rows that are worked on in the first cache
_DRAWS = np.uint64(64)  # of a step
_BLOCKS = 4  # of four words, that a step reads at most for every row
_TRIALS = 30  # blocks of a beta's rejection, two trials each: all fail once in 10**18
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)

_ALONE = 255  # in place of a mix, while rows are drawn: there is no other to mix with

_CODE = {name: place for place, name in enumerate(OPERATIONS)}
_RANDAUGMENT = 14
_ROTATE, _SOLARIZE, _COLOR = _CODE["rotate"], _CODE["solarize"], _CODE["color"]
_POSTERIZE, _CONTRAST, _BRIGHTNESS = _CODE["posterize"], _CODE["contrast"], _CODE["brightness"]
_SHARPNESS, _SHEAR_X, _SHEAR_Y = _CODE["sharpness"], _CODE["shear_x"], _CODE["shear_y"]
_TRANSLATE_X, _TRANSLATE_Y, _HUE = _CODE["translate_x"], _CODE["translate_y"], _CODE["hue"]
# What jitter changes, in its order.
_JITTER = (_BRIGHTNESS, _CONTRAST, _COLOR, _HUE)

# An operation at a magnitude: its code (the identity's for a warp), argument, rest, amount, whether
# it is a warp, and its matrix.
_ENTRY = 11

# Where a field begins in a row of numbers of four, two or one bytes.
_LAM, _MATRIX, _ARGUMENT, _REST, _AMOUNT, _VIEW, _PARTNER = (
    byte_of(name) // 4
    for name in ("lam", "matrix", "argument", "rest", "amount", "view", "partner")
)
_BOX, _ERASE = byte_of("box") // 2, byte_of("erase") // 2
_OPERATION, _DRAWN, _FILL, _ERASE_FILL, _MIX, _WARP_AT, _SAMPLING, _BORDER = (
    byte_of(name)
    for name in (
        "operation", "drawn", "fill", "erase_fill", "mix", "warp_at", "sampling", "border",
    )
)  # fmt: skip


@njit(inline="always")
def _block(k0, k1, sample, view, draw):  # type: ignore[no-untyped-def]
    words = philox4x32(sample & _LOW, sample >> _HALF, view, draw, k0, k1)
    return uniform(words[0]), uniform(words[1]), uniform(words[2]), uniform(words[3])


@njit(cache=True)
def _fill_block(k0, k1, samples, views, draw, rows, u, first):  # type: ignore[no-untyped-def]
    for i in range(rows):
        a, b, c, d = _block(k0, k1, samples[i], views[i], draw)
        u[first, i] = a
        u[first + 1, i] = b
        u[first + 2, i] = c
        u[first + 3, i] = d


@njit(cache=True)
def _beta(alpha, spare, k0, k1, sample, view, draw):  # type: ignore[no-untyped-def]
    """Beta(alpha, alpha) by bounded rejection within the step's own draws.

    Source: below 1 Jöhnk (1964), above 1 Cheng's BB (1978); at 1 it is ``spare`` itself.
    """
    if alpha == 1.0:
        return spare
    root = math.sqrt(alpha)
    for trial in range(2 * _TRIALS):
        words = _block(k0, k1, sample, view, draw + np.uint64(1 + trial // 2))
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
def _compose(m, a, b, c, d, e, f):  # type: ignore[no-untyped-def]
    """A later step acts on the earlier one's output, so its matrix stands to the right."""
    m00, m01, m10, m11 = m[0], m[1], m[3], m[4]
    m[0], m[1] = m00 * a + m01 * d, m00 * b + m01 * e
    m[2] += m00 * c + m01 * f
    m[3], m[4] = m10 * a + m11 * d, m10 * b + m11 * e
    m[5] += m10 * c + m11 * f


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
def _amount_of(code, part, negative, wide, height, width):  # type: ignore[no-untyped-def]
    """An operation's argument at a magnitude that is ``part`` of the largest."""
    sign = -1.0 if negative else 1.0
    if code in (_SHEAR_X, _SHEAR_Y):
        return sign * part * (0.99 if wide else 0.3)
    if code in (_TRANSLATE_X, _TRANSLATE_Y):
        side = width if code == _TRANSLATE_X else height
        return sign * math.floor(part * (32.0 if wide else 150.0 / 331.0 * side))
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
def _fill_entry(entry, code, part, negative, wide, height, width):  # type: ignore[no-untyped-def]
    amount = _amount_of(code, part, negative, wide, height, width)
    warps, a, b, c, d, e, f = warp_of(code, amount, height, width)
    entry[0] = 0.0 if warps else code
    entry[1] = 0.0 if warps else amount
    entry[2] = 0.0 if warps else 1.0 - amount
    entry[3] = amount
    entry[4] = 1.0 if warps else 0.0
    entry[5], entry[6], entry[7], entry[8], entry[9], entry[10] = a, b, c, d, e, f


@njit(cache=True)
def _cut(rows, height, width, u):  # type: ignore[no-untyped-def]
    """Clipped boxes of a share ``u[8]`` of the area about uniform centres.

    Top, left, bottom and right go to ``u[4]`` to ``u[7]``; no branches, for vectors.
    """
    for i in range(rows):
        side = math.sqrt(u[8, i])
        down, across = np.floor(height * side) / 2.0, np.floor(width * side) / 2.0
        y, x = np.floor(u[1, i] * height), np.floor(u[2, i] * width)
        u[4, i] = min(max(np.floor(y - down), 0.0), height)
        u[5, i] = min(max(np.floor(x - across), 0.0), width)
        u[6, i] = min(max(np.floor(y + down), 0.0), height)
        u[7, i] = min(max(np.floor(x + across), 0.0), width)


@njit(cache=True)
def _draw_geometry(code, n, u, rows, height, width, matrices):  # type: ignore[no-untyped-def]
    for i in range(rows):
        m = matrices[i]
        w0, w1, w2, w3 = u[0, i], u[1, i], u[2, i], u[3, i]
        if code == 0:  # flip
            if w0 < n[0]:
                _compose(m, -1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        elif code == 1:  # shift
            most = max(1.0, np.rint(n[0] * width)) if n[0] > 0 else 0.0
            right = math.floor(w0 * (2.0 * most + 1.0)) - most
            most = max(1.0, np.rint(n[0] * height)) if n[0] > 0 else 0.0
            below = math.floor(w1 * (2.0 * most + 1.0)) - most
            _compose(m, 1.0, 0.0, right, 0.0, 1.0, below)
        elif code == 2:  # resized crop
            area = n[0] + (n[1] - n[0]) * w0
            ratio = math.exp((2.0 * w1 - 1.0) * math.log(n[2])) if area < 1.0 else 1.0
            x = min(math.sqrt(area * ratio), 1.0)
            y = min(math.sqrt(area / ratio), 1.0)
            right = (w2 - 0.5) * (1.0 - x) * width
            below = (w3 - 0.5) * (1.0 - y) * height
            _compose(m, x, 0.0, right, 0.0, y, below)
        else:  # affine
            angle = math.radians((2.0 * w0 - 1.0) * n[0])
            scale = math.exp((2.0 * w1 - 1.0) * n[1])
            shear_x, shear_y = (2.0 * w2 - 1.0) * n[2], (2.0 * w3 - 1.0) * n[3]
            right = (2.0 * u[4, i] - 1.0) * n[4] * width
            below = (2.0 * u[5, i] - 1.0) * n[4] * height
            cos, sin = scale * math.cos(angle), scale * math.sin(angle)
            _compose(m, cos, -sin, right, sin, cos, below)
            _compose(m, 1.0, shear_x, 0.0, 0.0, 1.0, 0.0)
            _compose(m, 1.0, 0.0, 0.0, shear_y, 1.0, 0.0)


@njit(cache=True)
def _draw_jitter(n, u, rows, slot, floats, small):  # type: ignore[no-untyped-def]
    for kind in range(4):
        if n[kind] > 0:
            for i in range(rows):
                spread = (2.0 * u[kind, i] - 1.0) * n[kind]
                factor = spread if kind == 3 else 1.0 + spread
                small[i, _OPERATION + slot] = _JITTER[kind]
                floats[i, _ARGUMENT + slot] = factor
                floats[i, _REST + slot] = 1.0 - factor
            slot += 1
    return slot


@njit(cache=True)
def _draw_operation(  # type: ignore[no-untyped-def]
    wide, fixed, n, u, first, rows, slot, chosen, height, width, table, matrices, floats, small,
    listed, places,
):  # fmt: skip
    """RandAugment's next operation, or TrivialAugment's.

    ``table`` holds the entries of one magnitude, or room for one a row.
    """
    count = 0  # of warps; listed, not branched to, as no such branch can be foreseen
    for i in range(rows):
        name = min(int(u[first, i] * _RANDAUGMENT), _RANDAUGMENT - 1)
        negative = u[first + 2, i] < 0.5
        place = 2 * name + int(negative)
        if not fixed:
            v = u[first + 1, i]
            magnitude = math.floor(v * 31.0) if wide else n[1] + (n[2] - n[1]) * v
            place = i
            _fill_entry(table[i], name, magnitude / 30.0, negative, wide, height, width)
        places[i] = place
        entry = table[place]
        small[i, _DRAWN + chosen] = name
        floats[i, _AMOUNT + chosen] = entry[3]
        small[i, _OPERATION + slot] = int(entry[0])
        floats[i, _ARGUMENT + slot] = entry[1]
        floats[i, _REST + slot] = entry[2]
        listed[count] = i
        count += int(entry[4])
    for k in range(count):
        i = listed[k]
        entry = table[places[i]]
        small[i, _WARP_AT] = slot
        _compose(matrices[i], entry[5], entry[6], entry[7], entry[8], entry[9], entry[10])


@njit(cache=True)
def _draw_erasing(n, u, rows, height, width, shorts, small):  # type: ignore[no-untyped-def]
    for i in range(rows):
        if u[0, i] < n[0]:
            area = (n[1] + (n[2] - n[1]) * u[1, i]) * height * width
            ratio = math.exp((2.0 * u[2, i] - 1.0) * math.log(10.0 / 3.0))
            tall = min(max(np.rint(math.sqrt(area * ratio)), 1.0), height)
            broad = min(max(np.rint(math.sqrt(area / ratio)), 1.0), width)
            top = math.floor(u[3, i] * (height - tall + 1))
            left = math.floor(u[4, i] * (width - broad + 1))
            shorts[i, _ERASE], shorts[i, _ERASE + 1] = top, left
            shorts[i, _ERASE + 2], shorts[i, _ERASE + 3] = top + tall, left + broad
            for channel in range(3):
                small[i, _ERASE_FILL + channel] = math.floor(u[5, i] * 256.0)


@njit(cache=True)
def _draw_mixing(  # type: ignore[no-untyped-def]
    code, n, u, k0, k1, samples, views, draw, rows, height, width, floats, integers,
    shorts, small, listed,
):  # fmt: skip
    count = 0
    for i in range(rows):
        u[8, i] = 0.0
        listed[count] = i
        if u[0, i] < n[1] and small[i, _MIX] == 0:
            share = _beta(n[0], u[3, i], k0, k1, samples[i], views[i], draw)
            u[8, i] = 1.0 - share if code == 8 else share
            count += 1
    if code == 8:
        _cut(rows, height, width, u)
    for k in range(count):
        i = listed[k]
        small[i, _MIX] = 1 if code == 8 else 2
        if code == 8:
            for edge in range(4):
                shorts[i, _BOX + edge] = int(u[4 + edge, i])
            area = (u[6, i] - u[4, i]) * (u[7, i] - u[5, i])
            floats[i, _LAM] = 1.0 - area / (height * width)
        else:
            floats[i, _LAM] = u[8, i]


@njit(cache=True)
def _tables_of(program, height, width):  # type: ignore[no-untyped-def]
    """Entries of each RandAugment of one magnitude; room for one a row of each that draws it."""
    tables = np.empty((program.shape[0], _CHUNK, _ENTRY))
    for step in range(1, program.shape[0]):
        n = program[step, 1:]
        if program[step, 0] == 5 and n[1] == n[2]:
            for place in range(2 * _RANDAUGMENT):
                _fill_entry(
                    tables[step, place], place // 2, n[1] / 30.0, place % 2 == 1, False, height,
                    width,
                )  # fmt: skip
    return tables


@njit(cache=True)
def _blocks_of(code, n):  # type: ignore[no-untyped-def]
    if code == 5:
        return int(n[0])
    return 2 if code in (3, 7) else 1


@njit(cache=True)
def draw_rows(  # type: ignore[no-untyped-def]
    program, seed, ids, view, views, partners, batch, height, width, words
):  # fmt: skip
    """Fill a plan.

    Args:
        program: float64 ``(1 + steps, 6)``. First sampling, border and three levels of the fill;
            then a row a step: its code and numbers.
        seed: uint64.
        ids: int64 ``(rows,)``.
        view: uint64, of all rows where ``views`` is empty.
        views: int64, one a row, one a batch, or ``(0,)``.
        partners: int64 ``(rows,)``, places in the batch; or ``(0,)`` for neighbours.
        batch: Rows of a batch; the last may have fewer.
        height: Of the images in pixels.
        width: Of the images in pixels.
        words: int64 ``(rows, 16)``: is filled. The table's bytes.
    """
    k0, k1 = seed & _LOW, seed >> _HALF
    total = ids.shape[0]
    tables = _tables_of(program, height, width)
    u = np.empty((4 * _BLOCKS, _CHUNK))
    matrices = np.empty((_CHUNK, 6))
    listed, places = np.empty(_CHUNK, dtype=np.int64), np.empty(_CHUNK, dtype=np.int64)
    chunk_samples = np.empty(_CHUNK, dtype=np.uint64)
    chunk_views = np.empty(_CHUNK, dtype=np.uint64)
    for start in range(0, total, _CHUNK):
        rows = min(_CHUNK, total - start)
        part = words[start : start + rows]
        floats, integers = part.view(np.float32), part.view(np.int32)
        shorts, small = part.view(np.int16), part.view(np.uint8)
        part[:] = 0
        for i in range(rows):
            row = start + i
            chunk_samples[i] = np.uint64(ids[row])
            chunk_views[i] = view
            if views.shape[0]:
                chunk_views[i] = np.uint64(views[row if views.shape[0] == total else row // batch])
            part[i, 0] = ids[row]
            integers[i, _VIEW] = np.int32(np.uint32(chunk_views[i]))
            own = row % batch
            last = min(batch, total - (row - own)) - 1
            partner = partners[row] if partners.shape[0] else min(own ^ 1, last)
            integers[i, _PARTNER] = partner
            small[i, _MIX] = _ALONE if partner == own else 0
            floats[i, _LAM] = 1.0
            small[i, _SAMPLING], small[i, _BORDER] = int(program[0, 0]), int(program[0, 1])
            for channel in range(3):
                small[i, _FILL + channel] = int(program[0, 2 + channel])
            matrices[i, 0] = matrices[i, 4] = 1.0
            matrices[i, 1] = matrices[i, 2] = matrices[i, 3] = matrices[i, 5] = 0.0
        slot = 0
        chosen = 0
        for step in range(1, program.shape[0]):
            code, n = int(program[step, 0]), program[step, 1:]
            draw = np.uint64(step - 1) * _DRAWS
            for block in range(_blocks_of(code, n)):
                _fill_block(
                    k0, k1, chunk_samples, chunk_views, draw + np.uint64(block), rows, u, 4 * block
                )
            if code <= 3:
                for i in range(rows):
                    small[i, _WARP_AT] = slot
                _draw_geometry(code, n, u, rows, height, width, matrices)
            elif code == 4:
                slot = _draw_jitter(n, u, rows, slot, floats, small)
            elif code == 5 or code == 6:
                fixed = code == 5 and n[1] == n[2]
                for number in range(1 if code == 6 else int(n[0])):
                    _draw_operation(
                        code == 6, fixed, n, u, 4 * number, rows, slot, chosen, height, width,
                        tables[step], matrices, floats, small, listed, places,
                    )  # fmt: skip
                    slot += 1
                    chosen += 1
            elif code == 7:
                _draw_erasing(n, u, rows, height, width, shorts, small)
            else:
                _draw_mixing(
                    code, n, u, k0, k1, chunk_samples, chunk_views, draw, rows, height,
                    width, floats, integers, shorts, small, listed,
                )  # fmt: skip
        for i in range(rows):
            if small[i, _MIX] == _ALONE:
                small[i, _MIX] = 0
            for place in range(6):
                floats[i, _MATRIX + place] = matrices[i, place]
