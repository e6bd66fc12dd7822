"""Rows that are in the device's own memory already, as CuPy's or any DLPack array's are: results stay there too.

The same passes as for NumPy rows, and the same answers to rows that are not finite. Only flags and contexts cross
between host and device. Results are CuPy arrays: log-densities and log-determinants float64, rows in the flow's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nicecp.borders import check_rows, refuse_overflow
from nicecp.calls import Call
from nicecp.context import context_of, seen
from nicecp.kernels.backend import Array, Backend, Purpose
from nicecp.preprocessing import Dequantize, Standardize, Step

CHUNK = 4096  # rows at a time
F = TypeVar("F", bound=Callable[..., Any])
Take = Callable[[Call, slice, Array], None]


def on_device(method: F) -> F:
    """A method of NICE whose first argument is rows: those in the device's own memory go to DeviceRows' namesake."""

    @wraps(method)
    def call(flow: Any, rows: Any, *arguments: Any, **named: Any) -> Any:
        if flow.backend.owns(rows):
            return getattr(flow._there, method.__name__)(rows, *arguments, **named)
        return method(flow, rows, *arguments, **named)

    return call  # type: ignore[return-value]


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


def _affine(step: Step, d: int, backend: Backend) -> _Affine | None:
    """A step on the device, None for one that leaves the values as they are; TypeError for one that is not affine."""
    if isinstance(step, Dequantize):
        return None
    if not step.affine:
        raise TypeError(f"preprocessing {step.kind!r} is computed on the CPU: give this flow NumPy arrays")
    if isinstance(step, Standardize):
        arrays = (step.mean, 1.0 / step.std, step.std)
    else:
        origin, identity = np.zeros((1, d)), np.eye(d)
        x0 = step.inverse(origin)[0]
        arrays = (x0, np.ascontiguousarray(step.backward(identity, identity).T), step.inverse(identity) - x0)
    zero, forward, back = (backend.asarray(array) for array in arrays)
    return _Affine(zero, forward, back, not isinstance(step, Standardize))


class DeviceRows:
    """A flow's passes over rows in its device's memory. flow : the NICE; its parts are looked up when needed."""

    def __init__(self, flow: Any) -> None:
        self._flow = flow

    @cached_property
    def _steps(self) -> list[_Affine]:
        """The preprocessing on the device, made when first asked for; TypeError where a step is not affine."""
        flow = self._flow
        made = (_affine(step, flow.spec.n_features, flow.backend) for step in flow.preprocessing)
        return [step for step in made if step is not None]

    @property
    def usable(self) -> bool:
        """Whether the preprocessing can be done on the device: all but steps that are not affine."""
        return all(step.affine for step in self._flow.preprocessing)

    # --- what NICE's methods of these names do ------------------------------------------------------------------------

    def log_prob(self, x: Any, context: Any = None, dtype: Any = np.float64, *, floor: float | None = None) -> Any:
        rows, shape, given = self._rows(x, context)
        out = self._flow.backend.result(len(rows), dtype)
        settle, finish = self._settling(out, rows, floor)
        self._passes("density", rows, given, settle)
        finish()
        return self._handed_over(out, shape)

    def _settling(self, out: Array, rows: Array, floor: float | None) -> tuple[Take, Callable[[], None]]:
        """What puts log-densities into out : (n,), and what is to be called at the end: it refuses overflows."""
        backend, constant, wrong = self._flow.backend, self._log_det, list[Array]()
        xp = backend.xp

        def take(call: Call, at: slice, ok: Array) -> None:
            logp, fine = call.ws.logp + constant, self._finite_context(call)
            nan = xp.isnan(rows[at]).any(axis=1) | ~fine
            wrong.append(ok & fine & ~xp.isfinite(logp))
            value = xp.where(nan, np.float64(np.nan), xp.where(ok, logp, np.float64(-np.inf)))
            out[at] = value if floor is None else xp.maximum(value, np.float64(floor))

        return take, lambda: self._refuse(wrong, "log_prob")

    def log_prob_and_grad(self, x: Any, context: Any = None, *, floor: float | None = None) -> tuple[Any, Any]:
        backend, dtype = self._flow.backend, self._flow.dtype
        xp, wrong = backend.xp, list[Array]()
        rows, shape, given = self._rows(x, context)
        out, log_prob = backend.result(rows.shape, dtype), backend.result(len(rows), np.float64)
        settle, finish = self._settling(log_prob, rows, floor)

        def take(call: Call, at: slice, ok: Array) -> None:
            gradient = call.out.astype(np.float64)
            for step in reversed(self._steps):
                gradient = step.backward(gradient)
            fine = ok & self._finite_context(call)
            wrong.append(fine & ~xp.isfinite(gradient).all(axis=1))
            out[at] = xp.where(fine.reshape(-1, 1), gradient, np.float64(np.nan))
            settle(call, at, ok)

        self._passes("gradient", rows, given, take)
        self._refuse(wrong, "grad_log_prob")
        finish()
        return self._handed_over(log_prob, shape), self._handed_over(out, (*shape, rows.shape[1]))

    def forward(self, x: Any, context: Any = None) -> tuple[Any, Any]:
        flow, backend = self._flow, self._flow.backend
        rows, shape, given = self._rows(x, context)
        constant = flow.network.log_det(flow._views) + self._log_det
        out, log_det = backend.result(rows.shape, flow.dtype), backend.result(len(rows), np.float64)

        def take(call: Call, at: slice, ok: Array) -> None:
            fine = (ok & self._finite_context(call)).reshape(-1, 1)
            out[at] = backend.xp.where(fine, call.out, flow.dtype.type(np.nan))
            log_det[at] = constant if call.ws.log_det is None else call.ws.log_det + constant

        self._passes("latent", rows, given, take)
        return self._handed_over(out, (*shape, rows.shape[1])), self._handed_over(log_det, shape)

    def inverse(self, h: Any, context: Any = None) -> tuple[Any, Any]:
        flow, backend = self._flow, self._flow.backend
        rows, shape, given = self._rows(h, context, latent=True)
        constant = -flow.network.log_det(flow._views) - self._log_det
        out, log_det = backend.result(rows.shape, flow.dtype), backend.result(len(rows), np.float64)
        for start in range(0, len(rows), CHUNK):
            at = slice(start, min(start + CHUNK, len(rows)))
            self._invert(out[at], log_det[at], rows[at], given, at, constant)
        return self._handed_over(out, (*shape, rows.shape[1])), self._handed_over(log_det, shape)

    def _invert(
        self, out: Array, log_det: Array | None, h: Array, context: NDArray[Any] | None, at: slice, constant: float
    ) -> None:
        """h : (n, d) -> out : (n, d) in data space and, if wanted, log_det : (n,), one chunk."""
        flow, backend = self._flow, self._flow.backend
        with backend.arithmetic():
            z = self._inputs(h)
        with flow._calls.borrow("inverse", len(h)) as call:
            backend.split(*call.ws.h, z, flow.network.latent_order)
            call.ws.load_context(backend, context, at)
            call.run()
            with backend.arithmetic():
                x = call.out.astype(np.float64)
                for step in reversed(self._steps):
                    x = step.undo(x)
                out[...] = x
                if log_det is not None:
                    log_det[...] = constant if call.ws.log_det is None else call.ws.log_det + constant

    def sample(self, n: int, seed: int, context: NDArray[Any] | None, first: int = 0) -> NDArray[np.float64]:
        """(n, d) samples as a NumPy array: NICE.sample's, with the latents drawn and inverted on the device."""
        flow, backend = self._flow, self._flow.backend
        fill = backend.fill_logistic if flow.spec.prior == "logistic" else backend.fill_normal
        out = np.empty((n, flow.spec.n_features), np.float64)
        for start in range(0, n, CHUNK):
            part = out[start : start + CHUNK]
            h, x = (backend.alloc(part.shape, np.float64) for _ in range(2))
            fill(h, seed, Purpose.SAMPLE, 0, first + start)
            self._invert(x, None, h, context, slice(start, start + len(part)), 0.0)
            part[...] = backend.copy_out(x)
        return out

    # --- borders ------------------------------------------------------------------------------------------------------

    @property
    def _log_det(self) -> float:
        """log abs det of the preprocessing, the same for every row of an affine one."""
        return math.fsum(float(step.log_det) for step in self._flow.preprocessing)

    def _rows(self, x: Any, context: Any, latent: bool = False) -> tuple[Array, tuple[int, ...], NDArray[Any] | None]:
        """x : (..., d) on the device -> (n, d) rows, the leading shape, and what networks see of a context on the host.

        Refuses what NICE refuses. context : (k,), or one for each row.
        """
        flow = self._flow
        self._steps  # noqa: B018 (refuses what cannot be done on the device)
        array = flow.backend.borrow(x)
        check_rows(array.dtype, array.shape, flow.spec.n_features, flow.preprocessing, latent)
        shape, d = tuple(array.shape[:-1]), array.shape[-1]
        given = context_of(context, flow.context)
        if given is not None:
            if given.shape[:-1] not in ((), (1,), shape):
                raise ValueError(
                    f"context of shape {given.shape} for rows of shape {array.shape}: one, or one for each"
                )
            given = seen(given.reshape(-1, given.shape[-1]), flow.context, flow.dtype)
        with flow.backend.arithmetic():
            return array.reshape(-1, d), shape, given

    def _inputs(self, x: Array) -> Array:
        """Contiguous rows in the flow's dtype, in memory of the backend's own."""
        inputs = self._flow.backend.alloc(x.shape, self._flow.dtype)
        inputs[...] = x
        return inputs

    def _finite_context(self, call: Call) -> Any:
        """Which rows have a context that is not NaN."""
        xp, context = self._flow.backend.xp, call.ws.context
        return xp.ones(call.ws.n, np.bool_) if context is None else xp.isfinite(context).all(axis=1)

    def _passes(self, kind: str, rows: Array, context: NDArray[Any] | None, take: Take) -> None:
        """Preprocess rows, run passes over chunks of them, and hand these over with which rows are finite."""
        flow, backend = self._flow, self._flow.backend
        xp = backend.xp
        for start in range(0, len(rows), CHUNK):
            at = slice(start, min(start + CHUNK, len(rows)))
            with backend.arithmetic():
                z = rows[at].astype(np.float64)
                for step in self._steps:
                    z = step.apply(z)
                z = self._inputs(z)
                ok = xp.isfinite(z).all(axis=1)
                z = xp.where(ok.reshape(-1, 1), z, flow.dtype.type(0))
            with flow._calls.borrow(kind, len(z)) as call:
                backend.split(*call.ws.x, z, flow.network.order)
                call.ws.load_context(backend, context, at)
                call.run()
                with backend.arithmetic():
                    take(call, at, ok)

    def _refuse(self, wrong: list[Array], what: str) -> None:
        if wrong:
            with self._flow.backend.arithmetic():
                refuse_overflow(self._flow.backend.xp.concatenate(wrong), what)

    def _handed_over(self, array: Array, shape: tuple[int, ...]) -> Any:
        self._flow.backend.hand_over()
        return array.reshape(shape)
