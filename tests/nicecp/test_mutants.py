"""The flow's gates themselves: each must refuse flows that are broken on purpose, or it shows nothing.

A mutant is the real flow with one result spoiled, or on a backend with one operation replaced; the gates are the
functions that the other tests run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from nicecp.coupling import Buffers
from nicecp.flow import NICE
from nicecp.kernels.backend import Backend
from nicecp.network import Network
from nicecp.preprocessing import Standardize
from nicecp.spec import ModelSpec
from nicecp.testing import check_gradients
from tests import gates, oracle
from tests.mutants import (
    SPOIL,
    Change,
    Mutant,
    always_adds,
    refuses,
    without_log_det,
    without_log_det_gradient,
    without_mask,
)

Gate = Callable[[NICE, Any], Any]

SPEC = gates.make_spec(4, [(3,), (), (2, 2)])
NAMES = [*SPEC.parameter_shapes(), "x"]
CHECK: Gate = partial(check_gradients, max_checks=30)
GRADIENT_GATES: dict[str, Gate] = {
    "complex-step": gates.gate_complex_step,
    "central-differences": gates.gate_central_differences,
    "check-gradients": CHECK,
}
ALL_GATES = {
    **GRADIENT_GATES,
    "log-det": gates.gate_log_det,
    "density": gates.gate_density,
    "round-trip": gates.gate_round_trip,
}


# --- spoiled results ------------------------------------------------------------------------------------------------


def spoiled(name: str, spoil: Callable[[Any], Any], when: Callable[[NICE], bool] = lambda flow: True) -> type[NICE]:
    """NICE with one of its gradients spoiled: a parameter's, or the data's for "x"."""

    class Spoiled(NICE):
        def loss_and_gradients(self, x: Any) -> Any:
            loss, gradients = super().loss_and_gradients(x)
            if name in gradients and when(self):
                gradients[name] = spoil(gradients[name])
            return loss, gradients

        def grad_log_prob(self, x: Any, context: None = None) -> Any:
            dx = super().grad_log_prob(x)
            return spoil(dx) if name == "x" and when(self) else dx

    return Spoiled


def rebuilt(kind: type[NICE], flow: NICE, backend: Any = None) -> NICE:
    return kind.from_spec(flow.spec, flow.parameters(), flow.preprocessing, backend=backend or flow.backend)


@pytest.fixture
def good(one_backend: Backend) -> tuple[NICE, Any]:
    return gates.make_flow(SPEC, one_backend, preprocessing=gates.standardize(4))


@pytest.mark.parametrize("gate", list(ALL_GATES))
def test_an_honest_flow_passes(one_backend: Backend, good: tuple[NICE, Any], gate: str) -> None:
    """The same flow and rows, through the same wrappers: what the mutants fail for is their mutation."""
    flow, x = good
    ALL_GATES[gate](rebuilt(spoiled("x", lambda a: a), flow, Mutant(one_backend)), x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spoil", list(SPOIL))
@pytest.mark.parametrize("gate", list(GRADIENT_GATES))
def test_a_spoiled_gradient_is_refused(good: tuple[NICE, Any], gate: str, spoil: str, name: str) -> None:
    flow, x = good
    with pytest.raises(AssertionError, match=rf"\b{name}\b"):
        GRADIENT_GATES[gate](rebuilt(spoiled(name, SPOIL[spoil]), flow), x[:3])


@pytest.mark.parametrize("gate", list(GRADIENT_GATES))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_refused(good: tuple[NICE, Any], gate: str, bad: float) -> None:
    """A single entry: comparisons with NaN are false, also those that should raise."""
    flow, x = good

    def one_bad(gradient: Any) -> Any:
        gradient.reshape(-1)[-1] = bad
        return gradient

    for name in ("couplings/0/layers/0/weight", "x"):
        refuses(GRADIENT_GATES[gate], rebuilt(spoiled(name, one_bad), flow), x)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "x"])
@pytest.mark.parametrize("spoil", ["zeroed", "scaled"])
def test_check_gradients_refuses_them_in_a_fresh_flow(spoil: str, name: str) -> None:
    """Where the initial weights make most gradients so small that no difference of log_prob resolves them."""
    flow = spoiled(name, SPOIL[spoil]).from_spec(SPEC, seed=1)
    with pytest.raises(AssertionError, match=rf"gradient by {name}\b"):
        CHECK(flow, np.random.default_rng(0).normal(size=(3, 4)))


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_is_refused_too(name: str) -> None:
    parameters = gates.draw_parameters(SPEC)
    x = gates.draw_rows(SPEC, parameters, 3)

    def wrong(spoil: Callable[[Any], Any], *args: Any) -> Any:
        gradients, dx = oracle.gradients(*args)
        return {k: spoil(v) if k == name else v for k, v in gradients.items()}, spoil(dx) if name == "x" else dx

    gates.gate_oracle(SPEC, parameters, x, partial(wrong, lambda a: a))
    for spoil in SPOIL.values():
        refuses(gates.gate_oracle, SPEC, parameters, x, partial(wrong, spoil))


@pytest.mark.parametrize("name", ["x", "couplings/0/layers/0/weight", "scaling/log_scale"])
@pytest.mark.parametrize("gate", ["complex-step", "check-gradients"])
def test_float32_alone_can_be_wrong(one_backend: Backend, gate: str, name: str) -> None:
    """A mistake in the float32 kernels only: the float64 copy that differences are taken of is right."""
    flow, x = gates.make_flow(gates.make_spec(4, [(3,), (), (2, 2)], dtype="float32"), one_backend)
    for spoil in SPOIL.values():
        wrong = spoiled(name, spoil, when=lambda flow: flow.spec.dtype == "float32")
        refuses(GRADIENT_GATES[gate], rebuilt(wrong, flow), x)


def test_a_batch_that_loses_its_last_row_is_refused(good: tuple[NICE, Any]) -> None:
    flow, x = good

    class Losing(NICE):
        def loss_and_gradients(self, x: Any) -> Any:
            return super().loss_and_gradients(x)[0], super().loss_and_gradients(x[: max(1, len(x) - 1)])[1]

    for gate in GRADIENT_GATES.values():
        refuses(gate, rebuilt(Losing, flow), x)


# --- broken mathematics ---------------------------------------------------------------------------------------------


def negated_output(position: int) -> Change:
    def change(original: Change, *args: Any) -> None:
        original(*args)
        if args[position] is not None:
            args[position][...] *= -1

    return change


def no_scaling(original: Change, x0: Any, x1: Any, h0: Any, h1: Any, s0: Any, s1: Any) -> None:
    x0[...], x1[...] = h0, h1


NO_LOG_DET = {"scale_prior_forward": without_log_det, "scale_prior_backward": without_log_det_gradient}
GRADIENT = ("complex-step", "central-differences", "check-gradients")
BROKEN: dict[str, tuple[dict[str, Change], tuple[str, ...]]] = {  # changes of the backend -> gates that must refuse
    "no log-det in log_prob": ({"scale_prior_forward": without_log_det}, (*GRADIENT, "density")),
    "no log-det in the gradient": ({"scale_prior_backward": without_log_det_gradient}, GRADIENT),
    "no log-det in either": (NO_LOG_DET, ("complex-step", "check-gradients", "density")),
    "no ReLU mask": ({"dense_backward": without_mask}, GRADIENT),
    "no ReLU": ({"dense_forward": without_mask}, (*GRADIENT, "density", "round-trip")),
    "sign of dx": ({"dense_backward": negated_output(0)}, GRADIENT),
    "sign of dw": ({"dense_backward": negated_output(1)}, GRADIENT),
    "sign of the prior's slope": ({"scale_prior_backward": negated_output(0)}, GRADIENT),
    "sign of ds": ({"scale_prior_backward": negated_output(3)}, GRADIENT),
    "inverse adds": ({"couple": always_adds}, ("round-trip",)),
    "inverse does not scale": ({"scale_inverse": no_scaling}, ("round-trip",)),
}


@pytest.mark.parametrize(("mutant", "gate"), [(name, gate) for name, (_, all_) in BROKEN.items() for gate in all_])
def test_broken_mathematics_is_refused(one_backend: Backend, good: tuple[NICE, Any], mutant: str, gate: str) -> None:
    flow, x = good
    refuses(ALL_GATES[gate], rebuilt(NICE, flow, Mutant(one_backend, **BROKEN[mutant][0])), x)


@pytest.mark.parametrize("gate", ["log-det", "density", "check-gradients"])
@pytest.mark.parametrize("kept", [0, 1, None])
def test_a_lost_log_det_is_refused(
    monkeypatch: pytest.MonkeyPatch, good: tuple[NICE, Any], gate: str, kept: int | None
) -> None:
    """All of it lost, or all but one half's, everywhere at once: log_prob, its gradient and forward agree."""
    flow, x = good

    def log_det(params: Any) -> float:
        return 0.0 if kept is None else float(params.scaling[kept].sum())

    def lossy(original: Change, logp: Any, h0: Any, h1: Any, x0: Any, x1: Any, s0: Any, s1: Any, *rest: Any) -> None:
        original(logp, h0, h1, x0, x1, s0, s1, *rest)
        logp -= sum(s.sum() for part, s in enumerate((s0, s1)) if part != kept)

    def lossy_gradient(original: Change, dx0: Any, dx1: Any, ds0: Any, ds1: Any, dlogp: Any, *rest: Any) -> None:
        original(dx0, dx1, ds0, ds1, dlogp, *rest)
        for part, ds in enumerate((ds0, ds1)):
            if ds is not None and part != kept:
                ds -= dlogp.sum()

    monkeypatch.setattr("nicecp.network.Network.log_det", lambda self, params: log_det(params))
    backend = Mutant(flow.backend, scale_prior_forward=lossy, scale_prior_backward=lossy_gradient)
    broken = rebuilt(NICE, flow, backend)
    gates.gate_central_differences(broken, x)  # differences of log_prob cannot see it ...
    refuses(ALL_GATES[gate], broken, x)  # ... so these must


