"""Gradients, log-determinants, round trips and densities of the flow, through the gates of tests/gates.py."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest

from nicecp import testing
from nicecp.flow import NICE
from nicecp.kernels.backend import Backend
from nicecp.preprocessing import Dequantize, MarginLogit
from nicecp.spec import ModelSpec
from nicecp.testing import check_gradients
from tests import gates, oracle

# d, hidden layers of every coupling, which part the first coupling reads, the couplings' laws in turn, and the
# partition if it is another than odd-even, orders of single couplings: 1 to 5 couplings, depths 0 to 3, mixed too
SHAPES: dict[str, tuple[Any, ...]] = {
    "d2-one-linear": (2, [()], 0, ("additive",)),
    "d3-two": (3, [(4,), (4,)], 0, ("additive",)),
    "d4-three-deep": (4, [(3, 5, 4)] * 3, 0, ("additive",)),
    "d5-four-mixed": (5, [(), (4,), (3, 4), (4, 3, 2)], 1, ("additive",)),
    "d7-five": (7, [(5,)] * 5, 0, ("additive",)),
    "d3-one-multiplicative": (3, [()], 1, ("multiplicative",)),
    "d5-multiplicative": (5, [(4,), (3, 4), (4,)], 0, ("multiplicative",)),
    "d4-affine": (4, [(3, 4)] * 3, 0, ("affine",)),
    "d5-all-laws": (5, [(4,), (), (3, 4), (4,), (3,)], 1, ("additive", "affine", "multiplicative")),
    "d3-spline": (3, [(4,), (4, 3)], 0, ("spline",)),
    "d5-spline-in-turn": (5, [(4,), (3, 4), ()], 1, ("spline", "affine", "spline"), "halves"),
    "d5-halves": (5, [(4,), (3, 4), (4,)], 0, ("additive", "affine"), "halves"),
    "d6-permuted": (6, [(4,), (3, 4), (4,)], 1, ("multiplicative", "additive"), (4, 1, 0, 5, 2, 3)),
    "d5-new-parts": (5, [(4,), (3,), (), (4, 3)], 1, ("affine",), "odd-even", {2: (3, 0, 1, 4, 2)}),
    "d4-new-parts-each": (4, [(4,)] * 3, 0, ("additive",), (2, 0, 3, 1), {1: (0, 1, 2, 3), 2: (3, 0, 2, 1)}),
}
EACH_SHAPE = pytest.mark.parametrize("shape", list(SHAPES))
EACH_PRIOR = pytest.mark.parametrize("prior", ["gaussian", "logistic"])


def spec_of(shape: str, prior: str, dtype: str = "float64") -> ModelSpec:
    d, hidden, first, laws, *partition = SHAPES[shape]
    return gates.make_spec(d, hidden, prior, dtype, first, laws, *partition)


@EACH_SHAPE
@EACH_PRIOR
def test_the_oracle_by_complex_step(shape: str, prior: str) -> None:
    spec = spec_of(shape, prior)
    parameters = gates.draw_parameters(spec)
    gates.gate_oracle(spec, parameters, gates.draw_rows(spec, parameters, 6))


@EACH_SHAPE
@EACH_PRIOR
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_and_density_are_the_oracles(backend: Backend, shape: str, prior: str, dtype: str) -> None:
    flow, x = gates.make_flow(spec_of(shape, prior, dtype), backend)
    gates.gate_complex_step(flow, x)
    gates.gate_density(flow, x)
    gates.gate_round_trip(flow, x)


@EACH_SHAPE
@EACH_PRIOR
def test_central_differences_and_log_det(one_backend: Backend, shape: str, prior: str) -> None:
    flow, x = gates.make_flow(spec_of(shape, prior), one_backend)
    gates.gate_central_differences(flow, x)
    gates.gate_log_det(flow, x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_preprocessing_is_part_of_the_density(one_backend: Backend, dtype: str) -> None:
    """Standardised columns: log_prob and its gradient are in data space, log-determinant included."""
    steps = (Dequantize(), *gates.standardize(5))
    flow, x = gates.make_flow(spec_of("d5-four-mixed", "logistic", dtype), one_backend, preprocessing=steps)
    gates.gate_complex_step(flow, x)
    gates.gate_density(flow, x)
    gates.gate_round_trip(flow, x)
    if dtype == "float64":
        gates.gate_log_det(flow, x)
        gates.gate_central_differences(flow, x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wide_flow_and_more_rows_than_a_chunk(one_backend: Backend, dtype: str) -> None:
    """Gradients by the oracle's hand-written pass: 1100 rows, 4 couplings of 65 features, layers of 64."""
    spec = gates.make_spec(65, [(64, 64)] * 4, dtype=dtype)
    parameters = gates.draw_parameters(spec)
    x = gates.draw_rows(spec, parameters, 1100, clear=2e-6, candidates=1500)
    flow = NICE.from_spec(spec, parameters, backend=one_backend)
    expected, dx = oracle.gradients(spec, parameters, x)
    tolerance = gates.COMPLEX_STEP[dtype]
    for name, value in flow.loss_and_gradients(x)[1].items():
        gates.assert_near(value, expected[name], tolerance, name)
    gates.assert_near(flow.grad_log_prob(x), dx, tolerance, "x")
    gates.gate_density(flow, x)
    gates.gate_round_trip(flow, x)


