"""Carries out a point's program (kernels/point.py) for many rows, a block of them at a time, without the GIL.

A block is as many rows as fill two vector registers with one feature of each, so that arithmetic runs along the rows
and a block's activations stay in the first-level cache, whatever the number of rows. Preprocessing is float64,
networks are of the flow's dtype, densities float64: the arithmetic of Backend's kernels.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import int64, void

from nicecp.kernels import _numba_point as one_point
from nicecp.kernels._numba_factors import _bounded, _factor
from nicecp.kernels._numba_layers import _exp_minus
from nicecp.kernels._numba_native import call_block, number_at, put_at
from nicecp.kernels._numba_simd import BLOCK_BYTES, dense_block
from nicecp.kernels._numba_spline import couple_rows
from nicecp.kernels._numba_transforms import transform
from nicecp.kernels.backend import FACTOR_BOUND
from nicecp.kernels.jit import c_function, inlined, kernel
from nicecp.kernels.point import Law, PointOp

# Numba takes constants from this module's own names.
_HEADER, _SIZE, _ROWS, _SCRATCH = one_point._HEADER, one_point._SIZE, one_point._ROWS, one_point._SCRATCH
_NUMBERS, _ARRAYS, _LOG_DET = one_point._NUMBERS, one_point._ARRAYS, one_point._LOG_DET
_FEATURES, _CONTEXT_SIZE, FAILED = one_point._FEATURES, one_point._CONTEXT_SIZE, one_point.FAILED
_SHIFT, _STANDARDIZE, _CHECK, _GATHER = PointOp.SHIFT, PointOp.STANDARDIZE, PointOp.CHECK, PointOp.GATHER
_CONTEXT, _DENSE, _COUPLE, _PRIOR = PointOp.CONTEXT, PointOp.DENSE, PointOp.COUPLE, PointOp.PRIOR
_PERMUTE = PointOp.PERMUTE
_DOUBLE, _INTEGER, _SPLINE = np.float64(0), np.int64(0), Law.SPLINE
_BOUND, _HALF_LOG_2PI = FACTOR_BOUND, 0.5 * math.log(2.0 * math.pi)
_PRODUCT = 64  # factors of at most 2 that are multiplied before a logarithm is taken: they cannot overflow
_LINE = 64  # bytes: a vector that lies across two cache lines takes two loads


@inlined
def _wide_dense(y, x, w, b, inputs, outputs, rows):  # type: ignore[no-untyped-def]
    """A layer of float64 between features of ``rows`` float64 each, without a ReLU: steps that mix features."""
    for o in range(outputs):
        at, bias = y + 8 * rows * o, number_at(b + 8 * o, _DOUBLE)
        for r in range(0, 8 * rows, 8):
            put_at(at + r, bias)
        for k in range(inputs):
            weight, values = number_at(w + 8 * (k * outputs + o), _DOUBLE), x + 8 * rows * k
            for r in range(0, 8 * rows, 8):
                put_at(at + r, number_at(at + r, _DOUBLE) + weight * number_at(values + r, _DOUBLE))


def _core(one: Any, transforms: bool) -> Any:
    """What evaluates rows, for weights of one's dtype, to be compiled."""
    size, real = one.itemsize, type(one)
    rows, wide = BLOCK_BYTES // size, 8 * (BLOCK_BYTES // size)  # wide : bytes of a feature in float64
    largest = float(np.finfo(real).max)

    def core(program, out, x, row_line, line, context, context_row, context_line, n):  # type: ignore[no-untyped-def]
        """out : (n,) = log p of the rows at x, x + row_line, ... in nats; FAILED where it is finite and that is not.

        program, out, x, context : addresses, the last three of float64; lines in bytes.
        """
        scratch = number_at(program + _SCRATCH, _INTEGER)
        work = np.empty(scratch * rows + 2 * rows + _LINE // 8, np.float64)
        base = (work.ctypes.data + _LINE - 1) // _LINE * _LINE
        total = base + scratch * wide  # (rows,)
        product = total + wide
        d, k = number_at(program + _FEATURES, _INTEGER), number_at(program + _CONTEXT_SIZE, _INTEGER)
        first_row = program + _HEADER
        last_row = first_row + number_at(program + _ROWS, _INTEGER) * _SIZE
        unknown, infinite = np.empty(rows, np.bool_), np.empty(rows, np.bool_)
        for start in range(0, n, rows):
            for r in range(rows):
                row = min(start + r, n - 1)  # the last one fills the block
                unknown[r], infinite[r] = False, False
                put_at(total + 8 * r, number_at(program + _LOG_DET, _DOUBLE))
                for c in range(d):
                    value = number_at(x + row * row_line + c * line, _DOUBLE)
                    unknown[r] |= math.isnan(value)
                    infinite[r] |= math.isinf(value)
                    put_at(base + c * wide + 8 * r, value)
                for c in range(k):
                    value = number_at(context + row * context_row + c * context_line, _DOUBLE)
                    unknown[r] |= not math.isfinite(value)
            for row in range(first_row, last_row, _SIZE):
                op, count = number_at(row, _INTEGER), number_at(row + _NUMBERS + 8, _INTEGER)
                z = base + wide * number_at(row + _NUMBERS, _INTEGER)
                third, second = number_at(row + _NUMBERS + 16, _INTEGER), number_at(row + _NUMBERS + 24, _INTEGER)
                a, b = number_at(row + _ARRAYS, _INTEGER), number_at(row + _ARRAYS + 8, _INTEGER)
                other = base + wide * third
                if op == _DENSE:
                    if number_at(row + _NUMBERS + 40, _INTEGER) != 0:
                        _wide_dense(z, other, a, b, count, second, rows)
                    else:
                        relu = number_at(row + _NUMBERS + 32, _INTEGER) != 0
                        dense_block(z, other, a, b, count, second, relu, one)
                elif op == _COUPLE:
                    if second == 0:
                        for c in range(0, count * BLOCK_BYTES, size):
                            put_at(z + c, number_at(z + c, one) + number_at(other + c, one))
                    elif second == _SPLINE:
                        couple_rows(total, z, other, count, rows, number_at(a, _INTEGER), one)
                    else:
                        for c in range(0, count * BLOCK_BYTES, BLOCK_BYTES):
                            for r in range(rows):
                                at = c + size * r
                                factor = _BOUND * _bounded(np.float64(number_at(other + at, one)))
                                shift = 0.0
                                if second == 2:
                                    shift = np.float64(number_at(other + count * BLOCK_BYTES + at, one))
                                put_at(z + at, real(np.float64(number_at(z + at, one)) * _factor(factor) + shift))
                                put_at(total + 8 * r, number_at(total + 8 * r, _DOUBLE) + factor)
                elif op == _PRIOR:
                    for first in range(0, count, _PRODUCT):
                        for r in range(0, wide, 8):
                            put_at(product + r, 1.0)
                        for c in range(first, min(first + _PRODUCT, count)):
                            log_scale = np.float64(number_at(a + size * c, one))
                            scale = math.exp(log_scale)
                            for r in range(rows):
                                h = abs(np.float64(number_at(z + c * BLOCK_BYTES + size * r, one)) * scale)
                                at, factor = total + 8 * r, product + 8 * r
                                if second == 0:
                                    term = log_scale - 0.5 * h * h - _HALF_LOG_2PI
                                else:
                                    term = log_scale - h
                                    put_at(factor, number_at(factor, _DOUBLE) * (1.0 + _exp_minus(h)))
                                put_at(at, number_at(at, _DOUBLE) + term)
                        if second != 0:
                            for r in range(0, wide, 8):
                                term = 2.0 * math.log(number_at(product + r, _DOUBLE))
                                put_at(total + r, number_at(total + r, _DOUBLE) - term)
                elif op == _GATHER:
                    for c in range(count):
                        values = other + wide * number_at(a + 8 * c, _INTEGER)
                        for r in range(rows):
                            put_at(z + c * BLOCK_BYTES + size * r, real(number_at(values + 8 * r, _DOUBLE)))
                elif op == _PERMUTE:
                    m, rest = number_at(row + _NUMBERS + 32, _INTEGER), base + wide * second
                    for c in range(count):
                        at = number_at(a + 8 * c, _INTEGER)
                        values = other + at * BLOCK_BYTES if at < m else rest + (at - m) * BLOCK_BYTES
                        for r in range(0, BLOCK_BYTES, size):
                            put_at(z + c * BLOCK_BYTES + r, number_at(values + r, one))
                elif op == _CONTEXT:
                    for c in range(count):
                        for r in range(rows):
                            at = context + min(start + r, n - 1) * context_row + c * context_line
                            put_at(z + (third + c) * BLOCK_BYTES + size * r, real(number_at(at, _DOUBLE)))
                elif op == _CHECK:
                    for r in range(rows):
                        for c in range(count):
                            infinite[r] |= not abs(number_at(z + c * wide + 8 * r, _DOUBLE)) <= largest
                elif op == _SHIFT or op == _STANDARDIZE:
                    for c in range(count):
                        shift = number_at(a + 8 * c, _DOUBLE)
                        scale = number_at(b + 8 * c, _DOUBLE) if op == _STANDARDIZE else 1.0
                        for r in range(c * wide, (c + 1) * wide, 8):
                            put_at(z + r, (number_at(z + r, _DOUBLE) - shift) / scale)
                elif transforms:  # else Numba does not compile what follows
                    for r in range(0, wide, 8):
                        value, log_slope = transform(count, number_at(z + r, _DOUBLE), a, b)
                        put_at(z + r, value)
                        put_at(total + r, number_at(total + r, _DOUBLE) + log_slope)
            for r in range(min(rows, n - start)):
                value = number_at(total + 8 * r, _DOUBLE)
                if unknown[r]:
                    value = math.nan
                elif infinite[r]:
                    value = -math.inf
                elif not math.isfinite(value):
                    value = FAILED
                put_at(out + 8 * (start + r), value)
        work[0] = 0.0  # Numba frees an array after its last use, and does not know of its address

    return core


@cache
def block_address(dtype: str, transforms: bool) -> int:
    """Address of the above for weights of that dtype."""
    core = _core(np.dtype(dtype).type(1), transforms)
    core.__qualname__ = f"block_{dtype}_transforms" if transforms else f"block_{dtype}"
    return int(c_function(void(*[int64] * 9), core).address)


@kernel
def score_blocks(out, core, program, x, context):  # type: ignore[no-untyped-def]
    """out : (n,) float64 = log p of x : (n, d), given context : (n, k) or (1, k), both float64; core : the address."""
    step = context.strides[0] if context.shape[0] > 1 else 0
    code, at, given, to = program.ctypes.data, x.ctypes.data, context.ctypes.data, out.ctypes.data
    call_block(core, code, to, at, x.strides[0], x.strides[1], given, step, 8, x.shape[0])
