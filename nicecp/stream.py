"""Rows of data that do not fit into memory: windows of them, read by a thread while the one before is computed on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nicecp.split import SHUFFLE_WINDOW, EpochReader, Rows, Split, Window

T = TypeVar("T")


class Ahead(Generic[T]):
    """An iterator's items, each made by a thread while the caller is busy with the one before it.

    An item is begun when the caller has taken the one before, so that it may use the place of the one before that;
    after None, which is handed out like any other, the next is begun at once.
    """

    def __init__(self, items: Iterator[T | None]) -> None:
        self._items, self._wanted, self._made = items, SimpleQueue[bool](), SimpleQueue[Any]()
        self._thread = threading.Thread(target=self._serve, name="nicecp-reader", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            for item in self._items:
                self._made.put((item, None))
                if item is not None and not self._wanted.get():
                    return
            self._made.put((None, StopIteration()))
        except BaseException as error:
            self._made.put((None, error))

    def take(self) -> T | None:
        """The next item, when it is there; what its making raised, StopIteration after the last one."""
        item, error = self._made.get()
        if error is not None:
            self._made.put((None, error))  # for whoever asks again
            raise error
        if item is not None:
            self._wanted.put(True)
        return item  # type: ignore[no-any-return]

    def close(self) -> None:
        """No more are wanted; returns when the thread has left the data alone."""
        self._wanted.put(False)
        self._thread.join()


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items of an iterator, each made while the caller is busy with the one before it."""
    ahead: Ahead[T] = Ahead(items)
    try:
        while True:
            try:
                item = ahead.take()
            except StopIteration:
                return
            assert item is not None
            yield item
    finally:
        ahead.close()


class StreamReader(EpochReader):
    """An EpochReader whose windows, where the split is not resident, come from two buffers filled by a thread.

    The same batches in the same order, and no more memory than the two buffers, however many rows there are. A window
    holds until the next one is asked for. own : which rows of every batch are wanted (all); a window's index and rows
    hold these alone, and of other rows only the few that are left over for the next window are kept.
    """

    n_buffers = 2

    def __init__(
        self, split: Split, batch_size: int, seed: int, window: int = SHUFFLE_WINDOW, own: range | None = None
    ) -> None:
        super().__init__(split, batch_size, seed, window)
        self._own = range(batch_size) if own is None else own
        self._buffers: list[tuple[NDArray[Any], Rows]] = []
        self._turn = 0
        self._stream: tuple[int, int, Ahead[Window]] | None = None  # (epoch, batches handed out, what comes next)

    @property
    def rows_of_batch(self) -> int:
        return len(self._own)

    @property
    def capacity(self) -> int:
        """Rows of a buffer: a window's, and those left over before and after it."""
        return (self.window // self.batch_size + 2) * len(self._own) + 2 * self.batch_size

    def epoch(self, epoch: int, skip_batches: int = 0) -> Iterator[Window]:
        checked = super().epoch(epoch, skip_batches)
        if self.resident:
            return (self._share(window) for window in checked)
        return self._streamed(epoch, skip_batches)

    def _share(self, window: Window) -> Window:
        """Of a window with all rows, the batches' own ones."""
        if len(self._own) == self.batch_size:
            return window
        return Window(window.data, self._part(window.index), self._part(window.rows), window.n_batches)

    def _part(self, entries: Rows) -> Rows:
        own = entries.reshape(-1, self.batch_size)[:, self._own.start : self._own.stop]
        return np.ascontiguousarray(own).reshape(-1)

    def close(self) -> None:
        """Stop the thread, if there is one; the next epoch starts another."""
        if self._stream is not None:
            self._stream[2].close()
            self._stream = None

    def _streamed(self, epoch: int, skip_batches: int) -> Iterator[Window]:
        if self._stream is None or self._stream[:2] != (epoch, skip_batches):
            self.close()
            self._stream = epoch, skip_batches, Ahead(self._endless(epoch, skip_batches))
        while True:
            at, done, ahead = self._stream
            window = ahead.take()
            if window is None:  # the thread goes on with the next epoch at once
                self._stream = at + 1, 0, ahead
                return
            self._stream = at, done + window.n_batches, ahead
            yield window
            if self._stream is None or self._stream[2] is not ahead:
                raise RuntimeError("this epoch's reader was closed, or is read by somebody else")

    def _endless(self, epoch: int, skip_batches: int) -> Iterator[Window | None]:
        while True:
            yield from self._windows_of(epoch, skip_batches)
            yield None
            epoch, skip_batches = epoch + 1, 0

    def _windows_of(self, epoch: int, skip_batches: int) -> Iterator[Window]:
        """As EpochReader._windows, of the rows that are wanted and into the buffers."""
        split, size = self.split, self.batch_size
        stop, begin = self.n_batches * size, skip_batches * size
        order, ends = self.sequence(epoch)
        kept, kept_rows = np.empty((0, split.source.n_features), split.source.dtype), np.empty(0, np.int64)
        for first in range(begin // self.window * self.window if begin < stop else stop, stop, self.window):
            last = min(first + self.window, len(split))
            shuffled = self._shuffled(epoch, first, last)[max(0, begin - first) :]
            # Entries below front are rows left over; entry front + i is position first + i of the epoch's order.
            front = len(kept_rows)
            entries = np.concatenate([np.arange(front), front + shuffled - first])
            count = len(entries) // size
            used, left = self._part(entries[: count * size]), entries[count * size :]
            if last == len(split):
                left = left[:0]
            data, rows = self._next_buffer()
            data[:front], rows[:front] = kept, kept_rows
            wanted = np.unique(np.concatenate([used, left]))
            wanted = wanted[wanted >= front]
            filled = self._fill(data, rows, front, order, ends, wanted - front + first)
            place = np.concatenate([np.arange(front), filled])
            known = np.concatenate([np.arange(front), wanted])
            if count:
                index = place[np.searchsorted(known, used)]
                yield Window(data, index, rows[index], count)
            after = place[np.searchsorted(known, left)]
            kept, kept_rows = data[after], rows[after]

    def _next_buffer(self) -> tuple[NDArray[Any], Rows]:
        if len(self._buffers) < 2:
            shape = self.capacity, self.split.source.n_features
            self._buffers.append((np.empty(shape, self.split.source.dtype), np.empty(self.capacity, np.int64)))
            self._turn = len(self._buffers) - 1
        else:
            self._turn = 1 - self._turn
        return self._buffers[self._turn]

    def _fill(self, data: NDArray[Any], rows: Rows, front: int, order: Rows, ends: Rows, positions: Rows) -> Rows:
        """positions : (k,) ascending, of the epoch's order -> where in data each is: from ``front``, in file order."""
        lengths = self.split.bounds[order + 1] - self.split.bounds[order]
        number = np.searchsorted(ends, positions, side="right")
        blocks, offsets = order[number], positions - (ends - lengths)[number]
        in_file = np.lexsort((offsets, blocks))
        self.split.load_rows(blocks[in_file], offsets[in_file], data[front:], rows[front:])
        place = np.empty(len(positions), np.int64)
        place[in_file] = front + np.arange(len(positions))
        return place
