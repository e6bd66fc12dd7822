"""The logit step: log-determinants of every step and list of steps, on the host and on the device, and runs with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nicecp import NICE
from nicecp.evaluate import Evaluator
from nicecp.flow import NICE as Flow
from nicecp.kernels.backend import Backend, Purpose, Slot
from nicecp.loading import Loader
from nicecp.preprocessing import (
    Dequantize,
    MarginLogit,
    Standardize,
    Step,
    Triangular,
    Zca,
    apply_steps,
    steps_backward,
    undo_steps,
)
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.testing import check_gradients
from nicecp.train import TrainConfig, Trainer
from nicecp.whitening import fit_gaussian, fit_zca
from tests import gates, oracle
from tests.mutants import refuses

D = 5
LOW, HIGH = np.array([0.0, -1.0, 2.0, -30.0, 0.5]), np.array([1.0, 1.0, 2.5, 50.0, 0.75])
_rng = np.random.default_rng(0)
_Q = np.linalg.qr(_rng.normal(size=(D, D)))[0]
STEPS: dict[str, Step] = {
    "dequantize": Dequantize(-1.0, 1.0),
    "standardize": Standardize(np.linspace(-3, 5, D), np.linspace(0.5, 4, D)),
    "zca": Zca(np.linspace(-1, 1, D), np.linspace(0.2, 3, D), _Q, 0.1),
    "triangular": Triangular(np.tril(_rng.normal(size=(D, D))) + 2 * np.eye(D), np.ones(D)),
    "logit": MarginLogit(LOW, HIGH, 0.05),
    "logit-0": MarginLogit(LOW, HIGH),
}
LISTS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in STEPS},
    "none": (),
    "logit, standardize": ("logit", "standardize"),
    "logit, zca, triangular": ("logit-0", "zca", "triangular"),
    "standardize, zca": ("standardize", "zca"),
}


def steps_of(name: str) -> tuple[Step, ...]:
    return tuple(STEPS[step] for step in LISTS[name])


def twice() -> tuple[Step, ...]:
    """Affine, logit, affine, another logit, affine: the second one's range holds all that the first ones give."""
    first, second = (
        MarginLogit(np.full(D, -15.0), np.full(D, 15.0), 0.01),
        MarginLogit(np.full(D, -3.0), np.full(D, 4.0)),
    )
    return STEPS["standardize"], first, Standardize(np.full(D, -0.1), np.full(D, 2.0)), second, STEPS["zca"]


def rows(n: int = 6, seed: int = 1) -> Any:
    return LOW + (HIGH - LOW) * np.random.default_rng(seed).uniform(0.05, 0.95, (n, D))


def jacobians(function: Any, x: Any) -> Any:
    """x : (n, d) -> (n, d, d) by fourth-order central differences, in steps of 1e-4 of the range."""
    h = 1e-4 * (HIGH - LOW)
    out = np.zeros((*function(x).shape, D))
    for column, e in enumerate(np.eye(D)):
        for weight, multiple in ((8, 1), (-8, -1), (-1, 2), (1, -2)):
            out[..., column] += weight * function(x + multiple * h * e) / (12 * h[column])
    return out


# --- every step, every list ------------------------


