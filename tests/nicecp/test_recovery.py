"""Bad numbers while training: going back, giving up, bounds, and the same after a resume."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import fit
from nicecp.checkpoint import load, load_run, load_state, state_path
from nicecp.columns import check_representable, near_discrete
from nicecp.data import open_splits
from nicecp.errors import DataError, TrainingError
from nicecp.flow import NICE
from nicecp.kernels.backend import Purpose, Slot
from nicecp.presented import uniform_noise
from nicecp.recovery import IN_A_ROW, LOWER, TIMES, WENT_BACK, log_scale_bound
from nicecp.run import Run
from nicecp.train import Callback, Trainer
from tests.nicecp import runs
from tests.nicecp.runs import StopAt, go_on, model_bytes, write_table

# Columns as they are and a constant rate: what a rate becomes is seen most easily.
SMALL = {**runs.SMALL, "preset": "tabular", "transform": "none"}


def train(data: str, out: Path, callbacks: list[Callback] | None = None, **given: Any) -> Any:
    return runs.train(data, out, callbacks, **{**SMALL, **given})


@pytest.fixture
def table(tmp_path: Path) -> str:
    return write_table(tmp_path / "table.h5", rows=3000)


class Poison(Callback):
    """Makes a parameter NaN after these steps (1 is the first)."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.done = steps, 0

    def on_step(self, trainer: Trainer) -> None:
        self.done += 1
        if self.done in self.steps:
            trainer.p[0] = np.nan


def events(record: Any) -> list[tuple[int, str]]:
    return [(event.epoch, event.kind) for event in record.events]


