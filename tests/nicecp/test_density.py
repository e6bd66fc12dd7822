"""A flow under other people's names: SciPy's, a prior's, a sampler's; and in their processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from nicecp import NICE, fit, load
from nicecp.errors import CheckpointError, DataError
from nicecp.preprocessing import Dequantize, MarginLogit, Standardize
from nicecp.records import DataInfo
from nicecp.transforms import Angle, Log, Logit, Quantile
from tests import gates
from tests.nicecp.test_point import zca

ROOT = Path(__file__).resolve().parents[2]
D = 4


def make(prior: str = "logistic", d: int = D, **more: Any) -> NICE:
    spec = gates.make_spec(d, ((6,),) * 3, prior, laws=("affine", "additive"))
    return NICE.from_spec(spec, gates.draw_parameters(spec), **more)


def rows(n: int, d: int = D, seed: int = 1) -> Any:
    return np.random.default_rng(seed).normal(size=(n, d))


# --- log-densities --------------------------------------------------------------------------------------------------


def test_log_prob_and_its_gradient_come_together() -> None:
    flow, x = make(preprocessing=gates.standardize(D)), rows(6).reshape(2, 3, D)
    value, gradient = flow.log_prob_and_grad(x)
    assert (value.shape, gradient.shape) == ((2, 3), (2, 3, D))
    np.testing.assert_allclose(value, flow.log_prob(x), rtol=1e-13)
    np.testing.assert_array_equal(gradient, flow.grad_log_prob(x))
    for column, step in enumerate(1e-5 * np.eye(D)):
        slope = (flow.log_prob(x + step) - flow.log_prob(x - step)) / 2e-5
        np.testing.assert_allclose(gradient[..., column], slope, rtol=1e-7, atol=1e-8)
    one, its_gradient = flow.log_prob_and_grad(x[0, 0])
    assert isinstance(one, float)
    np.testing.assert_allclose(its_gradient, gradient[0, 0], rtol=1e-12)


def test_log_prob_and_grad_of_what_is_not_finite() -> None:
    flow, x = make(), rows(3)
    x[0, 1], x[1, 2] = np.nan, np.inf
    value, gradient = flow.log_prob_and_grad(x, floor=-100.0)
    np.testing.assert_array_equal(np.isnan(value), [True, False, False])
    assert value[1] == -100.0
    assert flow.log_prob_and_grad(x)[0][1] == -np.inf
    np.testing.assert_array_equal(np.isnan(gradient).any(axis=1), [True, True, False])


def test_nothing_is_below_the_floor() -> None:
    flow, x = make(), rows(50)
    x[::7] *= 1e3
    plain = flow.log_prob(x)
    assert (plain < -200).any()
    for few in (flow._few, 0):
        flow._few = few
        np.testing.assert_allclose(flow.log_prob(x, floor=-200.0), np.maximum(plain, -200.0), rtol=1e-12)


def test_samples_with_their_log_densities() -> None:
    flow = make()
    x, log_prob = flow.sample(300, 5, return_log_prob=True)
    np.testing.assert_array_equal(x, flow.sample(300, 5))
    np.testing.assert_array_equal(log_prob, flow.log_prob(x))


# --- the duck type --------------------------------------------------------------------------------------------------


def test_a_flow_is_a_distribution_of_scipy() -> None:
    flow = make()
    assert (flow.dim, flow.n_features) == (D, D)
    np.testing.assert_array_equal(flow.logpdf(rows(5)), flow.log_prob(rows(5)))
    assert [flow.rvs(size, 1).shape for size in (None, 1, 7, (2, 3), 0)] == [(D,), (1, D), (7, D), (2, 3, D), (0, D)]
    for make_state in (lambda: 3, lambda: np.random.default_rng(3), lambda: np.random.RandomState(3)):
        np.testing.assert_array_equal(flow.rvs(4, make_state()), flow.rvs(4, make_state()))
        assert not np.array_equal(flow.rvs(4, make_state()), flow.rvs(4, 4))
    np.random.seed(8)  # noqa: NPY002
    first, second = flow.rvs(3), flow.rvs(3)
    np.random.seed(8)  # noqa: NPY002
    np.testing.assert_array_equal(flow.rvs(3), first)
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="size"):
        flow.rvs(-1)


def test_names_are_those_of_the_columns() -> None:
    assert make().names == ("x0", "x1", "x2", "x3")
    assert make(info=DataInfo(columns=("a", "b", "c", "d"))).names == ("a", "b", "c", "d")


def test_bounds_are_those_of_the_columns() -> None:
    infinite = np.tile([-np.inf, np.inf], (D, 1))
    np.testing.assert_array_equal(make().bounds, infinite)
    np.testing.assert_array_equal(make(preprocessing=(Dequantize(), *gates.standardize(D))).bounds, infinite)
    two, three = np.array([0, 2]), np.array([1.0, -2.0])
    log, logit = Log(two, three), Logit(np.array([1, 2]), np.array([-1.0, -4.0]), np.array([1.0, 4.0]))
    expected = [(1, np.inf), (-1, 1), (np.exp(-4) - 2, np.exp(4) - 2), (-np.inf, np.inf)]
    np.testing.assert_allclose(make(preprocessing=(log, logit, *gates.standardize(D), zca(D))).bounds, expected)
    angle = Angle(np.array([3]), np.array([-1.0]), np.array([24.0]))
    np.testing.assert_allclose(make(preprocessing=(angle,)).bounds, [*infinite[:3], (-1.0, 23.0)])
    knots = Quantile(two, np.array([2, 2]), *[np.array([0.0, 1, 0, 1])] * 2, np.ones(4), np.ones((2, 2)))
    np.testing.assert_array_equal(make(preprocessing=(knots,)).bounds, infinite)
    margin = MarginLogit(np.zeros(D), np.full(D, 9.0), 0.05)
    np.testing.assert_allclose(make(preprocessing=(margin, *gates.standardize(D))).bounds, [(-0.5, 9.5)] * D)
    for outside in (1.0, 0.9, -np.inf):
        assert make(preprocessing=(log,)).log_prob(np.array([outside, 0, 0, 0])) == -np.inf
    mixed = make(preprocessing=(zca(D), log)).bounds  # a half-space that no box describes
    np.testing.assert_array_equal(mixed, infinite)


# --- a prior --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["logistic", "gaussian"])
def test_the_cube_is_mapped_through_the_quantiles_of_the_prior(prior: str) -> None:
    flow, u = make(prior, preprocessing=gates.standardize(D)), np.random.default_rng(2).random((200, D))
    quantile = stats.logistic.ppf if prior == "logistic" else stats.norm.ppf
    x = flow.prior_transform(u)
    np.testing.assert_allclose(flow.forward(x)[0], quantile(u), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(flow.prior_transform(u[3]), x[3], rtol=1e-12)
    assert flow.prior_transform(u.reshape(2, 100, D)).shape == (2, 100, D)
    ends = flow.prior_transform(np.array([0.0, 1.0, 0.5, 5e-324]))
    assert np.isfinite(ends).all()


def test_the_volume_of_the_cube_is_the_density() -> None:
    """The Jacobian of prior_transform is 1 / p: what nested sampling relies on."""
    flow, u = make("gaussian"), np.random.default_rng(2).uniform(0.05, 0.95, (20, D))
    jacobian = np.stack(
        [(flow.prior_transform(u + h) - flow.prior_transform(u - h)) / 2e-6 for h in 1e-6 * np.eye(D)], axis=-1
    )
    log_volume = np.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(-log_volume, flow.log_prob(flow.prior_transform(u)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [-1e-9, 1.0 + 1e-9, np.nan, np.inf])
def test_numbers_outside_the_cube_are_refused(bad: float) -> None:
    u = np.full((3, D), 0.5)
    u[1, 2] = bad
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        make().prior_transform(u)


# --- files and training ---------------------------------------------------------------------------------------------


def test_a_flow_loads_itself(tmp_path: Path) -> None:
    flow, path = make(preprocessing=gates.standardize(D)), tmp_path / "a.h5"
    flow.save(path)
    twin = NICE.load(path)
    np.testing.assert_array_equal(twin.log_prob(rows(5)), flow.log_prob(rows(5)))
    np.testing.assert_array_equal(load(path).log_prob(rows(5)), flow.log_prob(rows(5)))
    assert NICE.load(path, threads=1).backend.blas_threads == 1  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"'.*a\.h5'"):
        NICE.load(path)


def test_fit_names_the_row_that_is_nan() -> None:
    x = rows(50)
    x[31, 2] = np.nan
    with pytest.raises(DataError, match="row 31"):
        fit(make(), x, epochs=1)


# --- threads and processes ------------------------------------------------------------------------------------------


def chain(log_prob: Any, seed: int, steps: int = 60) -> Any:
    """A Metropolis chain : (steps, d) and its log-densities."""
    rng, x = np.random.default_rng(seed), np.zeros(D)
    here, states = log_prob(x), []
    for _ in range(steps):
        there = x + 0.5 * rng.standard_normal(D)
        value = log_prob(there)
        if np.log(rng.random()) < value - here:
            x, here = there, value
        states.append([*x, here])
    return np.array(states)


@pytest.fixture(scope="module")
def trained() -> NICE:
    """Trained in this process, by more threads than one, before any pool is made."""
    flow = NICE(D, (16,), 3, threads=2, init="he")
    fit(flow, rows(400), epochs=1, batch_size=100)
    return flow


POOLS = """
import multiprocessing, sys
import numpy as np
import nicecp

