"""Float columns that training would not do well on, found before it begins."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import DTypeLike

from nicecp.data import Splits
from nicecp.errors import DataError, about_file
from nicecp.loading import loading
from nicecp.preprocessing import Step
from nicecp.presented import device_part, host_part, presented
from nicecp.records import Event
from nicecp.sources import column_label
from nicecp.split import BLOCK, Split

logger = logging.getLogger("nicecp")

MIN_ROWS = 100  # fewer say nothing
MAX_ROWS = 2**14  # looked at
SHARE = 0.05  # of the rows: so many have one value, or values come so often on average
_ELEMENTS = 2**22  # looked at
_LISTED = 8  # columns named in a message


def near_discrete(split: Split) -> tuple[int, ...]:
    """Columns in which one value fills at least SHARE of the rows, or values are repeated 1 / SHARE times on average.

    At most MAX_ROWS rows, in blocks from all over the split, are looked at; none of 8-bit data, which are dequantized.
    """
    d = split.source.n_features
    if split.source.is_image8 or len(split) < MIN_ROWS:
        return ()
    wanted = max(1, min(MAX_ROWS, _ELEMENTS // d) // BLOCK)
    blocks = np.unique(np.linspace(0, split.n_blocks - 1, min(wanted, split.n_blocks)).astype(np.int64))
    values = np.sort(split.load_blocks(blocks)[0], axis=0)
    n = len(values)
    if n < MIN_ROWS:
        return ()
    often = int(np.ceil(SHARE * n))
    one_value = (values[often - 1 :] == values[: n - often + 1]).any(axis=0)
    different = 1 + (values[1:] != values[:-1]).sum(axis=0)
    return tuple(int(i) for i in np.flatnonzero(one_value | (different <= SHARE * n)))


def discrete_columns_noted(split: Split) -> list[Event]:
    """A warning that names the near-discrete columns of the training rows, and the same as an event for the history."""
    found = near_discrete(split)
    if not found:
        return []
    labels = [column_label(column, split.source.info.columns) for column in found[:_LISTED]]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    message = (
        f"{split.source.name!r}: columns with few different values, or one value in many rows: {', '.join(labels)}"
        f"{more}; the likelihood of discrete values has no bound: leave them out, or add noise to them"
    )
    logger.warning("%s", message)
    return [Event(0, 0, "columns", message)]


def check_representable(splits: Splits, steps: tuple[Step, ...], dtype: DTypeLike, seed: int) -> None:
    """DataError that names the first row and column which the flow, computing in ``dtype``, would see as infinite.

    steps : the preprocessing; the numbers themselves are finite, but not those that it makes of them in float32
    seed : the run's, of the noise on recorded values
    """
    for given in (splits.train, splits.valid, splits.test):
        if given is None or given.source.is_image8:
            continue
        split = presented(given, host_part(steps), seed)  # DataError for rows outside a support
        source, d = split.source, split.source.n_features
        on_device = device_part(steps)
        if not all(step.affine for step in on_device):
            _check_images(split, on_device, dtype)
            continue
        shift, scale, matrix = loading(on_device, d)
        if (
            np.dtype(dtype) == np.float64
            and source.dtype == np.float32
            and scale.max(initial=0.0) < 1e200
            and matrix is None
        ):
            continue  # they cannot get there
        step = max(1, 2**19 // (BLOCK * d))
        for first in range(0, split.n_blocks, step):
            data, rows = split.load_blocks(np.arange(first, min(first + step, split.n_blocks)))
            with np.errstate(over="ignore", invalid="ignore"):
                inputs = (data - shift) * scale
                finite = np.isfinite((inputs if matrix is None else inputs @ matrix.T).astype(dtype))
            if not finite.all():
                row, column = (int(i) for i in np.unravel_index(int(np.argmin(finite)), finite.shape))
                where = f"row {int(rows[row])}, column {column_label(column, source.info.columns)}"
                problem = f"{where} is {data[row, column]:g}, too large for {np.dtype(dtype).name}"
                raise DataError(about_file(source.name, problem, "rescale this column, or use --dtype float64"))


def _check_images(split: Split, steps: tuple[Step, ...], dtype: DTypeLike) -> None:
    """check_representable for steps that do not take every number, of which the first that gives none is named."""
    source = split.source
    count = max(1, 2**19 // (BLOCK * source.n_features))
    for first in range(0, split.n_blocks, count):
        data, rows = split.load_blocks(np.arange(first, min(first + count, split.n_blocks)))
        x = np.asarray(data, np.float64)
        for number, step in enumerate(steps):
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                x = step.forward(x)
                finite = np.isfinite(x.astype(dtype) if number == len(steps) - 1 else x)
            if not finite.all():
                row, column = (int(i) for i in np.unravel_index(int(np.argmin(finite)), finite.shape))
                where = f"row {int(rows[row])}, column {column_label(column, source.info.columns)}"
                problem = f"{where} is {data[row, column]:g}, of which the step {step.kind!r} makes no finite number"
                remedy = "give a wider --range, or leave this row out"
                raise DataError(about_file(source.name, problem, remedy))
