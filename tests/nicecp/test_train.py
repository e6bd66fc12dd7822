"""Training: steps are the paper's arithmetic, the best model is kept, nothing is allocated on the way."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nicecp import train as train_module
from nicecp.errors import TrainingError
from nicecp.evaluate import Evaluation, Evaluator
from nicecp.flow import NICE
from nicecp.kernels.backend import Backend, Purpose, Slot
from nicecp.kernels.philox import random_words
from nicecp.optimizers import AdaM, RMSProp
from nicecp.preprocessing import Dequantize, Step
from nicecp.records import EpochRecord
from nicecp.sources import ArraySource
from nicecp.split import BLOCK, EpochReader, Split
from nicecp.train import Callback, TrainConfig, Trainer
from tests import gates, oracle
from tests.mutants import Mutant

BYTES = np.random.default_rng(3).integers(0, 256, (120, 5), np.uint8)
TABLE = np.random.default_rng(4).normal(size=(200, 4))
BY_LAYER, WHOLE = 0, 2**60  # values of UPDATE_BY_LAYER


def split_of(data: Any, start: int = 0, stop: int | None = None) -> Split:
    return Split.contiguous(ArraySource(data), start, len(data) if stop is None else stop, Purpose.TRAIN_NOISE)


def make_trainer(
    data: Any = TABLE,
    valid: Any = None,
    callbacks: Sequence[Callback | Callable[[EpochRecord], object]] = (),
    backend: Any = None,
    dtype: str = "float64",
    preprocessing: tuple[Step, ...] = (),
    train: Split | None = None,
    prior: str = "logistic",
    **config: Any,
) -> Trainer:
    spec = gates.make_spec(data.shape[1], [(6, 5), (4,), ()], prior, dtype)
    flow = NICE.from_spec(spec, gates.draw_parameters(spec), preprocessing, backend=backend)
    settings = {"batch_size": 32, "seed": 2**63 + 11} | config
    held = None if valid is None else split_of(valid)
    return Trainer(flow, train or split_of(data), held, TrainConfig(**settings), callbacks)


# --- one step is the paper's ----------------------------------------------------------------------------------------


def dequantized(step: Dequantize, data: np.ndarray, rows: np.ndarray, seed: int, purpose: int, epoch: int) -> Any:
    """data : (n, d) bytes, rows : their numbers in the file -> (n, d) float64, noise of 16 bits, eight to a block."""
    words = [random_words(seed, purpose, epoch, rows, block) for block in range((data.shape[1] + 7) // 8)]
    joined = np.concatenate(words, axis=1)
    bits = np.stack([joined & 0xFFFF, joined >> 16], axis=-1).reshape(len(rows), -1)[:, : data.shape[1]]
    return step.low + (step.high - step.low) * (65536 * data.astype(float) + bits) / 2**24


def expected_steps(trainer: Trainer, data: np.ndarray, start: int, optimizer: AdaM) -> dict[str, np.ndarray]:
    """The parameters after one epoch, all in NumPy's float64."""
    p = gates.host_parameters(trainer.flow)
    m, v = ({name: np.zeros(value.shape) for name, value in p.items()} for _ in range(2))
    config, spec = trainer.config, trainer.flow.spec
    (window,) = EpochReader(split_of(data, start), config.batch_size, config.seed).epoch(1)
    step = trainer.flow.preprocessing[0]
    assert isinstance(step, Dequantize)
    b1, b2, rate = optimizer.momentum, 1 - optimizer.beta2, optimizer.rate
    for t, rows in enumerate(window.rows.reshape(-1, config.batch_size), 1):
        x = dequantized(step, data[rows], rows, config.seed, Purpose.TRAIN_NOISE, 1)
        gradients, _ = oracle.gradients(spec, p, x)
        b1_t = b1 * optimizer.lam ** (t - 1)
        for name, g in gradients.items():
            m[name] = b1_t * m[name] + (1 - b1_t) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            m_hat, v_hat = m[name] / (1 - b1**t), v[name] / (1 - b2**t)
            p[name] = p[name] - rate * m_hat / (np.sqrt(v_hat) + optimizer.epsilon)
        rate /= optimizer.rate_decay
    assert t == 3
    return p


