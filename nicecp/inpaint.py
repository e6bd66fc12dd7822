"""Inpainting: hidden values ascend the log-likelihood while the others stay.  Dinh et al. 2015, section 5.2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.context import context_of
from nicecp.errors import TrainingError
from nicecp.flow import NICE
from nicecp.kernels.backend import Purpose
from nicecp.preprocessing import Dequantize, MarginLogit
from nicecp.spec import whole_number

FloatArray = NDArray[np.float64]
Bools = NDArray[np.bool_]

VARIANTS = ("text", "code")
SCRIPT_SCALE = 0.01  # the published script differentiates the mean log-density of 100 images
MAX_ITERATIONS = 2**31 - 2  # the random numbers' epoch word counts them twice
MAX_CHAINS = 2**24
_CHAIN_BITS = 32  # chain c's image i has the row number c * 2^32 + i among the random numbers


@dataclass(frozen=True)
class Inpainted:
    """x : (chains, n, d) start and result in data space; log-densities of both, (chains, n), in nats."""

    start: FloatArray
    result: FloatArray
    log_prob_before: FloatArray
    log_prob_after: FloatArray

    @property
    def mean(self) -> FloatArray:
        """(n, d) mean of the chains' results."""
        return np.asarray(self.result.mean(axis=0))


def step_size(iteration: int) -> float:
    """alpha_i = 10 / (100 + i), i from 0."""
    return 10.0 / (100.0 + iteration)


def box_of(flow: NICE) -> tuple[float, float] | None:
    """The box in which a flow's data lie: dequantized 8-bit values, or floats whose logit keeps a margin from its ends,
    the same for all; None for other flows of floats, whose range is not known."""
    for step in flow.preprocessing:
        if isinstance(step, Dequantize):
            return step.low, step.high
    first = flow.preprocessing[0] if flow.preprocessing else None
    if isinstance(first, MarginLogit) and first.margin > 0 and np.ptp(first.low) == 0 and np.ptp(first.high) == 0:
        return float(first.low[0]), float(first.high[0])
    return None


