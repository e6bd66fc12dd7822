"""The reference for spline couplings in plain NumPy float64, from Gregory and Delbourgo 1982 and Durkan et al. 2019.

It takes complex arrays, for derivatives by complex step; bins are chosen by the real parts. The backward pass by hand
takes every derivative through numerator, denominator and slope, so that it shares no rearrangement with the kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

BINS, BOUND, LEAST, STEEP = 8, 4.0, 1e-3, 1000.0
OUTPUTS = 3 * BINS - 1
OFFSET = np.log(np.exp(1 - LEAST) - 1)  # softplus(OFFSET) is 1 - LEAST


def numbers(m: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """m : (n, (3 BINS - 1) k) -> widths (n, k, BINS), heights (n, k, BINS), slopes (n, k, BINS - 1), raw."""
    each = np.stack([m[:, p * k : (p + 1) * k] for p in range(OUTPUTS)], axis=2)
    return each[..., :BINS], each[..., BINS : 2 * BINS], each[..., 2 * BINS :]


def softmax(u: NDArray[Any]) -> NDArray[Any]:
    e = np.exp(u - u.real.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sizes(u: NDArray[Any]) -> NDArray[Any]:
    """Of the bins, which fill [-BOUND, BOUND]."""
    return 2 * BOUND * (LEAST + (1 - BINS * LEAST) * softmax(u))


def starts(bins: NDArray[Any]) -> NDArray[Any]:
    return np.cumsum(bins, axis=-1) - bins - BOUND


def slopes(u: NDArray[Any]) -> NDArray[Any]:
    """At all BINS + 1 knots: 1 at the outermost."""
    a = np.where(u.real > STEEP, STEEP, u) + OFFSET
    inner = LEAST + np.where(a.real > 0, a, 0) + np.log(1 + np.exp(np.where(a.real > 0, -a, a)))
    one = np.ones_like(inner[..., :1])
    return np.concatenate([one, inner, one], axis=-1)


def take(values: NDArray[Any], b: NDArray[np.int64]) -> NDArray[Any]:
    return np.take_along_axis(values, b[..., None], axis=-1)[..., 0]


def couple(x: NDArray[Any], m: NDArray[Any], sign: int = 1) -> tuple[NDArray[Any], Any]:
    """x : (n, k) -> y, or its inverse, and log abs det : (n,)."""
    w, h, d = numbers(m, x.shape[1])
    w, h, d = sizes(w), sizes(h), slopes(d)
    x0, y0 = starts(w), starts(h)
    edges = x0 if sign == 1 else y0
    b = np.clip((x.real[..., None] >= edges.real).sum(axis=-1) - 1, 0, BINS - 1)
    w, h, x0, y0, left, right = (take(a, b) for a in (w, h, x0, y0, d[..., :-1], d[..., 1:]))
    s = h / w
    if sign == 1:
        t = (x - x0) / w
    else:
        y = x - y0
        a_, b_, c_ = h * (s - left) + y * (left + right - 2 * s), h * left - y * (left + right - 2 * s), -s * y
        with np.errstate(invalid="ignore"):  # of values outside
            t = 2 * c_ / (-b_ - np.sqrt(b_**2 - 4 * a_ * c_))
    top, bottom = s * t**2 + left * t * (1 - t), s + (left + right - 2 * s) * t * (1 - t)
    slope = s**2 * (right * t**2 + 2 * s * t * (1 - t) + left * (1 - t) ** 2) / bottom**2
    inside = np.abs(x.real) < BOUND
    out = np.where(inside, y0 + h * top / bottom if sign == 1 else x0 + w * t, x)
    return out, sign * np.log(np.where(inside, slope, 1.0)).sum(axis=1)


def couple_backward(dy: F64, dlog_det: F64, x: F64, m: F64) -> tuple[F64, F64]:
    """-> dx, dm."""
    n, k = x.shape
    raw_w, raw_h, raw_d = numbers(m, k)
    all_w, all_h, d = sizes(raw_w), sizes(raw_h), slopes(raw_d)
    b = np.clip((x[..., None] >= starts(all_w)).sum(axis=-1) - 1, 0, BINS - 1)
    w, h, x0, left, right = (take(a, b) for a in (all_w, all_h, starts(all_w), d[..., :-1], d[..., 1:]))
    inside = np.abs(x) < BOUND
    gy, gl = np.where(inside, dy, 0), np.where(inside, dlog_det[:, None], 0)
    s, t = h / w, np.where(inside, (x - x0) / w, 0.5)
    v = t * (1 - t)
    top, bottom = s * t**2 + left * v, s + (left + right - 2 * s) * v
    above = right * t**2 + 2 * s * v + left * (1 - t) ** 2

    def through(by_top: Any, by_bottom: Any, by_above: Any, by_s: Any = 0.0) -> F64:
        """The loss's derivative where these change so: y = y0 + h top / bottom, slope = s^2 above / bottom^2."""
        log_slope = 2 * by_s / s + by_above / above - 2 * by_bottom / bottom
        return np.asarray(gy * h * (by_top * bottom - top * by_bottom) / bottom**2 + gl * log_slope)

    by_t = through(
        2 * s * t + left * (1 - 2 * t),
        (left + right - 2 * s) * (1 - 2 * t),
        2 * right * t + 2 * s * (1 - 2 * t) - 2 * left * (1 - t),
    )
    by_s = through(t**2, 1 - 2 * v, 2 * v, 1.0)
    by_left, by_right = through(v, v, (1 - t) ** 2), through(0, v, t**2)
    by_size, by_height = -(t * by_t + s * by_s) / w, gy * top / bottom + by_s / w
    by_w, by_h, by_d = np.zeros_like(raw_w), np.zeros_like(raw_h), np.zeros_like(d)
    for i in range(BINS):
        by_w[..., i] = np.where(i == b, by_size, 0) + np.where(i < b, -by_t / w, 0)
        by_h[..., i] = np.where(i == b, by_height, 0) + np.where(i < b, gy, 0)
        by_d[..., i] += np.where(i == b, by_left, 0)
        by_d[..., i + 1] += np.where(i == b, by_right, 0)
    parts = []
    for raw, by in ((raw_w, by_w), (raw_h, by_h)):
        p = softmax(raw)
        by = 2 * BOUND * (1 - BINS * LEAST) * by
        parts.append(p * (by - (p * by).sum(axis=-1, keepdims=True)))
    sigmoid = np.where(raw_d > STEEP, 0, 1 / (1 + np.exp(-np.minimum(raw_d, STEEP) - OFFSET)))
    parts.append(by_d[..., 1:-1] * sigmoid)
    dm = np.concatenate(parts, axis=-1).transpose(0, 2, 1).reshape(n, -1)
    return np.where(inside, by_t / w, dy), dm
