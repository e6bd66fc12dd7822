"""Coupling layers: one half of the features is changed by a function of the other half (Dinh et al. 2015, section 3.2).

The halves travel as two contiguous arrays, part 0 (even features) and part 1 (odd features).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nicecp import host
from nicecp.kernels.backend import FACTOR_BOUND, Array, Backend
from nicecp.mlp import LayerReady, Layers, mlp_backward, mlp_forward
from nicecp.registry import MLP, law_named, network_named
from nicecp.spec import CouplingSpec
from nicecp.spline import coupling_spline


@dataclass(frozen=True)
class Buffers:
    """What one coupling reads and writes for n rows.

    x, y : (n, d_t) the half that it changes, before and after (one array where it is changed in place); condition :
    (n, d_c); ys : the network's layer outputs, m last; dys : gradients by all of them, the last one None where it is
    y's; log_det : (n,) float64, or None while all couplings preserve volume; first : whether log_det is begun here.

    With a context : (n, k) the network reads inputs : (n, d_c + k), condition and context beside each other, and
    dinputs is the gradient by these.
    """

    x: Array
    y: Array
    condition: Array
    ys: list[Array]
    dys: list[Array]
    log_det: Array | None
    first: bool
    context: Array | None = None
    inputs: Array | None = None
    dinputs: Array | None = None
    saved: list[Any] = field(default_factory=list)  # by a registered network's forward for its backward

    def network_input(self, backend: Backend) -> Array:
        """What the network reads: the condition, and the context behind it."""
        if self.inputs is None:
            return self.condition
        half = self.condition.shape[1]
        backend.copy_columns(self.inputs, 0, self.condition, 0, half)
        backend.copy_columns(self.inputs, half, self.context, 0, self.inputs.shape[1] - half)
        return self.inputs


class Own(NamedTuple):
    """Parameters, or gradients by them, of a coupling's registered network and law; empty for built-in ones."""

    network: dict[str, Array]
    law: dict[str, Array]


NONE = Own({}, {})


def own_of(views: dict[str, Array]) -> Own:
    """Views named network/NAME and law/NAME (nicecp.params.Views.own), apart."""
    parts: tuple[dict[str, Array], dict[str, Array]] = {}, {}
    for name, array in views.items():
        owner, _, key = name.partition("/")
        parts[owner == "law"][key] = array
    return Own(*parts)


class Coupling(ABC):
    """A law: what to do with the network's output m. Forward, backward below it, inverse."""

    reads_m = True  # whether backward needs x and m

    def __init__(self, spec: CouplingSpec) -> None:
        self.conditions_on = spec.conditions_on
        self.transforms = spec.transforms
        self.network_name = spec.network
        self.network = None if spec.network == MLP else network_named(spec.network)

    def forward(self, backend: Backend, at: Buffers, layers: Layers, own: Own = NONE) -> None:
        """at.x -> at.y, and at.log_det where the law has one."""
        self._m(backend, at, layers, own)
        self.apply(backend, at, 1, own)

    def backward(
        self,
        backend: Backend,
        at: Buffers,
        dcondition: Array | None,
        grads: Layers | None,
        dy: Array,
        dlogp: Array,
        layers: Layers,
        ready: LayerReady | None = None,
        own: Own = NONE,
        own_grads: Own | None = None,
    ) -> None:
        """dy : (n, d_t) becomes dx in place -> dcondition : (n, d_c), the network's part of it; grads.

        dlogp : (n,) float64, the loss's gradient by each row's log-density, of which log_det is a summand.
        """
        dm = self.apply_backward(backend, at, dy, dlogp, own, own_grads)
        inputs, dinputs = at.condition, dcondition
        if at.inputs is not None:
            inputs, dinputs = at.inputs, None if dcondition is None else at.dinputs
        if self.network is None:
            mlp_backward(backend, dinputs, grads, [*at.dys[:-1], dm], at.ys, inputs, layers, ready)
        else:
            by_own = None if own_grads is None else own_grads.network
            host.network_backward(backend, self.network, self.network_name, dinputs, by_own, dm, at.saved, own.network)
        if at.inputs is not None and dcondition is not None:  # nobody asks for the gradient by the context
            backend.copy_columns(dcondition, 0, at.dinputs, 0, dcondition.shape[1])

    def inverse(self, backend: Backend, at: Buffers, layers: Layers, own: Own = NONE) -> None:
        """at.y -> at.x, which may be one array."""
        self._m(backend, at, layers, own)
        self.apply(backend, at, -1, own)

    def refill(self, backend: Backend, at: Buffers, layers: Layers, own: Own = NONE) -> None:
        """at.ys as after forward, as far as backward reads them, from at.condition and with the same bits."""
        if self.network is not None:
            self._m(backend, at, layers, own)
            return
        read = len(layers) if self.reads_m else len(layers) - 1
        mlp_forward(backend, at.ys[:read], at.network_input(backend), layers[:read], linear=len(layers) - 1)

    def _m(self, backend: Backend, at: Buffers, layers: Layers, own: Own) -> None:
        """at.condition -> at.ys, of which the last one is m."""
        x = at.network_input(backend)
        if self.network is None:
            mlp_forward(backend, at.ys, x, layers)
        else:
            host.network_forward(backend, self.network, self.network_name, at.ys[-1], at.saved, x, own.network)

    @abstractmethod
    def apply(self, backend: Backend, at: Buffers, sign: int, own: Own) -> None:
        """The law with m = at.ys[-1]: x -> y for sign 1, y -> x for -1."""

    @abstractmethod
    def apply_backward(
        self, backend: Backend, at: Buffers, dy: Array, dlogp: Array, own: Own, own_grads: Own | None
    ) -> Array:
        """dy -> dx in place; returns the gradient by m."""