def inpaint(
    flow: NICE,
    x: ArrayLike,
    hidden: ArrayLike,
    iterations: int,
    *,
    chains: int = 1,
    seed: int = 0,
    box: tuple[float, float] | None = None,
    variant: str = "text",
    gradient_scale: float | None = None,
    context: ArrayLike | None = None,
    progress: Callable[[int], object] | None = None,
) -> Inpainted:
    """Fill in hidden values by noisy gradient ascent from uniform noise, all rows and chains in one batch.

    Parameters
    ----------
    x : (n, d) in data space, within the box; hidden values are not looked at
    hidden : (d,) or (n, d) bool, True where a value is to be filled in
    box : (low, high)
        That of the flow's 8-bit data, or of floats behind a logit with a margin, by default; needed for other flows.
    variant : "text" or "code"
        text, section 5.2:  x <- clip(x + alpha_i (scale d log p(x) / dx + eps)), eps ~ N(0, I), alpha_i =
        10 / (100 + i), scale 1, clipped to the box.
        code, the authors' script: the gradient is that of the mean over 100 images, so scale 0.01, and taken at a fresh
        dequantization x + (high - low) (u - 1/2) / 256, u ~ U[0, 1); nothing is clipped.
    gradient_scale : in place of the variant's scale
        A good model's gradient is so large that with scale 1 values jump between the box's faces until alpha_i has
        become small, after some 10^5 iterations. The text's projection with the script's 0.01 gets there in 10^3.
    context : (k,), for a flow with a context: the same for all rows
    seed : int
        Row i of chain c has noise of its own, keyed by (seed, iteration, c, i) alone.
    progress : called with the number of iterations done after each one.

    Returns
    -------
    Inpainted

    Raises
    ------
    ValueError
        Shapes, the box, a value outside of it or not finite, nothing hidden, or a setting out of bounds.
    TrainingError
        The ascent left the numbers' range (code only: text is clipped).
    """
    seed, chains = whole_number(seed, "seed"), whole_number(chains, "chains")
    if not (0 <= whole_number(iterations, "iterations") <= MAX_ITERATIONS and 1 <= chains <= MAX_CHAINS):
        raise ValueError(f"at least 0 iterations and 1 chain are needed, got {iterations} and {chains}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0..2**64 - 1, got {seed}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    scale = (1.0 if variant == "text" else SCRIPT_SCALE) if gradient_scale is None else float(gradient_scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"the gradient's scale must be positive and finite, got {gradient_scale}")
    low, high = _checked_box(flow, box)
    rows = np.array(x, np.float64)
    if rows.ndim != 2 or rows.shape[1] != flow.n_features or not len(rows):
        raise ValueError(f"expected x of shape (n, {flow.n_features}), got {rows.shape}")
    free = np.asarray(hidden)
    if free.dtype != np.bool_ or free.shape not in (rows.shape, rows.shape[1:]):
        raise ValueError(f"expected hidden as bool of shape {rows.shape[1:]} or {rows.shape}, got {free.shape}")
    free = np.broadcast_to(free, rows.shape)
    if not free.any():
        raise ValueError("hidden is False everywhere: nothing to fill in")
    _check_inside(rows, free, low, high)

    context = context_of(context, flow.context)
    if context is not None and context.ndim > 1:
        raise ValueError(f"inpainting takes one context for all rows, expected shape ({flow.n_context},)")
    n, d = rows.shape
    free = np.tile(free, (chains, 1))
    state = np.tile(rows, (chains, 1))
    noise = _Noise(flow, seed, chains, n)
    np.copyto(state, low + (high - low) * noise.uniform(0), where=free)
    start = state.copy()
    before = flow.log_prob(state, context)
    for i in range(iterations):
        at = state if variant == "text" else state + (high - low) / 256 * (noise.uniform(i + 1) - 0.5)
        step = _gradient(flow, at, context, i)
        step *= scale
        step += noise.normal(i + 1)
        step *= step_size(i)
        np.add(state, step, out=state, where=free)
        if variant == "text":
            np.clip(state, low, high, out=state)
        if progress is not None:
            progress(i + 1)
    after = flow.log_prob(state, context)
    return Inpainted(
        start.reshape(chains, n, d), state.reshape(chains, n, d), before.reshape(chains, n), after.reshape(chains, n)
    )


def _gradient(flow: NICE, x: FloatArray, context: FloatArray | None, iteration: int) -> FloatArray:
    """d log p / dx; TrainingError where x has left the range of the flow's numbers."""
    try:
        gradient = np.asarray(flow.grad_log_prob(x, context))
    except FloatingPointError:
        gradient = np.full_like(x, np.nan)
    if not np.isfinite(gradient).all():
        problem = f"inpainting diverged in iteration {iteration + 1}: the gradient is not finite"
        raise TrainingError(f"{problem}; use the variant 'text', which stays in the data's box")
    return gradient


def _checked_box(flow: NICE, box: tuple[float, float] | None) -> tuple[float, float]:
    own = box_of(flow)
    if box is None:
        if own is None:
            raise ValueError("this flow was trained on floats: say between which values they lie (--box, box=)")
        return own
    eight_bit = any(isinstance(step, Dequantize) for step in flow.preprocessing)
    if eight_bit and own is not None and tuple(box) != own:
        raise ValueError(f"the box of this flow's 8-bit data is {own[0]:g},{own[1]:g}: leave the box (--box) out")
    low, high = float(box[0]), float(box[1])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"the box must be two finite numbers low < high, got {box}")
    return low, high


def outside(x: FloatArray, low: float, high: float) -> tuple[int, int] | None:
    """Row and column of the first value of x : (n, d) that is not within low..high; NaN is not."""
    bad = ~((x >= low) & (x <= high))
    if not bad.any():
        return None
    row, column = np.unravel_index(int(np.argmax(bad)), bad.shape)
    return int(row), int(column)


def _check_inside(x: FloatArray, free: Bools, low: float, high: float) -> None:
    where = outside(np.where(free, low, x), low, high)
    if where is not None:
        row, column = where
        raise ValueError(f"x[{row}, {column}] is {x[row, column]:g}, outside the data's box {low:g}..{high:g}")


class _Noise:
    """Random numbers for (chains * n, d) rows, in buffers that every call fills anew."""

    def __init__(self, flow: NICE, seed: int, chains: int, n: int) -> None:
        self._backend, self._seed, self._chains, self._n = flow.backend, seed, chains, n
        self._parts = [flow.backend.alloc((n, flow.n_features), np.float64) for _ in range(chains)]
        self._host = np.empty((chains * n, flow.n_features))

    def uniform(self, iteration: int) -> FloatArray:
        for chain, part in enumerate(self._parts):
            # Even epoch words; normal numbers have odd ones, so that an iteration may have both.
            self._backend.fill_uniform(part, self._seed, Purpose.INPAINT, 2 * iteration, chain << _CHAIN_BITS)
        return self._gathered()

    def normal(self, iteration: int) -> FloatArray:
        for chain, part in enumerate(self._parts):
            self._backend.fill_normal(part, self._seed, Purpose.INPAINT, 2 * iteration + 1, chain << _CHAIN_BITS)
        return self._gathered()

    def _gathered(self) -> FloatArray:
        for chain, part in enumerate(self._parts):
            self._host[chain * self._n : (chain + 1) * self._n] = self._backend.copy_out(part)
        return self._host
