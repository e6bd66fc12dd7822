"""Rows of data into a network's workspace: gathering, dequantization and the flow's preprocessing, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nicecp.flow import NICE
from nicecp.kernels.backend import Array
from nicecp.network import Workspace
from nicecp.preprocessing import Dequantize, MarginLogit, Standardize, Step
from nicecp.presented import device_part

FloatArray = NDArray[np.float64]


def loading(steps: Sequence[Step], n_features: int) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """How rows of data become what affine steps make of them: by load_batch, and one matrix if a step mixes features.

    -> shift, scale : (d,) float64 for load_batch (see kernels/backend.py), and the matrix A : (d, d) with z = A x for
    what load_batch gives, or None. With a matrix, load_batch subtracts the point that the steps map to zero, so that
    the product is one of small numbers.

    Transforms of single columns come before (nicecp.presented). Raises ValueError for a dequantization that is not the
    first step, and for steps that are not affine.
    """
    if any(isinstance(step, Dequantize) for step in steps[1:]):
        raise ValueError("preprocessing step 'dequantize' must be the first")
    if not all(step.affine for step in steps):
        raise ValueError(f"preprocessing steps {', '.join(step.kind for step in steps)} are not one affine map")
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


def runs_of(steps: Sequence[Step]) -> list[tuple[Step, ...]]:
    """Steps in order, cut so that each part but the first begins with one that is not affine, and has no other.

    Raises ValueError for one that devices do not know, and for a dequantization that is not the first step.
    """
    runs: list[tuple[Step, ...]] = [()]
    for number, step in enumerate(steps):
        if isinstance(step, Dequantize) and number:
            raise ValueError("preprocessing step 'dequantize' must be the first")
        if not step.affine and not isinstance(step, MarginLogit):
            raise ValueError(f"preprocessing step {step.kind!r} cannot be carried out while rows are loaded")
        runs[-1:] = [(*runs[-1], step)] if step.affine else [runs[-1], (step,)]
    return runs


@dataclass
class _Affine:
    """z = x A^T + b on the device, by a dense layer: matrix : (d, d) = A^T, bias : (d,)."""

    matrix: Array
    bias: Array


@dataclass
class _Logit:
    """A logit step on the device, shift and scale of each part, and the affine map behind it."""

    shift: list[Array]
    scale: list[Array]
    margin: float
    then: _Affine | None


class Loader:
    """Loads batches of n rows; all its arrays are allocated once and stay where they are.

    Fresh noise comes first and the other steps after it, at every presentation of a row.
    """

    def __init__(self, flow: NICE, n: int) -> None:
        backend, d = flow.backend, flow.n_features
        self._backend, self._order, self._spec = backend, flow.network.order, flow.spec
        first, *others = runs_of(device_part(flow.preprocessing))
        shift, scale, matrix = loading(first, d)
        self._shift, self._scale = backend.asarray(shift), backend.asarray(scale)
        self._first = None if matrix is None else self._affine(matrix, np.zeros(d))
        self._logits = [self._logit(steps) for steps in others]
        self._log_det: Array | None = backend.alloc(n, np.float64) if others else None
        if self._first is not None or any(stage.then is not None for stage in self._logits):
            self._x, self._z = (backend.alloc((n, d), flow.spec.dtype) for _ in range(2))

    def _affine(self, matrix: FloatArray, bias: FloatArray) -> _Affine:
        backend, d, dtype = self._backend, len(bias), self._spec.dtype
        made = _Affine(backend.alloc((d, d), dtype), backend.alloc(d, dtype))
        backend.copy_in(made.matrix, np.ascontiguousarray(matrix.T))
        backend.copy_in(made.bias, bias)
        return made

    def _logit(self, steps: tuple[Step, ...]) -> _Logit:
        """A logit step, then any number of affine ones, as one map."""
        logit, *others = steps
        assert isinstance(logit, MarginLogit)
        d, then = len(logit.low), None
        if others:
            bias, matrix = np.zeros((1, d)), np.eye(d)
            for step in others:
                bias = step.forward(bias)
            for step in reversed(others):
                matrix = step.backward(matrix, matrix)
            then = self._affine(matrix, bias[0])
        shift, scale = (
            [self._backend.asarray(np.ascontiguousarray(values[columns])) for columns in self._spec.columns]
            for values in (logit.low, 1 / (logit.high - logit.low))
        )
        return _Logit(shift, scale, logit.margin, then)

    def load(
        self, ws: Workspace, data: Array, index: Array, rows: Array, state: Array, seed: int, purpose: int
    ) -> None:
        """ws.x, ws.weight and ws.before from the batch that state's CURSOR names; arguments as of load_batch."""
        backend, order = self._backend, self._order
        backend.load_batch(*ws.x, ws.weight, data, index, rows, order, self._shift, self._scale, state, seed, purpose)
        self._apply(self._first, ws)
        first = True
        for stage in self._logits:
            for x, shift, scale in zip(ws.x, stage.shift, stage.scale, strict=True):
                backend.logit_forward(x, self._log_det, x, shift, scale, stage.margin, first)
                first = False
            self._apply(stage.then, ws)
        ws.before = self._log_det

    def _apply(self, affine: _Affine | None, ws: Workspace) -> None:
        if affine is not None:
            self._backend.join(self._x, *ws.x, self._order)
            # dense layers are what backends make fast
            self._backend.dense_forward(self._z, self._x, affine.matrix, affine.bias, False)
            self._backend.split(*ws.x, self._z, self._order)