class AdditiveCoupling(Coupling):
    """y_t = x_t + m(x_c), y_c = x_c: the Jacobian's determinant is 1."""

    reads_m = False

    def apply(self, backend: Backend, at: Buffers, sign: int, own: Own) -> None:
        source, target = (at.x, at.y) if sign == 1 else (at.y, at.x)
        backend.couple(target, source, at.ys[-1], sign)

    def apply_backward(
        self, backend: Backend, at: Buffers, dy: Array, dlogp: Array, own: Own, own_grads: Own | None
    ) -> Array:
        return dy


class FactorCoupling(Coupling):
    """y_t = x_t exp(a) [+ b], y_c = x_c, a (and b) from m(x_c): see Backend.factor_forward. log det is sum(a)."""

    affine = False

    def apply(self, backend: Backend, at: Buffers, sign: int, own: Own) -> None:
        source, target = (at.x, at.y) if sign == 1 else (at.y, at.x)
        backend.factor_forward(target, at.log_det, source, at.ys[-1], self.affine, sign, at.first)

    def apply_backward(
        self, backend: Backend, at: Buffers, dy: Array, dlogp: Array, own: Own, own_grads: Own | None
    ) -> Array:
        backend.factor_backward(dy, at.dys[-1], dy, dlogp, at.x, at.ys[-1], self.affine)
        return at.dys[-1]


class AffineCoupling(FactorCoupling):
    """A factor and a shift."""

    affine = True


class SplineCoupling(Coupling):
    """y_t = g(x_t; m(x_c)), y_c = x_c, g a monotone spline of each feature: see Backend.spline_forward."""

    def apply(self, backend: Backend, at: Buffers, sign: int, own: Own) -> None:
        source, target = (at.x, at.y) if sign == 1 else (at.y, at.x)
        backend.spline_forward(target, at.log_det, source, at.ys[-1], sign, at.first)

    def apply_backward(
        self, backend: Backend, at: Buffers, dy: Array, dlogp: Array, own: Own, own_grads: Own | None
    ) -> Array:
        backend.spline_backward(dy, at.dys[-1], dy, dlogp, at.x, at.ys[-1])
        return at.dys[-1]


class RegisteredCoupling(Coupling):
    """A law of nicecp.registry, by calls of the host."""

    def __init__(self, spec: CouplingSpec) -> None:
        super().__init__(spec)
        self.law_name, self.law = spec.law, law_named(spec.law)

    def apply(self, backend: Backend, at: Buffers, sign: int, own: Own) -> None:
        source, target = (at.x, at.y) if sign == 1 else (at.y, at.x)
        m, log_det, law = at.ys[-1], at.log_det, own.law
        host.law_forward(backend, self.law, self.law_name, target, log_det, source, m, law, sign, at.first)

    def apply_backward(
        self, backend: Backend, at: Buffers, dy: Array, dlogp: Array, own: Own, own_grads: Own | None
    ) -> Array:
        grads, dm, m = None if own_grads is None else own_grads.law, at.dys[-1], at.ys[-1]
        host.law_backward(backend, self.law, self.law_name, dy, dm, grads, dy, dlogp, at.x, m, own.law)
        return dm


COUPLINGS: dict[str, type[Coupling]] = {
    "additive": AdditiveCoupling,
    "multiplicative": FactorCoupling,
    "affine": AffineCoupling,
    "spline": SplineCoupling,
}


def coupling_of(spec: CouplingSpec) -> Coupling:
    """The law of one coupling, built in or registered."""
    return COUPLINGS.get(spec.law, RegisteredCoupling)(spec)


def apply_law(law: str, x: NDArray[Any], m: NDArray[Any], parameters: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """A law in plain NumPy, for checks: x : (n, k), m : (n, LAWS k) -> y : (n, k)."""
    if law not in COUPLINGS:
        return np.asarray(law_named(law).forward(x, m, parameters)[0])
    if law == "spline":
        return coupling_spline(x, m)[0]
    k = x.shape[1]
    y: NDArray[Any] = x + m[:, :k]
    if law != "additive":
        y = x * np.exp(FACTOR_BOUND * np.tanh(m[:, :k] / FACTOR_BOUND))
    return y + m[:, k:] if law == "affine" else y
