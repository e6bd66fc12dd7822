"""Carries out a point's program (kernels/point.py): compiled once for every flow, cached, without the GIL.

Everything is float64, whatever the weights are. Legend: z values at a place in the scratch array, k features of a part.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import float64, int64

from nicecp.kernels._numba_factors import _bounded, _factor
from nicecp.kernels._numba_layers import _exp_minus
from nicecp.kernels._numba_native import call_point, item_size, number_at, put_at
from nicecp.kernels._numba_simd import dense_row
from nicecp.kernels._numba_spline import couple_rows
from nicecp.kernels._numba_transforms import transform
from nicecp.kernels.backend import FACTOR_BOUND
from nicecp.kernels.jit import c_function, inlined, kernel
from nicecp.kernels.point import Law, PointField, PointOp

# In bytes: programs are read at their address.
_HEADER, _SIZE, _NUMBERS, _ARRAYS = (
    8 * words for words in (PointField.HEADER, PointField.SIZE, PointField.NUMBERS, PointField.ARRAYS)
)
_ROWS, _SCRATCH, _LOG_DET = (8 * word for word in (PointField.ROWS, PointField.SCRATCH, PointField.LOG_DET))
_FEATURES, _CONTEXT_SIZE = 8 * PointField.FEATURES, 8 * PointField.CONTEXT
_SHIFT, _CHECK, _GATHER, _CONTEXT = PointOp.SHIFT, PointOp.CHECK, PointOp.GATHER, PointOp.CONTEXT
_DENSE, _COUPLE, _PRIOR, _STANDARDIZE = PointOp.DENSE, PointOp.COUPLE, PointOp.PRIOR, PointOp.STANDARDIZE
_PERMUTE = PointOp.PERMUTE
_DOUBLE, _INTEGER = np.float64(0), np.int64(0)
_SPLINE = Law.SPLINE
_BOUND, _HALF_LOG_2PI = FACTOR_BOUND, 0.5 * math.log(2.0 * math.pi)
_PRODUCT = 64  # factors of at most 2 that are multiplied before a logarithm is taken: they cannot overflow
FAILED = math.inf  # what the core returns where a finite point has no finite log-density


@inlined
def _couple(z, m, k, law):  # type: ignore[no-untyped-def]
    """z : (k,) by a law with the network's output m, both at addresses -> log abs det."""
    total = 0.0
    if law == 0:
        for c in range(0, 8 * k, 8):
            put_at(z + c, number_at(z + c, _DOUBLE) + number_at(m + c, _DOUBLE))
        return total
    for c in range(0, 8 * k, 8):
        a = _BOUND * _bounded(number_at(m + c, _DOUBLE))
        shift = number_at(m + 8 * k + c, _DOUBLE) if law == 2 else 0.0
        put_at(z + c, number_at(z + c, _DOUBLE) * _factor(a) + shift)
        total += a
    return total


@inlined
def _log_prior(z, h, s, k, prior, one):  # type: ignore[no-untyped-def]
    """h : (k,) = |z exp(s)|, all at addresses -> sum of log p_H(h) + s."""
    total, size = 0.0, item_size(one)
    for c in range(k):
        log_scale = np.float64(number_at(s + size * c, one))
        put_at(h + 8 * c, abs(number_at(z + 8 * c, _DOUBLE) * math.exp(log_scale)))
        total += log_scale
    if prior == 0:
        for c in range(0, 8 * k, 8):
            value = number_at(h + c, _DOUBLE)
            total -= 0.5 * value * value + _HALF_LOG_2PI
        return total
    for start in range(0, k, _PRODUCT):
        product = 1.0
        for c in range(start, min(start + _PRODUCT, k)):
            value = number_at(h + 8 * c, _DOUBLE)
            total -= value
            product *= 1.0 + _exp_minus(value)
        total -= 2.0 * math.log(product)
    return total


