"""What is asked for, what auto chooses, fits of single columns, and training and evaluation through transforms."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nicecp
from nicecp.data import open_splits
from nicecp.errors import DataError
from nicecp.evaluate import evaluate
from nicecp.presented import uniform_noise
from nicecp.run import Run
from nicecp.scoring import score
from nicecp.transform_fit import emptiest, fit_student, fit_transforms, quantile_knots
from nicecp.transform_spec import Transform, chains, parse
from nicecp.transform_stats import look_at, recorded_step
from nicecp.transforms import Angle, Recorded, Student


def table(n: int = 3000, seed: int = 0) -> np.ndarray:
    """Columns: normal, log-normal, an angle that avoids +-pi, heavy tails, a fraction, and few digits with an atom."""
    r = np.random.default_rng(seed)
    coarse = np.round(r.normal(size=n), 2)
    coarse[r.random(n) < 0.06] = 0.0
    return np.stack(
        [
            r.normal(size=n),
            np.exp(r.normal(size=n)),
            np.mod(r.normal(0.0, 0.6, n) + np.pi, 2 * np.pi) - np.pi,
            r.standard_t(1.2, n),
            r.beta(0.8, 2.0, n),
            coarse,
        ],
        axis=1,
    )


NAMES = ("gauss", "mass", "phi", "dxy", "eff", "coarse")


def fitted(text: str, x: np.ndarray) -> Any:
    from nicecp.sources import ArraySource

    with open_splits(ArraySource(x, columns=NAMES[: x.shape[1]]), 0.0) as splits:
        return fit_transforms(splits.train, text)


# --- how it is written ------------------------------------------------------------------------------------------------


def test_what_is_written() -> None:
    assert parse("auto") == [("*", (Transform("auto"),))]
    assert parse("mass=log,eff=logit(0:1), *=recorded(0.01)+quantile(64)") == [
        ("mass", (Transform("log"),)),
        ("eff", (Transform("logit", (0.0, 1.0)),)),
        ("*", (Transform("recorded", (0.01,)), Transform("quantile", (64.0,)))),
    ]
    assert parse("0=angle(2pi)")[0][1][0].numbers[0] == pytest.approx(2 * np.pi)
    assert parse("a=logit(-pi:pi)")[0][1][0].numbers == pytest.approx((-np.pi, np.pi))
    got = chains("phi=angle,1=log", 3, ("x", "y", "phi"))
    assert [chain[0].kind for chain in got] == ["standardize", "log", "angle"]
    assert [chain[0].kind for chain in chains("1=log,*=quantile", 3, ("2", "1", "0"))] == [
        "quantile",
        "log",
        "quantile",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mass=cube", "none of"),
        ("mass=logit", "needs its bounds"),
        ("mass=logit(1:0)", "LOW below HIGH"),
        ("mass=log(a)", "not a number"),
        ("mass=log(1:2)", "takes one bound"),
        ("mass=student(3)", "takes no numbers"),
        ("mass=quantile(1)", "whole number of knots"),
        ("mass=recorded(0)", "positive"),
        ("mass=log,mass=log", "twice"),
        ("=log", "COLUMN=KIND"),
        ("mass=log(1e999)", "not finite"),
    ],
)
def test_what_cannot_be_understood(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_standardize_stands_alone() -> None:
    """Else it would be passed over without a word: what comes behind it would see the column as it is."""
    for chain in ("standardize+log", "recorded+standardize"):
        with pytest.raises(ValueError, match=f"'{re.escape(chain)}': standardize stands alone"):
            parse(f"x={chain}")


def test_columns_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"'charge' is not a column of the data \(x, y\)"):
        chains("charge=log", 2, ("x", "y"))
    with pytest.raises(ValueError, match="several columns"):
        chains("x=log", 2, ("x", "x"))
    with pytest.raises(ValueError, match="twice"):
        chains("x=log,0=log", 2, ("x", "y"))


# --- what is chosen and fitted ----------------------------------------------------------------------------------------


def test_bounds_are_checked() -> None:
    with pytest.raises(DataError, match=r"column 0 \('gauss'\): \d+ of 3000 training rows are not above 0.*reach from"):
        fitted("gauss=log", table())
    with pytest.raises(DataError, match=r"between 0 and 0\.5"):
        fitted("eff=logit(0:0.5)", table())
    with pytest.raises(ValueError, match="auto stands alone"):
        fitted("eff=auto+log", table())
    unseen = fitted("gauss=recorded", table())
    assert unseen.steps == ()
    assert "no recorded step" in unseen.notes[-1]


def test_angles_are_cut_where_there_are_fewest() -> None:
    for centre in (0.0, 2.0, 3.1, 5.0):
        angle = np.random.default_rng(2).normal(centre, 0.5, 2000)
        cut = emptiest(angle, 2 * np.pi)
        assert abs(np.mod(cut - centre, 2 * np.pi) - np.pi) < 1.2
    (step,) = fitted("phi=angle", table()).steps
    assert isinstance(step, Angle)
    z = step.forward(table())[:, 2]
    assert np.abs(z).max() < 8


def test_student_is_fitted() -> None:
    nu, location, scale = fit_student(3.0 + 2.0 * np.random.default_rng(3).standard_t(3.0, 20_000))
    assert nu == pytest.approx(3.0, rel=0.1)
    assert location == pytest.approx(3.0, abs=0.05)
    assert scale == pytest.approx(2.0, rel=0.05)
    assert isinstance(fitted("dxy=student", table()).steps[0], Student)


def test_knots_are_as_many_as_held_out_rows_bear() -> None:
    r = np.random.default_rng(4)
    smooth = quantile_knots(r.normal(size=3000))
    rugged = quantile_knots(np.concatenate([k + 0.02 * r.normal(size=1000) for k in range(8)]))
    assert len(smooth.x) <= 32 < len(rugged.x)


def test_the_recorded_step_is_seen() -> None:
    r = np.random.default_rng(5)
    digits = np.unique(np.round(r.normal(size=500), 3))
    assert recorded_step(digits, np.float64) == pytest.approx(0.001)
    assert recorded_step(digits.astype(np.float32).astype(float), np.float32) == pytest.approx(0.001)
    assert recorded_step(np.unique(r.normal(size=500)), np.float64) == 0.0
    assert recorded_step(np.unique(r.normal(size=500).astype(np.float32)).astype(float), np.float32) == 0.0
    assert recorded_step(np.arange(0.0, 500.0, 10.0), np.float64) == 10.0
    assert look_at(np.round(r.normal(size=5000), 1), np.float64).coarse


def test_noise_on_recorded_values_is_the_row_s_own() -> None:
    rows, columns = np.arange(40), np.array([0, 3, 4, 9])
    u = uniform_noise(5, 0, rows, columns)
    assert np.array_equal(u[7:9, 1:3], uniform_noise(5, 0, rows[7:9], columns[1:3]))
    assert 0 < u.min() < 0.1 < 0.9 < u.max() < 1
    assert not np.array_equal(u, uniform_noise(6, 0, rows, columns))
    assert len(np.unique(u)) == u.size


# --- before training -------------------------------------------------------------------------------------------------


def test_preprocessing_is_fitted_before_there_is_a_flow(tmp_path: Path) -> None:
    x = table(1200)
    wanted = {"mass": "log", 4: "logit(0:1)", "phi": "angle", "*": "quantile"}
    steps, lines = nicecp.fit_preprocessing(x, wanted, columns=NAMES, whiten="gaussian")
    assert [step.kind for step in steps] == ["quantile", "log", "angle", "logit", "standardize", "triangular"]
    assert any(line.startswith("1 ('mass'): log, as asked for;") for line in lines)
    assert any("recorded to few digits" in line for line in lines)
    flow = nicecp.NICE(6, (8,), prior="gaussian", init="he", seed=3, preprocessing=steps)
    before = flow.log_prob(x[:9])
    assert np.isfinite(before).all()
    nicecp.fit(flow, x, epochs=1)
    assert [step.kind for step in flow.preprocessing] == [step.kind for step in steps]
    assert not np.allclose(flow.log_prob(x[:9]), before)
    flow.save(tmp_path / "f.h5")
    np.testing.assert_array_equal(nicecp.load(tmp_path / "f.h5").log_prob(x[:9]), flow.log_prob(x[:9]))
    once = nicecp.NICE(6, (8,), prior="gaussian", init="he", seed=3)
    given = {str(key): kind for key, kind in wanted.items()} | {"1": "log", "2": "angle"}
    del given["mass"], given["phi"]
    nicecp.fit(once, x, epochs=1, transform=given, whiten="gaussian", valid_fraction=0)
    other = nicecp.NICE(6, (8,), prior="gaussian", init="he", seed=3, preprocessing=steps)
    nicecp.fit(other, x, epochs=1, valid_fraction=0)
    np.testing.assert_allclose(once.log_prob(x[:9]), other.log_prob(x[:9]), rtol=1e-12)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"a,b": "log"}, ValueError, "no commas"),
        ({"a": "log,b=log"}, ValueError, "no commas"),
        ({}, ValueError, "names no column"),
        ({"a": 3}, TypeError, "text or"),
        (["log"], TypeError, "text or"),
    ],
)
def test_what_is_no_transform(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        nicecp.fit_preprocessing(table(100), given)
    with pytest.raises(error, match=words):
        nicecp.fit(nicecp.NICE(6, (8,)), table(100), transform=given)


def test_a_flow_says_that_it_keeps_its_preprocessing(caplog: pytest.LogCaptureFixture) -> None:
    flow = nicecp.NICE(6, (8,))
    nicecp.fit(flow, table(200), epochs=1)
    assert "keeps" not in caplog.text
    nicecp.fit(flow, table(200), epochs=1, transform="quantile")
    assert "preprocessing, which it keeps: transform, whiten" in caplog.text
    assert [step.kind for step in flow.preprocessing] == ["standardize"]


# --- training and evaluation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["auto", "mass=log,phi=angle,eff=logit(0:1),dxy=student,*=recorded+quantile"])
@pytest.mark.parametrize("whiten", ["none", "gaussian"])
@pytest.mark.slow
def test_evaluation_is_log_prob(text: str, whiten: str, tmp_path: Path) -> None:
    """Training, validation and scores of a checkpoint are those of log_prob in the data's space, row by row."""
    import h5py

    x = table(1500)
    with h5py.File(tmp_path / "t.h5", "w") as f:
        f["train"], f["test"] = x, table(300, seed=9)
        f["train"].attrs["columns"] = np.array([name.encode() for name in NAMES])
    out = tmp_path / "run.h5"
    with Run.start(
        str(tmp_path / "t.h5"), out, transform=text, whiten=whiten, epochs=2, hidden=(16,), couplings=4, threads=1
    ) as run:
        outcome = run.execute()
    flow = nicecp.load(out)
    assert outcome.test is not None
    recorded = [step for step in flow.preprocessing if isinstance(step, Recorded)]
    assert bool(recorded) == (text != "auto")
    rows = table(300, seed=9)
    for step in recorded:
        rows[:, step.columns] += step.width * (uniform_noise(0, 2, np.arange(300), step.columns) - 0.5)
    values = flow.log_prob(rows)
    assert outcome.test.mean == pytest.approx(float(np.mean(values)), abs=1e-9)
    assert outcome.test.minimum == pytest.approx(float(np.min(values)), abs=1e-9)
    assert score(out, str(tmp_path / "t.h5")).evaluation == outcome.test
    assert outcome.train is not None
    assert abs(outcome.record.history[-1].train_log_likelihood - outcome.train.mean) < 1.0
    events = [event.message for event in outcome.record.events if event.kind == "transform"]
    assert len(events) == 6
    assert outcome.round_trip < 1e-6
    resumed = Run.resume(out, epochs=3)
    with resumed as run:
        assert run.flow.preprocessing[0].kind == flow.preprocessing[0].kind
    nicecp.testing.check_gradients(flow, rows[:4])