def test_many_bad_steps_go_back_to_the_best_model_with_a_lower_rate(
    table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    n_batches = 2500 // 32
    seen: dict[int, Any] = {}

    class Watch(Callback):
        def on_step(self, trainer: Trainer) -> None:
            seen[len(seen) + 1] = (trainer.p.copy(), trainer.m.copy(), trainer.best.copy())

    with caplog.at_level(logging.WARNING, "nicecp"):
        outcome = train(table, tmp_path / "run.h5", [Poison(n_batches + 5), Watch()])
    # Bad from step 6 of epoch 2; whole groups of IN_A_ROW steps are looked at, so it is noticed after the second.
    back = n_batches + 2 * IN_A_ROW
    assert np.isnan(seen[back - 1][0]).any()
    p, m, best = seen[back]
    np.testing.assert_array_equal(p, best)
    assert not m.any()
    assert np.isfinite(seen[back + 1][0]).all()
    assert (seen[back + 1][0] != p).any()  # it trains again
    record = outcome.record
    assert events(record) == [(2, WENT_BACK), (2, "skipped")]
    message = record.events[0].message
    assert f"in {2 * IN_A_ROW - 5} steps in a row: went back to the model of epoch 1" in message
    assert "epoch 2: the loss was not finite" in caplog.text
    rates = [row.learning_rate for row in record.history]
    assert rates[1:] == pytest.approx([LOWER * rates[0]] * 2)
    assert outcome.finished
    assert all(np.isfinite(array).all() for array in load(tmp_path / "run.h5").parameters().values())
    assert events(load_run(tmp_path / "run.h5")[1]) == events(record)


def test_few_bad_steps_are_only_skipped(table: str, tmp_path: Path) -> None:
    class Mend(Callback):
        done = 0

        def on_step(self, trainer: Trainer) -> None:
            self.done += 1
            if self.done == 10:
                self.p = trainer.p.copy()
                trainer.p[0] = np.nan
            if self.done == 10 + IN_A_ROW - 1:
                trainer.p[...] = self.p

    record = train(table, tmp_path / "run.h5", [Mend()], epochs=1).record
    assert events(record) == [(1, "skipped")]
    assert record.events[0].message.startswith(f"{IN_A_ROW - 1} steps")


def test_after_some_times_it_gives_up_and_keeps_the_best(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"

    class Always(Callback):
        def on_step(self, trainer: Trainer) -> None:
            if trainer.record.epoch:
                trainer.p[0] = np.nan

    with Run.start(table, out, **{**SMALL, "epochs": 50}) as run:
        with pytest.raises(TrainingError, match=rf"after going back .* {TIMES} times; lower .*run\.h5'") as caught:
            run.execute([Always()])
        best = run.trainer.best.copy()
    assert "\n" not in str(caught.value)
    flow, record = load_run(out)
    assert record is not None
    assert (record.epoch >= 1, record.best_epoch) == (True, 1)
    assert [kind for _, kind in events(record)].count(WENT_BACK) == TIMES
    named = flow.parameters()
    assert all(np.isfinite(array).all() for array in named.values())
    np.testing.assert_array_equal(named["scaling/log_scale"][0::2], run.trainer.network.layout.views(best).scaling[0])
    state = load_state(state_path(out))[2]
    assert state.state[Slot.RATE] == pytest.approx(2e-3 * LOWER**TIMES)


def test_bad_parameters_at_the_end_of_an_epoch_are_neither_best_nor_saved(table: str, tmp_path: Path) -> None:
    """Without validation, where every epoch's model would be the best."""
    n_batches = 3000 // 32
    outcome = train(table, tmp_path / "run.h5", [Poison(2 * n_batches - 1)], valid_fraction=0.0, epochs=4)
    assert (2, WENT_BACK) in events(outcome.record)
    assert outcome.finished
    assert all(np.isfinite(array).all() for array in load(tmp_path / "run.h5").parameters().values())


@pytest.mark.parametrize("stop", [70, 80, 100, 130])
def test_going_back_is_the_same_after_a_resume(table: str, tmp_path: Path, stop: int) -> None:
    """Interrupted before, among and after the bad steps: they come of rows, which a resumed run meets again."""

    class Bad(Callback):
        """The rows of steps 76 to 140 have no finite loss: their noise is none, so the numbers themselves are bad."""

        def on_step(self, trainer: Trainer) -> None:
            step = trainer.record.epoch * trainer.reader.n_batches + trainer.position
            trainer.train_split.load()[0][:] = np.where(76 <= step <= 140, 1e300, clean)

    with open_splits(table, seed=4) as splits:
        clean = splits.train.load()[0].copy()
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    train(table, whole, [Bad()], prior="gaussian")
    train(table, parts, [Bad(), StopAt(stop, Trainer.request_stop)], prior="gaussian")
    saved = load_state(state_path(parts))[2]
    with Run.resume(parts) as run:
        assert run.trainer.resume_state().bad_steps == saved.bad_steps  # saved again before its first step
        bad = Bad()
        bad.on_step(run.trainer)  # its first step is a bad one as well
        assert run.execute([bad]).finished
    first, second = (load_run(path)[1] for path in (whole, parts))
    assert first is not None
    assert second is not None
    assert WENT_BACK in [kind for _, kind in events(first)]
    assert [(event.epoch, event.step, event.message) for event in first.events if event.kind == WENT_BACK] == [
        (event.epoch, event.step, event.message) for event in second.events if event.kind == WENT_BACK
    ]
    assert model_bytes(parts) == model_bytes(whole)


# --- the log-scale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bound", "partition", "column"), [("float32", 15.9, "odd-even", 3), ("float64", 36.0, "halves", 4)]
)
def test_a_log_scale_at_its_bound_is_held_and_named(
    table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, bound: float, partition: str, column: int
) -> None:
    assert log_scale_bound(np.dtype(dtype)) == pytest.approx(bound, abs=0.1)

    class Push(Callback):
        def on_step(self, trainer: Trainer) -> None:
            trainer.views.scaling[1][1] = 1000.0
            trainer.views.scaling[0][0] = -1000.0

    with caplog.at_level(logging.WARNING, "nicecp"):
        more = {"dtype": dtype, "partition": partition}
        outcome = train(table, tmp_path / "run.h5", [Push()], epochs=2, patience=None, **more)
    log_scale = load(tmp_path / "run.h5").parameters()["scaling/log_scale"]
    assert np.abs(log_scale).max() <= log_scale_bound(np.dtype(dtype)) * (1 + 1e-6)
    messages = [event.message for event in outcome.record.events if event.kind == "log-scale"]
    assert len(messages) == 1  # not once an epoch
    assert f"bound of {bound} nats in columns 0, {column}:" in messages[0]
    assert messages[0] in caplog.text


@pytest.mark.parametrize("given", [{"repartition": 1}, {"whiten": "gaussian"}, {"repartition": 2, "couplings": 5}])
def test_the_columns_that_are_named_are_those_of_the_saved_log_scale(
    table: str, tmp_path: Path, given: dict[str, Any]
) -> None:
    """Whatever parts the couplings end with; behind a whitening they are none of the data's columns."""

    class Push(Callback):
        def on_step(self, trainer: Trainer) -> None:
            trainer.views.scaling[1][0] = 1000.0

    outcome = train(table, tmp_path / "run.h5", [Push()], epochs=1, **given)
    log_scale = load(tmp_path / "run.h5").parameters()["scaling/log_scale"]
    (message,) = [event.message for event in outcome.record.events if event.kind == "log-scale"]
    what = "whitened columns" if "whiten" in given else "columns"
    assert f" nats in {what} {int(np.argmax(log_scale))}: they" in message


def test_a_constant_column_that_is_allowed_is_reported_in_the_end() -> None:
    x = np.random.default_rng(0).normal(size=(400, 3))
    x[:, 1] = 2.0
    flow = NICE(3, (4,), 3)
    record = fit(flow, x, epochs=60, batch_size=20, allow_constant=True, patience=None)
    assert any(event.kind == "columns" and ": 1;" in event.message for event in record.events)
    assert np.abs(flow.parameters()["scaling/log_scale"]).max() <= log_scale_bound(flow.dtype)


# --- columns ---------------------------------------------------------------------------------------------------------


def rows(n: int = 4000) -> Any:
    return np.random.default_rng(5).normal(size=(n, 4))


def discrete(x: Any) -> tuple[int, ...]:
    with open_splits(x, valid_fraction=0) as splits:
        return near_discrete(splits.train)


def test_columns_with_few_values_are_found() -> None:
    x = rows()
    assert discrete(x) == ()
    assert discrete(x.astype(np.float32)) == ()
    x[:, 1] = np.round(x[:, 1])  # whole numbers
    x[::10, 2] = 0.0  # a tenth of zeros
    x[:, 3] = np.round(x[:, 3], 2) + 7  # hundredths: about 600 values
    assert discrete(x) == (1, 2)
    x[:, 3] = np.round(x[:, 3], 1)
    assert discrete(x) == (1, 2, 3)
    assert discrete(x[:99]) == ()  # too few to tell
    assert discrete(np.zeros((400, 4), np.uint8)) == ()  # dequantized


def test_near_discrete_columns_are_named_in_a_warning_and_in_the_history(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = rows()
    x[:, 2] = np.sign(x[:, 2])
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["train"] = x
        file["train"].attrs["columns"] = ["a", "b", "charge", "d"]
    with caplog.at_level(logging.WARNING, "nicecp"):
        outcome = train(str(path), tmp_path / "run.h5", epochs=1)
    (event,) = outcome.record.events
    assert event.kind == "columns"
    assert "one value in many rows: 2 ('charge'); the likelihood of discrete values has no bound" in event.message
    assert event.message in caplog.text
    caplog.clear()
    go_on(tmp_path / "run.h5", epochs=2)
    assert caplog.text == ""  # said once


@pytest.mark.parametrize("role", ["train", "valid", "test"])
def test_numbers_too_large_for_the_working_precision_are_named(tmp_path: Path, role: str) -> None:
    x = rows()
    x[2999, 3] = -3.5e38  # finite in float64 alone
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        for name in ("train", "valid", "test"):
            file[name] = x if name == role else rows()
    with pytest.raises(DataError, match=rf"/{role}': row 2999, column 3 is -3\.5e\+38, too large for float32; rescale"):
        train(str(path), tmp_path / "run.h5", dtype="float32", standardize=False)
    with open_splits(path) as splits:
        check_representable(splits, (), np.float64, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.h5"]


def test_noise_that_leaves_a_support_is_found_before_training_with_the_seed_of_the_run(tmp_path: Path) -> None:
    """A test row at 0.09, recorded in steps of 0.2, before a logarithm: one time in twenty its noise is too much."""
    x = np.round(1 + np.random.default_rng(0).exponential(size=(300, 2)), 1)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["train"], file["test"] = x, np.full((1, 2), 0.09)
    data, found = str(tmp_path / "x.h5"), []
    for seed in range(40):
        u = uniform_noise(seed, Purpose.TEST_NOISE, np.zeros(1, np.int64), np.arange(2))
        found.append(bool((0.09 + 0.2 * (u - 0.5) <= 0).any()))
        if found[-1]:
            with pytest.raises(DataError, match=r"test': row 0, column . is -?0\.0.*, outside the support"):
                Run.start(data, None, **{**SMALL, "transform": "*=recorded(0.2)+log", "seed": seed})
    assert not found[0]
    assert any(found)
