"""Numba kernel of the logit step: numbers in a bounded interval become numbers on the whole line."""

from __future__ import annotations

import math

import numpy as np

from nicecp.kernels.jit import kernel


@kernel
def logit_forward(z, log_det, x, shift, scale, margin, first):  # type: ignore[no-untyped-def]
    """z : (n, k) = log(p / (1 - p)), p = margin + (1 - 2 margin) (x - shift) scale: see Backend.logit_forward."""
    n, k = x.shape
    inner = 1.0 - 2.0 * margin
    for i in range(n):
        total = 0.0
        for c in range(k):
            p = margin + inner * ((np.float64(x[i, c]) - shift[c]) * scale[c])
            low, high = math.log(p), math.log1p(-p)
            z[i, c] = low - high
            total -= low + high
        log_det[i] = total if first else log_det[i] + total
