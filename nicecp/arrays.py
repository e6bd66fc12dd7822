"""Rows that are in the device's own memory already, as CuPy's or any DLPack array's are: results stay there too.

The same passes as for NumPy rows, and the same answers to rows that are not finite. Only flags cross to the host.
Results are CuPy arrays: log-densities and log-determinants float64, rows in the flow's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nicecp.calls import Call, Calls
from nicecp.kernels.backend import Array, Backend
from nicecp.preprocessing import Dequantize, Standardize, Step, Triangular, Zca

CHUNK = 4096  # rows at a time


@dataclass(frozen=True)
class _Affine:
    """z = (x - zero) * factor, or (x - zero) @ matrix: a preprocessing step with its numbers on the device, float64."""

    zero: Array
    forward: Array
    back: Array
    mixes: bool

    def apply(self, x: Array) -> Array:
        return (x - self.zero) @ self.forward if self.mixes else (x - self.zero) * self.forward

    def undo(self, z: Array) -> Array:
        return z @ self.back + self.zero if self.mixes else z * self.back + self.zero

    def backward(self, dz: Array) -> Array:
        return dz @ self.forward.T if self.mixes else dz * self.forward


def check_rows(dtype: Any, shape: tuple[int, ...], n_features: int, eight_bit: bool, latent: bool) -> None:
    """TypeError or ValueError for what cannot be rows of a flow: of data, whose 8-bit values must be dequantized, or of
    latents."""
    kind = np.dtype(dtype).kind
    if kind not in "fiu":
        raise TypeError(f"expected real numbers, got an array of dtype {dtype}")
    if kind in "iu" and eight_bit and not latent:
        raise TypeError(
            f"expected dequantized values, got {dtype}: this flow was trained on 8-bit data, "
            "pass low + (high - low) * (k + u) / 256 with u uniform in [0, 1)"
        )
    if len(shape) == 0 or shape[-1] != n_features:
        raise ValueError(f"expected an array of shape (..., {n_features}), got {shape}")


def refuse_overflow(wrong: Any, what: str) -> None:
    """wrong : (n,) bool. A row that is finite and comes out as NaN is a mistake somewhere; -inf would hide it."""
    if bool(wrong.any()):
        problem = f"{what} of row {int(wrong.argmax())} is not a number though the row is: the flow overflows there"
        raise FloatingPointError(problem)


def _affine(step: Step, backend: Backend) -> _Affine | None:
    """A step on the device, None for one that leaves the values as they are; TypeError for one that is not affine."""
    if isinstance(step, Dequantize):
        return None
    if isinstance(step, Standardize):
        arrays = (step.mean, 1.0 / step.std, step.std)
    elif isinstance(step, (Zca, Triangular)):
        identity = np.eye(len(step.arrays()["mean" if isinstance(step, Zca) else "bias"]))
        zero = step.inverse(np.zeros((1, len(identity))))[0]
        arrays = (zero, np.ascontiguousarray(step.backward(identity).T), step.inverse(identity) - zero)
    else:
        raise TypeError(f"preprocessing {step.kind!r} is computed on the CPU: give this flow NumPy arrays")
    zero, forward, back = (backend.asarray(array) for array in arrays)
    return _Affine(zero, forward, back, not isinstance(step, Standardize))


class DeviceRows:
    """A flow's passes over rows in its device's memory. ``constant`` : log abs det of the preprocessing."""

    def __init__(self, backend: Backend, calls: Calls, n_features: int, dtype: Any, steps: Sequence[Step]) -> None:
        self._backend, self._calls, self._d, self._dtype = backend, calls, n_features, np.dtype(dtype)
        self._preprocessing = tuple(steps)

    @cached_property
    def _steps(self) -> list[_Affine]:
        """On the device, when first asked for; TypeError where one is not affine."""
        return [made for step in self._preprocessing if (made := _affine(step, self._backend)) is not None]

    @property
    def usable(self) -> bool:
        """Whether the preprocessing can be done on the device: all but steps that are not affine."""
        return all(isinstance(step, (Dequantize, Standardize, Zca, Triangular)) for step in self._preprocessing)

    # --- what NICE's methods of these names do ------------------------------------------------------------------------

    def log_prob(self, x: Any, constant: float, dtype: Any) -> Any:
        xp = self._backend.xp
        rows, shape = self._rows(x)
        out = self._backend.result(len(rows), dtype)
        wrong = []

        def take(call: Call, at: slice, ok: Array) -> None:
            logp = call.ws.logp + constant
            wrong.append(xp.isnan(logp) & ok)
            instead = xp.where(xp.isnan(rows[at]).any(axis=1), np.float64(np.nan), np.float64(-np.inf))
            out[at] = xp.where(ok, logp, instead)

        self._passes("density", rows, take)
        self._refuse_overflow(wrong, "log_prob")
        return self._handed_over(out, shape)

    def grad_log_prob(self, x: Any) -> Any:
        xp = self._backend.xp
        rows, shape = self._rows(x)
        out = self._backend.result(rows.shape, self._dtype)
        wrong = []

        def take(call: Call, at: slice, ok: Array) -> None:
            gradient = call.out.astype(np.float64)
            for step in reversed(self._steps):
                gradient = step.backward(gradient)
            wrong.append(xp.isnan(gradient).any(axis=1) & ok)
            out[at] = xp.where(ok.reshape(-1, 1), gradient, np.float64(np.nan))

        self._passes("gradient", rows, take)
        self._refuse_overflow(wrong, "grad_log_prob")
        return self._handed_over(out, (*shape, self._d))

    def forward(self, x: Any, constant: float) -> tuple[Any, Any]:
        xp = self._backend.xp
        rows, shape = self._rows(x)
        out, log_det = self._backend.result(rows.shape, self._dtype), self._backend.result(len(rows), np.float64)

        def take(call: Call, at: slice, ok: Array) -> None:
            out[at] = xp.where(ok.reshape(-1, 1), call.out, self._dtype.type(np.nan))
            log_det[at] = constant if call.ws.log_det is None else call.ws.log_det + constant

        self._passes("latent", rows, take)
        return self._handed_over(out, (*shape, self._d)), self._handed_over(log_det, shape)

    def inverse(self, h: Any, constant: float) -> tuple[Any, Any]:
        rows, shape = self._rows(h, latent=True)
        out, log_det = self._backend.result(rows.shape, self._dtype), self._backend.result(len(rows), np.float64)
        for start in range(0, len(rows), CHUNK):
            at = slice(start, min(start + CHUNK, len(rows)))
            self._invert(out, log_det, at, rows[at], constant)
        return self._handed_over(out, (*shape, self._d)), self._handed_over(log_det, shape)

    def _invert(self, out: Array, log_det: Array | None, at: slice, h: Array, constant: float) -> None:
        with self._backend.arithmetic():
            z = self._inputs(h)
        with self._calls.borrow("inverse", len(h)) as call:
            self._backend.split(*call.ws.h, z)
            call.run()
            with self._backend.arithmetic():
                x = call.out.astype(np.float64)
                for step in reversed(self._steps):
                    x = step.undo(x)
                out[at] = x
                if log_det is not None:
                    log_det[at] = constant if call.ws.log_det is None else call.ws.log_det + constant

    def sample(self, n: int, fill: Callable[[Array, int], None]) -> Any:
        """(n, d) float64 NumPy array in data space, from latents that fill(h, first row) draws on the device."""
        out = np.empty((n, self._d), np.float64)
        for start in range(0, n, CHUNK):
            part = out[start : start + CHUNK]
            h, x = (self._backend.alloc(part.shape, np.float64) for _ in range(2))
            fill(h, start)
            self._invert(x, None, slice(None), h, 0.0)
            part[...] = self._backend.copy_out(x)
        return out

    # --- borders ------------------------------------------------------------------------------------------------------

    def _rows(self, x: Any, latent: bool = False) -> tuple[Array, tuple[int, ...]]:
        """x : (..., d) on the device -> (n, d) rows, and the leading shape. Refuses what NICE refuses."""
        self._steps  # noqa: B018 (refuses what it cannot do)
        array = self._backend.borrow(x)
        eight_bit = any(isinstance(step, Dequantize) for step in self._preprocessing)
        check_rows(array.dtype, array.shape, self._d, eight_bit, latent)
        with self._backend.arithmetic():
            return array.reshape(-1, self._d), tuple(array.shape[:-1])

    def _inputs(self, x: Array) -> Array:
        """Contiguous rows in the flow's dtype."""
        return self._backend.xp.ascontiguousarray(x.astype(self._dtype))

    def _passes(self, kind: str, rows: Array, take: Callable[[Call, slice, Array], None]) -> None:
        """Preprocess rows, run passes over chunks of them, and hand these over with which rows are finite."""
        backend, xp = self._backend, self._backend.xp
        for start in range(0, len(rows), CHUNK):
            at = slice(start, min(start + CHUNK, len(rows)))
            with backend.arithmetic():
                z = rows[at].astype(np.float64)
                for step in self._steps:
                    z = step.apply(z)
                z = self._inputs(z)
                ok = xp.isfinite(z).all(axis=1)
                z = xp.where(ok.reshape(-1, 1), z, self._dtype.type(0))
            with self._calls.borrow(kind, len(z)) as call:
                backend.split(*call.ws.x, z)
                call.run()
                with backend.arithmetic():
                    take(call, at, ok)

    def _refuse_overflow(self, wrong: list[Array], what: str) -> None:
        if wrong:
            with self._backend.arithmetic():
                refuse_overflow(self._backend.xp.concatenate(wrong), what)

    def _handed_over(self, array: Array, shape: tuple[int, ...]) -> Any:
        self._backend.hand_over()
        return array.reshape(shape)
