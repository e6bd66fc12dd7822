"""The logit step in files, in runs and on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import NICE, AdaM, fit, load
from nicecp.checkpoint import load_run
from nicecp.cli.main import main
from nicecp.columns import check_representable
from nicecp.data import open_splits
from nicecp.errors import CheckpointError, DataError
from nicecp.preprocessing import (
    MarginLogit,
    apply_steps,
)
from nicecp.records import DataInfo
from nicecp.schema import model_from_tree, model_tree
from nicecp.spec import ModelSpec, alternating
from tests.nicecp.runs import go_on, model_bytes, train, write_images
from tests.nicecp.test_checkpoint import documented_log_prob, numbers
from tests.nicecp.test_logit import HIGH, D, rows, steps_of


def test_the_documented_reader_knows_the_logit(tmp_path: Path) -> None:
    spec, x = ModelSpec(D, alternating((6, 4), 3, ("affine", "additive"))), rows()
    for number, name in enumerate(("logit", "logit, zca, triangular")):
        flow, path = NICE.from_spec(spec, numbers(spec, number), steps_of(name)), tmp_path / f"{number}.h5"
        flow.save(path)
        np.testing.assert_allclose(documented_log_prob()(path, x), flow.log_prob(x), rtol=1e-11)
        np.testing.assert_array_equal(load(path).log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tree: tree.attrs["/preprocessing/0"].update(margin=0.5), "margin must be at least 0 and below 1/2"),
        (lambda tree: tree.attrs["/preprocessing/0"].pop("margin"), "'margin' is missing"),
        (lambda tree: tree.arrays.update({"/preprocessing/0/low": HIGH}), "low below high"),
        (lambda tree: tree.arrays.update({"/preprocessing/0/low": HIGH[:4]}), "should have shape"),
        (lambda tree: tree.arrays.pop("/preprocessing/0/high"), "is missing"),
    ],
)
def test_wrong_logits_in_files_are_refused(change: Any, says: str) -> None:
    spec = ModelSpec(D, alternating((3,), 3))
    tree = model_tree(spec, numbers(spec, 0), steps_of("logit"), DataInfo())
    change(tree)
    with pytest.raises(CheckpointError, match=says):
        model_from_tree(tree, "x.h5")


def test_a_run_on_images_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images.h5")
    train(data, tmp_path / "whole.h5", epochs=4, logit=0.05)
    train(data, tmp_path / "parts.h5", epochs=2, logit=0.05)
    go_on(tmp_path / "parts.h5", epochs=4)
    assert model_bytes(tmp_path / "parts.h5") == model_bytes(tmp_path / "whole.h5")
    flow = load(tmp_path / "whole.h5")
    assert [step.kind for step in flow.preprocessing] == ["dequantize", "margin-logit"]
    with pytest.raises(ValueError, match=r"logit is 0\.05 in the run, 0\.1 was asked for"):
        go_on(tmp_path / "parts.h5", logit=0.1)


def test_inpainting_behind_a_logit(tmp_path: Path) -> None:
    from nicecp.inpaint import inpaint

    train(write_images(tmp_path / "images.h5"), tmp_path / "run.h5", epochs=1, logit=0.05)
    flow, x, hidden = load(tmp_path / "run.h5"), np.random.default_rng(1).random((2, 12)), np.arange(12) < 4
    done = inpaint(flow, x, hidden, 20, gradient_scale=0.01)
    assert ((done.result >= 0) & (done.result <= 1)).all()
    np.testing.assert_array_equal(done.result[0][:, 4:], x[:, 4:])
    assert np.isfinite(done.log_prob_after).all()


def test_fitting_bounded_floats() -> None:
    """A density on the box: better in nats than one that does not know of the box, on rows that fill it."""
    data = np.random.default_rng(0).uniform(-1, 3, (3000, 2))
    made = {"prior": "gaussian", "coupling": "affine", "init": "he", "seed": 1, "threads": 1}
    bounded, plain = (NICE(2, (16,), 4, **made) for _ in range(2))
    fit(bounded, data, epochs=12, logit=0.001, value_range=(-1, 3), optimizer=AdaM(rate=5e-3))
    fit(plain, data, epochs=12, optimizer=AdaM(rate=5e-3))
    exact = -2 * np.log(4)
    got, other = (float(np.mean(flow.log_prob(data))) for flow in (bounded, plain))
    assert exact - 0.05 < got < exact + 0.02  # measured: 0.005 below
    assert got > other + 0.1
    assert [step.kind for step in bounded.preprocessing] == ["margin-logit", "standardize"]
    z = apply_steps(bounded.preprocessing, data)[0]
    assert np.abs(z.std(axis=0) - 1).max() < 0.1


def test_rows_without_a_logit_are_named(tmp_path: Path) -> None:
    """In rows to train on by their column's range; in others by themselves."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train"] = rng.uniform(0, 1, (50, 3))
        file["valid"] = np.vstack([rng.uniform(0, 1, (5, 3)), [[0.5, 1.5, 0.5]]])
        file["train"].attrs["columns"] = ["a", "b", "c"]
    with open_splits(tmp_path / "a.h5") as splits:
        step = MarginLogit(np.zeros(3), np.ones(3), 0.05)
        with pytest.raises(
            DataError, match=r"a\.h5:/valid': row 5, column .* is 1\.5, of which the step 'margin-logit'"
        ):
            check_representable(splits, (step,), np.float64, 0)
    flow = NICE(3, (4,), 3)
    with pytest.raises(DataError, match=r"column .* spans .*, which is not within the logit's range 0 to 0\.5;"):
        fit(flow, tmp_path / "a.h5", epochs=1, logit=0.05, value_range=(0, 0.5))
    ends = np.array([[0.0, 0.5, 0.5], [0.3, 0.2, 0.7], [0.2, 0.4, 0.1]])
    with pytest.raises(DataError, match="whose ends have no logit with margin 0"):
        fit(flow, ends, epochs=1, logit=0.0, value_range=(0, 1))
    with pytest.raises(ValueError, match=r"logit must be above 0 for 8-bit data"):
        fit(flow, np.zeros((9, 3), np.uint8), epochs=1, logit=0.0)
    with pytest.raises(ValueError, match="approximate would learn"):
        fit(flow, rng.uniform(0, 1, (50, 3)), epochs=1, logit=0.05, whiten="approximate")
    assert flow.preprocessing == ()