def chain(log_prob, seed):
    rng, x = np.random.default_rng(seed), np.zeros(4)
    here, states = log_prob(x), []
    for _ in range(60):
        there = x + 0.5 * rng.standard_normal(4)
        value = log_prob(there)
        if np.log(rng.random()) < value - here:
            x, here = there, value
        states.append([*x, here])
    return np.array(states)

if __name__ == "__main__":
    rows = np.random.default_rng(1).normal(size=(400, 4))
    flow = nicecp.NICE(4, (16,), 3, threads=2, init="he")
    nicecp.fit(flow, rows, epochs=1, batch_size=100)  # by two threads, before there is a pool
    tasks = [(target, seed) for target in (flow.log_prob, flow.njit_log_prob()) for seed in (1, 2)]
    serial = [chain(*task) for task in tasks]
    assert np.array_equal(serial[0], serial[2])
    assert not np.array_equal(serial[0], serial[1])
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        found = pool.starmap_async(chain, tasks).get(timeout=300)
        points = pool.map(flow.log_prob, rows[:20])
    for one, other in zip(found, serial, strict=True):
        assert np.array_equal(one, other)
    assert points == [flow.log_prob(row) for row in rows[:20]]
    print("the same bits")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_chains_in_worker_processes_are_the_serial_ones(tmp_path: Path, method: str) -> None:
    """Of a flow that was trained in the parent, as a program's own pool computes them."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    program = tmp_path / "pools.py"
    program.write_text(POOLS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(program), method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same bits\n"


def test_points_from_four_threads_are_the_serial_ones(trained: NICE) -> None:
    compiled, expected, found = trained.njit_log_prob(), {}, {}
    for seed in range(4):
        expected[seed] = chain(trained.log_prob, seed)

    def work(seed: int) -> None:
        found[seed] = [chain(target, seed) for target in (trained.log_prob, compiled) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    for seed in range(4):
        assert len(found[seed]) == 10
        for states in found[seed]:
            np.testing.assert_array_equal(states, expected[seed])


def test_a_standardised_point_is_what_the_steps_say() -> None:
    step = Standardize(np.arange(D) * 1.0, np.arange(1, D + 1) * 1.0)
    flow, plain, x = make(preprocessing=(step,)), make(), rows(8)
    np.testing.assert_allclose(flow.log_prob(step.inverse(x)), plain.log_prob(x) + step.log_det, rtol=1e-12)
