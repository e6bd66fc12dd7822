"""Mean log-likelihood of a split of data, in the space of the data before preprocessing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nicecp.beside import effective_rows
from nicecp.errors import DataError, about_file
from nicecp.extras import Extras, check_context
from nicecp.flow import NICE
from nicecp.kernels.backend import Array, Slot
from nicecp.loading import Loader
from nicecp.parallel import ALONE, Communicator
from nicecp.params import Views
from nicecp.preprocessing import Dequantize, Step
from nicecp.presented import log_dets, presented
from nicecp.split import SequentialReader, Split, Window
from nicecp.stream import read_ahead

BATCH = 1000  # rows
READ_ROWS = 2**16  # at a time, of splits with more; others stay in memory
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Mean and standard error over rows (nats per row); bits per dimension for 8-bit data, else None.

    Of rows with weights these are the weighted mean and its error, and effective_rows is Kish's effective sample size.
    """

    rows: int
    mean: float
    standard_error: float
    minimum: float
    bits_per_dim: float | None
    effective_rows: float | None = None


def log_det(steps: tuple[Step, ...]) -> float:
    """Sum of the steps' log-determinants, nats per row."""
    return sum(step.log_det for step in steps)


def check_width(flow: NICE, split: Split) -> None:
    """DataError unless the split has as many columns as the flow has features."""
    source = split.source
    if source.n_features != flow.n_features:
        raise DataError(
            about_file(
                source.name,
                f"{source.n_features} columns, but the flow has {flow.n_features} features",
                "use data of the same kind, or train a new flow",
            )
        )


def check_fits(flow: NICE, split: Split) -> None:
    """DataError unless the split holds rows that this flow can score, with the context that it is conditioned on."""
    check_kind(flow, split)
    check_context(flow, split.source)


def check_kind(flow: NICE, split: Split) -> None:
    """DataError unless the split's rows are of the flow's width and, as its own data, 8-bit or not."""
    check_width(flow, split)
    source = split.source
    wants_bytes = any(isinstance(step, Dequantize) for step in flow.preprocessing)
    if wants_bytes != source.is_image8:
        has, wants = ("8-bit", "float") if source.is_image8 else (str(source.dtype), "8-bit")
        raise DataError(
            about_file(source.name, f"{has} data, but the flow was trained on {wants} data", "convert the data")
        )


class PresentedRows:
    """A split's rows as batches for a flow, and what transforms of single columns add to each row's log-density.

    read_rows, share : see nicecp.split.SequentialReader
    """

    def __init__(self, steps: tuple[Step, ...], split: Split, read_rows: int, share: tuple[int, int]) -> None:
        self._steps, self._split, self._how = steps, split, (read_rows, share)
        self._seed = -1  # of the noise in the readers
        self._readers: tuple[SequentialReader, SequentialReader | None] | None = None

    def begin(self, batch_size: int) -> int:
        """The number, within the split, of the first row of the share."""
        return SequentialReader(self._split, batch_size, *self._how).begin

    def windows(self, seed: int, batch_size: int) -> Iterator[tuple[Window, FloatArray | None]]:
        """Windows of batches in file order, and (rows,) log-determinants of each one's rows, None if all are 0."""
        if self._readers is None or seed != self._seed:
            dets = log_dets(self._split, self._steps, seed)
            rows = SequentialReader(presented(self._split, self._steps, seed), batch_size, *self._how)
            own = None if dets is None else SequentialReader(dets, batch_size, *self._how)
            self._seed, self._readers = seed, (rows, own)
        return self._paired(*self._readers) if self._readers[0].resident else read_ahead(self._paired(*self._readers))

    @staticmethod
    def _paired(rows: SequentialReader, own: SequentialReader | None) -> Iterator[tuple[Window, FloatArray | None]]:
        if own is None:
            for window in rows:
                yield window, None
            return
        for window, values in zip(rows, own, strict=True):
            yield window, values.data[values.index[values.index >= 0], 0]


