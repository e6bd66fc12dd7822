"""Numba kernels of the layers: bias and ReLU, coupling, scaling and prior, loss, optimisers.

Backward stands under forward. Legend: n rows, k features of a part, o outputs of a dense layer.
"""

from __future__ import annotations

import math

import numpy as np

from nicecp.kernels.backend import Slot
from nicecp.kernels.jit import inlined, kernel

_STEP, _CURSOR, _RATE, _LOSS, _SKIP, _SKIPPED = Slot.STEP, Slot.CURSOR, Slot.RATE, Slot.LOSS, Slot.SKIP, Slot.SKIPPED
_LOG_PROB_SUM, _WEIGHT_SUM, _LOSS_RING, _RING_SIZE = Slot.LOG_PROB_SUM, Slot.WEIGHT_SUM, Slot.LOSS_RING, Slot.RING_SIZE
_MOMENTUM, _SQUARE_DECAY, _LAMBDA, _EPSILON = Slot.MOMENTUM, Slot.SQUARE_DECAY, Slot.LAMBDA, Slot.EPSILON
_RATE_DECAY, _RATE_FLOOR, _BAD_GRADIENT = Slot.RATE_DECAY, Slot.RATE_FLOOR, Slot.BAD_GRADIENT

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


# --- dense ----------------------------------------------------------------------------------------


@kernel
def bias_relu_forward(y, b, relu, start, stop):  # type: ignore[no-untyped-def]
    """Columns start..stop-1 of y : (n, o) += b : (o,), then max(y, 0) if relu; max(NaN, 0) stays NaN."""
    zero = y.dtype.type(0)
    bias = b[start:stop]
    for i in range(y.shape[0]):
        row = y[i, start:stop]
        if relu:
            for c in range(row.shape[0]):
                value = row[c] + bias[c]
                row[c] = zero if value < zero else value
        else:
            for c in range(row.shape[0]):
                row[c] += bias[c]


@kernel
def row_forward(y, x, w, start, stop):  # type: ignore[no-untyped-def]
    """Columns start..stop-1 of y : (o,) = x : (i,) @ w : (i, o), which is read once and in the order of its memory."""
    row = y[start:stop]
    row[:] = y.dtype.type(0)
    for k in range(x.shape[0]):
        factor, weight = x[k], w[k, start:stop]
        for c in range(row.shape[0]):
            row[c] += factor * weight[c]


@kernel
def row_backward(dx, dy, w, start, stop):  # type: ignore[no-untyped-def]
    """Columns start..stop-1 of dx : (i,) = dy : (o,) @ w.T, w : (i, o)."""
    for k in range(start, stop):
        total, weight = dx.dtype.type(0), w[k]
        for c in range(dy.shape[0]):
            total += dy[c] * weight[c]
        dx[k] = total


@kernel
def bias_relu_backward(dy, db, y, relu, with_db, start, stop):  # type: ignore[no-untyped-def]
    """Columns start..stop-1 of dy : (n, o) = 0 where y <= 0 if relu; db : (o,) = sum of dy over rows, in row order."""
    zero = dy.dtype.type(0)
    total = db[start:stop]
    if with_db:
        total[:] = zero
    for i in range(dy.shape[0]):
        row, active = dy[i, start:stop], y[i, start:stop]
        if relu and with_db:
            for c in range(row.shape[0]):
                g = zero if active[c] <= zero else row[c]
                row[c] = g
                total[c] += g
        elif relu:
            for c in range(row.shape[0]):
                row[c] = zero if active[c] <= zero else row[c]
        else:
            for c in range(row.shape[0]):
                total[c] += row[c]


# --- coupling, halves -----------------------------------------------------------------------------


@kernel
def couple(y, x, m, sign):  # type: ignore[no-untyped-def]
    """y = x + sign * m, all (k,)."""
    if sign > 0:
        for c in range(y.shape[0]):
            y[c] = x[c] + m[c]
    else:
        for c in range(y.shape[0]):
            y[c] = x[c] - m[c]


