"""Monotone rational-quadratic splines in one variable: arithmetic of the quantile transform, with logarithmic tails;
and for checks that of spline couplings, in plain NumPy.

Between knots (x_k, z_k), both increasing, with slopes d_k > 0 the spline is that of Gregory and Delbourgo, "Piecewise
rational quadratic interpolation to monotonic data", IMA Journal of Numerical Analysis 2, 1982, equation 2.4: once
continuously differentiable, increasing, with a closed inverse. Beyond the outermost knots, at a distance t of them,

    z = z_K + c log(1 + d_K t / c)        and the same to the left,

whose slope goes on continuously and falls as 1 / t, so that a value a million times farther out than the last knot
costs a density some dozens of nats, not millions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.kernels.backend import SPLINE_BINS, SPLINE_BOUND, SPLINE_LEAST, SPLINE_OFFSET, SPLINE_STEEP

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Knots:
    """x, z, slope : (k,) float64, k >= 2, x and z increasing, slopes positive; tail : (2,) the c of both sides."""

    x: FloatArray
    z: FloatArray
    slope: FloatArray
    tail: FloatArray


def check_knots(x: FloatArray, z: FloatArray, slope: FloatArray, tail: FloatArray) -> None:
    """ValueError unless the arrays (one spline a row, or a single one) are those of increasing splines."""
    if not all(np.isfinite(array).all() for array in (x, z, slope, tail)):
        raise ValueError("knots, slopes and tails must be finite")
    if x.shape != z.shape or x.shape != slope.shape or x.shape[-1] < 2:
        raise ValueError(f"knots and slopes must be alike and at least 2, got {x.shape}, {z.shape}, {slope.shape}")
    if not ((np.diff(x) > 0).all() and (np.diff(z) > 0).all()):
        raise ValueError("knots must increase")
    if not ((slope > 0).all() and (tail > 0).all()):
        raise ValueError("slopes and tails must be positive")


def forward(x: FloatArray, knots: Knots) -> tuple[FloatArray, FloatArray, FloatArray]:
    """x : (n,) -> z : (n,), log dz/dx : (n,) and its derivative d log(dz/dx) / dx : (n,); NaN stays NaN."""
    k = np.clip(np.searchsorted(knots.x, x, side="right") - 1, 0, len(knots.x) - 2)
    width, height = knots.x[k + 1] - knots.x[k], knots.z[k + 1] - knots.z[k]
    mean, left, right = height / width, knots.slope[k], knots.slope[k + 1]
    u = np.clip((x - knots.x[k]) / width, 0.0, 1.0)
    v = u * (1.0 - u)
    excess = left + right - 2.0 * mean
    below = mean + excess * v
    above = right * u**2 + 2.0 * mean * v + left * (1.0 - u) ** 2
    z = knots.z[k] + height * (mean * u**2 + left * v) / below
    log_slope = 2.0 * np.log(mean) + np.log(above) - 2.0 * np.log(below)
    bend = 2.0 * (right * u + mean * (1.0 - 2.0 * u) - left * (1.0 - u)) / above
    bend = (bend - 2.0 * excess * (1.0 - 2.0 * u) / below) / width
    for end, sign, side in ((0, -1.0, x < knots.x[0]), (-1, 1.0, x > knots.x[-1])):
        if side.any():
            c, d, t = knots.tail[end], knots.slope[end], sign * (x[side] - knots.x[end])
            rise = np.logaddexp(0.0, np.log(t) + np.log(d / c))
            z[side] = knots.z[end] + sign * c * rise
            log_slope[side] = np.log(d) - rise
            bend[side] = -sign / (c / d + t)
    return z, log_slope, bend


def inverse(z: FloatArray, knots: Knots) -> FloatArray:
    """z : (n,) -> x : (n,). Source of the root that does not cancel: Durkan et al. 2019, "Neural spline flows"."""
    k = np.clip(np.searchsorted(knots.z, z, side="right") - 1, 0, len(knots.z) - 2)
    width, height = knots.x[k + 1] - knots.x[k], knots.z[k + 1] - knots.z[k]
    mean, left, right = height / width, knots.slope[k], knots.slope[k + 1]
    y = np.clip(z - knots.z[k], 0.0, height)
    excess = left + right - 2.0 * mean
    a = height * (mean - left) + y * excess
    b = height * left - y * excess
    c = -mean * y
    u = np.where(y > 0, 2.0 * c / (-b - np.sqrt(np.maximum(b * b - 4.0 * a * c, 0.0))), 0.0 * y)
    x = knots.x[k] + width * np.clip(u, 0.0, 1.0)
    for end, sign, side in ((0, -1.0, z < knots.z[0]), (-1, 1.0, z > knots.z[-1])):
        if side.any():
            tail, d = knots.tail[end], knots.slope[end]
            x[side] = knots.x[end] + sign * tail / d * np.expm1(sign * (z[side] - knots.z[end]) / tail)
    return np.asarray(x)


# --- couplings --------------------------------------------------------------------------------------------------------


def coupling_spline(x: NDArray[Any], m: NDArray[Any]) -> tuple[FloatArray, FloatArray]:
    """x : (n, k), m : (n, (3 K - 1) k) -> y : (n, k) of Backend.spline_forward, x less the knots : (n, k, K + 1)."""
    n, k = x.shape
    numbers = np.asarray(m, np.float64).reshape(n, -1, k).transpose(0, 2, 1)
    xs, ys = (_coupling_knots(numbers[..., part : part + SPLINE_BINS]) for part in (0, SPLINE_BINS))
    raw = np.minimum(numbers[..., 2 * SPLINE_BINS :], SPLINE_STEEP) + SPLINE_OFFSET
    slopes = np.pad(SPLINE_LEAST + np.logaddexp(0.0, raw), ((0, 0), (0, 0), (1, 1)), constant_values=1.0)
    away = np.asarray(x, np.float64)[..., None] - xs
    b = np.clip((away >= 0).sum(axis=2) - 1, 0, SPLINE_BINS - 1)[..., None]
    (x0, x1), (y0, y1), (left, right) = (
        (np.take_along_axis(ends, b, 2)[..., 0], np.take_along_axis(ends, b + 1, 2)[..., 0])
        for ends in (xs, ys, slopes)
    )
    u, s = np.clip((x - x0) / (x1 - x0), 0.0, 1.0), (y1 - y0) / (x1 - x0)
    v = u * (1.0 - u)
    y = y0 + (y1 - y0) * (s * u**2 + left * v) / (s + (left + right - 2.0 * s) * v)
    return np.where(np.abs(x) < SPLINE_BOUND, y, x), away


def _coupling_knots(numbers: FloatArray) -> FloatArray:
    """(..., K) -> (..., K + 1)."""
    share = np.exp(numbers - numbers.max(axis=-1, keepdims=True))
    share = SPLINE_LEAST + (1.0 - SPLINE_BINS * SPLINE_LEAST) * share / share.sum(axis=-1, keepdims=True)
    inner = 2.0 * SPLINE_BOUND * np.cumsum(share, axis=-1)[..., :-1] - SPLINE_BOUND
    end = np.full((*numbers.shape[:-1], 1), SPLINE_BOUND)
    return np.concatenate([-end, inner, end], axis=-1)


# --- fitting ----------------------------------------------------------------------------------------------------------

TAIL_ROWS = 20  # rows beyond the outermost knots on either side, or a twentieth of few rows
TAILS = np.geomspace(0.25, 1.0, 9)  # c: never as straight as a line, nor so flat that samples run away
_STEEPNESS = np.geomspace(1 / 30, 30.0, 25)  # of a tail's first slope, relative to the last two knots'
_LEAST = 4  # effective rows, so that single heavy ones give a spline too


def fit_knots(values: FloatArray, count: int, weights: FloatArray | None = None) -> Knots:
    """The spline from values : (n,) to their normal scores: at most ``count`` knots at quantiles that are evenly spaced
    in normal score, and on each side the tail of greatest likelihood.

    weights : (n,) positive, of any scale; quantiles are then those of the weight, and rows count as Kish's effective
    number of them. ValueError if fewer than two values differ.
    """
    from scipy.special import ndtri

    order = np.argsort(values, kind="stable")
    x = np.asarray(values, np.float64)[order]
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)[order] / np.max(weights)
    different, first = np.unique(x, return_index=True)
    if len(different) < 2:
        raise ValueError("a quantile transform needs at least two different values")
    mass, total = np.add.reduceat(w, first), w.sum()
    n = max(_LEAST, int(total * total / (w @ w)))
    # A repeated value stands at the middle of its ranks.
    score = ndtri((np.cumsum(mass) - 0.5 * mass) / total)
    beyond = min(TAIL_ROWS, max(1, n // 20))
    last = -float(ndtri((beyond + 0.5) / n))
    wanted = np.linspace(-last, last, max(2, min(count, n // 4)))
    at = np.unique(np.clip(np.searchsorted(score, wanted), 0, len(score) - 1))
    at = at[np.append(True, np.diff(score[at]) > 0)]  # beside a heavy row light ones add nothing that could be seen
    if len(at) < 2:
        at = np.array([0, len(score) - 1])
    knot_x, knot_z = different[at], score[at]
    secant = np.diff(knot_z) / np.diff(knot_x)
    slope = np.empty(len(at))
    slope[0], slope[-1] = secant[0], secant[-1]
    slope[1:-1] = (knot_z[2:] - knot_z[:-2]) / (knot_x[2:] - knot_x[:-2])
    tail = np.empty(2)
    for end, sign, outside in ((0, -1.0, x < knot_x[0]), (-1, 1.0, x > knot_x[-1])):
        far = sign * (x[outside] - knot_x[end])
        slope[end], tail[end] = _fit_tail(far, w[outside], abs(float(knot_z[end])), float(slope[end]))
    return Knots(knot_x, knot_z, slope, tail)


def _fit_tail(outside: FloatArray, weights: FloatArray, z: float, slope: float) -> tuple[float, float]:
    """First slope and c of greatest likelihood under a normal z, for rows at distances ``outside`` of a knot at z."""
    best, found = -np.inf, (slope, 1.0)
    for d in slope * _STEEPNESS if len(outside) else ():
        rise = np.log1p(d * outside / TAILS[:, None])
        likelihood = (np.log(d) - rise - 0.5 * (z + TAILS[:, None] * rise) ** 2) @ weights
        j = int(np.argmax(likelihood))
        if likelihood[j] > best:
            best, found = float(likelihood[j]), (float(d), float(TAILS[j]))
    return found
