"""Numba kernels of couplings that scale as well as shift: multiplicative and affine (Dinh et al. 2015, section 3.2).

The network's output m holds, for each of the k features, a number u, and behind these for the affine law a shift. The
factor is exp(a), a = B tanh(u / B): see Backend.factor_forward. Computed in float64.
"""

from __future__ import annotations

import math

import numpy as np

from nicecp.kernels._numba_layers import _exp_minus
from nicecp.kernels.backend import FACTOR_BOUND
from nicecp.kernels.jit import inlined, kernel

_BOUND = FACTOR_BOUND


@inlined
def _bounded(u):  # type: ignore[no-untyped-def]
    """tanh(u / B) by exp(-|2 u / B|), which LLVM vectorises; NaN stays NaN."""
    e = _exp_minus(abs(u) * (2.0 / _BOUND))
    return math.copysign((1.0 - e) / (1.0 + e), u)


@inlined
def _factor(a):  # type: ignore[no-untyped-def]
    e = _exp_minus(abs(a))
    return 1.0 / e if a >= 0.0 else e


@kernel
def factor_forward(y, log_det, x, m, affine, inverse, first):  # type: ignore[no-untyped-def]
    """y : (n, k) = x exp(a) + shift, or its inverse; log_det : (n,) float64 = (or += unless first) sum of a, or -a."""
    n, k = x.shape
    for i in range(n):
        total = 0.0
        if inverse:
            for c in range(k):
                a = _BOUND * _bounded(np.float64(m[i, c]))
                shift = np.float64(m[i, k + c]) if affine else 0.0
                y[i, c] = (np.float64(x[i, c]) - shift) * _factor(-a)
                total -= a
        else:
            for c in range(k):
                a = _BOUND * _bounded(np.float64(m[i, c]))
                shift = np.float64(m[i, k + c]) if affine else 0.0
                y[i, c] = np.float64(x[i, c]) * _factor(a) + shift
                total += a
        log_det[i] = total if first else log_det[i] + total


@kernel
def factor_backward(dx, dm, dy, dlog_det, x, m, affine):  # type: ignore[no-untyped-def]
    """dx : (n, k) = dy exp(a); dm : (n, k) or (n, 2k): by u (dy x exp(a) + dlog_det) (1 - tanh^2), by the shift dy."""
    n, k = x.shape
    for i in range(n):
        up = dlog_det[i]
        for c in range(k):
            t = _bounded(np.float64(m[i, c]))
            slope = np.float64(dy[i, c])
            through = slope * _factor(_BOUND * t)
            dm[i, c] = (through * np.float64(x[i, c]) + up) * (1.0 - t * t)
            if affine:
                dm[i, k + c] = slope
            dx[i, c] = through


@kernel
def accumulate(out, x):  # type: ignore[no-untyped-def]
    """out : (n,) += x, float64."""
    for i in range(out.shape[0]):
        out[i] += x[i]
