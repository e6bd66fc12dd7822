"""Flows of spline couplings: the identity at first, bounded tails, smooth, and better than factors where it is bent."""

from __future__ import annotations

import numpy as np
import pytest

import nicecp
from nicecp.flow import NICE
from nicecp.kernels.backend import SPLINE_BOUND
from tests import gates

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


@DTYPES
def test_zeros_are_the_identity(dtype: str) -> None:
    flow = NICE(5, (6,), 4, "gaussian", dtype, coupling="spline")
    flow.set_parameters({name: 0 * value for name, value in flow.parameters().items()})
    x = np.random.default_rng(0).normal(0, 3, (50, 5)).astype(dtype).astype(float)
    h, log_det = flow.forward(x)
    np.testing.assert_allclose(h, x, rtol=0, atol=1e-14 if dtype == "float64" else 1e-6)
    np.testing.assert_allclose(log_det, 0, atol=1e-14)
    np.testing.assert_allclose(flow.log_prob(x), -(x**2 + np.log(2 * np.pi)).sum(axis=1) / 2, rtol=1e-6)


@DTYPES
@pytest.mark.parametrize("prior", ["gaussian", "logistic"])
def test_tails_are_bounded(dtype: str, prior: str) -> None:
    """A row far out costs what the prior makes it cost, in every way to score it, and comes back from the latent."""
    spec = gates.make_spec(4, [(5,), (4, 3), (5,)], prior, dtype, laws=("spline",))
    flow, x = gates.make_flow(spec)
    rows = np.concatenate([x] * 3)
    for column, value in enumerate((1e6, -1e6, 1e15, -1e15)):
        rows[column, column] = value
    rows[4] = 1e30
    found, one_point = np.asarray(flow.log_prob(rows)), flow.njit_log_prob()
    assert np.isfinite(found).all()
    np.testing.assert_allclose([one_point(row) for row in rows], found, rtol=1e-4)
    np.testing.assert_allclose(gates.log_prob_by_backend(flow, rows), found, rtol=1e-4)
    size = np.abs(rows).max(axis=1)
    scale = 10 * np.exp(np.abs(flow.parameters()["scaling/log_scale"]).max())
    assert (found > -1e3 - (scale * size) ** (2 if prior == "gaussian" else 1)).all()
    assert np.isfinite(flow.grad_log_prob(rows)).all()
    back = flow.inverse(flow.forward(rows)[0])[0]
    assert (np.abs(back - rows).max(axis=1) <= 1e-4 * np.maximum(size, 1)).all()


def test_the_map_is_smooth_across_knots_and_ends() -> None:
    """Slopes on both sides of every knot and of both ends agree, and a column's map increases."""
    spec = gates.make_spec(2, [()], laws=("spline",))
    flow, _ = gates.make_flow(spec)
    grid = np.linspace(-1.2 * SPLINE_BOUND, 1.2 * SPLINE_BOUND, 20_001)
    x = np.stack([np.full_like(grid, 0.7), grid], axis=1)
    h = np.asarray(flow.forward(x)[0])[:, 1]
    slopes = np.diff(h) / np.diff(grid)
    assert (slopes > 0).all()
    assert np.abs(np.diff(slopes)).max() < 0.01 * slopes.max(), "a jump"
    outside = np.abs(grid) > SPLINE_BOUND
    scale = np.exp(flow.parameters()["scaling/log_scale"][1])
    np.testing.assert_allclose(h[outside], scale * grid[outside], rtol=1e-12)


@pytest.mark.slow
def test_splines_learn_two_humps_where_factors_cannot() -> None:
    """x1 has two humps given x0: its density is known; an affine coupling can only move and stretch one."""
    rng = np.random.default_rng(0)
    x0 = rng.normal(size=4000)
    x1 = np.where(rng.random(4000) < 0.5, -1.0, 1.0) * (1.2 + 0.3 * np.tanh(x0)) + 0.2 * rng.normal(size=4000)
    x, score = np.stack([x0, x1], axis=1), {}
    for law in ("affine", "spline"):
        flow = NICE(2, (24,), 3, "gaussian", coupling=law, init="he", seed=1, threads=1)
        nicecp.fit(flow, x[:3000], epochs=30, batch_size=100)
        score[law] = float(np.mean(flow.log_prob(x[3000:])))
    t0, t1 = x[3000:].T
    centre = 1.2 + 0.3 * np.tanh(t0)
    humps = np.logaddexp(-0.5 * ((t1 - centre) / 0.2) ** 2, -0.5 * ((t1 + centre) / 0.2) ** 2)
    true = float(np.mean(-0.5 * t0**2 + humps - np.log(2 * 2 * np.pi * 0.2)))
    assert true - 0.08 < score["spline"] < true
    assert score["spline"] > score["affine"] + 0.1
