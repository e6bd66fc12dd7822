"""The gates that a flow must pass: each compares the library with the oracle or with differences, or raises.

The tests run them on the library as it is, and on deliberately broken copies (tests/nicecp/test_mutants.py): a gate
that a broken copy passes is worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.flow import NICE
from nicecp.kernels.backend import Backend
from nicecp.preprocessing import Standardize, Step
from nicecp.spec import CouplingSpec, ModelSpec
from tests import oracle, oracle_parts

F64 = NDArray[np.float64]
COMPLEX_STEP = {"float64": 1e-12, "float32": 5e-6}  # of each array's norm; measured: below 1e-14 and 1e-6
STEP = 1e-5  # of central differences, in float64 only
CENTRAL = 1e-8  # of the gradient's norm; measured: below 1e-9


def make_spec(
    d: int,
    hidden: Sequence[Sequence[int]],
    prior: str = "logistic",
    dtype: str = "float64",
    first: int = 0,
    laws: Sequence[str] = ("additive",),
    partition: str | Sequence[int] = "odd-even",
    orders: Mapping[int, Sequence[int]] | None = None,
) -> ModelSpec:
    """One coupling for every entry of hidden, alternating, the first conditioned on part ``first``; laws in turn.

    orders : of couplings by their number, where they have one of their own
    """
    own = {k: tuple(order) for k, order in (orders or {}).items()}
    couplings = tuple(
        CouplingSpec(laws[k % len(laws)], (first + k) % 2, 1 - (first + k) % 2, tuple(h), order=own.get(k))
        for k, h in enumerate(hidden)
    )
    if isinstance(partition, str):
        return ModelSpec(d, couplings, prior, dtype, partition=partition)
    return ModelSpec(d, couplings, prior, dtype, partition="permutation", order=tuple(partition))


def draw_parameters(spec: ModelSpec, seed: int = 0) -> dict[str, F64]:
    """Parameters of order 1 that the flow's dtype represents, so that every gradient is of order 1 as well.

    Output layers of couplings with a factor or a spline are smaller: several factors of 20 in a row would leave sums of
    numbers of very different sizes, and their rounding.
    """
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in spec.parameter_shapes().items():
        size = np.sqrt(1.5 / shape[0]) if name.endswith("weight") else 0.4
        _, k, _, j, _ = f"{name}////".split("/")[:5]
        law = spec.couplings[int(k)].law if name.startswith("couplings") else "additive"
        if law != "additive" and int(j) == len(spec.couplings[int(k)].hidden):
            size *= 0.1 if law == "spline" else 0.3
        out[name] = (size * rng.standard_normal(shape)).astype(spec.dtype).astype(float)
    return out


def kink_distance(spec: ModelSpec, parameters: dict[str, F64], z: F64, context: F64 | None = None) -> F64:
    """z : (n, d), context : (n, k) -> (n,): how far each row's nearest ReLU is from its kink."""
    distance, order = np.full(len(z), np.inf), oracle_parts.order_of(spec)
    parts = oracle_parts.parts_of(z, order)
    for k, (c, after) in enumerate(zip(spec.couplings, oracle_parts.orders_of(spec), strict=True)):
        parts, order = oracle_parts.regrouped(parts, order, after), after
        outputs = oracle.network(parameters, k, oracle.beside(parts[c.conditions_on], context))
        for x, (w, b) in zip(outputs[:-2], oracle.layers(parameters, k)[:-1], strict=True):
            distance = np.minimum(distance, np.abs(x @ w + b).min(axis=1))
        parts[c.transforms] = oracle.couple(c.law, parts[c.transforms], outputs[-1])[0]
    return distance


