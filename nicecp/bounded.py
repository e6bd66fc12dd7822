"""The logit step for data in a bounded interval, and statistics of rows behind steps that are not affine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nicecp.data import ColumnStats
from nicecp.errors import DataError, about_file
from nicecp.preprocessing import Dequantize, MarginLogit, Step, apply_steps
from nicecp.sources import column_label
from nicecp.split import Split

FloatArray = NDArray[np.float64]
_BLOCK_ELEMENTS = 2**22  # of rows that are turned into float64 at a time
_SEED = 0  # of the dequantization noise in statistics


def logit_step(train: Split, stats: ColumnStats | None, value_range: tuple[float, float], margin: float) -> MarginLogit:
    """The logit of values in ``value_range``: of all float columns, with their stats, or of dequantized 8-bit data.

    Raises
    ------
    ValueError
        The margin is not in [0, 1/2), or 0 for 8-bit data, in which the lowest value occurs.
    DataError
        A float column goes beyond the range, or up to its end with margin 0.
    """
    if not 0 <= margin < 0.5:
        raise ValueError(f"logit must be a margin of at least 0 and below 0.5, got {margin}")
    if stats is None and margin == 0:
        raise ValueError("logit must be above 0 for 8-bit data, in which the ends of their range occur")
    low, high = value_range
    d = train.source.n_features
    if stats is not None:
        outside = (stats.low < low) | (stats.high > high)
        if margin == 0:
            outside |= (stats.low <= low) | (stats.high >= high)
        if outside.any():
            column = int(np.argmax(outside))
            spans = f"spans {stats.low[column]:.9g} to {stats.high[column]:.9g}"
            problem = f"column {column_label(column, train.source.info.columns)} {spans}"
            inside = "" if margin else ", whose ends have no logit with margin 0"
            problem += f", which is not within the logit's range {low:g} to {high:g}{inside}"
            raise DataError(about_file(train.source.name, problem, "give a wider --range (value_range=)"))
    return MarginLogit(np.full(d, float(low)), np.full(d, float(high)), margin)


def blocks_after(split: Split, steps: Sequence[Step]) -> Iterator[FloatArray]:
    """Rows of a split after ``steps`` in blocks : (rows, d) float64; 8-bit values with the same noise at every call."""
    d, rng = split.source.n_features, np.random.default_rng(_SEED)
    count = max(1, _BLOCK_ELEMENTS // (1024 * d))
    for first in range(0, split.n_blocks, count):
        x = split.load_blocks(np.arange(first, min(first + count, split.n_blocks)))[0].astype(np.float64)
        if steps and isinstance(steps[0], Dequantize):
            x = steps[0].low + (steps[0].high - steps[0].low) / steps[0].levels * (x + rng.random(x.shape))
        yield apply_steps(steps, x)[0]


def mean_after(split: Split, steps: Sequence[Step]) -> FloatArray:
    """(d,) mean of the rows after ``steps``."""
    total, count = np.zeros(split.source.n_features), 0
    for z in blocks_after(split, steps):
        total, count = total + z.sum(axis=0), count + len(z)
    return total / max(1, count)


def spread_after(split: Split, steps: Sequence[Step]) -> tuple[FloatArray, FloatArray]:
    """(d,) mean and (d,) standard deviation of the rows after ``steps``: two passes."""
    mean, square, count = mean_after(split, steps), np.zeros(split.source.n_features), 0
    for z in blocks_after(split, steps):
        square, count = square + np.square(z - mean).sum(axis=0), count + len(z)
    return mean, np.sqrt(square / max(1, count))


def moments_after(split: Split, steps: Sequence[Step]) -> tuple[FloatArray, FloatArray]:
    """(d,) mean and (d, d) covariance of the rows after ``steps``: two passes."""
    d = split.source.n_features
    mean, total, count = mean_after(split, steps), np.zeros((d, d)), 0
    for z in blocks_after(split, steps):
        z = z - mean
        total, count = total + z.T @ z, count + len(z)
    return mean, total / max(1, count)
