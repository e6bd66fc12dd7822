"""Rows as a flow's network is trained on them where single columns are transformed: on the host, in float64, as read.

A data set that fits into memory is transformed once, when it is loaded; a larger one whenever its rows are read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.errors import DataError, about_file
from nicecp.flow import NICE
from nicecp.kernels.philox import random_words
from nicecp.preprocessing import Step, apply_steps
from nicecp.sources import Source, column_label
from nicecp.split import Split
from nicecp.transforms import ColumnStep, Recorded

FloatArray = NDArray[np.float64]


def host_part(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps that are applied to rows as they are read: up to the last transform of single columns."""
    last = max((k for k, step in enumerate(steps) if isinstance(step, ColumnStep)), default=-1)
    return steps[: last + 1]


def device_part(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The other steps, which the loader applies to every batch."""
    return steps[len(host_part(steps)) :]


def uniform_noise(seed: int, purpose: int, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> FloatArray:
    """(n, m) uniform in (0, 1): row numbers and column numbers decide, whatever else is read with them."""
    words = [random_words(seed, purpose, 0, rows, int(block)) for block in np.unique(columns // 4)]
    table = dict(zip(np.unique(columns // 4).tolist(), words, strict=True))
    picked = [table[int(column) // 4][:, int(column) % 4] for column in columns]
    return (np.stack(picked, axis=1) + 0.5) / 2.0**32


class _Rows:
    """What the two sources below share: another source, the host's steps, and the key of the noise."""

    def __init__(self, source: Source, steps: tuple[Step, ...], seed: int, purpose: int) -> None:
        self.source, self._steps, self._key = source, steps, (seed, purpose)
        self.name, self.n_rows, self.info = source.name, source.n_rows, source.info
        self.dtype: np.dtype[Any] = np.dtype(np.float64)
        self.is_image8 = False
        self.context, self.context_names, self.weight = source.context, source.context_names, source.weight

    def _raw(self, start: int, stop: int) -> FloatArray:
        """Rows start..stop-1 : (stop - start, d) float64, what was recorded in steps with its noise."""
        x = np.asarray(self.source.read(start, stop), np.float64)
        for step in self._steps:
            if isinstance(step, Recorded):
                u = uniform_noise(*self._key, np.arange(start, stop, dtype=np.int64), step.columns)
                x = np.array(x)
                x[:, step.columns] += step.width * (u - 0.5)
        return x

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def close(self) -> None:
        self.source.close()


class PresentedSource(_Rows):
    """Rows of a source after the host's steps; DataError for the first one outside their support."""

    @property
    def n_features(self) -> int:
        return self.source.n_features

    def read(self, start: int, stop: int) -> FloatArray:
        x = self._raw(start, stop)
        z = apply_steps(self._steps, x)[0]
        finite = np.isfinite(z)
        if not finite.all():
            row, column = (int(i) for i in np.unravel_index(int(np.argmin(finite)), finite.shape))
            where = f"row {start + row}, column {column_label(column, self.info.columns)}"
            problem = f"{where} is {x[row, column]:g}, outside the support of its transform"
            raise DataError(about_file(self.name, problem, "remove such rows, or transform this column in another way"))
        return np.ascontiguousarray(z)


class LogDetSource(_Rows):
    """The host's steps' log-determinants of a source's rows, (n, 1): split and read just as the rows themselves."""

    n_features = 1

    def read(self, start: int, stop: int) -> FloatArray:
        return np.broadcast_to(apply_steps(self._steps, self._raw(start, stop))[1], (stop - start,)).reshape(-1, 1)


def presented(split: Split, steps: tuple[Step, ...], seed: int) -> Split:
    """The same rows after the host's part of ``steps``; the split itself where there is none."""
    host = host_part(steps)
    return split.seen_as(PresentedSource(split.source, host, seed, split.purpose)) if host else split


def log_dets(split: Split, steps: tuple[Step, ...], seed: int) -> Split | None:
    """The log-determinants (n, 1) of the host's part of ``steps`` for the rows of a split; None where there is none."""
    host = host_part(steps)
    return split.seen_as(LogDetSource(split.source, host, seed, split.purpose)) if host else None


def mean_log_det(split: Split, steps: tuple[Step, ...], seed: int) -> float:
    """Mean over a split's rows, by their weights, of what the host's steps add to their log-densities, nats."""
    dets = log_dets(split, steps, seed)
    if dets is None or not len(split):
        return 0.0
    weights, total = split.weights, 0.0
    for block in range(dets.n_blocks):
        values = dets.load_blocks(np.arange(block, block + 1))[0][:, 0]
        total += float(
            values.sum() if weights is None else values @ weights[dets.bounds[block] : dets.bounds[block + 1]]
        )
    return total / (len(split) if weights is None else float(weights.sum()))


def past_transforms(flow: NICE, x: FloatArray) -> tuple[NICE, FloatArray]:
    """The flow from the space after its transforms of single columns, and rows x : (n, d) as they are there."""
    past = len(host_part(flow.preprocessing))
    if not past:
        return flow, x
    z = apply_steps(flow.preprocessing[:past], x)[0]
    if not np.isfinite(z).all():
        raise ValueError("a row lies outside the support of the flow's transforms")
    after = flow.preprocessing[past:]
    return NICE.from_spec(flow.spec, flow.parameters(), after, flow.info, backend=flow.backend), z
