"""Runs: signals, outputs that cannot be written, progress."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nicecp import run as run_module
from nicecp.checkpoint import load, load_run, load_state, save_run, state_path
from nicecp.errors import OutputError
from nicecp.records import EpochRecord
from nicecp.run import Run
from nicecp.train import Callback, Trainer
from tests.nicecp.runs import SMALL, TABLE_STEPS, StopAt, go_on, model_bytes, train, write_table


@pytest.fixture
def table(tmp_path: Path) -> str:
    return write_table(tmp_path / "table.h5")


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_finish_the_step_and_save(table: str, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run.h5"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    outcome = train(table, out, [StopAt(5, lambda trainer: os.kill(os.getpid(), number))])
    assert (outcome.finished, outcome.stopped_by) == (False, number)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    state = load_state(state_path(out))[2]
    assert int(state.state[0]) == 5  # steps
    assert go_on(out).finished


def test_a_signal_during_the_last_validation_changes_nothing(table: str, tmp_path: Path) -> None:
    class AtTheEnd(Callback):
        def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
            if record.epoch == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    outcome = train(table, tmp_path / "run.h5", [AtTheEnd()])
    assert outcome.finished
    assert outcome.stopped_by is None
    assert outcome.test is not None


def interrupt_while_saving(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """So many SIGINTs before every file is put in place."""
    replace = os.replace

    def interrupted(*args: Any) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        replace(*args)

    monkeypatch.setattr(os, "replace", interrupted)


def test_more_interrupts_do_not_lose_what_is_being_saved(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, out = tmp_path / "whole.h5", tmp_path / "run.h5"
    train(table, whole)
    interrupt_while_saving(monkeypatch, 2)
    with caplog.at_level(logging.WARNING, "nicecp"):
        outcome = train(table, out, [StopAt(5, lambda trainer: os.kill(os.getpid(), signal.SIGINT))])
    monkeypatch.undo()
    assert (outcome.finished, outcome.stopped_by) == (False, signal.SIGINT)
    assert [record.message.partition(" (")[0] for record in caplog.records] == ["saving; please wait"]
    assert int(load_state(state_path(out))[2].state[0]) == 5
    assert go_on(out).finished
    assert model_bytes(out) == model_bytes(whole)


def test_the_first_signal_is_the_one_that_is_reported(table: str, tmp_path: Path) -> None:
    def both(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGHUP)

    assert train(table, tmp_path / "run.h5", [StopAt(2, both)]).stopped_by == signal.SIGTERM


def test_a_late_third_interrupt_gives_up_and_files_stay_whole(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run.h5"
    train(table, out, [StopAt(3, Trainer.request_stop)])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    interrupt_while_saving(monkeypatch, 2)
    monkeypatch.setattr("nicecp.signals.PATIENCE", 0.0)
    with Run.resume(out) as run, pytest.raises(KeyboardInterrupt):
        run.execute([StopAt(2, lambda trainer: os.kill(os.getpid(), signal.SIGINT))])
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert go_on(out).finished


def test_ignored_signals_stay_ignored(table: str, tmp_path: Path) -> None:
    """nohup"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        outcome = train(table, tmp_path / "run.h5", [StopAt(3, lambda trainer: os.kill(os.getpid(), signal.SIGHUP))])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert outcome.finished


def test_another_thread_may_train(table: str, tmp_path: Path) -> None:
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(train(table, tmp_path / "run.h5", epochs=1)))
    thread.start()
    thread.join(60)
    assert outcomes[0].finished


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_a_failed_checkpoint_on_the_way_is_a_warning(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fails_once(path: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise OutputError(f"{path!r}: no space; free some space")
        save_run(path, *args, **kwargs)

    monkeypatch.setattr(run_module, "save_run", fails_once)
    out = tmp_path / "run.h5"
    with caplog.at_level(logging.WARNING, "nicecp"):
        outcome = train(table, out, epochs=1, checkpoint_every=1e-9)
    assert outcome.finished
    assert "no space" in caplog.text
    kinds = [event.kind for event in load_run(out)[1].events]  # type: ignore[union-attr]
    assert [kind for kind in kinds if kind != "transform"] == ["not saved"]


def test_a_failure_at_the_end_is_an_error(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Any, *args: Any, **kwargs: Any) -> None:
        raise OutputError("no space")

    monkeypatch.setattr(run_module, "save_run", fails)
    with pytest.raises(OutputError, match="no space"):
        train(table, tmp_path / "run.h5", epochs=1)


def test_existing_outputs(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    out.write_text("precious")
    with pytest.raises(OutputError, match=r"run\.h5.*already exists.*--overwrite"):
        Run.start("no-such-data.h5", out)  # before the data are looked at
    assert out.read_text() == "precious"
    train(table, out, epochs=1, overwrite=True)
    assert load(out).n_features == 5
    out.unlink()
    with pytest.raises(OutputError, match=r"run\.state\.h5.*already exists"):
        train(table, out)


@pytest.mark.parametrize("name", ["", "no/such/run.h5", "folder", "table.h5", "link.h5"])
def test_outputs_that_will_not_do(table: str, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.h5").symlink_to("table.h5")
    before = Path(table).read_bytes()
    for spec in ("table.h5", "table.h5:/train"):
        with pytest.raises(OutputError):
            Run.start(spec, name, overwrite=True, **SMALL)
    assert Path(table).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_too_large_a_model_is_refused_at_once(table: str, tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match="parameters needs"):
        Run.start(table, tmp_path / "run.h5", **{**SMALL, "hidden": (10**6,) * 9})


def test_progress(table: str, tmp_path: Path) -> None:
    seen = []
    with Run.start(table, tmp_path / "run.h5", **{**SMALL, "epochs": 2}) as run:
        run.execute([StopAt(TABLE_STEPS + 3, lambda trainer: seen.append(run.progress()))])
        first = run.trainer.record.history[0]
    (progress,) = seen
    assert (progress.epoch, progress.epochs) == (2, 2)
    assert progress.fraction == pytest.approx((TABLE_STEPS + 3) / (2 * TABLE_STEPS))
    assert progress.valid_log_likelihood == first.valid_log_likelihood
    assert progress.train_log_likelihood == pytest.approx(first.train_log_likelihood, abs=3.0)
    assert progress.rows_per_second > 0
    left = (TABLE_STEPS - 3) * 32 / progress.rows_per_second
    assert progress.seconds_left == pytest.approx(left, rel=1e-9)


def test_patience_without_validation_is_noticed(table: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nicecp"), Run.start(table, None, valid_fraction=0.0, patience=3, **SMALL):
        pass
    assert "patience has no effect" in caplog.text


def test_resuming_with_other_threads_is_noted(table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "run.h5"
    train(table, out, [StopAt(3, Trainer.request_stop)])
    with caplog.at_level(logging.WARNING, "nicecp"):
        go_on(out, threads=2)
    assert [r.message for r in caplog.records] == [
        "resumed with threads 1 -> 2: the result may differ in its last bits"
    ]
    record = load_run(out)[1]
    assert record is not None
    noted = [(event.epoch, event.step, event.kind) for event in record.events if event.kind != "transform"]
    assert noted == [(0, 3, "resumed")]
    assert record.threads == 2
    caplog.clear()
    with caplog.at_level(logging.WARNING, "nicecp"):
        go_on(out)
    assert caplog.records == []
