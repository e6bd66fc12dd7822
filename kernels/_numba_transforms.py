"""Transforms of single columns for a point's program: z and log dz/dx of one number (nicecp.transforms has the rows).

Each takes its numbers from a table of float64 at an address, one table for every column. Outside a transform's support
the result is not finite.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba.extending import get_cython_function_address

from nicecp.kernels._numba_native import call_special, number_at
from nicecp.kernels.jit import inlined
from nicecp.kernels.point import ColumnKind

_LOG, _LOGIT, _ANGLE, _STUDENT = ColumnKind.LOG, ColumnKind.LOGIT, ColumnKind.ANGLE, ColumnKind.STUDENT
_MARGIN = ColumnKind.MARGIN
_DOUBLE, _INTEGER = np.float64(0), np.int64(0)
_LOG_2PI = math.log(2.0 * math.pi)
_EDGE = 2.0**-53  # of a period: an angle on the seam counts as just beside it
_UNDERFLOW = 1e-280  # below this the tails of the t distribution are taken from their leading term


@cache
def special_functions() -> Any:
    """(3,) int64: addresses of SciPy's stdtr, ndtri and ndtri_exp for float64."""
    return np.array([_special(name) for name in ("stdtr", "ndtri", "ndtri_exp")], np.int64)


def _special(name: str) -> int:
    """Those that take several dtypes are numbered; 0 is float64."""
    from scipy.special import cython_special

    numbered = f"__pyx_fuse_0{name}"
    found = numbered if numbered in cython_special.__pyx_capi__ else name
    return int(get_cython_function_address("scipy.special.cython_special", found))


@inlined
def _softplus(a):  # type: ignore[no-untyped-def]
    return max(a, 0.0) + math.log1p(math.exp(-abs(a)))


@inlined
def _student(x, table, functions):  # type: ignore[no-untyped-def]
    """table : degrees of freedom, location, scale, and the logarithms of the density's and of the tail's factor."""
    nu, location, scale = (
        number_at(table, _DOUBLE),
        number_at(table + 8, _DOUBLE),
        number_at(table + 16, _DOUBLE),
    )
    t = (x - location) / scale
    size = abs(t)
    tail = call_special(number_at(functions, _INTEGER), nu, -size)
    if tail < _UNDERFLOW:
        log_tail = min(number_at(table + 32, _DOUBLE) - nu * math.log(size), 0.0)
        z = -call_special(number_at(functions + 16, _INTEGER), log_tail)
    else:
        z = -call_special(number_at(functions + 8, _INTEGER), tail)
    bent = _softplus(2.0 * math.log(size) - math.log(nu))
    log_density = number_at(table + 24, _DOUBLE) - 0.5 * (nu + 1.0) * bent
    return math.copysign(z, t), log_density - math.log(scale) + 0.5 * (z * z + _LOG_2PI)


@inlined
def _quantile(x, table):  # type: ignore[no-untyped-def]
    """table : number of knots, the tails' c to the left and the right, then x, z and slope of the knots."""
    count = int(number_at(table, _DOUBLE))
    xs = table + 24
    zs, slopes, last = xs + 8 * count, xs + 16 * count, 8 * (count - 1)
    side = -1 if x < number_at(xs, _DOUBLE) else (1 if x > number_at(xs + last, _DOUBLE) else 0)
    if side != 0:
        end = last if side > 0 else 0
        c, d = number_at(table + (16 if side > 0 else 8), _DOUBLE), number_at(slopes + end, _DOUBLE)
        rise = _softplus(math.log(side * (x - number_at(xs + end, _DOUBLE))) + math.log(d / c))
        return number_at(zs + end, _DOUBLE) + side * c * rise, math.log(d) - rise
    low, high = 0, count - 1  # the knot to the left of x, and one beyond it
    while high - low > 1:
        middle = (low + high) // 2
        if number_at(xs + 8 * middle, _DOUBLE) <= x:
            low = middle
        else:
            high = middle
    at = 8 * low
    width = number_at(xs + at + 8, _DOUBLE) - number_at(xs + at, _DOUBLE)
    height = number_at(zs + at + 8, _DOUBLE) - number_at(zs + at, _DOUBLE)
    mean, left, right = height / width, number_at(slopes + at, _DOUBLE), number_at(slopes + at + 8, _DOUBLE)
    u = (x - number_at(xs + at, _DOUBLE)) / width
    v = u * (1.0 - u)
    below = mean + (left + right - 2.0 * mean) * v
    above = right * u * u + 2.0 * mean * v + left * (1.0 - u) * (1.0 - u)
    z = number_at(zs + at, _DOUBLE) + height * (mean * u * u + left * v) / below
    return z, 2.0 * math.log(mean) + math.log(above) - 2.0 * math.log(below)


@inlined
def transform(kind, x, table, functions):  # type: ignore[no-untyped-def]
    """x -> z and log dz/dx, for MARGIN but for a constant."""
    if kind == _LOG:
        z = math.log(x - number_at(table, _DOUBLE))
        return z, -z
    if kind == _LOGIT:
        low, high = number_at(table, _DOUBLE), number_at(table + 8, _DOUBLE)
        below, above = math.log(x - low), math.log(high - x)
        return below - above, math.log(high - low) - below - above
    if kind == _ANGLE:
        cut, period = number_at(table, _DOUBLE), number_at(table + 8, _DOUBLE)
        turns = (x - cut) / period
        u = min(max(turns - np.floor(turns), _EDGE), 1.0 - _EDGE)
        below, above = math.log(u), math.log1p(-u)
        return below - above, -below - above - math.log(period)
    if kind == _MARGIN:  # what all rows have in common of its log-determinant is in the program's
        low, scale, margin = number_at(table, _DOUBLE), number_at(table + 8, _DOUBLE), number_at(table + 16, _DOUBLE)
        p = margin + (1.0 - 2.0 * margin) * ((x - low) * scale)
        below, above = math.log(p), math.log1p(-p)
        return below - above, -below - above
    if kind == _STUDENT:
        return _student(x, table, functions)
    return _quantile(x, table)
