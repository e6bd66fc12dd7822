"""Learning rates that fall over a run, and the decay of weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import nicecp
from nicecp.decay import rate_factor
from nicecp.optimizers import AdaM
from nicecp.run import Run
from nicecp.train import Callback, Trainer

X = np.random.default_rng(0).normal(size=(300, 4))


def test_the_cosine() -> None:
    factors = [rate_factor("cosine", epoch, 10) for epoch in range(1, 11)]
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in pairwise(factors))
    assert rate_factor("cosine", 14, 10) == factors[-1]
    assert rate_factor("constant", 7, 10) == 1.0


def test_rates_are_those_of_the_schedule() -> None:
    flow = nicecp.NICE(4, (8,), seed=1)
    record = nicecp.fit(flow, X, epochs=6, schedule="cosine", optimizer=AdaM(rate=2e-3))
    assert [row.learning_rate for row in record.history] == pytest.approx(
        [2e-3 * rate_factor("cosine", epoch, 6) for epoch in range(1, 7)]
    )


def test_weights_decay_and_nothing_else_does() -> None:
    """One step without a gradient to speak of: weights shrink by 1 - rate * decay, biases and log-scales do not."""
    plain, decayed = (nicecp.NICE(4, (8,), init="he", seed=1) for _ in range(2))
    for flow, decay in ((plain, 0.0), (decayed, 50.0)):
        nicecp.fit(flow, X, epochs=1, batch_size=250, valid_fraction=0.0, optimizer=AdaM(rate=1e-3), weight_decay=decay)
    for name, values in plain.parameters().items():
        factor = 0.95 if name.endswith("weight") else 1.0
        assert np.allclose(decayed.parameters()[name], factor * values, rtol=1e-12, atol=0), name


class StopAfter(Callback):
    """Ask a run to stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, trainer: Trainer) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.request_stop()


def test_a_resumed_run_keeps_its_schedule(tmp_path: Path) -> None:
    """Interrupted in the middle of an epoch, and of a schedule: the same bits as without."""
    with h5py.File(tmp_path / "x.h5", "w") as f:
        f["train"] = X
    data, ways = str(tmp_path / "x.h5"), []
    for name, stop in (("whole", 0), ("parts", 7)):
        out = tmp_path / f"{name}.h5"
        more: dict[str, Any] = {"epochs": 4, "hidden": (8,), "batch_size": 50, "threads": 1}
        with Run.start(data, out, schedule="cosine", weight_decay=1.0, **more) as run:
            run.execute([StopAfter(stop)])
        if stop:
            with Run.resume(out) as run:
                assert (run.settings.weight_decay, run.trainer.position) == (1.0, 2)
                run.execute()
        ways.append(nicecp.load(out).parameters())
    assert all(np.array_equal(ways[0][key], ways[1][key]) for key in ways[0])


@pytest.mark.parametrize(("stop", "epochs"), [(0, 3), (7, 3), (0, 8), (1, 8)])
def test_a_run_that_is_given_more_epochs_follows_their_schedule(tmp_path: Path, stop: int, epochs: int) -> None:
    """A run of three, finished or stopped in the first or second epoch: from there on the rates are those of eight."""
    more: dict[str, Any] = {"epochs": 3, "hidden": (8,), "batch_size": 50, "threads": 1, "numbers": {"rate": 1e-3}}
    with h5py.File(tmp_path / "x.h5", "w") as f:
        f["train"] = X
    with Run.start(str(tmp_path / "x.h5"), tmp_path / "run.h5", schedule="cosine", **more) as run:
        run.execute([StopAfter(stop)])
        done = run.trainer.record.epoch
    with Run.resume(tmp_path / "run.h5", epochs=epochs) as run:
        run.execute()
        rates = [row.learning_rate for row in run.trainer.record.history]
    expected = [rate_factor("cosine", epoch, 3 if epoch <= done else epochs) for epoch in range(1, epochs + 1)]
    assert rates == pytest.approx([1e-3 * factor for factor in expected])


@pytest.mark.parametrize(("more", "words"), [({"schedule": "linear"}, "schedule"), ({"weight_decay": -1.0}, "decay")])
def test_settings_out_of_bounds(more: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nicecp.fit(nicecp.NICE(4, (8,)), X, epochs=1, **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        Run.start(X, None, **more)  # type: ignore[arg-type]
