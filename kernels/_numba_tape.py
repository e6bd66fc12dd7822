"""Carries out the calls of a tape (kernels/tape.py): compiled, without the GIL, one thread of a crew.

Legend: n rows, d features, i inputs and o outputs of a dense layer, k features of a part; [a, b) the slice at hand.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from nicecp.kernels import _numba_layers as layers
from nicecp.kernels._numba_columns import copy_columns, gather, permute
from nicecp.kernels._numba_factors import accumulate, factor_backward, factor_forward
from nicecp.kernels._numba_logit import logit_forward
from nicecp.kernels._numba_native import arrive, gemm_rows, item_size, pointer
from nicecp.kernels._numba_random import load_bytes, load_bytes_ordered, load_floats, load_floats_ordered
from nicecp.kernels._numba_spline import OUTPUTS, spline_backward, spline_forward
from nicecp.kernels.backend import Slot
from nicecp.kernels.jit import inlined, kernel
from nicecp.kernels.tape import Field, Op

_FIRST, _PARTS, _START, _EXTENT, _GRAIN = Field.FIRST, Field.PARTS, Field.START, Field.EXTENT, Field.GRAIN
_NUMBERS, _ARRAYS = Field.NUMBERS, Field.ARRAYS
_BARRIER, _LOAD_BYTES, _LOAD_FLOATS, _SPLIT, _JOIN = Op.BARRIER, Op.LOAD_BYTES, Op.LOAD_FLOATS, Op.SPLIT, Op.JOIN
_MATMUL, _DENSE_FORWARD, _DENSE_BACKWARD = Op.MATMUL, Op.DENSE_FORWARD, Op.DENSE_BACKWARD
_BIAS_RELU_BACKWARD, _COUPLE, _LOSS = Op.BIAS_RELU_BACKWARD, Op.COUPLE, Op.LOSS
_SCALE_PRIOR_FORWARD, _SCALE_PRIOR_BACKWARD = Op.SCALE_PRIOR_FORWARD, Op.SCALE_PRIOR_BACKWARD
_SCALE_INVERSE, _UPDATE, _ADVANCE = Op.SCALE_INVERSE, Op.UPDATE, Op.ADVANCE
_FACTOR_FORWARD, _FACTOR_BACKWARD, _ACCUMULATE = Op.FACTOR_FORWARD, Op.FACTOR_BACKWARD, Op.ACCUMULATE
_LOGIT_FORWARD, _SPLINE_FORWARD, _SPLINE_BACKWARD = Op.LOGIT_FORWARD, Op.SPLINE_FORWARD, Op.SPLINE_BACKWARD
_GATHER, _COPY_COLUMNS, _PERMUTE = Op.GATHER, Op.COPY_COLUMNS, Op.PERMUTE
_STATE, _CURSOR, _EPOCH, _OUTPUTS = Slot.SIZE, Slot.CURSOR, Slot.EPOCH, OUTPUTS
_BYTE, _SINGLE, _DOUBLE, _INTEGER = np.uint8(0), np.float32(0), np.float64(0), np.int64(0)


@inlined
def _matrix(address, rows, columns, like):  # type: ignore[no-untyped-def]
    return carray(pointer(address, like), (rows, columns))


@inlined
def _vector(address, size, like):  # type: ignore[no-untyped-def]
    return carray(pointer(address, like), size)


@inlined
def _load_floats(x0, x1, weight, data, index, order, shift, scale, interleaved):  # type: ignore[no-untyped-def]
    if interleaved:
        load_floats(x0, x1, weight, data, index, shift, scale)
    else:
        load_floats_ordered(x0, x1, weight, data, index, order, shift, scale)


@kernel
def _load(code, at, number, a, b, one):  # type: ignore[no-untyped-def]
    n, d, m, purpose = number[0], number[1], number[2], number[3]
    seed, wide, rows_given, interleaved = number[4], number[5], number[6], number[7] != 0
    d0, d1, size = (d + 1) // 2, d // 2, item_size(one)
    state = _vector(at[8], _STATE, _DOUBLE)
    first = np.int64(state[_CURSOR]) * n + a
    x0, x1 = _matrix(at[0] + a * d0 * size, b - a, d0, one), _matrix(at[1] + a * d1 * size, b - a, d1, one)
    weight = _vector(at[2] + 8 * a, b - a, _DOUBLE)
    if first < 0 or first + b - a > rows_given:  # beyond the window: padding, and nothing is read
        weight[:], x0[:], x1[:] = 0.0, one - one, one - one
        return
    index, rows = _vector(at[4] + 8 * first, b - a, _INTEGER), _vector(at[5] + 8 * first, b - a, _INTEGER)
    shift, scale = _vector(at[6], d, _DOUBLE), _vector(at[7], d, _DOUBLE)
    order = _vector(at[9], d, _INTEGER)  # of bytes its inverse: noise comes by the data's columns
    if code == _LOAD_BYTES:
        epoch, data = np.int64(state[_EPOCH]), _matrix(at[3], m, d, _BYTE)
        if interleaved:
            load_bytes(x0, x1, weight, data, index, rows, shift, scale, epoch, seed, purpose)
        else:
            load_bytes_ordered(x0, x1, weight, data, index, rows, order, shift, scale, epoch, seed, purpose)
    elif wide:
        _load_floats(x0, x1, weight, _matrix(at[3], m, d, _DOUBLE), index, order, shift, scale, interleaved)
    else:
        _load_floats(x0, x1, weight, _matrix(at[3], m, d, _SINGLE), index, order, shift, scale, interleaved)


@kernel
def _logit(at, number, a, b, one):  # type: ignore[no-untyped-def]
    k, n, skipped = number[0], b - a, a * number[0] * item_size(one)  # rows
    z, x = _matrix(at[0] + skipped, n, k, one), _matrix(at[1] + skipped, n, k, one)
    log_det, shift, scale = _vector(at[2] + 8 * a, n, _DOUBLE), _vector(at[3], k, _DOUBLE), _vector(at[4], k, _DOUBLE)
    logit_forward(z, log_det, x, shift, scale, _vector(at[5], 1, _DOUBLE)[0], number[1] != 0)


@kernel
def _beside(code, at, number, a, b, one):  # type: ignore[no-untyped-def]
    n = b - a  # rows
    if code == _COPY_COLUMNS:
        to, width, start, from_, size = number[0], number[1], number[2], number[3], item_size(one)
        out, x = _matrix(at[0] + a * to * size, n, to, one), _matrix(at[1] + a * width * size, n, width, one)
        copy_columns(out, start, x, from_, number[4])
        return
    if code == _PERMUTE:
        d, size = number[0], item_size(one)
        d0, d1 = (d + 1) // 2, d // 2
        first, second = a * d0 * size, a * d1 * size
        y0, y1 = _matrix(at[0] + first, n, d0, one), _matrix(at[1] + second, n, d1, one)
        x0, x1 = _matrix(at[2] + first, n, d0, one), _matrix(at[3] + second, n, d1, one)
        permute(y0, y1, x0, x1, _vector(at[4], d, _INTEGER))
        return
    all_rows, k, m, given, out_wide, wide = number[0], number[1], number[2], number[3], number[4] != 0, number[5] != 0
    first = np.int64(_vector(at[3], _STATE, _DOUBLE)[_CURSOR]) * all_rows + a
    known = first >= 0 and first + n <= given  # beyond the window is padding, and nothing is read
    index = _vector(at[2] + 8 * first if known else at[2], n if known else 0, _INTEGER)
    if out_wide and wide:
        gather(_matrix(at[0] + 8 * a * k, n, k, _DOUBLE), _matrix(at[1], m, k, _DOUBLE), index)
    elif out_wide:
        gather(_matrix(at[0] + 8 * a * k, n, k, _DOUBLE), _matrix(at[1], m, k, _SINGLE), index)
    elif wide:
        gather(_matrix(at[0] + 4 * a * k, n, k, _SINGLE), _matrix(at[1], m, k, _DOUBLE), index)
    else:
        gather(_matrix(at[0] + 4 * a * k, n, k, _SINGLE), _matrix(at[1], m, k, _SINGLE), index)


@kernel
def _products(code, at, number, a, b, gemm, one):  # type: ignore[no-untyped-def]
    size = item_size(one)
    if code == _MATMUL:
        rows, columns, inner, ta, tb = number[0], number[1], number[2], number[3] != 0, number[4] != 0
        lda, ldb = rows if ta else inner, inner if tb else columns
        gemm_rows(gemm, one, at[0], columns, at[1], lda, ta, at[2], ldb, tb, rows, columns, inner)
        return
    n, i, o, relu = number[0], number[1], number[2], number[3] != 0
    if code == _DENSE_FORWARD:  # columns of y
        y, x, w = at[0], at[1], at[2]
        if n == 1:  # BLAS would copy all of w first
            layers.row_forward(_vector(y, o, one), _vector(x, i, one), _matrix(w, i, o, one), a, b)
        else:
            gemm_rows(gemm, one, y + a * size, o, x, i, False, w + a * size, o, False, n, b - a, i)
        layers.bias_relu_forward(_matrix(y, n, o, one), _vector(at[3], o, one), relu, a, b)
        return
    dx, dw, dy, x, w = at[0], at[1], at[2], at[3], at[4]  # columns of dx, rows of dw
    if dx != 0 and n == 1:
        layers.row_backward(_vector(dx, i, one), _vector(dy, o, one), _matrix(w, i, o, one), a, b)
    elif dx != 0:
        gemm_rows(gemm, one, dx + a * size, i, dy, o, False, w + a * o * size, o, True, n, b - a, o)
    if dw != 0:
        gemm_rows(gemm, one, dw + a * o * size, o, x + a * size, i, True, dy, o, False, b - a, o, n)


@kernel
def _elementwise(code, at, number, a, b, one):  # type: ignore[no-untyped-def]
    size = item_size(one)
    if code == _BIAS_RELU_BACKWARD:
        n, o, relu, with_db = number[0], number[1], number[2] != 0, number[3] != 0
        dy, db, y = _matrix(at[0], n, o, one), _vector(at[1], o, one), _matrix(at[2], n, o, one)
        layers.bias_relu_backward(dy, db, y, relu, with_db, a, b)
    elif code == _COUPLE:
        y, x, m = at[0] + a * size, at[1] + a * size, at[2] + a * size
        layers.couple(_vector(y, b - a, one), _vector(x, b - a, one), _vector(m, b - a, one), number[0])
    else:
        d = number[0]
        d0, d1 = (d + 1) // 2, d // 2
        x0, x1 = _matrix(at[0] + a * d0 * size, b - a, d0, one), _matrix(at[1] + a * d1 * size, b - a, d1, one)
        x = _matrix(at[2] + a * d * size, b - a, d, one)
        order, interleaved = _vector(at[3], d, _INTEGER), number[1] != 0
        if code == _SPLIT and interleaved:
            layers.split(x0, x1, x)
        elif code == _SPLIT:
            layers.split_ordered(x0, x1, x, order)
        elif interleaved:
            layers.join(x, x0, x1)
        else:
            layers.join_ordered(x, x0, x1, order)


@kernel
def _factors(code, at, number, a, b, one):  # type: ignore[no-untyped-def]
    if code == _ACCUMULATE:
        accumulate(_vector(at[0], number[0], _DOUBLE), _vector(at[1], number[0], _DOUBLE))
        return
    k, affine, n, size = number[0], number[1] != 0, b - a, item_size(one)  # rows
    width, skipped = k * (2 if affine else 1), a * k * size
    if code == _FACTOR_FORWARD:
        y, x = _matrix(at[0] + skipped, n, k, one), _matrix(at[1] + skipped, n, k, one)
        m, log_det = _matrix(at[2] + a * width * size, n, width, one), _vector(at[3] + 8 * a, n, _DOUBLE)
        factor_forward(y, log_det, x, m, affine, number[2] < 0, number[3] != 0)
        return
    dx, dm = _matrix(at[0] + skipped, n, k, one), _matrix(at[1] + a * width * size, n, width, one)
    dy, x = _matrix(at[2] + skipped, n, k, one), _matrix(at[3] + skipped, n, k, one)
    m, dlog_det = _matrix(at[4] + a * width * size, n, width, one), _vector(at[5] + 8 * a, n, _DOUBLE)
    factor_backward(dx, dm, dy, dlog_det, x, m, affine)


@kernel
def _splines(code, at, number, a, b, one):  # type: ignore[no-untyped-def]
    k, function, n, size = number[0], number[1], b - a, item_size(one)  # rows
    width, skipped = k * _OUTPUTS, a * k * size
    if code == _SPLINE_FORWARD:
        y, x = _matrix(at[0] + skipped, n, k, one), _matrix(at[1] + skipped, n, k, one)
        m, log_det = _matrix(at[2] + a * width * size, n, width, one), _vector(at[3] + 8 * a, n, _DOUBLE)
        spline_forward(y, log_det, x, m, function, number[2] < 0, number[3] != 0)
        return
    dx, dm = _matrix(at[0] + skipped, n, k, one), _matrix(at[1] + a * width * size, n, width, one)
    dy, x = _matrix(at[2] + skipped, n, k, one), _matrix(at[3] + skipped, n, k, one)
    m, dlog_det = _matrix(at[4] + a * width * size, n, width, one), _vector(at[5] + 8 * a, n, _DOUBLE)
    spline_backward(dx, dm, dy, dlog_det, x, m, function)


@kernel
def _scale_prior(code, at, number, a, b, one):  # type: ignore[no-untyped-def]
    n, k, prior, switch, size = number[0], number[1], number[2], number[3] != 0, item_size(one)
    if code == _SCALE_PRIOR_BACKWARD:  # columns
        dx, ds, h, s = (
            _matrix(at[0], n, k, one),
            _vector(at[1], k, one),
            _matrix(at[2], n, k, one),
            _vector(at[3], k, one),
        )
        layers.scale_prior_backward(dx, ds, _vector(at[4], n, _DOUBLE), h, s, prior, switch, a, b)
        return
    skipped = a * k * size  # rows
    to, start = _matrix(at[0] + skipped, b - a, k, one), _matrix(at[1] + skipped, b - a, k, one)
    s = _vector(at[2], k, one)
    if code == _SCALE_INVERSE:
        layers.scale_inverse(to, start, s)
    else:
        layers.scale_prior_forward(_vector(at[3] + 8 * a, b - a, _DOUBLE), to, start, s, prior, switch)


@kernel
def _training(code, at, number, a, b, one):  # type: ignore[no-untyped-def]
    if code == _UPDATE:
        size, state = item_size(one), _vector(at[4], _STATE, _DOUBLE)
        p, g = _vector(at[0] + a * size, b - a, one), _vector(at[1] + a * size, b - a, one)
        m, v = _vector(at[2] + a * size, b - a, one), _vector(at[3] + a * size, b - a, one)
        if number[0] == 0:
            layers.update_adam(p, g, m, v, state)
        else:
            layers.update_rmsprop(p, g, m, v, state)
    elif code == _LOSS:
        n = number[0]
        state, dlogp = _vector(at[0], _STATE, _DOUBLE), _vector(at[1], n, _DOUBLE)
        layers.loss(state, dlogp, _vector(at[2], n, _DOUBLE), _vector(at[3], n, _DOUBLE))
    else:
        layers.advance(_vector(at[0], _STATE, _DOUBLE))


@kernel
def replay(tape, me, crew, sync, gemm, one):  # type: ignore[no-untyped-def]
    """Thread ``me`` of ``crew`` does its parts of a tape : (calls, Field.SIZE) int64.

    sync : see _numba_native.arrive. gemm : BLAS's address for the dtype of ``one``, in which all of the tape is; 1.
    """
    barriers = 0
    for t in range(tape.shape[0]):
        row = tape[t]
        code = row[0]
        if code == _BARRIER:
            if crew > 1:
                barriers += 1
                if not arrive(sync, barriers * crew):
                    return
            continue
        first, parts, start, extent, grain = row[_FIRST], row[_PARTS], row[_START], row[_EXTENT], row[_GRAIN]
        number, at = row[_NUMBERS:_ARRAYS], row[_ARRAYS:]
        units = (extent + grain - 1) // grain
        for part in range(parts):
            if (first + part) % crew != me:
                continue
            a = start + min(units * part // parts * grain, extent)
            b = start + min(units * (part + 1) // parts * grain, extent)
            if code == _DENSE_FORWARD or code == _DENSE_BACKWARD or code == _MATMUL:
                _products(code, at, number, a, b, gemm, one)
            elif code == _UPDATE or code == _LOSS or code == _ADVANCE:
                _training(code, at, number, a, b, one)
            elif code == _LOAD_BYTES or code == _LOAD_FLOATS:
                _load(code, at, number, a, b, one)
            elif code == _SCALE_PRIOR_FORWARD or code == _SCALE_PRIOR_BACKWARD or code == _SCALE_INVERSE:
                _scale_prior(code, at, number, a, b, one)
            elif code == _LOGIT_FORWARD:
                _logit(at, number, a, b, one)
            elif code == _GATHER or code == _COPY_COLUMNS or code == _PERMUTE:
                _beside(code, at, number, a, b, one)
            elif code == _FACTOR_FORWARD or code == _FACTOR_BACKWARD or code == _ACCUMULATE:
                _factors(code, at, number, a, b, one)
            elif code == _SPLINE_FORWARD or code == _SPLINE_BACKWARD:
                _splines(code, at, number, a, b, one)
            else:
                _elementwise(code, at, number, a, b, one)
