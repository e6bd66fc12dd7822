"""The rows of an epoch as arrays on the device: resident, in the reader's own buffers, or streamed in blocks.

On a CPU the device's memory is the host's: steps read the reader's windows where they are, and a StreamReader's thread
fills one buffer while they compute on the other. On a GPU blocks are streamed: they go through two page-locked
buffers on the host and two on the device: while the device computes on one, the next one is copied beside it, and a
thread gathers the one after that. A block holds its rows in the order in which they are presented, so neither the
shuffling nor any result depends on how large it is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.kernels.backend import Array, Backend
from nicecp.kernels.device_arrays import Upload
from nicecp.split import EpochReader, Window

BLOCK_BYTES = 2**28  # of a streamed block, where no limit is given


@dataclass(frozen=True)
class Fed:
    """Some consecutive batches, as load_batch takes them. ``slot`` : which arrays these are; a step that was recorded
    for a slot does for all that follow in it, until one is ``fresh``."""

    data: Array
    index: Array
    rows: Array
    n_batches: int
    slot: int
    fresh: bool


def streamed_batches(
    device: str, rows: int, batch_rows: int, n_batches: int, row_bytes: int, in_memory: bool, limit: int | None
) -> int:
    """Batches in a block of ``rows`` rows that stream to a device; 0 where they are all in its memory.

    in_memory : whether the host has them all. limit : as of Feed. ValueError where it does not hold two batches.
    """
    if device == "cpu" or (in_memory and (limit is None or rows * (row_bytes + 16) <= limit)):  # with index and rows
        return 0
    batch_bytes = batch_rows * (row_bytes + 8)
    block_bytes = BLOCK_BYTES if limit is None else limit // 2
    if block_bytes < batch_bytes:
        raise ValueError(f"device_memory_limit must hold two batches, {2 * batch_bytes:,} bytes, got {limit:,}")
    return min(block_bytes // batch_bytes, n_batches)


class Feed:
    """Feeds a trainer. limit : bytes of the device's memory that data may take; None for as many as it has.

    On a GPU data stream where they are more than the limit, or more than the reader keeps in memory. ValueError where
    the limit does not hold two batches.
    """

    def __init__(self, backend: Backend, reader: EpochReader, limit: int | None = None) -> None:
        self._backend, self._reader = backend, reader
        split = reader.split
        size, row_bytes = reader.rows_of_batch, split.source.n_features * split.source.dtype.itemsize
        self._block = streamed_batches(
            backend.device, len(split), size, reader.n_batches, row_bytes, reader.resident, limit
        )
        self.streams = self._block > 0
        if self.streams:
            self._slots = [_Slot(backend, reader, self._block) for _ in range(2)]
            self._order = backend.asarray(np.arange(self._block * size))
            return
        # Steps read these two arrays at every window, so that a recorded step stays valid.
        capacity = (min(len(split), reader.window + reader.batch_size) // reader.batch_size) * size
        self._index, self._rows = backend.alloc(capacity, np.int64), backend.alloc(capacity, np.int64)
        self._places: list[tuple[NDArray[Any], Array]] = []  # of windows' data, on the host and on the device

    def epoch(self, epoch: int, skip_batches: int = 0) -> Generator[Fed, None, None]:
        """The batches of an epoch from ``skip_batches`` on. What was fed is used up when the next one is asked for.

        An epoch that is left early must be closed before its reader is: a thread may be waiting for rows.
        """
        windows = self._reader.epoch(epoch, skip_batches)
        return self._streamed(windows) if self.streams else self._in_place(windows)

    # --- in place -----------------------------------------------------------------------------------------------------

    def _in_place(self, windows: Iterator[Window]) -> Generator[Fed, None, None]:
        backend = self._backend
        for window in windows:
            count = len(window.index)
            backend.copy_in(self._index[:count], window.index)
            backend.copy_in(self._rows[:count], window.rows)
            slot, fresh = self._place(window.data)
            yield Fed(self._places[slot][1], self._index, self._rows, window.n_batches, slot, fresh)

    def _place(self, data: NDArray[Any]) -> tuple[int, bool]:
        """-> the slot of a window's data, and whether steps have not seen them there.

        Only a CPU has windows that are not resident here, and there an array on the device is the host's own: what a
        reader puts into one of its buffers is in that slot already.
        """
        for slot, (host, _) in enumerate(self._places):
            if host is data:
                return slot, False
        if len(self._places) == self._reader.n_buffers:  # no buffers: each window has an array of its own
            del self._places[0]  # first, for two windows at a time may be more than there is memory
        self._places.append((data, self._backend.asarray(data)))
        return len(self._places) - 1, True

    # --- streaming ----------------------------------------------------------------------------------------------------

    def _streamed(self, windows: Iterator[Window]) -> Generator[Fed, None, None]:
        try:
            yield from self._blocks(self._pieces(windows))
        finally:
            # Of an epoch that was left early a copy may be on its way still, and its memory, on both sides, given back.
            for slot in self._slots:
                slot.finish()

    def _blocks(self, pieces: Iterator[tuple[Window, int, int]]) -> Generator[Fed, None, None]:
        with ThreadPoolExecutor(1) as worker:

            def gather(number: int) -> Callable[[], int]:
                return worker.submit(self._slots[number % 2].gather, pieces).result

            count = gather(0)()
            if count:
                self._slots[0].upload()
            number, coming = 0, gather(1)
            while count:
                following = coming()
                if following:
                    # Behind the steps on the block before, which had this slot, and beside those on the block now.
                    self._slots[(number + 1) % 2].upload()
                    coming = gather(number + 2)
                slot = self._slots[number % 2]
                slot.ready()
                yield Fed(slot.data, self._order, slot.rows, count, number % 2, False)
                count, number = following, number + 1

    def _pieces(self, windows: Iterator[Window]) -> Iterator[tuple[Window, int, int]]:
        """Windows cut into blocks: rows start..stop-1 of their order."""
        size = self._reader.rows_of_batch
        for window in windows:
            for first in range(0, window.n_batches, self._block):
                yield window, first * size, min(first + self._block, window.n_batches) * size


class _Slot:
    """A buffer of so many batches on the device, and the host's that it is filled from."""

    def __init__(self, backend: Backend, reader: EpochReader, batches: int) -> None:
        rows, source = batches * reader.rows_of_batch, reader.split.source
        shape = rows, source.n_features
        self._backend, self._batch_size = backend, reader.rows_of_batch
        self.data, self.rows = backend.alloc(shape, source.dtype), backend.alloc(rows, np.int64)
        self._host_data, self._host_rows = backend.pinned(shape, source.dtype), backend.pinned(rows, np.int64)
        self._count = 0  # rows
        self._uploads: list[Upload] = []

    def gather(self, pieces: Iterator[tuple[Window, int, int]]) -> int:
        """Take the next piece into the host's buffer -> its number of batches, 0 at the end."""
        piece = next(pieces, None)
        if piece is None:
            return 0
        for upload in self._uploads:
            upload.done()
        window, start, stop = piece
        self._count = stop - start
        np.take(window.data, window.index[start:stop], axis=0, out=self._host_data[: self._count], mode="clip")
        self._host_rows[: self._count] = window.rows[start:stop]
        return self._count // self._batch_size

    def upload(self) -> None:
        count = self._count
        self._uploads = [
            self._backend.upload(self.data[:count], self._host_data[:count]),
            self._backend.upload(self.rows[:count], self._host_rows[:count]),
        ]

    def ready(self) -> None:
        for upload in self._uploads:
            upload.ready()

    def finish(self) -> None:
        """Nothing is copied from or into the slot any more."""
        self.ready()
        for upload in self._uploads:
            upload.done()
        self._uploads = []
