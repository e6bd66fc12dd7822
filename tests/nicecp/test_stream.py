"""Rows that do not fit into memory: the same batches as from memory, from two buffers and a thread."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp.errors import DataError
from nicecp.hdf5_data import HDF5Source
from nicecp.kernels.backend import Purpose
from nicecp.sources import ArraySource
from nicecp.split import BLOCK, EpochReader, Split
from nicecp.stream import Ahead, StreamReader, read_ahead

TRAIN = Purpose.TRAIN_NOISE
ROWS = 9 * BLOCK + 77
DATA = np.arange(3.0 * ROWS).reshape(ROWS, 3)


def splits() -> dict[str, Split]:
    source = ArraySource(DATA)
    return {
        "whole": Split.contiguous(source, 0, ROWS, TRAIN),
        "part": Split.contiguous(source, 100, ROWS - 3000, TRAIN),
        "keyed": Split.keyed(source, 1 / 3, 5, False, TRAIN),
        "held": Split.keyed(source, 1 / 3, 5, True, TRAIN),
    }


def batches(windows: Iterator[Any], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(data, file rows) of every batch, copied while its window holds."""
    found = []
    for window in windows:
        for i in range(window.n_batches):
            at = slice(i * size, (i + 1) * size)
            found.append((window.data[window.index[at]], window.rows[at].copy()))
    return found


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other) > 0
    for (data, rows), (its_data, its_rows) in zip(one, other, strict=True):
        np.testing.assert_array_equal(rows, its_rows)
        np.testing.assert_array_equal(data, its_data)
        np.testing.assert_array_equal(data, DATA[rows])


@pytest.mark.parametrize("kind", list(splits()))
@pytest.mark.parametrize(("batch", "window"), [(100, 1000), (100, 2500), (64, 64), (777, 800), (1, 1500), (300, 10**6)])
@pytest.mark.slow
def test_batches_are_those_of_the_reader_in_memory(kind: str, batch: int, window: int) -> None:
    """Over several epochs, and from the middle of one."""
    split = splits()[kind]
    plain, stream = EpochReader(split, batch, 3, window), StreamReader(split, batch, 3, window)
    for epoch in (1, 2, 3):
        assert_same(batches(stream.epoch(epoch), batch), batches(plain.epoch(epoch), batch))
    for skip in (1, plain.n_batches // 2, plain.n_batches - 1):
        assert_same(batches(stream.epoch(2, skip), batch), batches(plain.epoch(2, skip), batch))
    stream.close()


@pytest.mark.parametrize("window", [1000, 2500, 10**6])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_read_their_own_rows(ranks: int, window: int) -> None:
    split, batch = splits()["keyed"], 100
    whole = batches(EpochReader(split, batch, 3, window).epoch(4), batch)
    for rank in range(ranks):
        own = range(batch * rank // ranks, batch * (rank + 1) // ranks)
        stream = StreamReader(split, batch, 3, window, own)
        mine = batches(stream.epoch(4), len(own))
        assert_same(mine, [(data[own.start : own.stop], rows[own.start : own.stop]) for data, rows in whole])
        assert stream.resident or stream.capacity <= window / ranks + 4 * batch
        stream.close()


def test_one_window_after_another_and_epoch_after_epoch_by_one_thread() -> None:
    """As Trainer.step asks: one window at a time."""
    stream, found = StreamReader(splits()["whole"], 100, 3, 2500), []
    threads = set()
    for epoch in (1, 2):
        done = 0
        while done < stream.n_batches:
            window = next(stream.epoch(epoch, done))
            found += batches(iter([window]), 100)
            done += window.n_batches
            threads |= {t.ident for t in threading.enumerate() if t.name == "nicecp-reader"}
        assert list(stream.epoch(epoch, done)) == []
    stream.close()
    plain = EpochReader(splits()["whole"], 100, 3, 2500)
    assert_same(found, batches(plain.epoch(1), 100) + batches(plain.epoch(2), 100))
    assert len(threads) == 1
    assert not [t for t in threading.enumerate() if t.name == "nicecp-reader"]


def test_windows_stay_until_the_next_is_asked_for() -> None:
    """However slow the caller is, the thread does not write into what it holds."""
    stream, arrays = StreamReader(splits()["whole"], 100, 3, 2500), set()
    for window in stream.epoch(1):
        arrays.add(id(window.data))
        before = window.data[window.index].copy()
        time.sleep(0.02)
        np.testing.assert_array_equal(window.data[window.index], before)
    stream.close()
    assert len(arrays) == 2


def test_memory_is_two_windows(tmp_path: Path) -> None:
    """Whatever the file's size: of this process's arrays, by tracemalloc."""
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        for factor in (1, 8):
            file.create_dataset(f"rows{factor}", data=np.zeros((factor * 8 * BLOCK, 100), np.float32))
    peaks = []
    for factor in (1, 8):
        with HDF5Source(tmp_path / "rows.h5", f"rows{factor}") as source:
            stream = StreamReader(Split.contiguous(source, 0, source.n_rows, TRAIN), 100, 0, 2000)
            tracemalloc.start()
            for _ in stream.epoch(1):
                pass
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            stream.close()
    window = 2200 * 100 * 4
    pieces = 2 * 2**23  # what is read at once, and a copy of it
    assert 2 * window < peaks[0] < 3 * window + pieces
    assert peaks[1] < 1.1 * peaks[0]


def test_errors_of_the_thread_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DATA.copy()
    data[5 * BLOCK + 3, 1] = np.nan
    stream = StreamReader(Split.contiguous(ArraySource(data), 0, ROWS, TRAIN), 100, 3, 1000)
    for _ in range(2):
        with pytest.raises(DataError, match=f"row {5 * BLOCK + 3}, column 1"):
            batches(stream.epoch(1), 100)
    stream.close()


def test_an_epoch_that_somebody_else_reads_on() -> None:
    stream = StreamReader(splits()["whole"], 100, 3, 1000)
    first = stream.epoch(1)
    next(first)
    next(stream.epoch(2))
    with pytest.raises(RuntimeError, match="somebody else"):
        next(first)
    stream.close()


# --- the thread -------------------------------------------------------------------------------------------------------


def test_items_are_made_while_the_caller_is_busy() -> None:
    made, wanted = [], []

    def items() -> Iterator[int]:
        for i in range(4):
            made.append(i)
            yield i

    for item in read_ahead(items()):
        wanted.append(item)
        until = time.monotonic() + 10
        while len(made) < min(item + 2, 4) and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.01)
        assert made == list(range(min(item + 2, 4))), "the next one, and no more"
    assert wanted == [0, 1, 2, 3]


def test_leaving_early_ends_the_thread() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    reader = read_ahead(items())
    assert next(reader) == 0
    reader.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "nicecp-reader"]


def test_none_is_handed_on_and_not_waited_for() -> None:
    ahead: Ahead[int] = Ahead(iter([1, None, None, 2]))
    assert [ahead.take() for _ in range(4)] == [1, None, None, 2]
    for _ in range(2):
        with pytest.raises(StopIteration):
            ahead.take()
    ahead.close()