@pytest.mark.parametrize("gate", ["log-det", "density", "check-gradients"])
def test_preprocessing_without_its_log_det_is_refused(
    monkeypatch: pytest.MonkeyPatch, good: tuple[NICE, Any], gate: str
) -> None:
    monkeypatch.setattr(Standardize, "log_det", 0.0)
    refuses(ALL_GATES[gate], *good)


LAWS = gates.make_spec(4, [(3,), (), (2, 2)], laws=("affine", "multiplicative", "additive"))


def no_log_det(original: Change, y: Any, log_det: Any, *rest: Any) -> None:
    original(y, log_det, *rest)
    log_det[...] = 0


def no_log_det_gradient(original: Change, dx: Any, dm: Any, dy: Any, dlog_det: Any, *rest: Any) -> None:
    original(dx, dm, dy, np.zeros_like(dlog_det), *rest)


def scaled_gradient(original: Change, dx: Any, dm: Any, *args: Any) -> None:
    original(dx, dm, *args)
    dm *= 1.01


def last_log_det_alone(original: Change, *args: Any) -> None:
    original(*args[:-1], True)


FACTOR_MUTANTS: dict[str, tuple[dict[str, Change], tuple[str, ...]]] = {
    "no log-det": ({"factor_forward": no_log_det}, ("log-det", "density", "complex-step", "check-gradients")),
    "not added": ({"accumulate": lambda original, out, x: None}, ("density", "complex-step", "check-gradients")),
    "of the last coupling alone": ({"factor_forward": last_log_det_alone}, ("log-det", "density", "check-gradients")),
    "without a gradient": ({"factor_backward": no_log_det_gradient}, tuple(GRADIENT_GATES)),
    "gradient scaled": ({"factor_backward": scaled_gradient}, tuple(GRADIENT_GATES)),
}


