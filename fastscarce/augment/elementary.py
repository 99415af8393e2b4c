"""Sine, cosine and exponential of double numbers, by additions and multiplications alone.

So a plan's numbers are the same with any C library, and a loop over rows becomes vectors.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["cosine_sine", "exponential"]

# Half of pi and the logarithm of 2, each as its leading bits and the rest.
_HALF_PI, _HALF_PI_REST = 1.57079632673412561417, 6.07710050650619224932e-11
_LOG_2, _LOG_2_REST = 6.93147180369123816490e-01, 1.90821492927058770002e-10


@njit(inline="always")
def cosine_sine(x):  # type: ignore[no-untyped-def]
    """Of ``x`` from -1000 to 1000 radians, to about one unit in the last place.

    Source: the polynomials of fdlibm's k_cos.c and k_sin.c (Sun Microsystems, 1993).
    """
    quarter = np.rint(x * 0.636619772367581343076)
    r = (x - quarter * _HALF_PI) - quarter * _HALF_PI_REST
    z = r * r
    s = -2.50507602534068634195e-08 + z * 1.58969099521155010221e-10
    s = -1.98412698298579493134e-04 + z * (2.75573137070700676789e-06 + z * s)
    s = -1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 + z * s)
    s = r + (z * r) * s
    c = 2.08757232129817482790e-09 + z * -1.13596475577881948265e-11
    c = 2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07 + z * c)
    c = z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * c))
    half = 0.5 * z
    w = 1.0 - half
    c = w + (((1.0 - w) - half) + z * c)
    turn = int(quarter)
    cosine, sine = (s, c) if turn & 1 else (c, s)
    return (-cosine if (turn + 1) & 2 else cosine), (-sine if turn & 2 else sine)


@njit(inline="always")
def exponential(x):  # type: ignore[no-untyped-def]
    """Of ``x`` from -700 to 700, to about one unit in the last place: Taylor's series."""
    power = np.rint(x * 1.44269504088896338700)
    r = (x - power * _LOG_2) - power * _LOG_2_REST
    p = 1.0 / 479001600.0 + r * (1.0 / 6227020800.0)
    p = 1.0 / 3628800.0 + r * (1.0 / 39916800.0 + r * p)
    p = 1.0 / 40320.0 + r * (1.0 / 362880.0 + r * p)
    p = 1.0 / 720.0 + r * (1.0 / 5040.0 + r * p)
    p = 1.0 / 24.0 + r * (1.0 / 120.0 + r * p)
    p = 0.5 + r * (1.0 / 6.0 + r * p)
    scale = np.int64((np.int64(power) + 1023) << 52).view(np.float64)
    return (1.0 + (r + r * r * p)) * scale
