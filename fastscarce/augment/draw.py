"""Drawing of plans: random words to parameters, on the host, in double, then rounded.

Step number s of a policy reads the counter's draws 64 s to 64 s + 63 and no others, so a step that
is added at the end leaves those before it as they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from fastscarce.augment.philox import philox4x32, uniform, view_numbers
from fastscarce.augment.plan import Plan
from fastscarce.augment.policy import Policy, get_policy
from fastscarce.augment.table import BORDERS, OPERATIONS, PLAN, SAMPLINGS, SLOTS

__all__ = ["draw", "neighbours"]

_DRAWS = np.uint64(64)  # of a step
_TRIALS = 30  # blocks of a beta's rejection, two trials each: all fail once in 10**18
_CODE = {name: place for place, name in enumerate(OPERATIONS)}
_RANDAUGMENT = 14
_AUTOCONTRAST, _EQUALIZE = _CODE["autocontrast"], _CODE["equalize"]
_ROTATE, _SOLARIZE, _COLOR = _CODE["rotate"], _CODE["solarize"], _CODE["color"]
_POSTERIZE, _CONTRAST, _BRIGHTNESS = _CODE["posterize"], _CODE["contrast"], _CODE["brightness"]
_SHARPNESS, _SHEAR_X, _SHEAR_Y = _CODE["sharpness"], _CODE["shear_x"], _CODE["shear_y"]
_TRANSLATE_X, _TRANSLATE_Y, _HUE = _CODE["translate_x"], _CODE["translate_y"], _CODE["hue"]


def _place(name: str, size: int) -> int:
    """Where a field begins in a row of numbers of ``size`` bytes."""
    fields = PLAN.fields
    assert fields is not None
    return int(fields[name][1]) // size


_LAM, _MATRIX, _ARGUMENT = _place("lam", 4), _place("matrix", 4), _place("argument", 4)
_REST, _AMOUNT, _VIEW = _place("rest", 4), _place("amount", 4), _place("view", 4)
_PARTNER, _BOX, _ERASE = _place("partner", 4), _place("box", 2), _place("erase", 2)
_OPERATION, _DRAWN, _FILL = _place("operation", 1), _place("drawn", 1), _place("fill", 1)
_ERASE_FILL, _MIX, _WARP_AT = _place("erase_fill", 1), _place("mix", 1), _place("warp_at", 1)
_SAMPLING, _BORDER = _place("sampling", 1), _place("border", 1)


def neighbours(rows: int) -> npt.NDArray[np.int64]:
    """Places of partners, ``(rows,)``: 2i and 2i + 1 are a pair; an odd last row is its own."""
    place: npt.NDArray[np.int64] = np.arange(rows, dtype=np.int64) ^ 1
    return place.clip(max=max(rows - 1, 0))


def draw(
    policy: str | Sequence[Any] | Policy,
    sample_ids: npt.ArrayLike,
    *,
    view: npt.ArrayLike,
    seed: int,
    image_size: int | tuple[int, int],
    partners: npt.ArrayLike | None = None,
) -> Plan:
    """Draw a plan: each row is a function of (policy, seed, id, view, image size) alone.

    Only ``partner``, which names a place in the batch, and that a row whose partner is itself is
    not mixed, come from the batch.

    Args:
        policy: A name such as ``"randaugment(2, 9)+cutmix"``, a list of steps, or a `Policy`.
        sample_ids: int64 ``(rows,)``.
        view: View numbers, 0 to 2**32 - 1: int64 ``(rows,)`` or one number for all.
        seed: Any integer; its low 64 bits count.
        image_size: Side in pixels, or height and width.
        partners: Places in the batch of the rows that are mixed in, int64 ``(rows,)``. None:
            2i and 2i + 1 are each other's.

    Returns:
        A `Plan` of as many rows.

    Raises:
        ValueError: The policy is unknown, or a view, a partner or the size is out of range.
    """
    chosen = get_policy(policy)
    ids = np.ascontiguousarray(sample_ids, dtype=np.int64)
    if ids.ndim != 1:
        raise ValueError(f"draw needs sample_ids of shape (rows,), got {ids.shape}.")
    rows = ids.shape[0]
    size = checked_size("draw", image_size)
    views = view_numbers(view, rows)
    places = neighbours(rows) if partners is None else _partners(partners, rows)
    border = "reflect" if chosen.fill == "reflect" else "fill"
    # Whole numbers of eight bytes, so that each row lies where the kernels can read it; passed on
    # as a few plain arrays, because each one costs a compiled function more than a row does.
    words = np.zeros((rows, PLAN.itemsize // 8), dtype=np.int64)
    words[:, 0] = ids
    small = words.view(np.uint8)
    if rows:
        middle = np.array(
            [SAMPLINGS.index(chosen.sampling), BORDERS.index(border), *chosen.fill_levels],
            dtype=np.uint8,
        )
        _draw_rows(
            chosen.codes, chosen.numbers, np.uint64(seed & 0xFFFFFFFFFFFFFFFF), ids, views, places,
            size[0], size[1], middle, words.view(np.float32), words.view(np.int32),
            words.view(np.int16), small,
        )  # fmt: skip
    table = small.view(PLAN).reshape(rows)
    return Plan(table, size)


def checked_size(name: str, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width.

    Raises:
        ValueError: They are not from 1 to 32767.
    """
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(s, int) and 1 <= s <= 32767 for s in pair):
        raise ValueError(
            f"{name} needs image_size, one side or (height, width) of 1 to 32767 pixels, got"
            f" {image_size!r}."
        )
    return pair