SPLINES = gates.make_spec(4, [(3,), (), (2, 2)], laws=("spline",))


@pytest.mark.parametrize(
    "spec", [pytest.param(LAWS, id="factors"), pytest.param(SPLINES, id="splines", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("mistake", list(FACTOR_MUTANTS))
def test_log_dets_that_are_wrong_are_refused(one_backend: Backend, mistake: str, spec: ModelSpec) -> None:
    flow, x = gates.make_flow(spec, one_backend)
    changes, names = FACTOR_MUTANTS[mistake]
    if spec is SPLINES:
        changes = {name.replace("factor", "spline"): change for name, change in changes.items()}
    for name in names:
        ALL_GATES[name](rebuilt(NICE, flow, Mutant(one_backend)), x)
        refuses(ALL_GATES[name], rebuilt(NICE, flow, Mutant(one_backend, **changes)), x)


PERMUTED = gates.make_spec(5, [(3,), (), (2, 2)], partition=(3, 0, 4, 2, 1))


def without_order(original: Change, x: Any, x0: Any, x1: Any, order: Any) -> None:
    original(x, x0, x1, np.concatenate([np.arange(0, len(order), 2), np.arange(1, len(order), 2)]))


def test_a_latent_joined_in_another_order_is_refused(one_backend: Backend) -> None:
    flow, x = gates.make_flow(PERMUTED, one_backend)
    for name in ("density", "round-trip", "complex-step", "central-differences", "check-gradients"):
        ALL_GATES[name](rebuilt(NICE, flow, Mutant(one_backend)), x)
        refuses(ALL_GATES[name], rebuilt(NICE, flow, Mutant(one_backend, join=without_order)), x)


def test_a_log_scale_out_of_order_is_refused(monkeypatch: pytest.MonkeyPatch, one_backend: Backend) -> None:
    """Views of it in the parts' order instead of the data's: the flow is another one than its parameters say."""
    flow, x = gates.make_flow(PERMUTED, one_backend)
    parts = PERMUTED.part_sizes[0]
    as_parts = property(lambda spec: (slice(0, parts), slice(parts, None)))
    monkeypatch.setattr("nicecp.params.ModelSpec.latent_columns", as_parts)
    refuses(gates.gate_density, rebuilt(NICE, flow), x)


OTHER_PARTS = gates.make_spec(5, [(3,), (), (2, 2)], orders={1: (3, 0, 4, 2, 1), 2: (1, 2, 0, 4, 3)})


def by_inverse(original: Change, y0: Any, y1: Any, x0: Any, x1: Any, index: Any) -> None:
    original(y0, y1, x0, x1, np.argsort(index))


def as_they_were(original: Change, y0: Any, y1: Any, x0: Any, x1: Any, index: Any) -> None:
    y0[...], y1[...] = x0, x1


@pytest.mark.parametrize("mistake", [by_inverse, as_they_were])
def test_parts_that_are_not_those_of_the_coupling_are_refused(one_backend: Backend, mistake: Change) -> None:
    """There and back alike: only what knows the right parts can see it."""
    flow, x = gates.make_flow(OTHER_PARTS, one_backend)
    for name in ("density", "round-trip", "complex-step", "check-gradients"):
        ALL_GATES[name](rebuilt(NICE, flow, Mutant(one_backend)), x)
        if name != "check-gradients":
            refuses(ALL_GATES[name], rebuilt(NICE, flow, Mutant(one_backend, permute=mistake)), x)


def test_gradients_and_inverses_that_go_forth_again_are_refused(
    monkeypatch: pytest.MonkeyPatch, one_backend: Backend
) -> None:
    flow, x = gates.make_flow(OTHER_PARTS, one_backend)
    permute = Network._permute
    monkeypatch.setattr(Network, "_permute", lambda self, k, back, start, to: permute(self, k, 0, start, to))
    for name in ("round-trip", *GRADIENT_GATES):
        refuses(ALL_GATES[name], rebuilt(NICE, flow, Mutant(one_backend)), x)


@pytest.mark.parametrize("coupling", range(len(SPEC.couplings)))
def test_skipped_couplings_are_refused(good: tuple[NICE, Any], coupling: int) -> None:
    flow, x = rebuilt(NICE, good[0], Mutant(good[0].backend)), good[1]  # recorded passes would not notice

    def skip_forward(backend: Backend, at: Buffers, layers: Any, own: Any) -> None:
        at.y[...] = at.x

    def skip_inverse(backend: Backend, at: Buffers, layers: Any, own: Any) -> None:
        at.x[...] = at.y

    flow.network.couplings[coupling].inverse = skip_inverse  # type: ignore[method-assign]
    refuses(gates.gate_round_trip, flow, x)
    flow.network.couplings[coupling].forward = skip_forward  # type: ignore[method-assign]
    np.testing.assert_allclose(flow.inverse(flow.forward(x)[0])[0], x, rtol=1e-10)  # now both skip, and agree
    for gate in (gates.gate_round_trip, gates.gate_density, gates.gate_complex_step):
        refuses(gate, flow, x)
