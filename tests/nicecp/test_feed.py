"""Rows on their way to the device: streamed in blocks they give the bits of resident ones, whatever the block is."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nicecp.feed import Fed, Feed
from nicecp.flow import NICE
from nicecp.kernels import get_backend
from nicecp.kernels.backend import Backend, Purpose, Slot
from nicecp.preprocessing import Dequantize
from nicecp.sources import ArraySource
from nicecp.split import EpochReader, Split
from nicecp.stream import StreamReader
from nicecp.train import TrainConfig, Trainer
from tests import gates
from tests.emulated import build
from tests.kernels.stand_in import stand_in

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

D, BATCH = 3, 8
ROW = D + 8  # bytes: the row and its number
DATA = np.random.default_rng(1).integers(0, 256, (101, D), np.uint8)
SPEC = gates.make_spec(D, [(4,), (4,), ()], "logistic", "float64")


@pytest.fixture(scope="module")
def device() -> Backend:
    return stand_in()


def reader(window: int = 2**18) -> EpochReader:
    return EpochReader(Split.contiguous(ArraySource(DATA), 0, 101, Purpose.TRAIN_NOISE), BATCH, 5, window)


def trained(backend: Backend, limit: int | None, window: int = 2**18, epochs: int = 3) -> Trainer:
    flow = NICE.from_spec(SPEC, None, (Dequantize(),), seed=3, init="he", backend=backend)
    split = Split.contiguous(ArraySource(DATA), 0, 101, Purpose.TRAIN_NOISE)
    config = TrainConfig(epochs=epochs, batch_size=BATCH, seed=5, window=window, device_memory_limit=limit)
    trainer = Trainer(flow, split, None, config)
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    ("limit", "window", "streams"),
    [
        (None, 2**18, False),
        (101 * (D + 16), 2**18, False),
        (101 * (D + 16) - 1, 2**18, True),
        (2 * BATCH * ROW, 2**18, True),  # one batch in a block
        (2 * 5 * BATCH * ROW, 2**18, True),  # 5 + 5 + 2 batches
        (None, 40, True),  # windows: whatever the reader does not keep streams
        (2 * 3 * BATCH * ROW, 40, True),
    ],
)
def test_a_limit_changes_no_bit(device: Any, limit: int | None, window: int, streams: bool) -> None:
    feed = Feed(device, reader(window), limit)
    assert feed.streams == streams
    if streams and limit is not None:
        held = sum(slot.data.nbytes + slot.rows.nbytes for slot in feed._slots)
        assert held <= limit
    results = [trained(device, limit, window), trained(get_backend("cpu", 1), None, window)]
    numbers = [trainer.backend.copy_out(trainer.p) for trainer in results]
    gates.assert_near(numbers[0], numbers[1], 1e-12, "parameters")
    resident = trained(device, None, window)
    assert np.array_equal(numbers[0], device.copy_out(resident.p)), "the bits of another block size"
    states = [trainer.backend.copy_out(trainer.state) for trainer in (results[0], resident)]
    assert states[0][Slot.LOG_PROB_SUM] == states[1][Slot.LOG_PROB_SUM]


def test_a_step_is_recorded_once_for_each_slot(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    right = type(device).record
    monkeypatch.setattr(type(device), "record", lambda self, step: recorded.append(step) or right(self, step))
    trained(device, 2 * BATCH * ROW)
    assert len(recorded) == 2
    trained(device, None)
    assert len(recorded) == 3


def test_a_block_is_copied_beside_the_one_before(device: Any) -> None:
    """The copy of the next block is launched before the steps of this one, and behind those that read its slot."""
    feed = Feed(device, reader(), 2 * 4 * BATCH * ROW)
    calls = device.driver.cupy.calls
    blocks, copies = 0, []
    for fed in feed.epoch(1):
        blocks += 1
        copies.append(calls.count(("memcpy 1", "copy")))
        device.assign(fed.rows, fed.rows)  # in place of steps
        del fed
    assert blocks == 3
    first = copies[0]
    assert [count - first for count in copies] == [0, 2, 2], "blocks 1 and 2 are there at once, then 3, then no more"


def test_an_epoch_that_is_left_early_leaves_nothing_behind(device: Any) -> None:
    feed = Feed(device, reader(), 2 * BATCH * ROW)
    epoch = feed.epoch(1)
    assert isinstance(next(epoch), Fed)
    epoch.close()  # type: ignore[attr-defined]
    counts = [fed.n_batches for fed in feed.epoch(1, skip_batches=7)]
    assert counts == [1] * 5


def test_memory_is_given_back_after_the_copies_into_it(device: Any) -> None:
    """On both sides: the next block is on its way when the epoch is left."""
    feed = Feed(device, reader(), 2 * BATCH * ROW)
    epoch = feed.epoch(1)
    next(epoch)
    calls = device.driver.cupy.calls
    assert calls[-4:].count(("record", "copy")) > 0, "a copy was launched last"
    start = len(calls)
    epoch.close()
    assert ("wait", "main", "copy") in calls[start:]
    assert ("event.synchronize", "copy") in calls[start:]
    del feed
    device.copy_out(device.alloc(3, np.float64))  # a Race, if what was given back were still being written


def own_of(entries: NDArray[Any], own: range) -> NDArray[Any]:
    """Of entries of whole batches those of a rank's rows."""
    batches = entries.reshape(-1, BATCH, *entries.shape[1:])[:, own.start : own.stop]
    return batches.reshape(-1, *entries.shape[1:])


