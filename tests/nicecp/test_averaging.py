"""Averages of parameters over epochs: what is averaged, when it is kept, and that a resumed run has the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import nicecp
from nicecp.averaging import AverageKind, average_kind, better
from nicecp.checkpoint import load_run, load_state
from nicecp.cli.main import main
from nicecp.evaluate import evaluate
from nicecp.kernels.backend import Purpose
from nicecp.optimizers import AdaM
from nicecp.plan import cost_of
from nicecp.records import EpochRecord
from nicecp.run import Run
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import Callback, TrainConfig, Trainer
from tests.emulated import build
from tests.kernels.stand_in import stand_in

X = np.random.default_rng(0).normal(size=(360, 4)) * [1, 2, 3, 4]
FAST = AdaM(rate=0.3)  # hovers around the optimum, so that the average is better


class Watch(Callback):
    """Every epoch's parameters, and what they are averaged to."""

    def __init__(self) -> None:
        self.own: list[Any] = []
        self.average: list[Any] = []

    def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        self.own.append(trainer.backend.copy_out(trainer.p))
        assert trainer._average is not None
        self.average.append((trainer._average.count, trainer.backend.copy_out(trainer._average.flat)))


def trained(kind: str, epochs: int = 6, backend: Any = None, valid: bool = True) -> tuple[Trainer, Watch]:
    flow, watch = nicecp.NICE(4, (8,), seed=1, **({} if backend is None else {"device": "cpu"})), Watch()
    if backend is not None:
        flow = nicecp.NICE.from_spec(flow.spec, flow.parameters(), backend=backend)
    train, held_out = (Split.contiguous(ArraySource(X), *rows, purpose) for rows, purpose in
                       (((0, 300), Purpose.TRAIN_NOISE), ((300, 360), Purpose.VALID_NOISE)))  # fmt: skip
    config = TrainConfig(epochs=epochs, batch_size=50, optimizer=FAST, weight_average=kind)
    trainer = Trainer(flow, train, held_out if valid else None, config, watch)
    trainer.run()
    return trainer, watch


def test_the_tail_is_the_mean_of_the_last_epochs() -> None:
    trainer, watch = trained("tail:3")
    assert [count for count, _ in watch.average] == [0, 0, 0, 1, 2, 3]
    np.testing.assert_allclose(watch.average[-1][1], np.mean(watch.own[-3:], axis=0), rtol=1e-12)
    averages = [row.average_log_likelihood for row in trainer.record.history]
    assert [value is None for value in averages] == [True] * 4 + [False] * 2, "the mean of one epoch is that epoch"


def test_a_moving_average_begins_as_a_mean() -> None:
    _, watch = trained("ema:0.6")
    np.testing.assert_allclose(watch.average[1][1], np.mean(watch.own[:2], axis=0), rtol=1e-12)
    for before, own, after in zip(watch.average[1:], watch.own[2:], watch.average[2:], strict=False):
        np.testing.assert_allclose(after[1], 0.6 * before[1] + 0.4 * own, rtol=1e-9)


def test_the_better_of_both_is_kept_and_says_so() -> None:
    trainer, watch = trained("ema:0.9", epochs=10)
    record = trainer.record
    pairs = [(row.valid_log_likelihood, row.average_log_likelihood) for row in record.history]
    assert record.best_valid_log_likelihood == np.nanmax(np.array(pairs, np.float64))
    last = record.history[record.best_epoch - 1]
    assert last.average_log_likelihood == record.best_valid_log_likelihood > last.valid_log_likelihood
    assert record.best_average == record.best_epoch
    assert np.array_equal(trainer.backend.copy_out(trainer.p), watch.average[record.best_epoch - 1][1])
    assert trainer.valid_split is not None
    # Row noise aside, of which floats have none, the flow's own evaluation is the one that was recorded.
    assert evaluate(trainer.flow, trainer.valid_split).mean == pytest.approx(record.best_valid_log_likelihood, rel=1e-9)
    assert better(record.best_valid_log_likelihood, max(own for own, _ in pairs))


def test_without_validation_the_average_is_what_is_kept() -> None:
    trainer, watch = trained("tail:2", valid=False)
    assert trainer.record.best_average == 2
    assert np.array_equal(trainer.backend.copy_out(trainer.p), watch.average[-1][1])


@pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)
def test_a_device_averages_as_the_cpu_does() -> None:
    averages = [trained("ema:0.5", 3, backend)[1].average[-1][1] for backend in (stand_in(), None)]
    np.testing.assert_allclose(averages[0], averages[1], rtol=1e-7, atol=1e-12)


class StopAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, trainer: Trainer) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.request_stop()


@pytest.mark.parametrize("kind", ["tail:3", pytest.param("ema:0.8", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, kind: str) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as f:
        f["train"] = X
    more: dict[str, Any] = {"epochs": 5, "hidden": (8,), "batch_size": 50, "threads": 1, "weight_average": kind}
    for name, stop in (("whole", 0), ("parts", 21)):
        out = tmp_path / f"{name}.h5"
        with Run.start(str(tmp_path / "x.h5"), out, numbers={"rate": 0.05}, **more) as run:
            run.execute([StopAfter(stop)])
        if stop:
            state = load_state(tmp_path / "parts.state.h5")[2]
            assert (state.average_epochs, set(state.average)) == (
                {"tail:3": 1, "ema:0.8": 3}[kind],
                set(state.parameters),
            )
            with Run.resume(out) as run:
                run.execute()
    files = [tmp_path / f"{name}.h5" for name in ("whole", "parts")]
    (one, record), (other, again) = (load_run(path) for path in files)
    assert all(np.array_equal(one.parameters()[key], other.parameters()[key]) for key in one.parameters())
    assert record is not None
    assert again is not None
    histories = [[repr(replace(row, seconds=0)) for row in run.history] for run in (record, again)]
    assert histories[0] == histories[1]  # by repr, in which NaN equals NaN
    assert record.best_average == again.best_average
    states = [load_state(path.with_suffix(".state.h5"))[2] for path in files]
    assert all(np.array_equal(states[0].average[key], states[1].average[key]) for key in states[0].average)


def test_more_epochs_begin_the_tail_anew(tmp_path: Path) -> None:
    more: dict[str, Any] = {"hidden": (8,), "batch_size": 50, "threads": 1, "weight_average": "tail:2"}
    with h5py.File(tmp_path / "x.h5", "w") as f:
        f["train"] = X
    with Run.start(str(tmp_path / "x.h5"), tmp_path / "run.h5", epochs=3, **more) as run:
        run.execute()
        assert run.trainer._average is not None
        assert run.trainer._average.count == 2
    with Run.resume(tmp_path / "run.h5", epochs=6) as run:
        counts: list[int] = []

        class Count(Callback):
            def on_epoch(self, trainer: Trainer, record: EpochRecord) -> None:
                assert trainer._average is not None
                counts.append(trainer._average.count)

        run.execute([Count()])
    assert counts == [0, 1, 2]


def test_a_command_shows_and_records_averages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as f:
        f["train"] = X
    out = str(tmp_path / "run.h5")
    words = ["train", "--data", str(tmp_path / "x.h5"), "--out", out, "--hidden", "8", "--batch-size", "50"]
    assert main([*words, "--lr", "0.05", "--epochs", "8", "--weight-average", "ema:0.9", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert " nats (averaged " in shown
    with h5py.File(out) as file:
        averages = file["training/history/average_log_likelihood"][()]
        assert np.isnan(averages).tolist() == [True] + [False] * 7
        best = int(file["training"].attrs.get("best_average", 0))
    assert (f"averaged over {best} epochs" in shown) == (best > 0)
    assert main(["info", out]) == 0
    assert (f"averaged over {best} epochs" in capsys.readouterr().out) == (best > 0)
    assert main(["train", "--resume", out, "--weight-average", "tail:3"]) == 2
    assert "--weight-average is ema:0.9 in the run, tail:3 was asked for" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--weight-average", "tail:1"]) == 2
    assert "--weight-average must be none, tail:EPOCHS" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["tail", "tail:0", "tail:1", "tail:-3", "ema:0", "ema:1", "ema:1.5", "ema:nan", "mean:3", ""]
)
def test_what_is_no_average(text: str) -> None:
    with pytest.raises(ValueError, match="weight_average must be none"):
        nicecp.fit(nicecp.NICE(4, (8,)), X, epochs=1, weight_average=text)


def test_kinds_and_their_memory() -> None:
    assert average_kind("none") is None
    assert average_kind("tail:12") == AverageKind(tail=12)
    assert average_kind("ema:.5") == AverageKind(decay=0.5)
    spec = nicecp.NICE(4, (8,)).spec
    costs = [cost_of(spec, 50, averaged=averaged).parameter_bytes for averaged in (False, True)]
    assert costs[1] * 5 == costs[0] * 6
