"""Numba kernels of spline couplings: monotone rational-quadratic splines, linear beyond both ends.

Gregory and Delbourgo 1982, equation 2.4; as a coupling law Durkan et al. 2019, "Neural spline flows". What m means, and
the symbols: Backend.spline_forward. Computed in float64, on tiles: arrays whose lines are the numbers of m, values and
results, side by side for up to TILE elements, so that arithmetic runs along vector registers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from numba import int64, void

from nicecp.kernels._numba_native import call_block, item_size, number_at, put_at
from nicecp.kernels._numba_vector import (
    ALWAYS,
    NEVER,
    WIDTH,
    Mask,
    Number,
    Rows,
    Vector,
    exp_minus,
    log_1p,
    on_rows,
    where,
)
from nicecp.kernels.backend import SPLINE_BINS, SPLINE_BOUND, SPLINE_LEAST, SPLINE_OFFSET, SPLINE_STEEP
from nicecp.kernels.jit import c_function, inlined, kernel

TILE = 64
_COLUMNS = 16  # of a tile at most: slopes lie between 1e-13 and 1e4, and a product of 16 neither overflows nor vanishes
_WIDTH, _BOUND = WIDTH, SPLINE_BOUND
_SHARED = 2.0 * _BOUND * (1.0 - SPLINE_BINS * SPLINE_LEAST)  # of the interval, what softmax shares out
_SMALLEST = 2.0 * _BOUND * SPLINE_LEAST  # bin

# Lines of a tile. The first are m's numbers: widths, heights, inner slopes; after a backward pass gradients by these.
_WIDTHS, _HEIGHTS = range(SPLINE_BINS), range(SPLINE_BINS, 2 * SPLINE_BINS)
_SLOPES = range(2 * SPLINE_BINS, 3 * SPLINE_BINS - 1)
OUTPUTS = 3 * SPLINE_BINS - 1
VALUE, RESULT, SLOPE = OUTPUTS, OUTPUTS + 1, OUTPUTS + 2  # what goes in, what comes out, dy/dx there
UP, UP_LOG = OUTPUTS + 3, OUTPUTS + 4  # upstream gradients by the result and by log(slope)
ROWS = OUTPUTS + 5


def _knots(raw: Sequence[Vector]) -> list[Vector]:
    """m's BINS numbers -> BINS + 1 knots from -BOUND to BOUND."""
    top = raw[0]
    for other in raw[1:]:
        top = where(other.compare(">", top), other, top)
    sums = [top.like(0.0)]
    for one in raw:
        sums.append(sums[-1] + exp_minus(top - one))
    share = _SHARED / sums[-1]
    inner = [share * before + (b * _SMALLEST - _BOUND) for b, before in enumerate(sums)]
    return [top.like(-_BOUND), *inner[1:-1], top.like(_BOUND)]


def _slope(u: Vector) -> Vector:
    """A knot's slope: LEAST + softplus(u + OFFSET), 1 for u = 0."""
    a = where(u.compare(">", SPLINE_STEEP), u.like(SPLINE_STEEP), u) + SPLINE_OFFSET
    return SPLINE_LEAST + where(a.compare(">", 0.0), a, 0.0) + log_1p(exp_minus(a.function("fabs")))


def _slope_backward(up: Vector, u: Vector) -> Vector:
    a = u + SPLINE_OFFSET
    e = exp_minus(a.function("fabs"))
    through = up * where(a.compare("<", 0.0), e, 1.0) / (1.0 + e)
    return where(u.compare(">", SPLINE_STEEP), u.like(0.0), through)


class _Bin:
    """The bin that a value lies in.

    reached[b] : whether its number is b or more; x0, x1, y0, y1 : its ends; u0, u1 : m's numbers of the slopes there, 0
    at the outermost; left, right : these slopes; w, h, s : width, height, and their ratio.
    """

    def __init__(self, rows: Rows, inverse: bool) -> None:
        self.value = rows[VALUE]
        self.xs, self.ys = _knots([rows[i] for i in _WIDTHS]), _knots([rows[i] for i in _HEIGHTS])
        beyond = [self.value.compare(">=", edge) for edge in (self.ys if inverse else self.xs)[1:-1]]
        self.reached: list[Mask] = [ALWAYS, *beyond, NEVER]

        def pick(each: Sequence[Vector]) -> Vector:
            found = each[0]
            for mask, one in zip(beyond, each[1:], strict=True):
                found = where(mask, one, found)
            return found

        slopes = [self.value.like(0.0), *(rows[i] for i in _SLOPES), self.value.like(0.0)]
        (self.x0, self.x1), (self.y0, self.y1), (self.u0, self.u1) = (
            (pick(ends[:-1]), pick(ends[1:])) for ends in (self.xs, self.ys, slopes)
        )
        self.left, self.right = _slope(self.u0), _slope(self.u1)
        self.w, self.h = self.x1 - self.x0, self.y1 - self.y0
        self.s = self.h / self.w
        self.excess = self.left + self.right - 2.0 * self.s
        self.inside = self.value.function("fabs").compare("<", _BOUND)

    def at(self, t: Vector) -> tuple[Vector, Vector, Vector, Vector]:
        """At a place t of the bin, 0 to 1: 1 - t, t (1 - t), y's denominator, and the slope's numerator over s^2."""
        rest = 1.0 - t
        v = t * rest
        below = self.s + self.excess * v
        return rest, v, below, self.right * t * t + 2.0 * self.s * v + self.left * rest * rest