@pytest.mark.parametrize("by_layer", [BY_LAYER, WHOLE])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 2e-3)])
def test_three_steps_are_the_oracles(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float, by_layer: int
) -> None:
    monkeypatch.setattr(train_module, "UPDATE_BY_LAYER", by_layer)
    adam, start = AdaM(rate=0.01, lam=0.9, rate_decay=1.1, epsilon=1e-2), 20
    trainer = make_trainer(
        BYTES, train=split_of(BYTES, start), dtype=dtype, preprocessing=(Dequantize(-2, 3),), optimizer=adam,
        backend=backend,
    )  # fmt: skip
    before = gates.host_parameters(trainer.flow)
    expected = expected_steps(trainer, BYTES, start, adam)
    for _ in range(3):
        trainer.step()
    for name, value in gates.host_parameters(trainer.flow).items():
        gates.assert_near(value - before[name], expected[name] - before[name], tolerance, name)


@pytest.mark.parametrize("optimizer", [AdaM(), RMSProp()])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_updates_by_layer_are_the_update_of_the_whole(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, dtype: str, optimizer: AdaM | RMSProp
) -> None:
    states = []
    for by_layer in (BY_LAYER, WHOLE):
        monkeypatch.setattr(train_module, "UPDATE_BY_LAYER", by_layer)
        trainer = make_trainer(dtype=dtype, optimizer=optimizer, epochs=2, backend=backend)
        trainer.run()
        states.append(trainer.resume_state())
    for kind in ("parameters", "first_moment", "second_moment"):
        one, other = (getattr(state, kind) for state in states)
        for name, value in one.items():
            assert np.any(value), f"{kind} of {name} never changed"
            np.testing.assert_array_equal(value, other[name])


