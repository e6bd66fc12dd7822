"""Laws of the splits and readers: which rows, in which order, and how much memory and reading that takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nicecp.errors import DataError
from nicecp.kernels.backend import Purpose
from nicecp.sources import ArraySource
from nicecp.split import BLOCK, EpochReader, SequentialReader, Split, Window

TRAIN = Purpose.TRAIN_NOISE


class NumberedSource(ArraySource):
    """Row r is (r, r + 0.5); counts what is read."""

    def __init__(self, n: int, dtype: Any = np.float64) -> None:
        rows = np.arange(n)
        super().__init__(np.stack([rows, rows + 0.5], axis=1).astype(dtype))
        self.rows_read = 0
        self.largest_read = 0
        self.calls = 0

    def read(self, start: int, stop: int) -> NDArray[Any]:
        self.rows_read += stop - start
        self.largest_read = max(self.largest_read, stop - start)
        self.calls += 1
        return super().read(start, stop).copy()


def splits_of(source: ArraySource, kind: str) -> Split:
    if kind == "keyed":
        return Split.keyed(source, 1 / 6, seed=5, member=False, purpose=TRAIN)
    return Split.contiguous(source, 100, source.n_rows - 50, TRAIN)


def sequence(windows: Iterator[Window], batch_size: int) -> NDArray[np.int64]:
    """The file rows in the order in which batches present them, after checking that data, index and rows agree."""
    parts = [np.empty(0, np.int64)]
    for window in windows:
        assert len(window.index) == len(window.rows) == window.n_batches * batch_size > 0
        assert window.index.dtype == window.rows.dtype == np.int64
        np.testing.assert_array_equal(window.data[window.index, 0], window.rows)
        parts.append(window.rows.copy())
    return np.concatenate(parts)


# --- splits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 6, 1023, 1024, 1025, 6144, 10_000])
@pytest.mark.parametrize("fraction", [1 / 6, 0.1, 0.5, 1 / 3])
def test_keyed_split_is_disjoint_complete_and_exact(n: int, fraction: float) -> None:
    source = NumberedSource(n)
    valid = Split.keyed(source, fraction, 3, True, Purpose.VALID_NOISE)
    train = Split.keyed(source, fraction, 3, False, TRAIN)
    held = [valid.rows_of_block(b) for b in range(valid.n_blocks)]
    kept = [train.rows_of_block(b) for b in range(train.n_blocks)]
    assert len(valid) == sum(map(len, held)) == int(round(n * fraction * 30) // 30)
    assert len(train) == sum(map(len, kept)) == n - len(valid)
    np.testing.assert_array_equal(np.sort(np.concatenate(held + kept)), np.arange(n))
    for b, rows in enumerate(held):
        assert np.all(np.diff(rows) > 0)
        assert np.all(rows // BLOCK == b)
        assert abs(len(rows) - min(BLOCK, n - b * BLOCK) * fraction) < 1


def test_keyed_split_depends_on_the_seed_only() -> None:
    def held(seed: int, dtype: Any = np.float64) -> NDArray[np.int64]:
        return Split.keyed(NumberedSource(3000, dtype), 1 / 6, seed, True, TRAIN).load()[1]

    np.testing.assert_array_equal(held(1), held(1, np.float32))
    assert len(np.intersect1d(held(1), held(2))) == pytest.approx(500 / 6, abs=30)
    assert held(1).mean() == pytest.approx(1500, abs=130)  # 500 of 0..2999: standard error 35


def test_a_sixth_is_a_sixth_and_not_the_nearest_double() -> None:
    # 6 million times the double next to 1/6 is below a million
    assert len(Split.keyed(_huge(6_000_000), 1 / 6, 0, True, TRAIN)) == 1_000_000


def _huge(n: int) -> ArraySource:
    return ArraySource(np.lib.stride_tricks.as_strided(np.zeros(2, np.uint8), (n, 2), (0, 1)))


def test_contiguous_split_and_its_description() -> None:
    split = Split.contiguous(NumberedSource(5000), 1000, 4000, TRAIN)
    data, rows = split.load()
    np.testing.assert_array_equal(rows, np.arange(1000, 4000))
    np.testing.assert_array_equal(data[:, 0], rows)
    np.testing.assert_array_equal(split.rows_of_block(2), np.arange(1000 + 2 * BLOCK, 4000))
    assert split.describe() == {
        "source": "array", "rows": 3000, "block": 1024, "rule": "range", "start": 1000, "stop": 4000
    }  # fmt: skip
    keyed = Split.keyed(NumberedSource(600), 1 / 6, 9, True, TRAIN).describe()
    assert (keyed["rule"], keyed["fraction"], keyed["seed"], keyed["rows"]) == ("keyed", "1/6", 9, 100)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_bad_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        Split.keyed(NumberedSource(10), fraction, 0, True, TRAIN)


# --- shuffled epochs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["keyed", "contiguous"])
@pytest.mark.parametrize("window", [2**18, 5000, 2048, 1000, 64])
@pytest.mark.parametrize("batch_size", [64, 37])
def test_every_row_once_per_epoch_up_to_the_tail(kind: str, window: int, batch_size: int) -> None:
    split = splits_of(NumberedSource(7000), kind)
    reader = EpochReader(split, batch_size, seed=11, window=window)
    rows = sequence(reader.epoch(1), batch_size)
    assert len(rows) == reader.n_batches * batch_size == len(split) // batch_size * batch_size
    assert len(np.unique(rows)) == len(rows)
    assert np.isin(rows, split.load()[1]).all()
    again = sequence(reader.epoch(1), batch_size)
    np.testing.assert_array_equal(again, rows)
    other = sequence(reader.epoch(2), batch_size)
    assert (other != rows).mean() > 0.9
    assert (sequence(EpochReader(split, batch_size, 12, window).epoch(1), batch_size) != rows).mean() > 0.9


@given(
    n=st.integers(1, 4000), window=st.integers(20, 5000), batch_size=st.integers(1, 700), epoch=st.integers(0, 5)
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_order_does_not_depend_on_batches_and_resuming_gives_the_tail(
    n: int, window: int, batch_size: int, epoch: int
) -> None:
    split = Split.keyed(NumberedSource(n), 1 / 7, 1, False, TRAIN)
    batch_size = min(batch_size, window, len(split))
    reader = EpochReader(split, batch_size, 2, window)
    rows = sequence(reader.epoch(epoch), batch_size)
    singles = sequence(EpochReader(split, 1, 2, window).epoch(epoch), 1)
    np.testing.assert_array_equal(rows, singles[: len(rows)])
    for skip in {0, 1, reader.n_batches // 2, reader.n_batches - 1, reader.n_batches}:
        np.testing.assert_array_equal(sequence(reader.epoch(epoch, skip), batch_size), rows[skip * batch_size :])


def test_resident_and_streamed_splits_of_one_window_agree() -> None:
    array = np.arange(8000.0).reshape(4000, 2)
    split = Split.contiguous(ArraySource(array), 0, 4000, TRAIN)
    whole = list(EpochReader(split, 100, 0, window=4000).epoch(3))
    streamed = list(EpochReader(split, 100, 0, window=3999).epoch(3))
    assert len(whole) == 1
    assert len(streamed) == 2
    # the first window's rows come from the same blocks, in an order of the same keys
    assert len(np.intersect1d(whole[0].rows[:3000], streamed[0].rows)) > 2900


def test_resident_data_are_one_array_for_ever_and_not_a_copy() -> None:
    array = np.arange(6000.0).reshape(3000, 2)
    split = Split.contiguous(ArraySource(array), 0, 2500, TRAIN)
    reader = EpochReader(split, 100, 0)
    assert reader.resident
    first, second = (next(iter(reader.epoch(e))).data for e in (1, 2))
    assert first is second
    assert np.shares_memory(first, array)
    assert next(iter(SequentialReader(split, 100))).data is first


def test_shuffling_mixes_within_and_across_blocks() -> None:
    split = Split.contiguous(NumberedSource(64 * BLOCK), 0, 64 * BLOCK, TRAIN)
    rows = sequence(EpochReader(split, 256, 0).epoch(1), 256)
    batch_means = rows.reshape(-1, 256).mean(axis=1) / (64 * BLOCK)
    assert np.abs(batch_means - 0.5).max() < 5 * np.sqrt(1 / 12 / 256)
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.02
    # streamed through small windows, it is the blocks that are far apart
    streamed = sequence(EpochReader(split, 256, 0, window=4 * BLOCK).epoch(1), 256)
    assert len(np.unique(streamed[: 4 * BLOCK] // BLOCK)) == 4
    assert np.ptp(streamed[: 4 * BLOCK]) > 16 * BLOCK


def test_streaming_reads_whole_blocks_once_and_keeps_about_two_windows() -> None:
    n, window = 200 * BLOCK, 16 * BLOCK
    source = NumberedSource(n)
    reader = EpochReader(Split.contiguous(source, 0, n, TRAIN), 200, 0, window)
    row_bytes = 16 + 8 + 8  # data, file row, and index
    tracemalloc.start()
    for _ in reader.epoch(1):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.rows_read == n  # windows of whole blocks: nothing twice
    assert source.calls <= n // BLOCK
    # Philox works on 4 words of 8 bytes a row, several at a time; none of it grows with n = 12.5 windows
    assert peak < window * (2 * row_bytes + 250) < n * row_bytes


def test_skipping_reads_only_what_follows() -> None:
    n, window = 32 * BLOCK, 4 * BLOCK
    source = NumberedSource(n)
    reader = EpochReader(Split.contiguous(source, 0, n, TRAIN), 64, 0, window)
    list(reader.epoch(1, skip_batches=reader.n_batches * 3 // 4))
    assert source.rows_read == n // 4


def test_bad_readers_are_refused() -> None:
    split = Split.contiguous(NumberedSource(100), 0, 100, TRAIN)
    with pytest.raises(DataError, match="100 rows to train on, fewer than one batch of 101"):
        EpochReader(split, 101, 0)
    with pytest.raises(ValueError, match="window"):
        EpochReader(split, 50, 0, window=49)
    with pytest.raises(ValueError, match="at least 1"):
        EpochReader(split, 0, 0)
    with pytest.raises(ValueError, match="skip"):
        EpochReader(split, 50, 0).epoch(1, 3)
    with pytest.raises(ValueError, match="epoch"):
        EpochReader(split, 50, 0).epoch(2**31)


# --- sequential -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["keyed", "contiguous"])
@pytest.mark.parametrize(("batch_size", "window"), [(100, 2**16), (100, 1000), (333, 1000), (7, 10), (2000, 100)])
def test_sequential_reader_is_in_file_order_with_a_padded_end(kind: str, batch_size: int, window: int) -> None:
    split = splits_of(NumberedSource(5000), kind)
    reader = SequentialReader(split, batch_size, window)
    windows = list(reader)
    index = np.concatenate([w.index for w in windows])
    rows = np.concatenate([w.rows for w in windows])
    assert len(rows) == reader.n_batches * batch_size == -(-len(split) // batch_size) * batch_size
    assert sum(w.n_batches for w in windows) == reader.n_batches
    np.testing.assert_array_equal(rows[: len(split)], split.load()[1])
    assert (rows[len(split) :] == -1).all()
    assert (index[len(split) :] == -1).all()
    assert (index[: len(split)] >= 0).all()
    for w in windows:
        real = w.index >= 0
        np.testing.assert_array_equal(w.data[w.index[real], 0], w.rows[real])
    resident = len(split) <= window
    assert all((a is b) == resident for a, b in zip(windows, reader, strict=True))


def test_sequential_reader_of_no_rows() -> None:
    reader = SequentialReader(Split.contiguous(NumberedSource(10), 3, 3, TRAIN), 4)
    assert reader.n_batches == 0
    assert list(reader) == []