def test_rows_outside_a_support_are_named(tmp_path: Path) -> None:
    import h5py

    x = table(400)
    other = x.copy()
    other[17, 1] = -3.0
    with h5py.File(tmp_path / "t.h5", "w") as f:
        f["train"], f["test"] = x, other
    with pytest.raises(DataError, match=r"t.h5:/test': row 17, column 1 is -3, outside the support"):
        Run.start(str(tmp_path / "t.h5"), None, transform="1=log")
    flow = nicecp.NICE(6, (8,))
    nicecp.fit(flow, x, epochs=1, transform="1=log")
    assert flow.log_prob(other[17]) == -np.inf
    assert np.isfinite(flow.log_prob(x)).all()


def test_a_run_through_transforms_resumes_with_the_same_bits(tmp_path: Path) -> None:
    import h5py

    text = "1=log,*=recorded+quantile"
    with h5py.File(tmp_path / "x.h5", "w") as f:
        f["train"] = table(800)
    x, ways = str(tmp_path / "x.h5"), []
    for name, epochs in (("whole", (4,)), ("parts", (2, 4))):
        out = tmp_path / f"{name}.h5"
        for count in epochs:
            more: dict[str, Any] = {"schedule": "constant", "weight_decay": 0.5}
            run = (
                Run.start(x, out, transform=text, epochs=count, hidden=(8,), threads=1, **more)
                if count == epochs[0]
                else Run.resume(out, epochs=count)
            )
            with run:
                run.execute()
        ways.append(nicecp.load(out).parameters())
    assert all(np.array_equal(ways[0][key], ways[1][key]) for key in ways[0])