def _partners(partners: npt.ArrayLike, rows: int) -> npt.NDArray[np.int64]:
    places = np.asarray(partners, dtype=np.int64)
    if places.shape != (rows,) or (rows and not (places.min() >= 0 and places.max() < rows)):
        raise ValueError(
            f"draw needs partners, {rows} places from 0 to {rows - 1}, got shape {places.shape}"
            + (f" from {places.min()} to {places.max()}." if places.size else ".")
        )
    return places


@njit(inline="always")
def _block(k0, k1, low, high, view, step, block):  # type: ignore[no-untyped-def]
    words = philox4x32(low, high, view, np.uint64(step) * _DRAWS + np.uint64(block), k0, k1)
    return uniform(words[0]), uniform(words[1]), uniform(words[2]), uniform(words[3])


@njit(cache=True)
def _beta(alpha, spare, k0, k1, low, high, view, step):  # type: ignore[no-untyped-def]
    """Beta(alpha, alpha) by bounded rejection within the step's own draws.

    Source: below 1 Jöhnk (1964), above 1 Cheng's BB (1978); at 1 it is ``spare`` itself.
    """
    if alpha == 1.0:
        return spare
    root = math.sqrt(alpha)
    for trial in range(2 * _TRIALS):
        words = _block(k0, k1, low, high, view, step, 1 + trial // 2)
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
def _warp_of(m, code, amount, height, width):  # type: ignore[no-untyped-def]
    """One of RandAugment's warps; shear is about the top left corner, as torchvision's is."""
    if code == _ROTATE:
        cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
        _compose(m, cos, -sin, 0.0, sin, cos, 0.0)
    elif code == _SHEAR_X:
        _compose(m, 1.0, amount, amount * height * 0.5, 0.0, 1.0, 0.0)
    elif code == _SHEAR_Y:
        _compose(m, 1.0, 0.0, 0.0, amount, 1.0, amount * width * 0.5)
    elif code == _TRANSLATE_X:
        _compose(m, 1.0, 0.0, -amount, 0.0, 1.0, 0.0)
    elif code == _TRANSLATE_Y:
        _compose(m, 1.0, 0.0, 0.0, 0.0, 1.0, -amount)
    else:
        return False
    return True


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
def _cut(share, across, down, height, width, box):  # type: ignore[no-untyped-def]
    """A clipped box of ``share`` of the area about a uniform centre; its pixels."""
    side = math.sqrt(share)
    for axis in range(2):
        size = height if axis == 0 else width
        half = math.floor(size * side) / 2.0
        centre = math.floor((down if axis == 0 else across) * size)
        box[axis] = min(max(math.floor(centre - half), 0), size)
        box[axis + 2] = min(max(math.floor(centre + half), 0), size)
    return (box[2] - box[0]) * (box[3] - box[1])


@njit(cache=True)
def _place_erasing(n, words, more, height, width, erase, fill):  # type: ignore[no-untyped-def]
    area = (n[1] + (n[2] - n[1]) * words[1]) * height * width
    ratio = math.exp((2.0 * words[2] - 1.0) * math.log(10.0 / 3.0))
    tall = min(max(np.rint(math.sqrt(area * ratio)), 1.0), height)
    broad = min(max(np.rint(math.sqrt(area / ratio)), 1.0), width)
    top = math.floor(words[3] * (height - tall + 1))
    left = math.floor(more[0] * (width - broad + 1))
    erase[0], erase[1], erase[2], erase[3] = top, left, top + tall, left + broad
    for channel in range(3):
        fill[channel] = math.floor(more[1] * 256.0)


@njit(cache=True)
def _draw_rows(  # type: ignore[no-untyped-def]
    codes, numbers, seed, ids, views, partner, height, width, middle, floats, integers, shorts,
    small,
):  # fmt: skip
    lam, mix, warp_at = floats[:, _LAM], small[:, _MIX], small[:, _WARP_AT]
    matrix = floats[:, _MATRIX : _MATRIX + 6]
    argument, rest = floats[:, _ARGUMENT : _ARGUMENT + SLOTS], floats[:, _REST : _REST + SLOTS]
    amounts = floats[:, _AMOUNT : _AMOUNT + SLOTS]
    operation = small[:, _OPERATION : _OPERATION + SLOTS]
    drawn, erase_fill = small[:, _DRAWN : _DRAWN + SLOTS], small[:, _ERASE_FILL : _ERASE_FILL + 4]
    box, erase = shorts[:, _BOX : _BOX + 4], shorts[:, _ERASE : _ERASE + 4]
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = seed & mask, seed >> half
    m = np.empty(6)
    for row in range(ids.shape[0]):
        sample = np.uint64(ids[row])
        integers[row, _VIEW] = np.int32(np.uint32(views[row]))
        integers[row, _PARTNER] = partner[row]
        lam[row] = 1.0
        small[row, _SAMPLING], small[row, _BORDER] = middle[0], middle[1]
        for channel in range(3):
            small[row, _FILL + channel] = middle[2 + channel]
        low, high, view = sample & mask, sample >> half, views[row]
        m[0] = m[4] = 1.0
        m[1] = m[2] = m[3] = m[5] = 0.0
        slot = 0
        chosen = 0
        for step in range(codes.shape[0]):
            code, n = codes[step], numbers[step]
            w = _block(k0, k1, low, high, view, step, 0)
            if code == 0:  # flip
                warp_at[row] = slot
                if w[0] < n[0]:
                    _compose(m, -1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
            elif code == 1:  # shift
                warp_at[row] = slot
                most = max(1.0, np.rint(n[0] * width)) if n[0] > 0 else 0.0
                right = math.floor(w[0] * (2.0 * most + 1.0)) - most
                most = max(1.0, np.rint(n[0] * height)) if n[0] > 0 else 0.0
                below = math.floor(w[1] * (2.0 * most + 1.0)) - most
                _compose(m, 1.0, 0.0, right, 0.0, 1.0, below)
            elif code == 2:  # resized crop
                warp_at[row] = slot
                area = n[0] + (n[1] - n[0]) * w[0]
                ratio = math.exp((2.0 * w[1] - 1.0) * math.log(n[2])) if area < 1.0 else 1.0
                x = min(math.sqrt(area * ratio), 1.0)
                y = min(math.sqrt(area / ratio), 1.0)
                right = (w[2] - 0.5) * (1.0 - x) * width
                below = (w[3] - 0.5) * (1.0 - y) * height
                _compose(m, x, 0.0, right, 0.0, y, below)
            elif code == 3:  # affine
                warp_at[row] = slot
                more = _block(k0, k1, low, high, view, step, 1)
                angle = math.radians((2.0 * w[0] - 1.0) * n[0])
                scale = math.exp((2.0 * w[1] - 1.0) * n[1])
                shear_x, shear_y = (2.0 * w[2] - 1.0) * n[2], (2.0 * w[3] - 1.0) * n[3]
                right = (2.0 * more[0] - 1.0) * n[4] * width
                below = (2.0 * more[1] - 1.0) * n[4] * height
                cos, sin = scale * math.cos(angle), scale * math.sin(angle)
                _compose(m, cos, -sin, right, sin, cos, below)
                _compose(m, 1.0, shear_x, 0.0, 0.0, 1.0, 0.0)
                _compose(m, 1.0, 0.0, 0.0, shear_y, 1.0, 0.0)
            elif code == 4:  # jitter
                for kind in range(4):
                    if n[kind] > 0:
                        spread = (2.0 * w[kind] - 1.0) * n[kind]
                        factor = spread if kind == 3 else 1.0 + spread
                        name = _BRIGHTNESS
                        if kind == 1:
                            name = _CONTRAST
                        elif kind == 2:
                            name = _COLOR
                        elif kind == 3:
                            name = _HUE
                        operation[row, slot] = name
                        argument[row, slot] = factor
                        rest[row, slot] = 1.0 - factor
                        slot += 1
            elif code == 5 or code == 6:  # randaugment, trivialaugment
                wide = code == 6
                count = 1 if wide else int(n[0])
                for number in range(count):
                    u = w if number == 0 else _block(k0, k1, low, high, view, step, number)
                    name = min(int(u[0] * _RANDAUGMENT), _RANDAUGMENT - 1)
                    magnitude = math.floor(u[1] * 31.0) if wide else n[1] + (n[2] - n[1]) * u[1]
                    amount = _amount_of(name, magnitude / 30.0, u[2] < 0.5, wide, height, width)
                    drawn[row, chosen] = name
                    amounts[row, chosen] = amount
                    chosen += 1
                    if _warp_of(m, name, amount, height, width):
                        warp_at[row] = slot
                    else:
                        operation[row, slot] = name
                        argument[row, slot] = amount
                        rest[row, slot] = 1.0 - amount
                    slot += 1
            elif code == 7:  # erase
                if w[0] < n[0]:
                    more = _block(k0, k1, low, high, view, step, 1)
                    _place_erasing(n, w, more, height, width, erase[row], erase_fill[row])
            elif w[0] < n[1] and mix[row] == 0 and partner[row] != row:  # cutmix, mixup
                share = _beta(n[0], w[3], k0, k1, low, high, view, step)
                if code == 8:
                    mix[row] = 1
                    area = _cut(1.0 - share, w[2], w[1], height, width, box[row])
                    lam[row] = 1.0 - area / (height * width)
                else:
                    mix[row] = 2
                    lam[row] = share
        for place in range(6):
            matrix[row, place] = m[place]