def test_rows_are_shuffled_by_the_documented_keys() -> None:
    """Blocks by the keys of (seed, epoch), each window's rows by those of (seed, epoch + 2^31): what resuming needs."""
    rows, batch, seed, epoch, window = 3 * BLOCK + 10, 100, 7, 5, 2000
    words = oracle.words(seed, Purpose.SHUFFLE, epoch, np.arange(4), 1)[:, 0]
    order = np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable")
    sequence = np.concatenate([np.arange(b * BLOCK, min((b + 1) * BLOCK, rows)) for b in order])
    expected = []
    for first in range(0, rows, window):
        part = np.arange(first, min(first + window, rows))
        words = oracle.words(seed, Purpose.SHUFFLE, epoch + 2**31, part, 1)[:, 0]
        keys = (words[:, 0] << np.uint64(32)) | words[:, 1]
        expected.append(sequence[part[np.argsort(keys, kind="stable")]])
    data = np.arange(2.0 * rows).reshape(rows, 2)
    got = np.concatenate([w.rows for w in EpochReader(split_of(data), batch, seed, window).epoch(epoch)])
    np.testing.assert_array_equal(got, np.concatenate(expected)[: rows // batch * batch])


# --- which model is kept --------------------------------------------------------------------------------------------


class Kept(Callback):
    """The parameters after every epoch."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, np.ndarray]] = {}

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        self.after[record.epoch] = trainer.network.layout.to_host(trainer.backend, trainer.p)


def scripted(monkeypatch: pytest.MonkeyPatch, series: Sequence[float], patience: int | None) -> tuple[Trainer, Kept]:
    """A finished run whose validations gave these values."""

    def run(self: Evaluator, views: Any, seed: int, epoch: int) -> Evaluation:
        return Evaluation(1, series[epoch - 1], 0.0, 0.0, None)

    monkeypatch.setattr(Evaluator, "run", run)
    kept = Kept()
    trainer = make_trainer(valid=TABLE[:10], callbacks=[kept], epochs=len(series), patience=patience)
    trainer.run()
    return trainer, kept


NAN = float("nan")


@pytest.mark.parametrize(
    ("series", "patience", "best", "epochs"),
    [
        ((1, 0, 2, 0, 1.5, 9), 2, 3, 5),  # an improvement starts the count anew
        ((1, 0, 2, 0, 3, 0, 0), 2, 5, 7),
        ((1, 2, 3, 2.5), 1, 3, 4),
        ((5, 4, 3, 2), None, 1, 4),
        ((1, 1, 1, 9), 2, 1, 3),  # as good as before is not better
        ((NAN, -5, -6, -4), None, 4, 4),  # a first validation that is not a number is beaten by every number
        ((NAN, -5, -6, -7, -1), 2, 2, 4),
        ((-3, NAN, -4), None, 1, 3),
        ((-3, NAN, NAN, -1), 2, 1, 3),
        ((NAN, -np.inf, -1), None, 3, 3),
    ],
)
def test_the_best_validation_wins_and_patience_counts_from_it(
    monkeypatch: pytest.MonkeyPatch, series: tuple[float, ...], patience: int | None, best: int, epochs: int
) -> None:
    trainer, kept = scripted(monkeypatch, series, patience)
    assert trainer.record.epoch == len(trainer.record.history) == epochs
    assert trainer.record.best_epoch == best
    assert trainer.record.best_valid_log_likelihood == series[best - 1]
    for name, value in trainer.flow.parameters().items():
        np.testing.assert_array_equal(value, kept.after[best][name])
    assert not np.array_equal(kept.after[1]["scaling/log_scale"], kept.after[2]["scaling/log_scale"])


def test_validation_and_training_are_reported_in_the_space_of_the_data() -> None:
    step = gates.standardize(4)
    trainer = make_trainer(TABLE * 3, valid=TABLE, preprocessing=step, epochs=1, optimizer=AdaM(rate=1e-12))
    expected = trainer.flow.log_prob(TABLE).mean()
    (window,) = trainer.reader.epoch(1)
    batches = trainer.flow.log_prob(TABLE[window.rows] * 3).mean()
    (row,) = trainer.run().history
    assert row.valid_log_likelihood == pytest.approx(expected, rel=1e-9)
    assert row.train_log_likelihood == pytest.approx(batches, rel=1e-9)


# --- stopping -------------------------------------------------------------------------------------------------------


class StopAt(Callback):
    """Every step takes ten seconds of the clock; after ``step`` of them the run is asked to stop."""

    def __init__(self, clock: SimpleNamespace, step: int) -> None:
        self.clock, self.left = clock, step

    def on_step(self, trainer: Trainer) -> None:
        self.clock.now += 10.0
        self.left -= 1
        if self.left == 0:
            trainer.request_stop()


def test_an_interrupted_epoch_keeps_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(train_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    trainer = make_trainer(epochs=3, callbacks=[StopAt(clock, 8)])  # six steps an epoch: stops after two of the second
    trainer.run()
    assert (trainer.record.epoch, trainer.position, trainer.stopped, trainer.finished) == (1, 2, True, False)
    assert trainer.resume_state().epoch_seconds == 20.0

    clock.now += 5000.0  # between the two calls nobody trains
    other = make_trainer(epochs=3, callbacks=[StopAt(clock, -1)])
    other.restore(trainer.record, trainer.resume_state())
    other.run()
    assert [row.seconds for row in other.record.history] == [60.0, 60.0, 60.0]
    assert not other.stopped
    trainer = make_trainer(epochs=3, callbacks=[StopAt(clock, 8)])
    for _ in range(2):  # and the same without the detour over a file
        trainer.run()
        clock.now += 5000.0
    assert [row.seconds for row in trainer.record.history] == [60.0, 60.0, 60.0]


def test_steps_without_a_finite_loss_are_skipped_and_noted(caplog: pytest.LogCaptureFixture) -> None:
    data = TABLE.copy()
    data[17] = 1e200  # its square overflows
    trainer = make_trainer(data, epochs=2, batch_size=50, prior="gaussian")
    trainer.run()
    assert [(event.epoch, event.step, event.kind) for event in trainer.record.events] == [
        (1, 3, "skipped"),
        (2, 6, "skipped"),
    ]
    assert {event.message for event in trainer.record.events} == {
        "1 step had a loss or gradients that are not finite and was skipped"
    }
    assert all(np.isfinite(value).all() for value in trainer.flow.parameters().values())
    assert all(np.isfinite(row.train_log_likelihood) for row in trainer.record.history)
    assert "skipped" in caplog.text

    with pytest.raises(TrainingError, match=r"not finite in 2 steps in a row, after going back.* 5 times.*--lr"):
        make_trainer(np.full((64, 4), 1e200), prior="gaussian").run()


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [("seed", -1), ("seed", 2**64), ("epochs", 0), ("batch_size", 0), ("window", 0), ("patience", 0)],
)
def test_settings_out_of_range(setting: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be.*got {value}"):
        TrainConfig(**{setting: value})  # type: ignore[arg-type]


def test_settings_at_the_edge_of_their_range() -> None:
    assert [TrainConfig(seed=seed).seed for seed in (0, 2**64 - 1)] == [0, 2**64 - 1]
    trainer = make_trainer(seed=2**64 - 1, epochs=1, patience=1)
    assert np.isfinite(trainer.run().history[0].train_log_likelihood)


# --- what a step costs ----------------------------------------------------------------------------------------------


@pytest.fixture
def tracing() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["uint8", pytest.param("float64", marks=pytest.mark.slow)])
def test_steps_allocate_nothing_that_grows(tracing: None, kind: str) -> None:
    n, d = 2000, 64  # a batch is a megabyte
    data = np.random.default_rng(0).integers(0, 256, (44 * n, d)).astype(kind)
    steps = (Dequantize(),) if kind == "uint8" else ()
    flow = NICE(d, (32, 32), 3, dtype="float64", threads=1, preprocessing=steps)
    trainer = Trainer(flow, split_of(data), None, TrainConfig(batch_size=n))
    for _ in range(20):  # Python and Numba fill small caches of their own
        trainer.step()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(20):
        trainer.step()
    after, peak = tracemalloc.get_traced_memory()
    assert trainer.backend.copy_out(trainer.state)[Slot.STEP] == 40  # all in one window
    assert after - before < 2**10
    assert peak - before < 2**16


class Spy:
    """What training asks of its backend: arrays that load_batch read, by the number of the recording that runs.

    Recorded steps are carried out call by call, so that each one is seen.
    """

    def __init__(self, backend: Backend) -> None:
        self.records, self.running, self.loads = 0, 0, []  # type: ignore[var-annotated]
        self.backend = Mutant(backend, record=self.record, load_batch=self.load_batch)

    def record(self, original: Any, step: Callable[[], None]) -> Any:
        self.records += 1
        number = self.records

        def run() -> None:
            self.running = number
            step()

        return run

    def load_batch(
        self, original: Any, x0: Any, x1: Any, weight: Any, data: Any, index: Any, rows: Any, *rest: Any
    ) -> None:
        self.loads.append((self.running, x0, weight, data, index, rows, rest[3]))  # alive, so no address comes twice
        original(x0, x1, weight, data, index, rows, *rest)

    def addresses(self, since: int) -> set[tuple[int, ...]]:
        return {tuple(array.ctypes.data for array in load[1:]) for load in self.loads if load[0] == since}


def test_a_recorded_step_stays_valid(one_backend: Backend) -> None:
    """Data that stay in memory: one recording for all epochs, and every buffer of a step keeps its address."""
    spy = Spy(one_backend)
    trainer = make_trainer(epochs=3, backend=spy.backend)
    trainer.run()
    assert len(spy.loads) == 18
    assert spy.records == 1
    assert len(spy.addresses(1)) == 1


def test_a_step_is_recorded_once_for_each_of_two_buffers(one_backend: Backend) -> None:
    """Data that do not stay in memory."""
    spy = Spy(one_backend)
    trainer = make_trainer(epochs=2, window=70, backend=spy.backend)  # of 200 rows
    trainer.run()
    assert len(spy.loads) == 12
    assert spy.records == 2
    for number in (1, 2):
        assert len(spy.addresses(number)) == 1
    assert len({load[3].ctypes.data for load in spy.loads}) == 2
    assert len({load[4].ctypes.data for load in spy.loads}) == len({load[5].ctypes.data for load in spy.loads}) == 1