@kernel
def split(x0, x1, x):  # type: ignore[no-untyped-def]
    """x : (n, d) -> x0 : (n, d0) even features, x1 : (n, d1) odd features."""
    for i in range(x.shape[0]):
        for c in range(x0.shape[1]):
            x0[i, c] = x[i, 2 * c]
        for c in range(x1.shape[1]):
            x1[i, c] = x[i, 2 * c + 1]


@kernel
def join(x, x0, x1):  # type: ignore[no-untyped-def]
    """x0 : (n, d0), x1 : (n, d1) -> x : (n, d), interleaved."""
    for i in range(x.shape[0]):
        for c in range(x0.shape[1]):
            x[i, 2 * c] = x0[i, c]
        for c in range(x1.shape[1]):
            x[i, 2 * c + 1] = x1[i, c]


@kernel
def split_ordered(x0, x1, x, order):  # type: ignore[no-untyped-def]
    """x : (n, d) -> x0 : (n, d0), the columns order[:d0], x1 : (n, d1), the others."""
    d0 = x0.shape[1]
    for i in range(x.shape[0]):
        for c in range(d0):
            x0[i, c] = x[i, order[c]]
        for c in range(x1.shape[1]):
            x1[i, c] = x[i, order[d0 + c]]


@kernel
def join_ordered(x, x0, x1, order):  # type: ignore[no-untyped-def]
    """x0 : (n, d0), x1 : (n, d1) -> x : (n, d), its columns order[:d0] and the others."""
    d0 = x0.shape[1]
    for i in range(x.shape[0]):
        for c in range(d0):
            x[i, order[c]] = x0[i, c]
        for c in range(x1.shape[1]):
            x[i, order[d0 + c]] = x1[i, c]


# --- scaling and prior ----------------------------------------------------------------------------

_LOG2E = 1.0 / math.log(2.0)
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # sum is log 2 to 86 bits (Cody & Waite)


@inlined
def _exp_minus(a):  # type: ignore[no-untyped-def]
    """exp(-a) for a >= 0 or NaN, float64, relative error below 4e-16; 0 beyond a = 708 (where exp(-a) < 1e-307).

    Written out because LLVM vectorises this and not the C library's exp: 157,000 of them a step on MNIST.
    """
    t = -708.0 if a > 708.0 else -a
    k = np.floor(t * _LOG2E + 0.5)
    r = (t - k * _LN2_HIGH) - k * _LN2_LOW
    # Taylor to r^13, |r| <= log(2) / 2: truncation below 5e-18
    p = 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    bits = np.int64((np.int64(k) + 1023) << 52)
    return 0.0 if a > 708.0 else p * np.int64(bits).view(np.float64)


_TILE = 64  # elements at a time: they stay in a small buffer, and 64 factors of at most 2 cannot overflow


