"""Runs: their files, and resuming to the same bits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp.checkpoint import load, load_run, load_state, save_state, state_path
from nicecp.data import DataSpec
from nicecp.errors import CheckpointError, DataError
from nicecp.presets import Settings
from nicecp.run import Run
from nicecp.scoring import score
from nicecp.train import Trainer
from tests.nicecp.runs import SMALL, TABLE_STEPS, StopAt, go_on, model_bytes, train, write_images, write_table


@pytest.fixture
def table(tmp_path: Path) -> str:
    return write_table(tmp_path / "table.h5")


# --- what is written --------------------------------------------------------------------------------------------------


def test_files_of_a_run(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    outcome = train(table, out, epochs=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.h5", "run.state.h5", "table.h5"]
    flow, record = load_run(out)
    assert record is not None
    assert [row.epoch for row in record.history] == [1, 2, 3, 4]
    best = max(record.history, key=lambda row: row.valid_log_likelihood)
    assert (record.best_epoch, record.best_valid_log_likelihood) == (best.epoch, best.valid_log_likelihood)
    assert (record.epoch, record.seed, record.threads) == (4, 4, 1)
    assert set(record.versions) == {"nicecp", "python", "numpy", "numba", "h5py", "blas", "ranks"}
    assert all(record.versions.values())
    assert record.config["data"] == table
    settings = Settings.from_json(record.config["settings"])
    assert (settings.hidden, settings.epochs, settings.dtype) == ((6,), 4, "float64")
    assert record.config["rows"]["valid"]["rows"] == 100
    assert record.config["rows"]["train"]["fraction"] == "1/6"
    assert len(flow.info.fingerprint) == 64
    # The table's numbers, computed again by another way.
    with h5py.File(table) as file:
        log_prob = flow.log_prob(file["test"][()])
    assert outcome.test.mean == pytest.approx(log_prob.mean(), rel=1e-12)
    assert outcome.test.standard_error == pytest.approx(log_prob.std(ddof=1) / np.sqrt(50), rel=1e-12)
    assert outcome.valid.mean == pytest.approx(best.valid_log_likelihood, rel=1e-12)
    assert outcome.train.rows == 500
    assert 0 < outcome.round_trip < 1e-11
    assert outcome.finished


def test_the_best_model_is_kept_not_the_last(table: str, tmp_path: Path) -> None:
    """At this rate the last epoch is far from the best."""
    out = tmp_path / "run.h5"
    outcome = train(table, out, epochs=8, preset="tabular", numbers={"rate": 0.2})
    assert outcome.record.best_epoch < 8
    last, _, state = load_state(state_path(out))
    best = load(out)
    name = "scaling/log_scale"
    np.testing.assert_array_equal(best.parameters()[name], state.best_parameters[name])
    assert not np.array_equal(best.parameters()[name], last.parameters()[name])


def test_eight_bit_runs_record_their_kind(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    outcome = train(write_images(tmp_path / "images.h5"), out, epochs=1, value_range=(-1.0, 1.0))
    flow = load(out)
    assert (flow.info.image_shape, flow.dtype) == ((4, 3), np.float32)
    assert flow.preprocessing[0].attrs() == {"low": -1.0, "high": 1.0, "levels": 256}
    assert (outcome.train.rows, outcome.valid.rows, outcome.test) == (250, 50, None)
    assert outcome.valid.bits_per_dim is not None


def test_small_data_get_a_smaller_batch_unless_asked(tmp_path: Path) -> None:
    data = write_table(tmp_path / "t.h5", rows=60)
    given = {**SMALL, "batch_size": None}
    with Run.start(data, None, **given) as run:
        assert run.trainer.config.batch_size == 32
    with Run.start(data, None, **given, preset="tabular") as run:
        assert run.trainer.config.batch_size == 50
    with pytest.raises(DataError, match="fewer than one batch of 51"):
        Run.start(data, None, **{**SMALL, "batch_size": 51})


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7, TABLE_STEPS, TABLE_STEPS + 1, 2 * TABLE_STEPS + 3])
def test_resumed_is_uninterrupted(table: str, tmp_path: Path, step: int) -> None:
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    train(table, whole)
    outcome = train(table, parts, [StopAt(step, Trainer.request_stop)])
    assert not outcome.finished
    again = go_on(parts)
    assert again.finished
    assert model_bytes(parts) == model_bytes(whole)
    first, second = load_run(whole)[1], load_run(parts)[1]
    assert first is not None
    assert second is not None
    for one, other in zip(first.history, second.history, strict=True):
        assert one.train_log_likelihood == other.train_log_likelihood
        assert one.valid_log_likelihood == other.valid_log_likelihood


def test_resumed_is_uninterrupted_with_noise_momentum_and_decay(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images.h5")
    given: dict[str, Any] = {
        "optimizer": "rmsprop",
        "numbers": {"momentum_epoch": 1, "rate_decay": 1.01},
        "dtype": "float32",
        "epochs": 4,
    }
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    train(data, whole, **given)
    train(data, parts, [StopAt(4, Trainer.request_stop)], **given)
    go_on(parts, [StopAt(9, Trainer.request_stop)])
    assert go_on(parts).finished
    assert model_bytes(parts) == model_bytes(whole)


def test_a_checkpoint_made_on_the_way_is_enough(table: str, tmp_path: Path) -> None:
    """What a killed process leaves: the files of its last checkpoint, in the middle of an epoch."""
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    train(table, whole)
    folder = tmp_path / "killed"
    folder.mkdir()

    with Run.start(table, parts, **{**SMALL, "epochs": 3}) as run:

        def keep(trainer: Trainer) -> None:
            run.save()
            for path in (parts, Path(state_path(parts))):
                shutil.copy(path, folder / path.name)

        run.execute([StopAt(TABLE_STEPS + 5, keep)])
    state = load_state(folder / "parts.state.h5")[1]
    assert state.epoch == 1
    go_on(folder / "parts.h5")
    assert model_bytes(folder / "parts.h5") == model_bytes(whole)


def test_checkpoints_after_so_many_epochs(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    more = {**SMALL, "epochs": 5, "checkpoint_every": 1e9, "checkpoint_epochs": 2}
    with Run.start(table, tmp_path / "run.h5", **more) as run:
        monkeypatch.setattr(run, "save", lambda: seen.append(run.trainer.record.epoch))
        run.execute()
    assert seen == [2, 4, 5]  # and at the end


def test_no_checkpoint_before_its_time(table: str, tmp_path: Path) -> None:
    seen: list[bool] = []
    out = tmp_path / "run.h5"
    train(table, out, [StopAt(2 * TABLE_STEPS, lambda trainer: seen.append(out.exists()))], checkpoint_every=1000.0)
    assert seen == [False]


def test_extending_a_finished_run(table: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    given = {"preset": "tabular", "numbers": {"rate": 0.05}}  # a constant rate: a cosine's follows from the epochs
    train(table, whole, epochs=5, **given)
    train(table, parts, epochs=2, **given)
    before = parts.read_bytes()
    assert go_on(parts).finished
    assert parts.read_bytes() == before  # finished: nothing to do
    assert go_on(parts, epochs=5).record.epoch == 5
    assert model_bytes(parts) == model_bytes(whole)
    assert Settings.from_json(load_run(parts)[1].config["settings"]).epochs == 5  # type: ignore[union-attr]


def test_extending_patience(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    first = train(table, out, epochs=50, patience=1, numbers={"rate": 0.3})
    assert first.record.epoch == first.record.best_epoch + 1
    second = go_on(out, patience=3)
    assert second.record.epoch >= first.record.best_epoch + 3


def test_the_state_file_may_be_named_and_a_lost_best_file_comes_back(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    train(table, out)
    kept = model_bytes(out)
    out.unlink()
    go_on(tmp_path / "run.state.h5")
    assert model_bytes(out) == kept


def test_resume_in_another_folder(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train("table.h5", Path("run.h5"), [StopAt(3, Trainer.request_stop)])
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert go_on(Path("../run.h5")).finished


def test_resume_with_moved_and_with_changed_data(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    train(table, out, [StopAt(3, Trainer.request_stop)])
    os.rename(table, tmp_path / "moved.h5")
    with pytest.raises(DataError, match=r"table\.h5.*no such file"):
        Run.resume(out)
    other = write_table(tmp_path / "other.h5", seed=9)
    with pytest.raises(DataError, match=r"other\.h5.*fingerprint"):
        Run.resume(out, data=other)
    assert go_on(out, data=str(tmp_path / "moved.h5")).finished


def test_resume_refuses_other_validation_rows(table: str, tmp_path: Path) -> None:
    """The training rows are the same numbers, but the file now has a validation set of its own."""
    out = tmp_path / "run.h5"
    train(table, out, [StopAt(3, Trainer.request_stop)])
    with h5py.File(table, "a") as file:
        file["valid"] = np.zeros((10, 5))
    with pytest.raises(DataError, match="rows are not those of the run"):
        Run.resume(out)


def test_resume_refuses_other_settings(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    train(table, out)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for given, words in (
        ({"hidden": (7,)}, "hidden is 6 in the run, 7 was asked for"),
        ({"numbers": {"rate": 0.5}}, "rate is"),
        ({"prior": "gaussian"}, "prior is logistic"),
        ({"seed": 5}, "seed is 4"),
    ):
        with pytest.raises(CheckpointError, match=words):
            Run.resume(out, **given)
    with pytest.raises(CheckpointError, match=r"none\.h5.*no such run"):
        Run.resume(tmp_path / "none.h5")
    Path(state_path(out)).unlink()
    with pytest.raises(CheckpointError, match=r"its state file .*run\.state\.h5' is not there"):
        Run.resume(out)
    assert (tmp_path / "run.h5").read_bytes() == before["run.h5"]


def test_resume_of_a_file_without_settings(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    train(table, out)
    flow, record, state = load_state(state_path(out))
    record.config = {"data": table}
    save_state(state_path(out), flow, record, state)
    with pytest.raises(CheckpointError, match="does not say with which settings"):
        Run.resume(out)


def test_changed_data_are_taken_only_if_that_is_asked_for(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    train(table, out, [StopAt(TABLE_STEPS + 3, Trainer.request_stop)])
    os.unlink(table)
    write_table(tmp_path / "table.h5", seed=1, rows=300)
    with pytest.raises(DataError, match=r"another fingerprint.*--allow-changed-data"):
        go_on(out)
    outcome = go_on(out, allow_changed_data=True)
    assert outcome.finished
    assert outcome.record.epoch == 3
    assert outcome.train.rows == 250
    (event,) = (event for event in outcome.record.events if event.kind != "transform")
    assert (event.epoch, event.step, event.kind) == (1, TABLE_STEPS + 3, "data")
    go_on(out, epochs=4)  # from now on these are its data
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["train"] = np.zeros((50, 4))
    with pytest.raises(DataError, match="4 columns"):
        go_on(out, epochs=5, data=str(tmp_path / "other.h5"), allow_changed_data=True)


def test_arrays_train_as_files_do(tmp_path: Path) -> None:
    """With context and weights, saved and resumed: the array is not recorded, and has to be given again."""
    data = write_table(tmp_path / "table.h5")
    rng = np.random.default_rng(3)
    with h5py.File(data, "r+") as file:
        x = file["train"][()]
        file["c"], file["w"] = context, weights = rng.normal(size=(600, 2)), rng.random(600)
        del file["test"]
    array, out, other = DataSpec(x, context, weights), tmp_path / "array.h5", tmp_path / "file.h5"
    train(DataSpec(data, "/c", "/w"), other)
    train(array, out, [StopAt(20, Trainer.request_stop)])
    with pytest.raises(DataError, match="was given its context as an array"):
        Run.resume(out)
    with Run.resume(out, data=array) as run:
        assert run.execute().finished
    assert model_bytes(out) == model_bytes(other)
    assert score(out, array, "valid").evaluation == score(other, data, "valid").evaluation
    images = rng.integers(0, 256, (200, 4, 3), dtype=np.uint8)
    train(images, tmp_path / "images.h5", epochs=1)
    with pytest.raises(CheckpointError, match="does not say where its data are; pass --data"):
        Run.resume(tmp_path / "images.h5")
    assert load(tmp_path / "images.h5").info.image_shape == (4, 3)


@pytest.mark.parametrize("odd", [7, True, {"a": 1}, [], ""])
def test_a_record_may_say_anything_about_its_data(tmp_path: Path, odd: Any) -> None:
    out = tmp_path / "run.h5"
    train(write_table(tmp_path / "table.h5"), out, epochs=1)
    flow, record, state = load_state(state_path(out))
    record.config["data"] = odd
    save_state(state_path(out), flow, record, state)
    with pytest.raises(CheckpointError, match=r"run\.state\.h5': does not say where its data are; pass --data"):
        Run.resume(out)