@pytest.mark.parametrize("name", [*LISTS, "twice"])
def test_log_determinants_are_those_of_numerical_jacobians(name: str) -> None:
    steps, x = (twice() if name == "twice" else steps_of(name)), rows()
    z, log_det = apply_steps(steps, x)
    expected = np.linalg.slogdet(jacobians(lambda x: apply_steps(steps, x)[0], x))[1]
    np.testing.assert_allclose(np.broadcast_to(log_det, 6), expected, rtol=0, atol=1e-8)
    assert (np.ptp(expected) > 0.1) == ("logit" in name or name == "twice")
    back, opposite = undo_steps(steps, z)
    np.testing.assert_allclose(back, x, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(np.broadcast_to(opposite, 6), -expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", [*LISTS, "twice"])
def test_gradients_go_back_through_steps(name: str) -> None:
    """The gradient of w z(x) + log det by x, against differences."""
    steps, x, w = (twice() if name == "twice" else steps_of(name)), rows(), np.linspace(-1, 2, D)

    def value(x: Any) -> Any:
        z, log_det = apply_steps(steps, x)
        return z @ w + log_det

    slope = jacobians(lambda x: value(x)[:, None], x)[:, 0]
    gates.assert_near(steps_backward(steps, np.tile(w, (6, 1)), x), slope, 1e-8, name)


def test_a_logit_by_its_formula() -> None:
    x = np.array([[0.0, -1.0, 2.5, 10.0, 0.625]])
    step = MarginLogit(LOW, HIGH, 0.05)
    np.testing.assert_allclose(step.forward(x), [[-np.log(19), -np.log(19), np.log(19), 0, 0]], atol=1e-12)
    p = np.array([0.05, 0.05, 0.95, 0.5, 0.5])
    expected = (np.log(0.9 / (HIGH - LOW)) - np.log(p * (1 - p))).sum()
    assert step.log_det + step.log_det_rows(x)[0] == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(step.inverse(np.array([[-800.0] * D]))[0], LOW - 0.05 / 0.9 * (HIGH - LOW), rtol=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "margin", "says"),
    [
        (np.zeros(2), np.zeros(3), 0.0, "one shape"),
        (np.zeros(2), np.zeros(2), 0.0, "low below high"),
        (np.zeros(2), np.full(2, np.inf), 0.0, "finite"),
        (np.zeros(2), np.ones(2), 0.5, "margin must be at least 0 and below 1/2, got 0.5"),
        (np.zeros(2), np.ones(2), -0.1, "margin"),
        (np.zeros(2), np.ones(2), np.nan, "margin"),
    ],
)
def test_no_logit_of_such_numbers(low: Any, high: Any, margin: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MarginLogit(low, high, margin)


# --- flows ------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["logit", "logit, standardize", "logit, zca, triangular", "twice"])
@pytest.mark.parametrize("partition", ["odd-even", "halves"])
@pytest.mark.slow
def test_flows_behind_a_logit(one_backend: Backend, dtype: str, name: str, partition: str) -> None:
    steps = twice() if name == "twice" else steps_of(name)
    spec = gates.make_spec(D, [(4,), (3, 4), (4,)], dtype=dtype, laws=("affine", "additive"), partition=partition)
    parameters = gates.draw_parameters(spec)
    flow, x = NICE.from_spec(spec, parameters, steps, backend=one_backend), rows()
    tolerance = gates.COMPLEX_STEP[dtype]
    z, log_det = apply_steps(steps, x)
    expected = oracle.log_prob(spec, parameters, z) + log_det
    gates.assert_near(flow.log_prob(x), expected, tolerance, "log_prob")
    h, by_forward = flow.forward(x)
    gates.assert_near(h, oracle.forward(spec, parameters, z)[0], tolerance, "h")
    gates.assert_near(by_forward, oracle.forward(spec, parameters, z)[1] + log_det, tolerance, "log_det")
    back, opposite = flow.inverse(h)
    np.testing.assert_allclose(back, x, rtol=0, atol=(1e-9 if dtype == "float64" else 1e-4) * (HIGH - LOW).max())
    report = check_gradients(flow, x)
    assert report.error <= 0.5
    if dtype == "float64":
        np.testing.assert_allclose(opposite, -by_forward, atol=1e-8)
        expected = np.linalg.slogdet(jacobians(lambda x: flow.forward(x)[0], x))[1]
        np.testing.assert_allclose(by_forward, expected, atol=1e-7)
    loss, _ = flow.loss_and_gradients(x)
    assert loss == pytest.approx(-float(np.mean(flow.log_prob(x))), rel=1e-6)


def test_outside_the_range_the_density_is_zero(one_backend: Backend) -> None:
    flow, x = NICE(D, (4,), 3, preprocessing=(STEPS["logit"],)), rows()
    x[1, 0], x[2, 3], x[3, 2], x[4] = -0.2, 80.0, np.nan, LOW
    got = flow.log_prob(x)
    assert (got[1:3] == -np.inf).all()
    assert np.isnan(got[3])
    assert np.isfinite(got[[0, 4, 5]]).all(), "the ends themselves have a density, with a margin"
    assert np.isnan(flow.grad_log_prob(x)[1:4]).all()
    with pytest.raises(ValueError, match="preprocessing has finite values"):
        check_gradients(flow, x[:2])


def test_the_density_integrates_to_one(one_backend: Backend) -> None:
    """Over the box and what the margin adds to it."""
    spec = gates.make_spec(2, [(5,), (4,), (5,)], "gaussian", laws=("affine",))
    step = MarginLogit(np.array([0.0, -2.0]), np.array([1.0, 3.0]), 0.05)
    flow = NICE.from_spec(spec, gates.draw_parameters(spec), (step,), backend=one_backend)
    edge = 0.05 / 0.9 * (step.high - step.low)
    low, high = step.low - edge, step.high + edge
    k = 1200
    axes = [lo + (hi - lo) * (np.arange(k) + 0.5) / k for lo, hi in zip(low, high, strict=True)]
    density = np.exp(flow.log_prob(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)))
    assert density.sum() * np.prod((high - low) / k) == pytest.approx(1, abs=1e-3)
    x = flow.sample(2000, 1)
    assert ((x > low) & (x < high)).all()
    assert x[:, 1].std() > 0.1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda step: {"log_det_rows": lambda self, x: np.zeros(len(x))},
        lambda step: {"log_det_rows": lambda self, x: 1.01 * step.log_det_rows(self, x)},
        lambda step: {"log_det": 0.0},
        lambda step: {"backward": lambda self, dz, x: 1.01 * step.backward(self, dz, x)},
        lambda step: {"backward": lambda self, dz, x: step.backward(self, dz + 1 - 2 * self._p(x), x)},
        lambda step: {"inverse": lambda self, z: step.inverse(self, 1.01 * z)},
    ],
    ids=["no log-det", "log-det scaled", "no common log-det", "gradient scaled", "gradient without log-det", "inverse"],
)
def test_a_wrong_logit_is_refused(spoil: Any) -> None:
    wrong = type("Wrong", (MarginLogit,), spoil(MarginLogit))
    for kind in (MarginLogit, wrong):
        flow = Flow(D, (4,), 3, preprocessing=(kind(LOW, HIGH, 0.05),), seed=2, init="he")
        if kind is MarginLogit:
            check_gradients(flow, rows())
        else:
            refuses(check_gradients, flow, rows())