def _forward(rows: Rows) -> None:
    b = _Bin(rows, False)
    t = (b.value - b.x0) / b.w
    _, v, below, above = b.at(t)
    y = b.y0 + b.h * (b.s * t * t + b.left * v) / below
    rows[RESULT] = where(b.inside, y, b.value)
    rows[SLOPE] = where(b.inside, (b.s / below) * (b.s / below) * above, 1.0)


def _inverse(rows: Rows) -> None:
    """By the root of the quadratic that does not cancel: Durkan et al. 2019, appendix A.1. The slope is dy/dx, too."""
    b = _Bin(rows, True)
    y = b.value - b.y0
    linear = b.h * b.left - y * b.excess
    under = linear * linear + 4.0 * b.s * y * (b.h * (b.s - b.left) + y * b.excess)
    t = 2.0 * b.s * y / (linear + where(under.compare("<", 0.0), under.like(0.0), under).function("sqrt"))
    _, _, below, above = b.at(t)
    rows[RESULT] = where(b.inside, b.x0 + b.w * t, b.value)
    rows[SLOPE] = where(b.inside, (b.s / below) * (b.s / below) * above, 1.0)


def _backward(rows: Rows) -> None:
    b, up, up_log = _Bin(rows, False), rows[UP], rows[UP_LOG]
    t = (b.value - b.x0) / b.w
    rest, v, below, above = b.at(t)
    turn = 1.0 - 2.0 * t
    part = (b.s * t * t + b.left * v) / below  # of the height
    up_part, log_above, log_below = up * b.h / below, up_log / above, 2.0 * up_log / below
    # By the place t, by s, and by the two slopes, each with the others held.
    by_t = up * (b.s / below) * (b.s / below) * above * b.w - log_below * b.excess * turn
    by_t = by_t + 2.0 * log_above * (b.right * t + b.s * turn - b.left * rest)
    by_s = up_part * (t * t - part * (1.0 - 2.0 * v)) + 2.0 * up_log / b.s
    by_s = by_s + 2.0 * v * log_above - log_below * (1.0 - 2.0 * v)
    by_left = v * (up_part * (1.0 - part) - log_below) + log_above * rest * rest
    by_right = log_above * t * t - v * (up_part * part + log_below)
    by_x = by_t / b.w
    rows[RESULT] = where(b.inside, by_x, up)

    def used(gradient: Number) -> Vector:
        return where(b.inside, up.like(gradient), 0.0)

    by_w, by_h = used(0.0 - (t * by_t + b.s * by_s) / b.w), used(up * part + by_s / b.w)
    _knots_backward(rows, _WIDTHS, b, b.xs, used(0.0 - by_x), by_w)
    _knots_backward(rows, _HEIGHTS, b, b.ys, used(up), by_h)
    by_u0, by_u1 = used(_slope_backward(by_left, b.u0)), used(_slope_backward(by_right, b.u1))
    for j, row in enumerate(_SLOPES):  # between bins j and j + 1
        from_left, from_right = where(b.reached[j], by_u1, 0.0), where(b.reached[j + 2], up.like(0.0), by_u0)
        rows[row] = where(b.reached[j + 1], from_right, from_left)


def _knots_backward(
    rows: Rows, lines: range, b: _Bin, knots: Sequence[Vector], by_start: Vector, by_size: Vector
) -> None:
    """Gradients by the start and the size of the bin in use -> by m's numbers.  Pair: _knots.

    The start is -BOUND and the sizes of all bins before; of softmax p, the gradient is p (g - sum of p g).
    """
    sizes = [where(b.reached[i + 1], by_start, where(b.reached[i], by_size, 0.0)) for i in range(SPLINE_BINS)]
    shares = [after - before - _SMALLEST for before, after in pairwise(knots)]
    total = sum((share * size for share, size in zip(shares, sizes, strict=True)), by_start.like(0.0)) / _SHARED
    for line, share, size in zip(lines, shares, sizes, strict=True):
        rows[line] = share * (size - total)


_FORMS = {"values": on_rows(_forward), "inverses": on_rows(_inverse), "gradients": on_rows(_backward)}


