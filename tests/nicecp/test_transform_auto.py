"""What auto gives a column and what it says of it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from nicecp import transform_fit
from nicecp.data import open_splits
from nicecp.spline import fit_knots
from nicecp.transform_fit import gain_of_spline
from tests.nicecp.test_transform_fit import NAMES, fitted, table


def test_auto_says_what_it_chose_and_why() -> None:
    found = fitted("auto", table())
    kinds = [re.match(r"\d \('\w+'\): (\w+), since (.*?);", line) for line in found.lines]
    chosen = {name: (match[1], match[2]) for name, match in zip(NAMES, kinds, strict=True) if match}
    assert chosen["gauss"] == ("quantile", "it is close to normal")
    assert chosen["mass"][0] == "quantile"
    assert re.search(r"it is skewed; Student's t is 0\.\d+ nats worse on held-out rows; skewness", found.lines[1])
    assert chosen["dxy"] == ("quantile", chosen["dxy"][1])
    assert "tails are heavy" in chosen["dxy"][1]
    assert chosen["eff"][0] == "quantile"  # never a bound in silence
    assert "(if it is an angle, say angle)" not in found.lines[0]
    assert not any("log" in kind or "logit" in kind for kind, _ in chosen.values())
    uniform = table()
    uniform[:, 2] = np.random.default_rng(1).uniform(-np.pi, np.pi, len(uniform))
    assert "if it is an angle, say angle" in fitted("auto", uniform).lines[2]
    notes = " ".join(found.notes)
    assert re.search(r"one value in many rows: 5 \('coarse'\) \(\d\.\d+% are 0\)", notes)
    assert "recorded to few digits: 5 ('coarse') (steps of 0.01)" in notes
    assert "coarse" not in " ".join(fitted("coarse=recorded+quantile", table()).notes)
    few = fitted("auto", table(200))
    assert re.search(
        r"student, since it is close to normal; a spline is 0\.0\d+ nats worse on held-out rows;", few.lines[0]
    )
    assert "quantile, since its tails are heavy and it is skewed" in few.lines[1]
    assert "student, since its tails are heavy" in few.lines[3]
    assert "quantile, since values repeat" in few.lines[5]
    assert "student, since 10 rows are few" in fitted("auto", table(10)).lines[0]


@pytest.mark.parametrize("n", [60, 3000])
def test_no_row_costs_without_bound_behind_auto(n: int) -> None:
    """Of a column of any shape: beyond the rows that were seen z grows as the logarithm of x."""
    rng = np.random.default_rng(8)
    columns = [rng.normal(size=n), rng.uniform(size=n), rng.exponential(size=n), rng.integers(0, 4, n).astype(float)]
    steps = fitted("auto", np.stack(columns, axis=1)).steps
    assert steps
    for far in (1e3, 1e9, -1e9, 1e150):
        z = np.full((1, 4), far)
        for step in steps:
            z = step.forward(z)
        assert np.isfinite(z).all()
        assert np.abs(z).max() < 25 + 1.1 * np.log(abs(far)), far


def test_many_columns_are_looked_at_in_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks of 1024 rows, of which the last may be short."""
    monkeypatch.setattr(transform_fit, "MAX_NUMBERS", 2**16)
    with open_splits(np.random.default_rng(0).normal(size=(40_000, 4)), 0.0) as splits:
        assert 15 * 1024 < len(transform_fit.sample_of(splits.train)[0]) <= 16 * 1024
    with open_splits(np.random.default_rng(0).normal(size=(40_000, 64)), 0.0) as splits:
        rows = len(transform_fit.sample_of(splits.train)[0])
    assert rows == 2**10
    compared: list[int] = []
    monkeypatch.setattr(transform_fit, "quantile_knots", lambda v, w=None: compared.append(len(v)) or fit_knots(v, 8))
    x = np.random.default_rng(0).normal(size=40_000)
    assert gain_of_spline(x, None, 2000) is not None
    assert compared == [1600]  # but every fifth


def test_digits_that_follow_the_size_of_the_numbers() -> None:
    """No step is to be recommended where small numbers are recorded in smaller steps than large ones."""
    x = table()
    x[:, 0] = [float(f"{value:.1e}") for value in x[:, 0]]
    notes = " ".join(fitted("auto", x).notes)
    assert "significant digits, so that values repeat: 0 ('gauss')" in notes
    assert "recorded to few digits: 5 ('coarse') (steps of 0.01)" in notes


def test_what_auto_chooses_is_the_likelier_of_two() -> None:
    """On rows that the fits have not seen, of columns that one of the two suits."""
    rng = np.random.default_rng(12)
    assert gain_of_spline(rng.exponential(size=400)) > 0.15
    assert gain_of_spline(rng.standard_t(2.0, 400)) < -0.02
    assert gain_of_spline(rng.normal(size=5)) is None
    assert gain_of_spline(np.zeros(400)) is None
    one_sided = np.concatenate([rng.normal(size=800), 3.0 + 20.0 * rng.exponential(size=800)])
    weights = np.repeat([1.0, 1e-3], 800)
    assert gain_of_spline(one_sided) > 0.3
    assert abs(gain_of_spline(rng.permutation(one_sided), None) - gain_of_spline(one_sided)) < 0.2
    shuffled = rng.permutation(1600)
    assert gain_of_spline(one_sided[shuffled], weights[shuffled]) < 0.05, "what weighs nothing does not count"