def draw_rows(
    spec: ModelSpec, parameters: dict[str, F64], n: int, seed: int = 1, clear: float = 1e-3, candidates: int = 300
) -> F64:
    """n rows of the flow's input space, representable in its dtype, whose ReLUs are all clear of their kinks.

    A difference or a rounding that steps over a kink would say nothing about the derivative.
    """
    drawn = np.random.default_rng(seed).normal(0, 1.5, (candidates, spec.n_features)).astype(spec.dtype).astype(float)
    rows = drawn[kink_distance(spec, parameters, drawn) > clear][:n]
    assert len(rows) == n, "too few rows are clear of the kinks: use a smaller flow"
    return rows


def make_flow(
    spec: ModelSpec, backend: Backend | None = None, seed: int = 0, preprocessing: tuple[Step, ...] = ()
) -> tuple[NICE, F64]:
    """A flow with drawn parameters, and six rows of data for it (data space)."""
    parameters = draw_parameters(spec, seed)
    z = draw_rows(spec, parameters, 6, seed + 1)
    for step in reversed(preprocessing):
        z = step.inverse(z)
    return NICE.from_spec(spec, parameters, preprocessing, backend=backend), z


def standardize(d: int) -> tuple[Step, ...]:
    return (Standardize(np.linspace(-3, 5, d), np.linspace(0.5, 4, d)),)


# --- what the library should say ------------------------------------------------------------------------------------


def host_parameters(flow: NICE) -> dict[str, F64]:
    return {name: value.astype(float) for name, value in flow.parameters().items()}


def to_inputs(flow: NICE, x: F64) -> tuple[F64, float, F64]:
    """Data -> input space by the preprocessing's definition: z, log abs det, dz/dx per column."""
    z, slope = x, np.ones(x.shape[1])
    for step in flow.preprocessing:
        if isinstance(step, Standardize):
            z, slope = (z - step.mean) / step.std, slope / step.std
    return z, float(np.log(slope).sum()), slope


def expected_log_prob(flow: NICE, x: F64) -> F64:
    z, log_det, _ = to_inputs(flow, x)
    return oracle.log_prob(flow.spec, host_parameters(flow), z) + log_det


def assert_near(actual: Any, expected: F64, rtol: float, what: str) -> None:
    """Relative norm of one array; NaN fails."""
    actual = np.asarray(actual, float)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    gap, size = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    assert np.isfinite(gap), f"{what} is not finite"
    assert gap <= rtol * size, f"{what}: off by {gap:.3g}, {gap / size if size else np.inf:.3g} of its norm"


def log_prob_by_backend(flow: NICE, x: F64) -> F64:
    """log_prob by the backend's kernels, as larger flows' rows go."""
    few, flow._few = flow._few, 0
    try:
        return np.asarray(flow.log_prob(x))
    finally:
        flow._few = few


# --- gates ----------------------------------------------------------------------------------------------------------


def gate_oracle(
    spec: ModelSpec, parameters: dict[str, F64], x: F64, gradients: Callable[..., Any] = oracle.gradients
) -> None:
    """The oracle's gradients by hand are those by complex step, array by array."""
    by_hand, dx = gradients(spec, parameters, x)
    expected, expected_dx = oracle.complex_step(spec, parameters, x)
    assert by_hand.keys() == expected.keys()
    for name in expected:
        assert_near(by_hand[name], expected[name], 1e-12, name)
    assert_near(dx, expected_dx, 1e-12, "x")


def gate_complex_step(flow: NICE, x: F64) -> None:
    """The library's loss and gradients are the oracle's by complex step, array by array, in the flow's dtype."""
    tolerance = COMPLEX_STEP[flow.spec.dtype]
    z, log_det, slope = to_inputs(flow, x)
    expected, dz = oracle.complex_step(flow.spec, host_parameters(flow), z)
    loss, gradients = flow.loss_and_gradients(x)
    assert_near(loss, np.array(oracle.mean_loss(flow.spec, host_parameters(flow), z) - log_det), tolerance, "loss")
    assert gradients.keys() == expected.keys()
    for name in expected:
        assert gradients[name].dtype == flow.dtype
        assert_near(gradients[name], expected[name], tolerance, name)
    assert_near(flow.grad_log_prob(x), dz * slope, tolerance, "x")