@inlined
def _column_tiles(k):  # type: ignore[no-untyped-def]
    """Columns per tile and rows per tile of a part of k columns: a tile is about _TILE consecutive elements."""
    columns = min(k, _TILE)
    return columns, max(1, _TILE // columns)


@kernel
def scale_prior_forward(logp, h, x, s, prior, first):  # type: ignore[no-untyped-def]
    """One part: h : (n, k) = x * exp(s), logp : (n,) float64 = (or +=, unless first) sum_d log p_H(h_d) + s_d."""
    n, k = x.shape
    if first:
        for i in range(n):
            logp[i] = 0.0
    columns, rows = _column_tiles(k)
    factor = np.empty(_TILE, np.float64)
    size = np.empty(_TILE, np.float64)
    term = np.empty(_TILE, np.float64)
    for start in range(0, k, columns):
        width = min(columns, k - start)
        log_det = 0.0
        for c in range(width):
            factor[c] = math.exp(np.float64(s[start + c]))
            log_det += np.float64(s[start + c])
        for top in range(0, n, rows):
            height = min(rows, n - top)
            for r in range(height):
                for c in range(width):
                    value = np.float64(x[top + r, start + c]) * factor[c]
                    h[top + r, start + c] = value
                    size[r * width + c] = abs(value)
            if prior == 0:
                for r in range(height):
                    square = 0.0
                    for c in range(r * width, (r + 1) * width):
                        square += size[c] * size[c]
                    logp[top + r] += log_det - 0.5 * square - width * _HALF_LOG_2PI
            else:
                for c in range(height * width):
                    term[c] = 1.0 + _exp_minus(size[c])
                for r in range(height):
                    # sum of log1p(exp(-|h|)) as the log of a product of factors in (1, 2]
                    total, product = 0.0, 1.0
                    for c in range(r * width, (r + 1) * width):
                        total += size[c]
                        product *= term[c]
                    logp[top + r] += log_det - total - 2.0 * math.log(product)


@kernel
def scale_prior_backward(dx, ds, dlogp, h, s, prior, with_ds, left, right):  # type: ignore[no-untyped-def]
    """Columns left..right-1 of one part: dx : (n, k) = dlogp g(h) exp(s); ds : (k,) = sum_i dlogp (g(h) h + 1).

    Rows are summed in order, in float64.
    """
    n, k = h.shape
    columns, rows = _column_tiles(k)
    factor = np.empty(_TILE, np.float64)
    gradient = np.empty(_TILE, np.float64)
    value = np.empty(_TILE, np.float64)
    slope = np.empty(_TILE, np.float64)
    for start in range(left, right, columns):
        width = min(columns, right - start)
        for c in range(width):
            factor[c] = math.exp(np.float64(s[start + c]))
            gradient[c] = 0.0
        for top in range(0, n, rows):
            height = min(rows, n - top)
            for r in range(height):
                for c in range(width):
                    value[r * width + c] = h[top + r, start + c]
            if prior == 0:
                for c in range(height * width):
                    slope[c] = -value[c]
            else:
                for c in range(height * width):
                    e = _exp_minus(abs(value[c]))
                    slope[c] = math.copysign((1.0 - e) / (1.0 + e), -value[c])
            for r in range(height):
                up = dlogp[top + r]
                for c in range(width):
                    g = slope[r * width + c]
                    dx[top + r, start + c] = up * g * factor[c]
                    gradient[c] += up * (g * value[r * width + c] + 1.0)
        if with_ds:
            for c in range(width):
                ds[start + c] = gradient[c]


@kernel
def scale_inverse(x, h, s):  # type: ignore[no-untyped-def]
    """x : (n, k) = h * exp(-s)."""
    n, k = h.shape
    factor = np.empty(_TILE, np.float64)
    for start in range(0, k, _TILE):
        stop = min(start + _TILE, k)
        for c in range(start, stop):
            factor[c - start] = math.exp(-np.float64(s[c]))
        for i in range(n):
            for c in range(start, stop):
                x[i, c] = np.float64(h[i, c]) * factor[c - start]


@kernel
def loss(state, dlogp, logp, weight):  # type: ignore[no-untyped-def]
    """state[LOSS] = -sum(w logp) / sum(w), dlogp = -w / sum(w), all (n,) float64; rows of weight 0 are not read."""
    n = logp.shape[0]
    total, weights = 0.0, 0.0
    for i in range(n):
        if weight[i] != 0.0:
            total += weight[i] * logp[i]
            weights += weight[i]
    value = -total / weights
    finite = math.isfinite(value)
    state[_LOSS] = value
    state[_LOSS_RING + int(state[_CURSOR]) % _RING_SIZE] = value
    state[_SKIP] = 0.0 if finite else 1.0
    if finite:
        state[_LOG_PROB_SUM] += total
        state[_WEIGHT_SUM] += weights
    for i in range(n):
        dlogp[i] = -weight[i] / weights if finite else 0.0


# --- optimisers -----------------------------------------------------------------------------------


@kernel
def update_adam(p, g, m, v, state):  # type: ignore[no-untyped-def]
    """AdaM on a range of the flat buffers, all (k,); t = STEP + 1.  Kingma & Ba 2014, first version."""
    if state[_SKIP] != 0.0:
        return
    real = p.dtype.type
    t = state[_STEP] + 1.0
    momentum, decay = state[_MOMENTUM], state[_SQUARE_DECAY]
    momentum_t = momentum * state[_LAMBDA] ** (t - 1.0)
    b1, one_b1 = real(momentum_t), real(1.0 - momentum_t)
    b2, one_b2 = real(decay), real(1.0 - decay)
    rate = real(state[_RATE] / (1.0 - momentum**t))
    root = real(1.0 / math.sqrt(1.0 - decay**t))
    epsilon = real(state[_EPSILON])
    zero, tiny, largest = real(0), real(np.finfo(p.dtype).tiny), real(np.finfo(p.dtype).max)
    bad = zero
    for i in range(p.shape[0]):
        gi = g[i]
        fine = abs(gi) <= largest
        mi = b1 * m[i] + one_b1 * gi
        vi = b2 * v[i] + one_b2 * gi * gi
        # Moments of units that stay silent decay into denormal numbers, which cost 50 times as much: as on GPUs, 0.
        mi = zero if abs(mi) < tiny else mi
        vi = zero if vi < tiny else vi
        change = rate * mi / (math.sqrt(vi) * root + epsilon)
        m[i] = mi if fine else m[i]
        v[i] = vi if fine else v[i]
        p[i] -= change if fine else zero
        bad += gi * zero  # stays 0 while gradients are finite, else NaN
    if bad != zero:
        state[_BAD_GRADIENT] = 1.0


@kernel
def update_rmsprop(p, g, m, v, state):  # type: ignore[no-untyped-def]
    """RMSProp with momentum, all (k,), the root mean square floored: the published code of Dinh et al."""
    if state[_SKIP] != 0.0:
        return
    real = p.dtype.type
    momentum, rate = real(state[_MOMENTUM]), real(state[_RATE])
    b2, one_b2 = real(state[_SQUARE_DECAY]), real(1.0 - state[_SQUARE_DECAY])
    floor = real(state[_EPSILON])
    zero, tiny, largest = real(0), real(np.finfo(p.dtype).tiny), real(np.finfo(p.dtype).max)
    bad = zero
    for i in range(p.shape[0]):
        gi = g[i]
        fine = abs(gi) <= largest
        vi = b2 * v[i] + one_b2 * gi * gi
        vi = zero if vi < tiny else vi  # no denormal numbers, as in update_adam
        mi = momentum * m[i] - rate * gi / max(math.sqrt(vi), floor)
        mi = zero if abs(mi) < tiny else mi
        v[i] = vi if fine else v[i]
        m[i] = mi if fine else m[i]
        p[i] += mi if fine else zero
        bad += gi * zero  # stays 0 while gradients are finite, else NaN
    if bad != zero:
        state[_BAD_GRADIENT] = 1.0


@kernel
def advance(state):  # type: ignore[no-untyped-def]
    """CURSOR += 1; unless SKIP, STEP += 1 and the rate decays to its floor; bad steps are counted: Backend.advance."""
    if state[_BAD_GRADIENT] != 0.0:
        state[_BAD_GRADIENT] = 0.0
        state[_SKIPPED] += 1.0
        state[_LOSS_RING + int(state[_CURSOR]) % _RING_SIZE] = math.nan
    state[_CURSOR] += 1.0
    if state[_SKIP] != 0.0:
        state[_SKIPPED] += 1.0
        return
    state[_STEP] += 1.0
    rate = state[_RATE]
    state[_RATE] = max(rate / state[_RATE_DECAY], min(rate, state[_RATE_FLOOR]))