# --- on the device ------------------------


def loaded(flow: NICE, data: Any, n: int) -> tuple[Any, Any]:
    """The first batch in data order, and each row's own log-determinant."""
    backend, ws = flow.backend, flow.network.workspace(n, keep=False)
    index, state = backend.asarray(np.arange(n)), backend.alloc(Slot.SIZE, np.float64)
    Loader(flow, n).load(ws, backend.asarray(data), index, index, state, 3, Purpose.TEST_NOISE)
    x = backend.alloc((n, flow.n_features), flow.spec.dtype)
    backend.join(x, *ws.x, flow.network.order)
    return backend.copy_out(x), backend.copy_out(ws.before) if ws.before is not None else np.zeros(n)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("partition", ["odd-even", (4, 0, 3, 1, 2)])
@pytest.mark.parametrize("name", ["none", "logit", "logit, standardize", "logit, zca, triangular", "twice"])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_device_loads_what_the_steps_say(
    backend: Backend, dtype: str, partition: Any, name: str, eight_bit: bool
) -> None:
    steps = twice() if name == "twice" else steps_of(name)
    data: Any = rows(40).astype(np.float32)
    if eight_bit:
        spread = Standardize(-LOW / (HIGH - LOW), 1 / (HIGH - LOW))  # 0..1 -> low..high
        steps = (Dequantize(), spread, *steps)
        data = np.random.default_rng(2).integers(3, 253, (40, D)).astype(np.uint8)
    spec = gates.make_spec(D, [(4,)] * 3, dtype=dtype, partition=partition)
    x, own = loaded(NICE.from_spec(spec, None, steps, backend=backend), data, 40)
    values = data.astype(float)
    if eight_bit:
        values = (values * 65536 + oracle.uniform_bits(3, Purpose.TEST_NOISE, 0, np.arange(40), D)) / 2**24
    z, log_det = apply_steps(steps, values)
    tolerance = {"float32": 2e-5, "float64": 1e-11}[dtype]  # a logit stretches what rounding left of values near 0
    gates.assert_near(x, z, tolerance, "x")
    common = sum(step.log_det for step in steps)
    gates.assert_near(own + common, np.broadcast_to(log_det, 40).copy(), tolerance, "log_det")


def test_training_and_evaluation_report_densities_of_data(one_backend: Backend) -> None:
    """The first step's mean log-likelihood, and every row's in evaluation, are log_prob of these rows."""
    steps, data = steps_of("logit, standardize"), rows(60, 3)
    flow = NICE(D, (6,), 3, coupling="affine", preprocessing=steps, init="he", threads=1)
    want = flow.log_prob(data)
    split = Split.contiguous(ArraySource(data), 0, 60, Purpose.TEST_NOISE)
    evaluator = Evaluator(flow, split, batch_size=25)
    got = evaluator.row_log_probs(flow.network.layout.views(flow.flat), 0, 0)
    np.testing.assert_allclose(got, want, rtol=1e-11)
    trainer = Trainer(flow, split, None, TrainConfig(batch_size=60))
    trainer.step()
    mean = trainer.state[Slot.LOG_PROB_SUM] / trainer.state[Slot.WEIGHT_SUM]
    assert mean + sum(step.log_det for step in steps) == pytest.approx(want.mean(), rel=1e-11)


def test_whitening_behind_a_logit() -> None:
    """Fitted where it is applied: the rows behind all steps have covariance 1."""
    data = rows(400, 5)
    data[:, 1] = LOW[1] + (HIGH[1] - LOW[1]) * (0.7 * (data[:, 0] - LOW[0]) / (HIGH[0] - LOW[0]) + 0.15)
    data[:, 1] += np.random.default_rng(1).normal(0, 0.05, 400)
    train = Split.contiguous(ArraySource(data), 0, 400, Purpose.TRAIN_NOISE)
    for fitted in (fit_zca, fit_gaussian):
        z = apply_steps((STEPS["logit"], fitted(train, (STEPS["logit"],))), data)[0]
        np.testing.assert_allclose(np.cov(z.T, bias=True), np.eye(D), atol=1e-8)