def _core(one: Any, transforms: bool) -> Any:
    """What evaluates a point, for weights of one's dtype, to be compiled."""
    largest = float(np.finfo(one.dtype).max)
    narrow = one.dtype != np.float64  # else LLVM drops a second copy of the layer's code

    def core(program, x, line, context, context_line):  # type: ignore[no-untyped-def]
        """log p of the point whose numbers stand at x, x + line, ... in nats; FAILED if it is finite and that is not.

        program, x, context : addresses, the last two of float64; lines in bytes.
        """
        scratch = number_at(program + _SCRATCH, _INTEGER)
        work = np.empty(scratch + 1, np.float64)
        base = work.ctypes.data
        gained = base + 8 * scratch
        total = number_at(program + _LOG_DET, _DOUBLE)
        unknown, infinite = False, False
        for c in range(number_at(program + _FEATURES, _INTEGER)):
            value = number_at(x + c * line, _DOUBLE)
            unknown |= math.isnan(value)
            infinite |= math.isinf(value)
            put_at(base + 8 * c, value)
        for c in range(number_at(program + _CONTEXT_SIZE, _INTEGER)):
            unknown |= not math.isfinite(number_at(context + c * context_line, _DOUBLE))
        first_row, count = program + _HEADER, number_at(program + _ROWS, _INTEGER)
        if unknown or infinite:
            count = 0
        for row in range(first_row, first_row + count * _SIZE, _SIZE):
            op, n = number_at(row, _INTEGER), number_at(row + _NUMBERS + 8, _INTEGER)
            z, other = (
                base + 8 * number_at(row + _NUMBERS, _INTEGER),
                base + 8 * number_at(row + _NUMBERS + 16, _INTEGER),
            )
            second = number_at(row + _NUMBERS + 24, _INTEGER)
            a, b = number_at(row + _ARRAYS, _INTEGER), number_at(row + _ARRAYS + 8, _INTEGER)
            if op == _DENSE:
                relu = number_at(row + _NUMBERS + 32, _INTEGER) != 0
                if narrow and number_at(row + _NUMBERS + 40, _INTEGER) != 0:
                    dense_row(z, other, a, b, n, second, relu, _DOUBLE)
                else:
                    dense_row(z, other, a, b, n, second, relu, one)
            elif op == _COUPLE and second == _SPLINE:
                put_at(gained, 0.0)
                couple_rows(gained, z, other, n, 1, number_at(a, _INTEGER), _DOUBLE)
                total += number_at(gained, _DOUBLE)
            elif op == _COUPLE:
                total += _couple(z, other, n, second)
            elif op == _PRIOR:
                total += _log_prior(z, other, a, n, second, one)
            elif op == _GATHER:
                for c in range(n):
                    put_at(z + 8 * c, number_at(other + 8 * number_at(a + 8 * c, _INTEGER), _DOUBLE))
            elif op == _CHECK:
                for c in range(n):
                    infinite |= not abs(number_at(z + 8 * c, _DOUBLE)) <= largest
                if infinite:
                    break
            elif op == _CONTEXT:
                behind = z + (other - base)
                for c in range(n):
                    put_at(behind + 8 * c, number_at(context + c * context_line, _DOUBLE))
            elif op == _SHIFT:
                for c in range(0, 8 * n, 8):
                    put_at(z + c, number_at(z + c, _DOUBLE) - number_at(a + c, _DOUBLE))
            elif op == _STANDARDIZE:
                for c in range(0, 8 * n, 8):
                    value = number_at(z + c, _DOUBLE) - number_at(a + c, _DOUBLE)
                    put_at(z + c, value / number_at(b + c, _DOUBLE))
            elif op == _PERMUTE:
                m, rest = number_at(row + _NUMBERS + 32, _INTEGER), base + 8 * second
                for c in range(0, 8 * n, 8):
                    at = number_at(a + c, _INTEGER)
                    put_at(z + c, number_at(other + 8 * at if at < m else rest + 8 * (at - m), _DOUBLE))
            elif transforms:  # else Numba does not compile what follows
                value, log_slope = transform(n, number_at(z, _DOUBLE), a, b)
                put_at(z, value)
                total += log_slope
        if unknown:
            total = math.nan
        elif infinite:
            total = -math.inf
        elif not math.isfinite(total):
            total = FAILED
        work[0] = total  # Numba frees an array after its last use, and does not know of its address
        return total

    return core


@cache
def core_address(dtype: str, transforms: bool) -> int:
    """Address of double core(program, x, line, context, line) for weights of that dtype."""
    core = _core(np.dtype(dtype).type(1), transforms)
    core.__qualname__ = f"core_{dtype}_transforms" if transforms else f"core_{dtype}"
    return int(c_function(float64(int64, int64, int64, int64, int64), core).address)


@kernel
def score_rows(out, program, x, context):  # type: ignore[no-untyped-def]
    """out : (n,) float64 = log p of x : (n, d), given context : (n, k) or (1, k), both float64; FAILED as above."""
    code, at, given = program.ctypes.data, x.ctypes.data, context.ctypes.data
    step = context.strides[0] if context.shape[0] > 1 else 0
    for i in range(x.shape[0]):
        out[i] = call_point(code, at + i * x.strides[0], x.strides[1], given + i * step, 8)
