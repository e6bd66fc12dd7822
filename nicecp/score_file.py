"""The log-density of every row of a data set, of any size, into a file: what `nicecp score` does.

Rows are read, scored and written in blocks, so that memory does not grow with the data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.checkpoint import load_run
from nicecp.data_spec import files_in
from nicecp.errors import DataError, OutputError, about_file
from nicecp.evaluate import check_fits
from nicecp.flow import NICE
from nicecp.kernels.backend import Purpose
from nicecp.memory import block_within
from nicecp.parallel import ALONE, Communicator
from nicecp.preprocessing import Dequantize
from nicecp.presented import uniform_noise
from nicecp.rank_devices import open_for
from nicecp.scoring import as_recorded, open_matched
from nicecp.sources import Source, as_they_are
from nicecp.split import Split
from nicecp.transforms import Recorded

FloatArray = NDArray[np.float64]
StrPath = str | os.PathLike[str]

FORMATS = (".h5", ".hdf5")
MAX_DRAWS = 2**31 - 2
_BLOCK_NUMBERS = 2**21  # of a block, 16 MiB
_BLOCK_ROWS = 2**16


@dataclass
class _Moments:
    """Number of rows with a weight, sum of weights, weighted mean, weighted sum of squared deviations from it.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    count: int = 0
    weight: float = 0.0
    mean: float = math.nan
    square: float = 0.0

    def add(self, values: FloatArray, weight: FloatArray) -> None:
        new, before = float(weight.sum()), self.weight
        if new == 0.0:
            return
        mean = float(values @ weight) / new
        delta = mean - self.mean if before else 0.0
        with np.errstate(over="ignore"):  # of log-densities of -1e200 the error is infinite
            self.square += float(weight @ np.square(values - mean) + np.square(delta) * before * new / (before + new))
        self.mean = self.mean + delta * new / (before + new) if before else mean
        self.count, self.weight = self.count + int((weight > 0).sum()), before + new


@dataclass
class Scored:
    """What came of scoring a data set; statistics in nats, over the rows whose log-density is finite.

    The mean is weighted where the rows have weights. minimum and its row are NaN and -1 where there is no such row.
    """

    dataset: str
    seed: int
    draws: int
    rows: int = 0
    nan: int = 0  # rows that hold NaN: their log-density is NaN
    outside: int = 0  # rows that are infinite or outside the flow's support: their log-density is -inf
    minimum: float = math.nan
    minimum_row: int = -1
    _moments: tuple[_Moments, _Moments] = field(default_factory=lambda: (_Moments(), _Moments()), repr=False)

    @property
    def finite(self) -> int:
        return self.rows - self.nan - self.outside

    @property
    def mean(self) -> float:
        """By the rows' weights, where they have any; NaN without rows."""
        return self._moments[0].mean

    @property
    def standard_error(self) -> float:
        """Of the mean, as nicecp.evaluate.weighted_error; NaN for fewer than two rows."""
        plain, squared = self._moments
        n = plain.count
        if n < 2:
            return math.nan
        total = squared.square + squared.weight * (squared.mean - plain.mean) ** 2  # of (weight gap)^2
        return math.sqrt(n / (n - 1) * total) / plain.weight

    def add(self, values: FloatArray, weight: FloatArray | None = None) -> None:
        """The next rows' log-densities : (n,), and their weights."""
        first = self.rows
        self.rows += len(values)
        self.nan += int(np.isnan(values).sum())
        self.outside += int(np.isneginf(values).sum())
        finite = np.isfinite(values)
        if not finite.any():
            return
        row = int(np.argmin(np.where(finite, values, np.inf)))
        if not values[row] >= self.minimum:
            self.minimum, self.minimum_row = float(values[row]), first + row
        w = np.ones(int(finite.sum())) if weight is None else weight[finite]
        self._moments[0].add(values[finite], w)
        self._moments[1].add(values[finite], w * w)


