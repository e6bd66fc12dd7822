"""A flow as gradient checks see it: at one context, in float64 if wanted, with the way to its input space and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.flow import NICE
from nicecp.preprocessing import apply_steps, undo_steps
from nicecp.records import Parameters

Floats = NDArray[np.float64]
_STEP = 1e-5  # of differences that take vectors of input space to data space


class Checked:
    """A flow, and the context : (k,) that all of its rows are given, or None for a flow without one."""

    def __init__(self, flow: NICE, context: ArrayLike | None = None) -> None:
        self.flow, self.spec, self.n_features = flow, flow.spec, flow.n_features
        self._given: tuple[Any, ...] = () if context is None else (np.asarray(context, np.float64),)

    @property
    def seen(self) -> Floats | None:
        """What networks see of the context : (k,)."""
        return None if not self._given or self.flow.context is None else self.flow.context.scaled(self._given[0])

    def log_prob(self, x: Floats) -> Floats:
        return np.asarray(self.flow.log_prob(x, *self._given))

    def grad_log_prob(self, x: Floats) -> Floats:
        return np.asarray(self.flow.grad_log_prob(x, *self._given))

    def loss_and_gradients(self, x: Floats) -> tuple[float, Parameters]:
        return self.flow.loss_and_gradients(x, *self._given)

    def forward(self, x: Floats) -> tuple[Floats, Any]:
        return self.flow.forward(x, *self._given)

    def inverse(self, h: Floats) -> tuple[Floats, Any]:
        return self.flow.inverse(h, *self._given)

    def parameters(self) -> Parameters:
        return self.flow.parameters()

    def set_parameters(self, named: Parameters) -> None:
        self.flow.set_parameters(named)

    def in_float64(self, parameters: Parameters) -> Checked:
        """A copy in float64 with these parameters."""
        flow = self.flow
        double = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
        spec = replace(flow.spec, dtype="float64")
        arguments = (spec, double, flow.preprocessing, flow.info)
        keywords = {} if flow.context is None else {"context": flow.context}
        return Checked(type(flow).from_spec(*arguments, backend=flow.backend, **keywords), *self._given)

    # --- input space ------------------------

    def to_inputs(self, x: Floats) -> Floats:
        """Data space to the flow's input space."""
        return np.asarray(apply_steps(self.flow.preprocessing, x)[0])

    def affine(self) -> bool:
        return all(step.affine for step in self.flow.preprocessing)

    def from_inputs(self, vectors: Floats, x: Floats) -> Floats:
        """Vectors (differences, not points) of input space in data space, at rows x : (n, d) unless affine."""
        if not self.affine():
            z = self.to_inputs(x)
            ends = (undo_steps(self.flow.preprocessing, z + sign * _STEP * vectors)[0] for sign in (1, -1))
            return np.asarray(np.subtract(*ends) / (2 * _STEP))
        moved, origin = vectors, np.zeros_like(vectors)
        for step in reversed(self.flow.preprocessing):
            moved, origin = step.inverse(moved), step.inverse(origin)
        return moved - origin

    def at_inputs(self, z: Floats) -> Floats:
        """Points of input space in data space."""
        return np.asarray(undo_steps(self.flow.preprocessing, z)[0])
