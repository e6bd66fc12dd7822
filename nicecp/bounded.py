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


def blocks_after(split: Split, steps: Sequence[Step]) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Rows of a split after ``steps`` in blocks : (rows, d) float64, and their weights (rows,); 8-bit values with the
    same noise at every call."""
    d, rng, weight = split.source.n_features, np.random.default_rng(_SEED), split.source.weight
    count = max(1, _BLOCK_ELEMENTS // (1024 * d))
    for first in range(0, split.n_blocks, count):
        data, rows = split.load_blocks(np.arange(first, min(first + count, split.n_blocks)))
        x = data.astype(np.float64)
        if steps and isinstance(steps[0], Dequantize):
            x = steps[0].low + (steps[0].high - steps[0].low) / steps[0].levels * (x + rng.random(x.shape))
        yield apply_steps(steps, x)[0], np.ones(len(x)) if weight is None else weight[rows]


def mean_after(split: Split, steps: Sequence[Step]) -> FloatArray:
    """(d,) mean of the rows after ``steps``, by their weights."""
    total, size = np.zeros(split.source.n_features), 0.0
    for z, w in blocks_after(split, steps):
        total, size = total + w @ z, size + float(w.sum())
    return total / (size or 1.0)


def spread_after(split: Split, steps: Sequence[Step]) -> tuple[FloatArray, FloatArray]:
    """(d,) mean and (d,) standard deviation of the rows after ``steps``, by their weights: two passes."""
    mean, square, size = mean_after(split, steps), np.zeros(split.source.n_features), 0.0
    for z, w in blocks_after(split, steps):
        square, size = square + w @ np.square(z - mean), size + float(w.sum())
    return mean, np.sqrt(square / (size or 1.0))


def moments_after(split: Split, steps: Sequence[Step]) -> tuple[FloatArray, FloatArray]:
    """(d,) mean and (d, d) covariance of the rows after ``steps``, by their weights: two passes."""
    d = split.source.n_features
    mean, total, size = mean_after(split, steps), np.zeros((d, d)), 0.0
    for z, w in blocks_after(split, steps):
        z = z - mean
        total, size = total + (z.T * w) @ z, size + float(w.sum())
    return mean, total / (size or 1.0)
