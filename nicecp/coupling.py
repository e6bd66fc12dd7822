"""Coupling layers: one half of the features is changed by a function of the other half (Dinh et al. 2015, section 3.2).

The halves travel as two contiguous arrays, part 0 (even features) and part 1 (odd features).
"""

from __future__ import annotations

from nicecp.kernels.backend import Array, Backend
from nicecp.mlp import LayerReady, Layers, mlp_backward, mlp_forward
from nicecp.spec import CouplingSpec


class AdditiveCoupling:
    """y_t = x_t + m(x_c), y_c = x_c: the Jacobian's determinant is 1."""

    law = "additive"

    def __init__(self, spec: CouplingSpec) -> None:
        self.conditions_on = spec.conditions_on
        self.transforms = spec.transforms

    def forward(self, backend: Backend, y: Array, x: Array, condition: Array, ys: list[Array], layers: Layers) -> None:
        """y, x : (n, d_t), condition : (n, d_c); ys are the network's layer outputs. y may be x."""
        mlp_forward(backend, ys, condition, layers)
        backend.couple(y, x, ys[-1], 1)

    def backward(
        self,
        backend: Backend,
        dcondition: Array | None,
        grads: Layers | None,
        dy: Array,
        dys: list[Array],
        ys: list[Array],
        condition: Array,
        layers: Layers,
        ready: LayerReady | None = None,
    ) -> None:
        """dy : (n, d_t), which is also dx, unchanged -> dcondition : (n, d_c), the network's part of it; grads."""
        mlp_backward(backend, dcondition, grads, [*dys, dy], ys, condition, layers, ready)

    def inverse(self, backend: Backend, x: Array, y: Array, condition: Array, ys: list[Array], layers: Layers) -> None:
        """x = y - m(condition); x may be y."""
        mlp_forward(backend, ys, condition, layers)
        backend.couple(x, y, ys[-1], -1)


COUPLINGS = {AdditiveCoupling.law: AdditiveCoupling}