@pytest.mark.parametrize("window", [40, 2**18])
@pytest.mark.parametrize("own", [range(BATCH), range(3, 6)], ids=["all", "own"])
def test_rows_that_arrive_are_those_of_the_reader(device: Any, own: range, window: int) -> None:
    split, host = reader().split, reader(window)
    stream = StreamReader(split, BATCH, 5, window, own)
    feed, n_batches = Feed(device, stream, 2 * 2 * len(own) * ROW), 0
    assert feed.streams
    expected = np.concatenate([part.data[part.index] for part in host.epoch(2)])
    expected_rows = np.concatenate([part.rows for part in host.epoch(2)])
    data, rows = [], []
    for fed in feed.epoch(2):
        count = fed.n_batches * len(own)
        n_batches += fed.n_batches
        data.append(device.copy_out(fed.data[:count]))
        rows.append(device.copy_out(fed.rows[:count]))
    stream.close()
    assert n_batches == host.n_batches
    assert np.array_equal(np.concatenate(data), own_of(expected, own))
    assert np.array_equal(np.concatenate(rows), own_of(expected_rows, own))


def test_a_cpu_reads_the_reader_s_two_buffers_where_they_are() -> None:
    stream = StreamReader(reader().split, BATCH, 5, 40)
    feed, seen = Feed(get_backend("cpu", 1), stream), []
    for epoch in (1, 2):
        for fed in feed.epoch(epoch):
            assert any(fed.data is buffer for buffer, _ in stream._buffers), "not a copy"
            seen.append((fed.slot, fed.fresh))
    stream.close()
    assert [slot for slot, _ in seen] == [0, 1, 0, 1, 0, 1]
    assert [fresh for _, fresh in seen] == [True, True, False, False, False, False]


def test_a_step_that_fails_leaves_no_thread_behind(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    monkeypatch.setattr(Trainer, "_next_batch", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(device, 2 * BATCH * ROW, 40)
    assert threading.active_count() == before


def test_a_limit_below_two_batches_is_refused(device: Any) -> None:
    with pytest.raises(ValueError, match=f"must hold two batches, {2 * BATCH * ROW} bytes, got {2 * BATCH * ROW - 1}"):
        Feed(device, reader(), 2 * BATCH * ROW - 1)
    assert not Feed(get_backend("cpu", 1), reader(), 1).streams, "a CPU's data are in its memory anyway"