def test_a_row_outside_the_range_is_named_in_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    train_rows, test_rows = rng.uniform(0, 1, (60, 3)), rng.uniform(0, 1, (20, 3))
    flow = NICE(3, (4,), 3)
    fit(flow, train_rows, epochs=1, batch_size=20, logit=0.05, value_range=(0, 1))
    flow.save(tmp_path / "run.h5")
    test_rows[13, 1] = 1.2
    with h5py.File(tmp_path / "test.h5", "w") as file:
        file["test"] = test_rows
    assert main(["evaluate", str(tmp_path / "run.h5"), "--data", f"{tmp_path / 'test.h5'}:/test"]) == 2
    error = capsys.readouterr().err
    assert "row 13 is nan: the flow overflows there, or its preprocessing does not take such values" in error


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with h5py.File("t.h5", "w") as file:
        file["train"], file["test"] = rng.uniform(-1, 1, (200, 3)), rng.uniform(-1, 1, (20, 3))
    words = ["train", "--data", "t.h5", "--epochs", "1", "--threads", "1", "--hidden", "6", "--out"]
    assert main([*words, "a.h5", "--logit", "0.01", "--range=-1,1"]) == 0
    capsys.readouterr()
    flow, record = load_run("a.h5")
    assert record is not None
    assert [step.kind for step in flow.preprocessing] == ["margin-logit", "standardize"]
    assert main(["evaluate", "a.h5", "--data", "t.h5", "--json"]) == 0
    with h5py.File("t.h5") as file:
        want = float(np.mean(flow.log_prob(file["test"][()])))
    assert json.loads(capsys.readouterr().out)["mean"] == pytest.approx(want, rel=1e-10)
    assert main(["info", "a.h5"]) == 0
    assert re.search(r"preprocessing +margin-logit margin=0\.01, standardize", capsys.readouterr().out)
    for options, says in (
        (["--logit", "0.01"], "a logit of floats needs the interval in which they lie (--range LO,HI"),
        (["--logit", "0.6"], "--logit"),
        (["--logit", "0.01", "--range=0,1"], "spans -"),
        (["--logit", "0.01", "--range=-1,1", "--whiten", "approximate"], "--whiten must be zca or gaussian behind"),
        (["--range=-1,1"], "is for 8-bit data, or for floats with a logit"),
    ):
        assert main([*words, "b.h5", *options]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert not Path("b.h5").exists()