@cache
def tile_function(form: str) -> int:
    """Address of void f(tile, bytes from line to line, elements): VALUE -> RESULT and SLOPE ("values", "inverses"), or
    VALUE, UP and UP_LOG -> RESULT, the gradient by the value, and gradients in place of m's numbers ("gradients").

    Lines are of a multiple of WIDTH numbers. One compiled function serves flows of both dtypes, points and blocks, and
    is compiled when a flow has a spline: nobody else waits for it.
    """
    compute = _FORMS[form]

    def tile(address, line, size):  # type: ignore[no-untyped-def]
        for start in range(0, 8 * size, 8 * _WIDTH):
            compute(address + start, line)

    tile.__qualname__ = f"spline_{form}"
    return int(c_function(void(int64, int64, int64), tile).address)


@inlined
def couple_rows(total, z, m, k, rows, function, like):  # type: ignore[no-untyped-def]
    """z : (k, rows) becomes its spline, total : (rows,) float64 += its log slopes; m : (OUTPUTS, k, rows).

    For points and blocks. z, m : addresses of numbers of like's type; function : tile_function("values").
    """
    size, real = item_size(like), type(like)
    most = rows * max(1, min(_COLUMNS, TILE // rows))
    line = (min(most, k * rows) + _WIDTH - 1) // _WIDTH * _WIDTH
    tile = np.zeros((ROWS, line), np.float64)
    for start in range(0, k * rows, most):
        count = min(most, k * rows - start)
        for e in range(count):
            tile[VALUE, e] = number_at(z + size * (start + e), like)
        for p in range(OUTPUTS):
            for e in range(count):
                tile[p, e] = number_at(m + size * (p * k * rows + start + e), like)
        call_block(function, tile.ctypes.data, 8 * line, count)
        for e in range(count):
            put_at(z + size * (start + e), real(tile[RESULT, e]))
        for r in range(rows):
            product = 1.0
            for e in range(r, count, rows):
                product *= tile[SLOPE, e]
            put_at(total + 8 * r, number_at(total + 8 * r, np.float64(0)) + math.log(product))
    tile[0, 0] = 0.0  # Numba frees an array after its last use, and does not know of its address


@inlined
def _gather(tile, x, m, top, height, start, width):  # type: ignore[no-untyped-def]
    k = x.shape[1]
    for r in range(height):
        for c in range(width):
            tile[VALUE, r * width + c] = x[top + r, start + c]
        for p in range(OUTPUTS):
            for c in range(width):
                tile[p, r * width + c] = m[top + r, p * k + start + c]


@kernel
def spline_forward(y, log_det, x, m, function, inverse, first):  # type: ignore[no-untyped-def]
    """y : (n, k) = the spline of x, or its inverse; log_det : (n,) float64 = (or += unless first) log abs det.

    function : tile_function("values"), or ("inverses") if inverse.
    """
    n, k = x.shape
    columns = min(k, _COLUMNS)
    rows = TILE // columns
    tile = np.zeros((ROWS, TILE), np.float64)
    if first:
        for i in range(n):
            log_det[i] = 0.0
    for start in range(0, k, columns):
        width = min(columns, k - start)
        for top in range(0, n, rows):
            height = min(rows, n - top)
            _gather(tile, x, m, top, height, start, width)
            call_block(function, tile.ctypes.data, 8 * TILE, height * width)
            for r in range(height):
                product = 1.0
                for c in range(r * width, (r + 1) * width):
                    product *= tile[SLOPE, c]
                log_det[top + r] += -math.log(product) if inverse else math.log(product)
                for c in range(width):
                    y[top + r, start + c] = tile[RESULT, r * width + c]
    tile[0, 0] = 0.0  # Numba frees an array after its last use, and does not know of its address


@kernel
def spline_backward(dx, dm, dy, dlog_det, x, m, function):  # type: ignore[no-untyped-def]
    """dx : (n, k), dm as m : (n, (3 BINS - 1) k), from dy : (n, k) and dlog_det : (n,) float64.

    function : tile_function("gradients").
    """
    n, k = x.shape
    columns = min(k, _COLUMNS)
    rows = TILE // columns
    tile = np.zeros((ROWS, TILE), np.float64)
    for start in range(0, k, columns):
        width = min(columns, k - start)
        for top in range(0, n, rows):
            height = min(rows, n - top)
            _gather(tile, x, m, top, height, start, width)
            for r in range(height):
                for c in range(width):
                    tile[UP, r * width + c] = dy[top + r, start + c]
                    tile[UP_LOG, r * width + c] = dlog_det[top + r]
            call_block(function, tile.ctypes.data, 8 * TILE, height * width)
            for r in range(height):
                for c in range(width):
                    dx[top + r, start + c] = tile[RESULT, r * width + c]
                for p in range(OUTPUTS):
                    for c in range(width):
                        dm[top + r, p * k + start + c] = tile[p, r * width + c]
    tile[0, 0] = 0.0  # as above
