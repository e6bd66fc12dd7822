"""Column transforms fitted by the rows' weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nicecp
from nicecp import spline
from nicecp.transform_fit import emptiest, fit_student, quantile_knots
from nicecp.transform_stats import look_at


def tilted(n: int = 6000) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a normal distribution whose weights make them rows of one at 1, of a wide one, and of Student's t."""
    r = np.random.default_rng(6)
    x = np.stack([r.normal(size=n), 3.0 * r.normal(size=n), r.standard_t(3.0, n)], axis=1)
    return x, np.exp(x[:, 0] - 0.5)


def test_weights_move_a_quantile_spline() -> None:
    x, weights = tilted()
    places = np.linspace(-0.5, 2.5, 7)
    z = spline.forward(places, quantile_knots(x[:, 0], weights))[0]
    np.testing.assert_allclose(z, places - 1.0, atol=0.12)
    assert np.abs(spline.forward(places, quantile_knots(x[:, 0]))[0] - places).max() < 0.12
    counts = np.random.default_rng(7).integers(1, 4, 400)
    values, ones = x[:400, 0], np.ones(int(counts.sum()))
    repeated = spline.fit_knots(np.repeat(values, counts), 16)
    np.testing.assert_array_equal(spline.fit_knots(np.repeat(values, counts), 16, 1e200 * ones).x, repeated.x)
    weighted = spline.fit_knots(values, 16, counts.astype(float))
    inside = np.linspace(-2, 2, 9)
    np.testing.assert_allclose(spline.forward(inside, weighted)[0], spline.forward(inside, repeated)[0], atol=0.05)


def test_one_heavy_row_gives_a_spline_too() -> None:
    x, weights = tilted(500)
    weights[3] = 1e12
    for values in x.T:
        knots = quantile_knots(values, weights)
        assert np.isfinite(spline.forward(values, knots)[1]).all()


def test_weights_move_the_other_fits() -> None:
    x, weights = tilted()
    assert fit_student(3.0 + x[:, 2] + 0.0 * weights, np.ones(len(x)))[1] == pytest.approx(3.0, abs=0.1)
    assert fit_student(x[:, 0], weights)[1] == pytest.approx(1.0, abs=0.1)
    around = np.random.default_rng(8).uniform(0, 2 * np.pi, 8000)
    cut = emptiest(around, 2 * np.pi, np.where(np.abs(around - 4.0) < 0.5, 0.01, 1.0))
    assert abs(cut - 4.0) < 0.6
    look, plain = look_at(x[:, 0], np.float64, weights), look_at(x[:, 0], np.float64)
    assert plain.rows == 6000
    assert 1000 < look.rows < 4000
    wide = look_at(np.exp(x[:, 1]), np.float64, np.exp(-np.maximum(x[:, 1], 0.0) * 3))
    assert wide.skewness < 0.3 * look_at(np.exp(x[:, 1]), np.float64).skewness
    uniform = look_at(x[:, 2], np.float64, np.full(len(x), 7.0))
    assert uniform == look_at(x[:, 2], np.float64)


def test_a_logit_is_standardised_by_weights() -> None:
    r = np.random.default_rng(9)
    x, weights = r.beta(2.0, 2.0, size=(500, 2)), r.integers(0, 3, 500)
    made = []
    for rows, given in ((x, weights), (np.repeat(x, weights, axis=0), None)):
        flow = nicecp.NICE(2, (4,))
        how: dict[str, Any] = {"logit": 0.01, "whiten": "gaussian", "valid_fraction": 0}
        nicecp.fit(flow, rows, epochs=1, sample_weight=given, **how)
        made.append([array for step in flow.preprocessing for array in step.arrays().values()])
    for one, other in zip(*made, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_preprocessing_by_weights() -> None:
    x, weights = tilted()
    (standardize,), _ = nicecp.fit_preprocessing(x, "none", sample_weight=weights)
    np.testing.assert_allclose(standardize.arrays()["mean"][0], np.average(x[:, 0], weights=weights), rtol=1e-12)
    steps, _ = nicecp.fit_preprocessing(x, "quantile", sample_weight=weights)
    flow = nicecp.NICE(3, (4,), preprocessing=steps)
    assert np.average(flow.forward(x)[0][:, 0], weights=weights) == pytest.approx(0.0, abs=0.02)