def score_file(
    checkpoint: StrPath,
    data: Any,
    out: StrPath,
    *,
    draws: int = 1,
    seed: int | None = None,
    overwrite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    precision: str | None = None,
    progress: Callable[[int, int], object] | None = None,
    communicator: Communicator = ALONE,
    memory_limit: int | None = None,
) -> Scored:
    """Write the log-densities of a data set's rows under a checkpoint's flow, in the order of the rows.

    Parameters
    ----------
    data : as nicecp.data.open_source; of a file without a named dataset the test dataset, else the training one
        Context and weights come from where the run had them, unless a DataSpec says otherwise.
    out : FILE.h5, which appears whole or not at all
        Dataset ``log_prob`` (n,) float64, nats, in the data's space: NaN for rows with NaN, -inf for rows that are
        infinite or outside the flow's support. Attributes: checkpoint, data, seed, draws.
    draws : how many times the noise of 8-bit data, and of columns recorded to a few digits, is drawn
        Of row i, draw k is that of (seed, i, k), the first one evaluate's. What is written is the logarithm of the
        densities' mean, log(sum_k p(x_k) / draws): with many draws that of the recorded values' own density.
    seed : of the noise; the run's own by default
    device, threads, precision : as nicecp.scoring.score
    progress : called with the rows done and all rows, after every block
    communicator : of the ranks that share the blocks, all of which make the same call; rank 0 writes, and what is
        returned is complete there
    memory_limit : bytes that the process may have in memory (nicecp.memory)

    Raises
    ------
    DataError, CheckpointError
        A file cannot be used, the data do not fit the flow, or the flow overflows at a finite row, which is named.
    OutputError
        The output cannot be written, or is no .h5 file.
    ValueError
        draws is less than 1, or not 1 for data that get no noise.
    """
    from nicecp.convert import new_dataset, new_file

    if os.path.splitext(os.fspath(out))[1].lower() not in FORMATS:
        raise OutputError(about_file(out, "unknown kind of output", f"name it {' or '.join(FORMATS)}"))
    flow, record = load_run(checkpoint, backend=open_for(communicator, device, threads), precision=precision)
    seed = seed if seed is not None else record.seed if record is not None else 0
    source = open_matched(flow, as_recorded(data, record), "test")
    try:
        check_scorable(flow, source, draws)
        scored = Scored(source.name, seed, draws)
        inputs = [os.fspath(checkpoint), *files_in(data)]
        own = min(_block_rows(source), block_within(memory_limit, flow, source))
        step = communicator.from_first(lambda: own)  # ranks differ in what they have in memory, and must not in blocks
        blocks = row_scores(flow, source, seed, draws, communicator, step)
        if communicator.rank > 0:
            for _ in blocks:
                pass
            return scored
        with new_file(os.fspath(out), overwrite, inputs) as file:
            written = new_dataset(file, "log_prob", (source.n_rows,), "float64")
            texts = {"checkpoint": os.path.basename(os.fspath(checkpoint)), "data": source.name, "unit": "nats"}
            for name, text in texts.items():
                written.attrs[name] = np.bytes_(text.encode("utf-8", "backslashreplace"))
            written.attrs["seed"], written.attrs["draws"] = np.uint64(seed), np.int64(draws)
            for start, values in blocks:
                written[start : start + len(values)] = values
                scored.add(values, None if source.weight is None else source.weight[start : start + len(values)])
                if progress is not None:
                    progress(scored.rows, source.n_rows)
        return scored
    finally:
        source.close()


def check_scorable(flow: NICE, source: Source, draws: int) -> None:
    """DataError unless the flow can score the rows, ValueError unless they can be drawn so many times."""
    check_fits(flow, Split.contiguous(source, 0, source.n_rows, Purpose.TEST_NOISE))
    if not 1 <= draws <= MAX_DRAWS:
        raise ValueError(f"draws must be in 1..{MAX_DRAWS}, got {draws}")
    if draws > 1 and not any(isinstance(step, (Dequantize, Recorded)) for step in flow.preprocessing):
        problem = "draws are for 8-bit data and columns recorded to a few digits, whose noise is drawn"
        raise ValueError(f"{problem}: the columns of {source.name!r} get none")