# --- check_gradients ------------------------------------------------------------------------------------------------


SPLINE = pytest.param("spline", marks=pytest.mark.slow)  # 23 numbers for each feature: many parameters


@pytest.mark.parametrize(
    ("dtype", "init"),
    [
        ("float64", "paper"),
        ("float32", "he"),
        pytest.param("float32", "paper", marks=pytest.mark.slow),
        pytest.param("float64", "he", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("coupling", ["additive", "multiplicative", "affine", ("affine", "additive"), SPLINE])
def test_check_gradients_passes_fresh_flows(dtype: str, init: str, coupling: str | tuple[str, ...]) -> None:
    flow = NICE(5, hidden=(6, 4), n_couplings=3, dtype=dtype, init=init, seed=3, coupling=coupling)
    before = flow.parameters()
    report = check_gradients(flow, np.random.default_rng(0).normal(size=(4, 5)))
    assert report.rows == 4
    assert report.directions >= 2 * (min(flow.n_parameters, 220) + flow.n_features)
    assert 0 < report.error <= 0.5, "half of what is allowed, so that rounding elsewhere has room"
    assert report.log_det_error < 1e-8
    assert all(np.array_equal(value, before[name]) for name, value in flow.parameters().items())


@pytest.mark.parametrize("partition", ["odd-even", "halves", (4, 1, 0, 2, 3)])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_check_gradients_passes_every_partition(dtype: str, partition: str | tuple[int, ...]) -> None:
    flow = NICE(5, hidden=(6, 4), n_couplings=3, dtype=dtype, seed=3, coupling="affine", partition=partition)
    report = check_gradients(flow, np.random.default_rng(0).normal(size=(4, 5)))
    assert 0 < report.error <= 0.5
    assert report.log_det_error < 1e-8


@pytest.mark.slow
def test_check_gradients_draws_what_it_is_not_given() -> None:
    """Rows in the support of the preprocessing, and a context for all of them."""
    step = MarginLogit(np.zeros(4), np.ones(4), 0.01)
    flow = NICE(4, hidden=(6, 4), n_couplings=3, coupling="affine", n_context=2, seed=3, preprocessing=(step,))
    report = check_gradients(flow)
    assert report.rows == 6
    assert 0 < report.error <= 0.5
    assert check_gradients(flow, seed=1) != report


def test_the_example_in_the_docstring() -> None:
    outcome = doctest.testmod(testing)
    assert outcome.attempted > 3
    assert outcome.failed == 0


@EACH_PRIOR
def test_check_gradients_samples_large_flows(one_backend: Backend, prior: str) -> None:
    """More parameters than max_checks, data on another scale, and rows beside kinks as they come."""
    spec = gates.make_spec(6, [(32, 32)] * 4, prior)
    flow, _ = gates.make_flow(spec, one_backend, preprocessing=gates.standardize(6))
    x = flow.inverse(np.random.default_rng(2).normal(size=(8, 6)))[0]
    report = check_gradients(flow, x, max_checks=40)
    arrays = len(flow.parameters())
    assert 2 * (2 * arrays + 6) <= report.directions <= 2 * (40 + 3 * arrays + 7)
    assert check_gradients(flow, x, max_checks=40) == report
    assert check_gradients(flow, x, max_checks=40, seed=1) != report


@pytest.mark.slow
def test_check_gradients_beside_kinks() -> None:
    """A fresh flow's biases are 0: a row of zeros puts every unit of the first layer exactly on its kink."""
    flow = NICE(4, hidden=(5, 5), n_couplings=3, seed=2)
    x = np.random.default_rng(1).normal(size=(3, 4))
    x[1] = 0
    report = check_gradients(flow, x)
    assert report.left_out > 0
    with pytest.raises(AssertionError, match="layers/0/weight cannot be judged"):
        check_gradients(flow, x[1])  # where x is 0 the first weights have no influence
    assert check_gradients(flow, x[0]).rows == 1


@pytest.mark.parametrize("x", [np.zeros((0, 4)), np.full((2, 4), np.nan), np.zeros((2, 5)), np.zeros((2, 2, 4))])
def test_check_gradients_refuses_what_it_cannot_check(x: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected|must be"):
        check_gradients(NICE(4, hidden=(3,), n_couplings=3), x)


# --- the density as a density ---------------------------------------------------------------------------------------


@EACH_PRIOR
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("laws", [("additive",), ("affine",), ("spline",)])
def test_the_density_integrates_to_one(one_backend: Backend, prior: str, dtype: str, laws: tuple[str, ...]) -> None:
    """Over a grid in data space that holds all but 1e-5 of the mass, standardised columns included."""
    spec = gates.make_spec(2, [(5,), (4,), (5,)], prior, dtype, laws=laws)
    flow, _ = gates.make_flow(spec, one_backend, preprocessing=gates.standardize(2))
    edge = flow.sample(4000, 3)
    reach = 2.2 * np.abs(edge - edge.mean(axis=0)).max(axis=0)
    axes = [np.linspace(m - r, m + r, 1400) for m, r in zip(edge.mean(axis=0), reach, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    assert np.exp(flow.log_prob(grid)).sum() * cell == pytest.approx(1, abs=1e-4)


@EACH_PRIOR
def test_samples_follow_the_density(one_backend: Backend, prior: str) -> None:
    """Counts of 40,000 samples in cells against the density's mass there, each within five standard errors."""
    spec = gates.make_spec(2, [(5,), (4,), (5,)], prior)
    flow, _ = gates.make_flow(spec, one_backend)
    n, x = 40_000, flow.sample(40_000, 11)
    low, high = np.quantile(x, 0.02, axis=0), np.quantile(x, 0.98, axis=0)
    fine, coarse = 400, 8
    axes = [lo + (hi - lo) * (np.arange(fine) + 0.5) / fine for lo, hi in zip(low, high, strict=True)]
    density = np.exp(flow.log_prob(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)))
    mass = density.reshape(coarse, fine // coarse, coarse, -1).sum(axis=(1, 3)) * np.prod((high - low) / fine)
    counts = np.histogram2d(*x.T, bins=coarse, range=list(zip(low, high, strict=True)))[0]
    used = n * mass > 20
    assert used.sum() > coarse**2 // 2
    error = (counts - n * mass)[used] / np.sqrt(n * mass * (1 - mass))[used]
    assert np.abs(error).max() < 5
    assert np.sqrt((error**2).mean()) < 1.5


def test_samples_are_the_inverse_of_the_prior(one_backend: Backend) -> None:
    """By the seed alone; a longer draw begins with a shorter one; the latent of a sample is the oracle's noise."""
    flow, _ = gates.make_flow(gates.make_spec(5, [(4,)] * 3), one_backend, preprocessing=gates.standardize(5))
    x = flow.sample(50, 2**40 + 1)
    assert x.shape == (50, 5)
    assert x.dtype == np.float64
    assert np.array_equal(flow.sample(20, 2**40 + 1), x[:20])
    assert not np.isin(flow.sample(50, 1), x).any()
    gates.assert_near(flow.forward(x)[0], oracle.fill_logistic(2**40 + 1, 4, 0, np.arange(50), 5), 1e-12, "latent")
    rng = np.random.default_rng(1)
    assert not np.array_equal(flow.sample(3, rng), flow.sample(3, rng))
    assert np.array_equal(flow.sample(3, np.random.default_rng(9)), flow.sample(3, np.random.default_rng(9)))
    assert flow.sample(0, 1).shape == (0, 5)


# --- shapes and odd numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shapes(one_backend: Backend, dtype: str) -> None:
    flow, x = gates.make_flow(gates.make_spec(3, [(4,)] * 3, dtype=dtype), one_backend)
    rows, tolerance = flow.log_prob(x), gates.COMPLEX_STEP[dtype]
    assert rows.shape == (6,)
    assert rows.dtype == np.float64
    assert isinstance(flow.log_prob(x[0]), float)
    gates.assert_near(flow.log_prob(x[0]), rows[0], tolerance, "one row")
    gates.assert_near(flow.log_prob(x.reshape(2, 3, 3)), rows.reshape(2, 3), tolerance, "(2, 3, d)")
    gates.assert_near(flow.log_prob(x.tolist()), rows, 0, "a list")
    gates.assert_near(flow.log_prob(np.asfortranarray(x)[::1]), rows, 0, "Fortran order")
    assert flow.log_prob(x, dtype=np.float32).dtype == np.float32
    assert flow.log_prob(np.zeros((0, 3))).shape == (0,)
    assert flow.log_prob(np.zeros((2, 0, 3))).shape == (2, 0)
    for call in (flow.grad_log_prob, lambda x: flow.forward(x)[0], lambda x: flow.inverse(x)[0]):
        assert call(x[0]).shape == (3,)
        assert call(x.reshape(3, 2, 3)).shape == (3, 2, 3)
        assert call(np.zeros((0, 3))).shape == (0, 3)
        gates.assert_near(call(x[0]), call(x)[0], tolerance, "one row")
    for transform in (flow.forward, flow.inverse):
        assert isinstance(transform(x[0])[1], float)
        assert np.shape(transform(x.reshape(2, 3, 3))[1]) == (2, 3)


@EACH_PRIOR
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_gives_nan_and_infinity_minus_infinity(one_backend: Backend, prior: str, dtype: str) -> None:
    """In their own rows only."""
    spec = gates.make_spec(4, [(4,)] * 3, prior, dtype)
    flow, x = gates.make_flow(spec, one_backend, preprocessing=gates.standardize(4))
    good = flow.log_prob(x)
    x[1, 2], x[2, 0], x[3, 3], x[4, :2] = np.nan, np.inf, -np.inf, (np.nan, np.inf)
    got = flow.log_prob(x)
    assert np.isnan(got[[1, 4]]).all()
    assert (got[[2, 3]] == -np.inf).all()
    assert np.array_equal(got[[0, 5]], good[[0, 5]])
    assert np.isnan(flow.log_prob(x[1]))
    assert flow.log_prob(x[2]) == -np.inf
    assert np.isfinite(flow.grad_log_prob(x)[[0, 5]]).all()
    assert not np.isfinite(flow.grad_log_prob(x)[1:5]).all(axis=1).any()


@pytest.mark.parametrize("call", ["log_prob", "grad_log_prob", "forward", "inverse"])
@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (np.zeros((2, 5)), ValueError, r"\(\.\.\., 4\).*\(2, 5\)"),
        (np.zeros(3), ValueError, r"\(\.\.\., 4\).*\(3,\)"),
        (1.5, ValueError, r"\(\.\.\., 4\).*\(\)"),
        (np.zeros((2, 4), complex), TypeError, "real.*complex"),
        (np.full((2, 4), "a"), TypeError, "real.*U1"),
        (np.full((2, 4), None), TypeError, "real.*object"),
    ],
)
def test_wrong_input_says_what_was_expected(call: str, x: object, error: type[Exception], says: str) -> None:
    flow = NICE(4, hidden=(3,), n_couplings=3)
    with pytest.raises(error, match=says):
        getattr(flow, call)(x)


def test_wrong_parameters_are_refused() -> None:
    flow = NICE(4, hidden=(3,), n_couplings=3)
    named = flow.parameters()
    with pytest.raises(ValueError, match="scaling/log_scale"):
        flow.set_parameters({**named, "scaling/log_scale": np.zeros(5)})
    with pytest.raises(ValueError, match="couplings/0/layers/0/bias"):
        flow.set_parameters({name: value for name, value in named.items() if name != "couplings/0/layers/0/bias"})
    with pytest.raises(ValueError, match="extra"):
        flow.set_parameters({**named, "extra": np.zeros(1)})
