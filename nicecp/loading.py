"""Rows of data into a network's workspace: gathering, dequantization and the flow's preprocessing, on the device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nicecp.flow import NICE
from nicecp.kernels.backend import Array
from nicecp.network import Workspace
from nicecp.preprocessing import Dequantize, Standardize, Step
from nicecp.presented import device_part

FloatArray = NDArray[np.float64]


def loading(steps: tuple[Step, ...], n_features: int) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """How rows of data become the network's inputs: by load_batch, and one matrix if a step mixes features.

    -> shift, scale : (d,) float64 for load_batch (see kernels/backend.py), and the matrix A : (d, d) with z = A x for
    what load_batch gives, or None. All steps are affine
    (transforms of single columns come before: nicecp.presented): with a matrix, load_batch subtracts the point that
    they map to zero, so that the product is one of small numbers.

    Raises ValueError for a dequantization that is not the first step.
    """
    if any(isinstance(step, Dequantize) for step in steps[1:]):
        raise ValueError("preprocessing step 'dequantize' must be the first")
    shift, scale, eight_bit = np.zeros(n_features), np.ones(n_features), False
    if steps and isinstance(steps[0], Dequantize):
        shift, scale, eight_bit = shift + steps[0].low, scale * (steps[0].high - steps[0].low), True
    if all(isinstance(step, (Dequantize, Standardize)) for step in steps):
        for step in steps:
            if isinstance(step, Standardize):
                # 8-bit values are scaled and then shifted, floats shifted and then scaled
                shift = (shift - step.mean) / step.std if eight_bit else shift + step.mean / scale
                scale = scale / step.std
        return shift, scale, None
    zero, matrix = np.zeros((1, n_features)), np.eye(n_features)
    for step in reversed(steps):
        zero, matrix = step.inverse(zero), step.backward(matrix, matrix)
    return (shift - zero[0] if eight_bit else shift + zero[0]), scale, matrix


class Loader:
    """Loads batches of n rows; all its arrays are allocated once and stay where they are.

    Fresh noise comes first and the steps that mix features after it, at every presentation of a row.
    """

    def __init__(self, flow: NICE, n: int) -> None:
        backend, d = flow.backend, flow.n_features
        self._backend, self._order = backend, flow.network.order
        shift, scale, matrix = loading(device_part(flow.preprocessing), d)
        self._shift, self._scale = backend.asarray(shift), backend.asarray(scale)
        self._matrix: Array | None = None
        if matrix is not None:
            self._matrix = backend.alloc((d, d), flow.spec.dtype)
            backend.copy_in(self._matrix, np.ascontiguousarray(matrix.T))
            self._x, self._z = (backend.alloc((n, d), flow.spec.dtype) for _ in range(2))
            self._bias = backend.alloc(d, flow.spec.dtype)  # zero: dense layers are what backends make fast

    def load(
        self, ws: Workspace, data: Array, index: Array, rows: Array, state: Array, seed: int, purpose: int
    ) -> None:
        """ws.x and ws.weight from the batch that state's CURSOR names; arguments as of the backend's load_batch."""
        backend = self._backend
        order = self._order
        backend.load_batch(*ws.x, ws.weight, data, index, rows, order, self._shift, self._scale, state, seed, purpose)
        if self._matrix is not None:
            backend.join(self._x, *ws.x, order)
            backend.dense_forward(self._z, self._x, self._matrix, self._bias, False)
            backend.split(*ws.x, self._z, order)