def test_transforms_make_a_heavy_tailed_table_likelier(caplog: pytest.LogCaptureFixture) -> None:
    x = table(2000)[:, 1:4]
    x[:, 2] += x[:, 0]
    held = table(500, seed=8)[:, 1:4]
    held[:, 2] += held[:, 0]
    means = {}
    for text in ("none", "auto"):
        flow = nicecp.NICE(3, (32,), coupling="affine", init="he", seed=1)
        with caplog.at_level(logging.INFO, "nicecp"):
            nicecp.fit(flow, x, epochs=15, seed=1, transform=text)
        means[text] = float(np.mean(flow.log_prob(held)))
    assert means["auto"] > means["none"] + 0.3  # 0.9 when this was written
    assert "column 0: quantile, since" in caplog.text


def test_images_have_no_column_transforms() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (300, 4), np.uint8)
    with pytest.raises(ValueError, match="for floats"):
        nicecp.fit(nicecp.NICE(4, (8,)), pictures, epochs=1, transform="auto")
    with pytest.raises(ValueError, match="--transform"):
        Run.start(pictures, None, transform="auto")


@pytest.mark.skipif(
    "NICECP_DATA" not in os.environ, reason="NICECP_DATA does not name the folder with the real data sets"
)
def test_outliers_of_a_real_table_stay_bounded() -> None:
    """cms_zmumu's dxy columns reach 178 where most rows lie within 0.1: no test row is far out in the flow's space."""
    with open_splits(f"{os.environ['NICECP_DATA']}/cms_zmumu.h5") as splits:
        assert splits.test is not None
        fits = fit_transforms(splits.train, "quantile")
        z = fits.steps[0].forward(np.asarray(splits.test.load()[0], np.float64))
        assert np.abs(z).max() < 8
        steps = (*fits.steps,)
        flow = nicecp.NICE(8, (8,), preprocessing=steps)
        assert evaluate(flow, splits.test).minimum > -80