class Evaluator:
    """Scores one split again and again in one workspace, with fresh dequantization noise for every epoch.

    Of several ranks each scores its share of the rows, and all have the result.
    """

    def __init__(
        self,
        flow: NICE,
        split: Split,
        batch_size: int = BATCH,
        communicator: Communicator = ALONE,
        read_rows: int = READ_ROWS,
    ) -> None:
        check_fits(flow, split)
        if len(split) == 0:
            raise DataError(about_file(split.source.name, "no rows to evaluate", "use a file with rows"))
        self.flow, self.split, backend = flow, split, flow.backend
        self._communicator = communicator
        share = communicator.rank, communicator.size
        self._batch = min(batch_size, len(split))
        self._rows = PresentedRows(flow.preprocessing, split, read_rows, share)
        self._ws = flow.network.workspace(self._batch, keep=False)
        self._state = backend.alloc(Slot.SIZE, np.float64)
        self._loader = Loader(flow, self._batch)
        self._extras = Extras(flow, split.source)
        self._weights = split.weights
        self._kept: tuple[Window, tuple[Array, Array, Array]] | None = None  # a window, here and on the device
        self._passes: list[tuple[Views, int, Callable[[], None]]] = []  # over that window

    def _recorded(self, window: Window, views: Views, seed: int) -> Callable[[], None]:
        """The pass over a window's batches. Those of the last window are kept: validation comes back to it every epoch,
        with the parameters and maybe with their average."""
        backend = self.flow.backend
        if self._kept is None or not _same(self._kept[0], window):
            self._kept, self._passes = None, []  # first, for two windows may be more than there is memory
            data, index, rows = (backend.asarray(array) for array in (window.data, window.index, window.rows))
            self._kept = window, (data, index, rows)
        for parameters, key, run in self._passes:
            if parameters is views and key == seed:
                return run
        data, index, rows = self._kept[1]

        def score() -> None:
            self._loader.load(self._ws, data, index, rows, self._state, seed, self.split.purpose)
            self._extras.load(self._ws, rows, self._state)
            self.flow.network.forward(self._ws, views)

        run = backend.record(score)
        self._passes = [*self._passes[-1:], (views, seed, run)]
        return run

    def row_log_probs(self, views: Views, seed: int, epoch: int) -> FloatArray:
        """Log-density of every row in file order : (n,) float64, nats in data space."""
        backend, ws = self.flow.backend, self._ws
        out = np.zeros(len(self.split), np.float64)
        offset, done = log_det(self.flow.preprocessing), self._rows.begin(self._batch)
        for window, own in self._rows.windows(seed, self._batch):
            self._at(epoch, 0)
            recorded = self._recorded(window, views, seed)
            for i in range(window.n_batches):
                self._at(epoch, i)
                recorded()
                part = out[done : done + ws.n]
                part[...] = backend.copy_out(ws.logp)[: len(part)] + offset
                done += len(part)
            if own is not None:
                out[done - len(own) : done] += own
        self._communicator.sum(out)
        return out

    def _at(self, epoch: int, batch: int) -> None:
        host = np.zeros(Slot.SIZE)
        host[Slot.EPOCH], host[Slot.CURSOR] = epoch, batch
        self.flow.backend.copy_in(self._state, host)

    def run(self, views: Views, seed: int, epoch: int) -> Evaluation:
        """Evaluate with the parameters in ``views``; noise is keyed by (seed, row, epoch). An overflow gives NaN."""
        return self._summary(self.row_log_probs(views, seed, epoch))

    def run_checked(self, views: Views, seed: int, epoch: int) -> Evaluation:
        """As run; DataError that names the first row where the flow overflows, to NaN or -inf."""
        values = self.row_log_probs(views, seed, epoch)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            position = int(bad[0])
            block = int(np.searchsorted(self.split.bounds, position, side="right")) - 1
            row = int(self.split.rows_of_block(block)[position - int(self.split.bounds[block])])
            affine = all(step.affine for step in self.flow.preprocessing)
            why = "the flow overflows there" + ("" if affine else ", or its preprocessing does not take such values")
            problem = f"the log-density of row {row} is {values[position]}: {why}"
            raise DataError(about_file(self.split.source.name, problem, "look at this row, or train a new flow"))
        return self._summary(values)

    def _summary(self, values: FloatArray) -> Evaluation:
        n, weights = len(values), self._weights
        with np.errstate(over="ignore", invalid="ignore"):
            if weights is None:
                mean = float(np.mean(values))
                error = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
            else:
                mean = float(np.average(values, weights=weights))
                error = weighted_error(values - mean, weights)
        effective = None if weights is None else effective_rows(weights)
        return Evaluation(n, mean, error, float(values.min()), bits_per_dim(self.flow, mean), effective)


def _same(one: Window, other: Window) -> bool:
    alike = one.data is other.data and np.array_equal(one.index, other.index)
    return alike and np.array_equal(one.rows, other.rows)


def weighted_error(gaps: FloatArray, weights: FloatArray) -> float:
    """Standard error of a weighted mean, gaps : (n,) values less that mean; NaN for a single row.

    sqrt(n / (n - 1) sum (w gap)^2) / sum w: of equal weights it is the standard deviation over sqrt(n).
    Source: Cochran, Sampling Techniques, 1977, section 6.3 (a ratio of two sums over rows).
    """
    n = len(gaps)
    return math.sqrt(n / (n - 1) * float(np.square(weights * gaps).sum())) / float(weights.sum()) if n > 1 else math.nan


def bits_per_dim(flow: NICE, mean: float) -> float | None:
    """-(LL - d log(256 / width)) / (d log 2) for 8-bit data dequantized to that width, else None."""
    for step in flow.preprocessing:
        if isinstance(step, Dequantize):
            return -(mean - flow.n_features * step.log_bin) / (flow.n_features * math.log(2.0))
    return None


def evaluate(
    flow: NICE,
    split: Split,
    seed: int = 0,
    epoch: int = 0,
    communicator: Communicator = ALONE,
    read_rows: int = READ_ROWS,
) -> Evaluation:
    """Mean log-likelihood of a split under a flow.

    Raises DataError where the data do not fit the flow, or where a row's log-density is not finite.
    """
    evaluator = Evaluator(flow, split, communicator=communicator, read_rows=read_rows)
    with flow.backend.computing():
        return evaluator.run_checked(flow.network.layout.views(flow.flat), seed, epoch)