def gate_central_differences(flow: NICE, x: F64) -> None:
    """The library's gradients are central differences of its own log_prob: every parameter, every input, float64."""
    assert flow.spec.dtype == "float64", "a float32 flow is never differenced"
    parameters = host_parameters(flow)
    gradients = flow.loss_and_gradients(x)[1]
    size = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    try:
        for name, value in parameters.items():
            slope = np.empty(value.shape)
            for entry in np.ndindex(value.shape):
                ends = []
                for h in (STEP, -STEP):
                    moved = value.copy()
                    moved[entry] += h
                    flow.set_parameters({**parameters, name: moved})
                    ends.append(-log_prob_by_backend(flow, x).mean())
                slope[entry] = (ends[0] - ends[1]) / (2 * STEP)
            gap = np.linalg.norm(gradients[name] - slope)
            assert np.isfinite(gap), f"{name} is not finite"
            size = max(size, np.linalg.norm(slope))
            assert gap <= CENTRAL * size, f"{name}: off by {gap:.3g}, {gap / size:.3g} of the gradient's norm"
    finally:
        flow.set_parameters(parameters)
    dx, slope = flow.grad_log_prob(x), np.empty(x.shape)
    for column in range(x.shape[1]):
        step = np.zeros(x.shape[1])
        step[column] = STEP
        slope[:, column] = (log_prob_by_backend(flow, x + step) - log_prob_by_backend(flow, x - step)) / (2 * STEP)
    assert_near(dx, slope, CENTRAL, "x")


def gate_log_det(flow: NICE, x: F64) -> None:
    """forward's log_det is slogdet of its numerical Jacobian, row by row, and inverse's is its negative."""
    h, log_det = flow.forward(x)
    d = x.shape[1]
    jacobian = np.empty((len(x), d, d))
    for column in range(d):
        step = np.zeros(d)
        step[column] = STEP
        jacobian[:, :, column] = (flow.forward(x + step)[0] - flow.forward(x - step)[0]) / (2 * STEP)
    sign, expected = np.linalg.slogdet(jacobian)
    assert (sign == 1).all()
    np.testing.assert_allclose(log_det, expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(flow.inverse(h)[1], -expected, rtol=0, atol=1e-7)


def gate_density(flow: NICE, x: F64) -> None:
    """log_prob is the oracle's, which adds the log-determinant by its own means; so is the latent."""
    tolerance = COMPLEX_STEP[flow.spec.dtype]
    assert_near(flow.log_prob(x), expected_log_prob(flow, x), tolerance, "log_prob")
    blocks = np.tile(x, (7, 1))
    assert_near(flow.log_prob(blocks), expected_log_prob(flow, blocks), tolerance, "log_prob in blocks")
    assert_near(log_prob_by_backend(flow, x), expected_log_prob(flow, x), tolerance, "log_prob by the backend")
    z, log_det, _ = to_inputs(flow, x)
    h, s = oracle.forward(flow.spec, host_parameters(flow), z)
    got, got_log_det = flow.forward(x)
    assert_near(got, h, tolerance, "h")
    assert_near(got_log_det, s + np.full(len(x), log_det), tolerance, "log_det")


def gate_round_trip(flow: NICE, x: F64) -> None:
    """inverse(forward(x)) is x and forward(inverse(h)) is h, and the inverse is the oracle's."""
    tolerance = 1e-12 if flow.spec.dtype == "float64" else 5e-6
    h = flow.forward(x)[0]
    assert_near(flow.inverse(h)[0], x, tolerance, "inverse(forward(x))")
    latent = np.random.default_rng(5).standard_normal(x.shape)
    back = flow.inverse(latent)[0]
    assert_near(flow.forward(back)[0], latent, tolerance, "forward(inverse(h))")
    z = oracle.inverse(flow.spec, host_parameters(flow), latent)
    for step in reversed(flow.preprocessing):
        z = step.inverse(z)
    assert_near(back, z, tolerance, "inverse(h)")
