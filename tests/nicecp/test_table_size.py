"""What follows from a table's size: batches, epochs, weight decay and whitening of the preset tabular-spline."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

import nicecp
from nicecp.data import open_splits
from nicecp.data_spec import DataSpec
from nicecp.preset_table import PRESETS
from nicecp.presets import resolve
from nicecp.run import Run
from nicecp.table_size import TableSize, shrinkage, sized

SPLINE = PRESETS["tabular-spline"]
FEW = TableSize(300, 20, 300.0)


@pytest.mark.parametrize(
    ("rows", "columns", "batch", "epochs", "decay", "whiten"),
    [
        (80, 8, 32, 100, 20.0, "none"),
        (1000, 8, 32, 100, 2.0, "none"),
        (1000, 3, 32, 100, 2.0, "none"),
        (5000, 10, 32, 100, 0.5, "none"),
        (20_001, 8, 128, 100, 2000 / 20_001, "none"),
        (5001, 16, 64, 100, 250 * 16 / 5001, "gaussian"),
        (16_001, 16, 64, 100, 250 * 16 / 16_001, "none"),
        (100_001, 8, 256, 62, SPLINE.weight_decay, "none"),
        (60_001, 100, 256, 20, 250 * 100 / 60_001, "gaussian"),
        (100, 2001, 32, 100, 20.0, "none"),
        (10**9, 5, 256, 20, SPLINE.weight_decay, "none"),
        (1, 15, 32, 100, 20.0, "none"),
    ],
)
def test_few_rows_are_held_back(rows: int, columns: int, batch: int, epochs: int, decay: float, whiten: str) -> None:
    preset = sized(SPLINE, TableSize(rows, columns, float(rows)))
    assert (preset.batch_size, preset.epochs, preset.whiten) == (batch, epochs, whiten)
    assert preset.weight_decay == pytest.approx(decay)
    assert preset.regularization == (shrinkage(rows, columns) if whiten == "gaussian" else 0.0)
    assert (preset.hidden, preset.couplings, preset.transform) == ((128, 128), 6, "auto")


def test_shrinkage() -> None:
    assert shrinkage(100, 50) == 0.25
    assert shrinkage(10**6, 2) == shrinkage(10**7, 2) == 1e-3
    assert shrinkage(0, 3) == 9.0


def test_other_presets_are_as_they_were() -> None:
    for name, preset in PRESETS.items():
        assert (sized(preset, FEW) == preset) == (name != "tabular-spline"), name


def test_weighted_rows_are_worth_their_effective_number() -> None:
    x = np.random.default_rng(0).normal(size=(400, 3))
    weight = np.repeat([1.0, 1e-9], [100, 300])
    with open_splits(DataSpec(x, None, weight), 0.0) as splits:
        size = TableSize.of(splits.train)
    assert (size.rows, size.columns) == (400, 3)
    assert size.effective == pytest.approx(100, rel=1e-5)
    preset = sized(SPLINE, TableSize(100_000, 8, 100.0))
    assert (preset.batch_size, preset.epochs, preset.weight_decay) == (256, 62, 20.0)


def test_what_is_given_wins() -> None:
    chosen = resolve("a.h5", False, 100, size=FEW)
    assert (chosen.preset, chosen.whiten, chosen.regularization) == ("tabular-spline", "gaussian", shrinkage(300, 20))
    given = resolve("a.h5", False, 100, size=FEW, whiten="none", batch_size=7, weight_decay=0.0, epochs=3)
    assert (given.whiten, given.regularization) == ("none", 0.0)
    assert (given.batch_size, given.weight_decay, given.epochs) == (7, 0.0, 3)
    assert resolve("a.h5", False, 100, size=FEW, whiten="zca").regularization == 0.0
    assert resolve("a.h5", False, 100, size=FEW, regularization=0.5).regularization == 0.5
    assert resolve("a.h5", False, 100, size=FEW, standardize=False).transform == "none"
    logit = resolve("a.h5", False, 100, size=FEW, logit=0.05, value_range=(0.0, 1.0))
    assert (logit.transform, logit.logit) == ("none", 0.05)
    pixels = resolve("a.h5", True, 100, "tabular-spline", size=FEW)
    assert (pixels.batch_size, pixels.whiten, pixels.transform) == (SPLINE.batch_size, "none", "none")


def test_a_run_follows_its_training_rows(tmp_path: Path) -> None:
    """Those left after validation; a row of 1e9 among the test rows costs no more than some tens of nats."""
    rng = np.random.default_rng(1)
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["train"] = rng.normal(size=(1200, 3)) @ rng.normal(size=(3, 3))
        test = rng.normal(size=(20, 3))
        test[3, 1] = 1e9
        file["test"] = test
    with Run.start(str(tmp_path / "t.h5"), tmp_path / "run.h5", epochs=2, hidden=(8,), threads=1) as run:
        assert (run.settings.preset, run.settings.batch_size) == ("tabular-spline", 32)
        assert run.settings.weight_decay == pytest.approx(250 * 8 / 1000)
        outcome = run.execute()
    assert outcome.test is not None
    assert outcome.test.minimum > -150
    assert nicecp.load(tmp_path / "run.h5").spec.couplings[0].law == "spline"