def _block_rows(source: Source) -> int:
    return max(1, min(_BLOCK_ROWS, _BLOCK_NUMBERS // source.n_features))


def row_scores(
    flow: NICE,
    source: Source,
    seed: int,
    draws: int = 1,
    communicator: Communicator = ALONE,
    step: int | None = None,
) -> Iterator[tuple[int, FloatArray]]:
    """Blocks of rows in order: the first row's number, and their log-densities (k,) as ``score_file`` writes them.

    Of several ranks each scores one block of every round; rank 0 has them all, the others none. step : rows of a block
    """
    step = _block_rows(source) if step is None else step
    starts = range(0, source.n_rows, step)
    for first in range(0, len(starts), communicator.size):
        mine = starts[first + communicator.rank : first + communicator.rank + 1]
        values = _block(flow, source, mine[0], step, seed, draws) if len(mine) else np.empty(0)
        gathered = communicator.gather(values)
        if gathered is not None:
            yield starts[first], gathered


def _block(flow: NICE, source: Source, start: int, step: int, seed: int, draws: int) -> FloatArray:
    """Log-densities (k,) of a block of rows."""
    with as_they_are():
        rows = source.read(start, min(start + step, source.n_rows))
    at = np.arange(start, start + len(rows))
    total = _log_prob(flow, source, in_data_space(flow, rows, at, seed, 0), start)
    for draw in range(1, draws):
        total = np.logaddexp(total, _log_prob(flow, source, in_data_space(flow, rows, at, seed, draw), start))
    return total - math.log(draws) if draws > 1 else total


def in_data_space(flow: NICE, rows: NDArray[Any], at: NDArray[np.int64], seed: int, draw: int) -> NDArray[Any]:
    """rows : (n, d) as a source gives them, their consecutive numbers (n,) -> what a flow scores, with noise if any."""
    if rows.dtype == np.uint8:
        step = next(step for step in flow.preprocessing if isinstance(step, Dequantize))
        noise = flow.backend.alloc(rows.shape, np.float64)
        flow.backend.fill_uniform(noise, seed, Purpose.TEST_NOISE, draw, int(at[0]))
        bytes_as_floats: FloatArray = step.low + (step.high - step.low) * (
            (rows + flow.backend.copy_out(noise)) / step.levels
        )
        return bytes_as_floats
    for recorded in (step for step in flow.preprocessing if isinstance(step, Recorded)):
        rows = np.array(rows, np.float64)
        u = uniform_noise(seed, Purpose.TEST_NOISE, at, recorded.columns, draw)
        rows[:, recorded.columns] += recorded.width * (u - 0.5)
    return rows


def _log_prob(flow: NICE, source: Source, x: NDArray[Any], start: int) -> FloatArray:
    """Log-densities of rows from ``start`` on; DataError that names the first row at which the flow overflows."""
    context = None if source.context is None else source.context[start : start + len(x)]
    try:
        values: FloatArray = flow.log_prob(x, context)
        return values
    except FloatingPointError:
        row = _first_overflow(flow, x, context)
        problem = f"the log-density of row {start + row} is not finite though the row is: the flow overflows there"
        raise DataError(about_file(source.name, problem, "look at this row, or train a new flow")) from None


def _first_overflow(flow: NICE, x: NDArray[Any], context: FloatArray | None) -> int:
    """By halves: the first row for which log_prob raises."""
    low, high = 0, len(x)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            flow.log_prob(x[low:middle], None if context is None else context[low:middle])
        except FloatingPointError:
            high = middle
        else:
            low = middle
    return low
