"""Which rows are trained on, and in which order: splits, the shuffled reader of an epoch, the sequential reader.

Rows are handled in blocks of BLOCK, because single rows of a file are a thousand times slower to read. Everything
follows from (seed, epoch, row numbers) by counter-based random numbers, so that a reader can start anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.errors import DataError, about_file
from nicecp.kernels.backend import Purpose
from nicecp.kernels.philox import random_keys
from nicecp.sources import Source

BLOCK = 1024  # rows
SHUFFLE_WINDOW = 2**18  # rows
_READ_BYTES = 2**23  # at most about this much is read beyond what is kept
_WINDOW_EPOCH = 2**31  # added to the epoch word, so that rows are not shuffled by the keys of the blocks

Rows = NDArray[np.int64]


class Split:
    """A part of a source's rows, in file order, made by ``contiguous``, ``keyed`` or ``weighted``.

    ``purpose`` (kernels' Purpose) keys the dequantization noise. Block b covers the file rows from
    ``start + b * BLOCK``; memory and work are O(BLOCK) per block and O(n_blocks) in all.
    """

    def __init__(
        self,
        source: Source,
        start: int,
        stop: int,
        purpose: int,
        fraction: Fraction | None,
        seed: int,
        member: bool,
        chosen: NDArray[np.bool_] | None = None,
    ) -> None:
        if not 0 <= start <= stop <= source.n_rows:
            raise ValueError(f"rows {start} to {stop} are not within the {source.n_rows} rows of {source.name}")
        self.source, self.purpose = source, purpose
        self.start, self.stop = start, stop
        self.fraction, self.seed, self.member = fraction, seed, member
        self._chosen = chosen  # (stop - start,) which rows belong to it; None: the rule of fraction, seed and member
        self.n_blocks = -(-(stop - start) // BLOCK)
        # bounds[b] is the number of rows of the split that lie before block b
        ends = np.minimum(np.arange(self.n_blocks + 1, dtype=np.int64) * BLOCK, stop - start)
        if chosen is not None:
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen)])[ends]
        elif fraction is not None:
            # whole blocks and remainder apart keeps the products far below 2^63
            whole, rest = ends // fraction.denominator, ends % fraction.denominator
            held = whole * fraction.numerator + rest * fraction.numerator // fraction.denominator
            ends = held if member else ends - held
        self.bounds: Rows = ends
        self._loaded: tuple[NDArray[Any], Rows] | None = None

    @classmethod
    def contiguous(cls, source: Source, start: int, stop: int, purpose: int) -> Split:
        """File rows start..stop-1, less those of weight 0."""
        weight = None if source.weight is None else source.weight[start:stop]
        chosen = None if weight is None or weight.all() else weight > 0
        return cls(source, start, stop, purpose, None, 0, False, chosen)

    @classmethod
    def keyed(cls, source: Source, fraction: float | Fraction, seed: int, member: bool, purpose: int) -> Split:
        """A random ``fraction`` of the rows (member=True) or all the others (member=False), fixed by the seed.

        Of the first m rows of the file, m a multiple of BLOCK or all, exactly floor(m * fraction) are held out: in
        each block those with the smallest Philox keys.
        """
        return cls(source, 0, source.n_rows, purpose, as_fraction(fraction), seed, member)

    @classmethod
    def weighted(cls, source: Source, fraction: float | Fraction, seed: int, member: bool, purpose: int) -> Split:
        """Random rows that hold a ``fraction`` of the source's weight (member=True) or all the others (member=False).

        In the order of their Philox keys, as many as ``held_by_weight`` says. Rows of weight 0 are in neither part.
        """
        weight, n, share = source.weight, source.n_rows, as_fraction(fraction)
        if weight is None:
            raise ValueError(f"{source.name} has no weights")
        order = np.argsort(random_keys(seed, Purpose.SPLIT, 0, np.arange(n, dtype=np.int64)), kind="stable")
        held = np.zeros(n, np.bool_)
        held[order[: held_by_weight(weight[order], share)]] = True
        return cls(source, 0, n, purpose, share, seed, member, (weight > 0) & (held if member else ~held))

    def rows(self) -> Rows:
        """(len,) the numbers of all its rows, ascending."""
        blocks = [self.rows_of_block(block) for block in range(self.n_blocks)]
        return np.concatenate([np.empty(0, np.int64), *blocks])

    @property
    def weights(self) -> NDArray[np.float64] | None:
        """(len,) the rows' weights in order; None where all count alike."""
        if self.source.weight is None:
            return None
        return self.source.weight[self.rows()]

    def head(self, rows: int) -> Split:
        """The part of it that lies in its first ``rows`` rows of the file, rounded up to whole blocks."""
        stop = min(self.stop, self.start + -(-rows // BLOCK) * BLOCK)
        chosen = None if self._chosen is None else self._chosen[: stop - self.start]
        return Split(self.source, self.start, stop, self.purpose, self.fraction, self.seed, self.member, chosen)

    def seen_as(self, source: Source) -> Split:
        """The same rows of another source, which shows them differently."""
        member, chosen = self.member, self._chosen
        return Split(source, self.start, self.stop, self.purpose, self.fraction, self.seed, member, chosen)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def rows_of_block(self, block: int) -> Rows:
        """-> (k,) file rows of the block that belong to the split, ascending."""
        first = self.start + block * BLOCK
        rows = np.arange(first, min(first + BLOCK, self.stop), dtype=np.int64)
        if self._chosen is not None:
            return rows[self._chosen[rows - self.start]]
        if self.fraction is None:
            return rows
        count = int(self.bounds[block + 1] - self.bounds[block])
        held = count if self.member else len(rows) - count
        order = np.argsort(random_keys(self.seed, Purpose.SPLIT, 0, rows), kind="stable")
        chosen = order[:held] if self.member else order[held:]
        return rows[np.sort(chosen)]

    def describe(self) -> dict[str, str | int]:
        """The rule by which the rows were chosen, for the record of a run."""
        record: dict[str, str | int] = {"source": self.source.name, "rows": len(self), "block": BLOCK}
        if self._chosen is not None:
            record["weighted"] = 1
        if self.fraction is None:
            return record | {"rule": "range", "start": self.start, "stop": self.stop}
        part = "held-out" if self.member else "rest"
        return record | {"rule": "keyed", "fraction": str(self.fraction), "seed": self.seed, "part": part}

    def load(self) -> tuple[NDArray[Any], Rows]:
        """All rows: data (len, d) and file rows (len,); read once, the same arrays in every call."""
        if self._loaded is None:
            self._loaded = self.load_blocks(np.arange(self.n_blocks))
        return self._loaded

    def load_blocks(self, blocks: Rows, front: int = 0) -> tuple[NDArray[Any], Rows]:
        """blocks : ascending block numbers -> their rows' data (m, d) and file rows (m,), neighbours read together.

        With ``front`` the arrays have as many more rows at their beginning, for the caller to fill.
        """
        total = front + int((self.bounds[blocks + 1] - self.bounds[blocks]).sum())
        breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
        runs = [run for run in np.split(np.asarray(blocks), breaks) if len(run)]
        if self.fraction is None and self._chosen is None and len(runs) == 1 and front == 0:
            first, last = self._file_range(runs[0])
            return self.source.read(first, last), np.arange(first, last, dtype=np.int64)
        data = np.empty((total, self.source.n_features), self.source.dtype)
        rows = np.empty(total, np.int64)
        row_bytes = self.source.n_features * self.source.dtype.itemsize
        step = max(1, _READ_BYTES // (row_bytes * BLOCK))
        done = front
        for run in runs:
            for i in range(0, len(run), step):
                part = run[i : i + step]
                first, last = self._file_range(part)
                chosen = np.concatenate([self.rows_of_block(int(b)) for b in part])
                end = done + len(chosen)
                if len(chosen):
                    np.take(self.source.read(first, last), chosen - first, axis=0, out=data[done:end])
                rows[done:end] = chosen
                done = end
        return data, rows

    def load_rows(self, blocks: Rows, offsets: Rows, data: NDArray[Any], rows: Rows) -> None:
        """Row offsets[i] of block blocks[i], ascending -> data[i], its file row rows[i]; neighbours read together."""
        row_bytes = self.source.n_features * self.source.dtype.itemsize
        step = max(1, _READ_BYTES // (row_bytes * BLOCK))
        at = 0
        while at < len(blocks):
            # blocks b, b + 1, ... as long as each is wanted
            first = int(blocks[at])
            inside = np.searchsorted(blocks, np.arange(first, first + step + 1))
            gap = np.flatnonzero(np.diff(inside) == 0)
            count = int(gap[0]) if len(gap) else step
            end = int(inside[count])
            run = np.arange(first, first + count)
            start, stop = self._file_range(run)
            chosen = [self.rows_of_block(int(block))[offsets[inside[i] : inside[i + 1]]] for i, block in enumerate(run)]
            rows[at:end] = np.concatenate(chosen)
            np.take(self.source.read(start, stop), rows[at:end] - start, axis=0, out=data[at:end], mode="clip")
            at = end

    def _file_range(self, run: Rows) -> tuple[int, int]:
        return self.start + int(run[0]) * BLOCK, min(self.start + (int(run[-1]) + 1) * BLOCK, self.stop)


def held_by_weight(weight: NDArray[np.float64], fraction: Fraction) -> int:
    """How many of the first rows of weight : (n,) come nearest to a fraction of its sum."""
    if not fraction:
        return 0
    sums = np.cumsum(weight)
    # A row is taken if its middle lies within the share. Sums of scaled weights differ by rounding, and ties must not.
    share = float(fraction) * float(sums[-1]) * (1 + 1e-9)
    return int(np.searchsorted(sums - weight / 2, share, side="right"))


def as_fraction(fraction: float | Fraction) -> Fraction:
    """0 <= fraction < 1 as the ratio that was meant: 1 / 6 is a sixth, not the nearest double. Else ValueError."""
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction of held-out rows must be at least 0 and below 1, got {fraction}")
    return min(Fraction(fraction).limit_denominator(1_000_000), Fraction(999_999, 1_000_000))


@dataclass(frozen=True)
class Window:
    """Some consecutive batches: batch i is entries [i * batch_size, (i + 1) * batch_size) of index and rows.

    data : (m, d) of the source's dtype; index : positions in data; rows : file rows. Both int64, -1 marks padding.
    """

    data: NDArray[Any]
    index: Rows
    rows: Rows
    n_batches: int


class EpochReader:
    """Shuffled batches, every row at most once an epoch; the rows beyond the last full batch are dropped.

    The order of an epoch: blocks sorted by their keys (seed, epoch), their rows cut into windows of ``window`` rows,
    each window's rows sorted by their keys. A split of at most ``window`` rows is read once and kept: the same data
    array is handed out every time. A larger one is read anew each epoch, at most about two windows in memory.

    Raises DataError if there is not one full batch.
    """

    n_buffers = 1  # arrays in which windows' data come, again and again, where they are not resident

    def __init__(self, split: Split, batch_size: int, seed: int, window: int = SHUFFLE_WINDOW) -> None:
        _check_batch_size(batch_size)
        if window < batch_size:
            raise ValueError(f"the shuffle window ({window} rows) must hold a batch ({batch_size} rows)")
        if len(split) < batch_size:
            problem = f"{len(split)} rows to train on, fewer than one batch of {batch_size}"
            raise DataError(about_file(split.source.name, problem, f"use a batch size of at most {max(1, len(split))}"))
        self.split, self.batch_size, self.seed, self.window = split, batch_size, seed, window

    @property
    def rows_of_batch(self) -> int:
        """Entries of a window's index for each batch."""
        return self.batch_size

    @property
    def n_batches(self) -> int:
        """Batches in an epoch."""
        return len(self.split) // self.batch_size

    @property
    def resident(self) -> bool:
        """True if the data stay in memory."""
        return len(self.split) <= self.window

    def epoch(self, epoch: int, skip_batches: int = 0) -> Iterator[Window]:
        """The windows of an epoch (0 <= epoch < 2^31), from batch ``skip_batches`` on."""
        if not 0 <= epoch < _WINDOW_EPOCH:
            raise ValueError(f"the epoch must be in 0..2^31 - 1, got {epoch}")
        if not 0 <= skip_batches <= self.n_batches:
            raise ValueError(f"cannot skip {skip_batches} of {self.n_batches} batches")
        return self._windows(epoch, skip_batches)

    def _windows(self, epoch: int, skip_batches: int) -> Iterator[Window]:
        split, size = self.split, self.batch_size
        stop = self.n_batches * size  # positions in the epoch's order
        begin = skip_batches * size
        order, ends = self.sequence(epoch)
        kept = np.empty((0, split.source.n_features), split.source.dtype)  # rows left over from the window before
        kept_rows = np.empty(0, np.int64)
        for first in range(begin // self.window * self.window if begin < stop else stop, stop, self.window):
            last = min(first + self.window, len(split))
            shuffled = self._shuffled(epoch, first, last)[max(0, begin - first) :]
            front = len(kept_rows)
            data, rows, place = self._read(order, ends, first, last, front)
            index = np.concatenate([np.arange(front), place[shuffled - first]])
            if front:
                data[:front], rows[:front] = kept, kept_rows
            count = len(index) // size
            if count:
                chosen = index[: count * size]
                yield Window(data, chosen, rows[chosen], count)
            left = index[count * size :]
            if last < len(split):
                kept, kept_rows = data[left], rows[left]

    def sequence(self, epoch: int) -> tuple[Rows, Rows]:
        """The split's blocks in the epoch's order, and the positions in that order where they end."""
        split = self.split
        keys = random_keys(self.seed, Purpose.SHUFFLE, epoch, np.arange(split.n_blocks))
        order = np.argsort(keys, kind="stable")
        return order, np.cumsum(split.bounds[order + 1] - split.bounds[order])

    def _shuffled(self, epoch: int, first: int, last: int) -> Rows:
        positions = np.arange(first, last, dtype=np.int64)
        keys = random_keys(self.seed, Purpose.SHUFFLE, epoch + _WINDOW_EPOCH, positions)
        return positions[np.argsort(keys, kind="stable")]

    def _read(self, order: Rows, ends: Rows, first: int, last: int, front: int) -> tuple[NDArray[Any], Rows, Rows]:
        """Positions first..last-1 of the block sequence -> data, its file rows, and where in data each position is.

        ``front`` rows are left free at the beginning of data.
        """
        split = self.split
        low, high = (int(i) for i in np.searchsorted(ends, [first, last - 1], side="right"))
        blocks = order[low : high + 1]
        if self.resident:
            data, rows = split.load()
            offsets = split.bounds[blocks]
        else:
            ascending = np.sort(blocks)
            data, rows = split.load_blocks(ascending, front)
            lengths = split.bounds[ascending + 1] - split.bounds[ascending]
            offsets = front + (np.cumsum(lengths) - lengths)[np.searchsorted(ascending, blocks)]
        lengths = split.bounds[blocks + 1] - split.bounds[blocks]
        starts = ends[low : high + 1] - lengths
        place = np.repeat(offsets - starts, lengths) + np.arange(int(starts[0]), int(ends[high]))
        return data, rows, place[first - int(starts[0]) : last - int(starts[0])]


class SequentialReader:
    """Batches in file order; the last one is padded with index = rows = -1.

    A split of at most ``window`` rows is read once: every iteration hands out the same Window object. A larger one is
    read anew in every iteration, window by window. share = (i, n): the i-th of n parts of the batches, from row
    ``begin`` of the split.
    """

    def __init__(self, split: Split, batch_size: int, window: int = 2**16, share: tuple[int, int] = (0, 1)) -> None:
        _check_batch_size(batch_size)
        self.split, self.batch_size, self.window = split, batch_size, window
        self._whole: Window | None = None
        edges = [self.n_batches * (share[0] + i) // share[1] * batch_size for i in (0, 1)]
        self.begin, self._end = (min(edge, len(split)) for edge in edges)

    @property
    def n_batches(self) -> int:
        return -(-len(self.split) // self.batch_size)

    @property
    def resident(self) -> bool:
        """True if the share stays in memory."""
        return self._end - self.begin <= self.window

    def __iter__(self) -> Iterator[Window]:
        n = self._end - self.begin
        if n <= self.window:
            if n and self._whole is None:
                if n == len(self.split):
                    data, rows = self.split.load()
                    self._whole = self._pad(data, np.arange(n, dtype=np.int64), rows)
                else:
                    self._whole = self._read(self.begin, self._end)
            if self._whole is not None:
                yield self._whole
            return
        step = max(1, self.window // self.batch_size) * self.batch_size
        for first in range(self.begin, self._end, step):
            yield self._read(first, min(first + step, self._end))

    def _read(self, first: int, last: int) -> Window:
        """Rows first to last - 1 of the split."""
        bounds = self.split.bounds
        low, high = (int(i) for i in np.searchsorted(bounds[1:], [first, last - 1], side="right"))
        data, rows = self.split.load_blocks(np.arange(low, high + 1))
        index = np.arange(first, last, dtype=np.int64) - bounds[low]
        return self._pad(data, index, rows[index])

    def _pad(self, data: NDArray[Any], index: Rows, rows: Rows) -> Window:
        count = -(-len(index) // self.batch_size)
        padding = np.full(count * self.batch_size - len(index), -1, np.int64)
        return Window(data, np.concatenate([index, padding]), np.concatenate([rows, padding]), count)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
