"""NICE: the flow that users hold.  Dinh, Krueger, Bengio 2015, arXiv 1410.8516."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nicecp.arrays import DeviceRows, on_device
from nicecp.borders import as_rows, refuse_overflow, seed_of, settle, to_inputs, with_log_det
from nicecp.calls import Call, Calls
from nicecp.context import Context, context_of, paired, rows_for, seen
from nicecp.density import Density
from nicecp.kernels import get_backend, with_precision
from nicecp.kernels.backend import Array, Backend, Purpose, Slot
from nicecp.native import Points, rows_without_blas
from nicecp.network import Halves, Network
from nicecp.params import initial_parameters
from nicecp.preprocessing import Step, steps_backward, undo_steps
from nicecp.records import DataInfo, Parameters
from nicecp.spec import ModelSpec, spec_of, whole_number
from nicecp.transforms import check_step_fits

logger = logging.getLogger("nicecp")

CHUNK = 1024  # rows at a time: bounds what a call needs beside its result; activations stay in cache
FloatArray = NDArray[np.float64]


class NICE(Density):
    """A normalizing flow of coupling layers, exact log-density, inverse and sampling.

    Parameters
    ----------
    n_features : int
        d, at least 2.
    hidden : sequence of int, or a sequence of these for each coupling
        Hidden layer sizes of every coupling's ReLU network; the output layer is linear.
    n_couplings : int
        At least 1, by default 4 or as many as ``hidden`` has sequences. Below 3 not every feature can influence every
        other (section 3.3): a warning is logged.
    prior : "logistic" or "gaussian"
    dtype : "auto", "float32" or "float64"
        Of parameters and computation. "auto" is float64, and becomes float32 when the flow is fitted to 8-bit images.
    seed : int
        Of the initial weights, 0 <= seed < 2**64.
    coupling : "additive", "multiplicative", "affine" or "spline", or several of these
        The law of all couplings, or a sequence of laws that is gone through again and again (nicecp.coupling).
    partition : "odd-even", "halves", "random" or a sequence of int
        The two parts that couplings change in turn: even and odd features, halves, or halves of a permutation of these.
        repartition : after so many couplings, if not 0, the seed draws other parts, as it does for "random".
    network : "mlp" or a registered name
        What couplings read: dense ReLU layers, or a network of one's own. A law of one's own is a name in ``coupling``.
        See nicecp.registry and docs/extending.md.
    n_context : int
        k, at least 0: the density is p(x | context) for a context of k numbers, which every network reads beside its
        half of the features (nicecp.context). context_names : what they are called.
    init : "paper", "he" or "table"
        Initial weights; see nicecp.params.initial_parameters.
    preprocessing : sequence of steps
        Applied to data in order before the couplings; log-densities are reported in the space before them.
    precision : "full" or "tf32"
        Of float32 matrix products on a GPU; "tf32" is faster and rounds their factors to 10 bits.
    device, threads
        See nicecp.kernels.get_backend. On a GPU, rows in its memory (CuPy, DLPack) give results there (nicecp.arrays).

    Log-densities are in nats and float64. Calls do not share buffers: several threads may use one flow.
    """

    def __init__(
        self,
        n_features: int,
        hidden: Sequence[int] | Sequence[Sequence[int]] = (1000,) * 5,
        n_couplings: int | None = None,
        prior: str = "logistic",
        dtype: DTypeLike = "auto",
        seed: int = 0,
        *,
        coupling: str | Sequence[str] = "additive",
        partition: str | Sequence[int] = "odd-even",
        repartition: int = 0,
        network: str = "mlp",
        n_context: int = 0,
        context_names: Sequence[str] | None = None,
        init: str = "paper",
        preprocessing: Sequence[Step] = (),
        precision: str = "full",
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        open_dtype = isinstance(dtype, str) and dtype == "auto"
        made_of = (prior, "float64" if open_dtype else dtype, coupling, partition, network, n_context, precision)
        spec = spec_of(n_features, hidden, n_couplings, *made_of, repartition, seed)
        if context_names is not None and not spec.n_context:
            raise ValueError("context_names are for a flow with a context: give n_context too")
        context = Context.unscaled(spec.n_context, context_names) if spec.n_context else None
        self._build(spec, None, tuple(preprocessing), DataInfo(), context, seed, init, get_backend(device, threads))
        self._dtype_is_open = open_dtype

    @classmethod
    def from_spec(
        cls,
        spec: ModelSpec,
        parameters: Parameters | None = None,
        preprocessing: Sequence[Step] = (),
        info: DataInfo | None = None,
        seed: int = 0,
        *,
        context: Context | None = None,
        init: str = "paper",
        backend: Backend | None = None,
    ) -> NICE:
        """A flow from its architecture, with these parameters (names of spec.parameter_shapes()) or fresh ones.

        context : the scale of its context, which parameters that come from elsewhere go with
        """
        flow, info, backend = cls.__new__(cls), info or DataInfo(), backend or get_backend()
        if context is None and spec.n_context and parameters is None:
            context = Context.unscaled(spec.n_context)
        flow._build(spec, parameters, tuple(preprocessing), info, context, seed, init, backend)
        flow._dtype_is_open = False
        return flow

    def _build(
        self,
        spec: ModelSpec,
        parameters: Parameters | None,
        preprocessing: tuple[Step, ...],
        info: DataInfo,
        context: Context | None,
        seed: int,
        init: str,
        backend: Backend,
    ) -> None:
        seed = whole_number(seed, "seed")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in 0..2**64 - 1, got {seed}")
        if len(spec.couplings) < 3:
            logger.warning(
                "%d coupling(s): at least 3 are needed for every feature to influence every other", len(spec.couplings)
            )
        for step in preprocessing:
            check_step_fits(step, spec.n_features)
        if spec.n_context != (0 if context is None else len(context)):
            raise ValueError(f"a flow with n_context = {spec.n_context} needs a Context of as many numbers")
        self.spec, self.preprocessing, self.info, self.seed, self.init = spec, preprocessing, info, seed, init
        self.context, self.backend = context, (backend := with_precision(backend, spec.precision))
        self.network = Network(spec, backend)
        self.flat: Array = backend.alloc(self.network.layout.size, spec.dtype)
        self._views = self.network.layout.views(self.flat)
        self._calls = Calls(self.network, self._views)
        self._few = rows_without_blas(spec, preprocessing) if backend.device == "cpu" else 0
        self._points: Points | None = None
        self._there = DeviceRows(self)
        self.set_parameters(initial_parameters(backend, spec, seed, init) if parameters is None else parameters)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.spec, self.parameters(), self.preprocessing, self.info, self.seed)
        keywords = {"context": self.context, "init": self.init, "backend": self.backend}
        return _rebuild, (arguments, keywords, self._dtype_is_open)

    # --- what it is -------------------------------------------------------------------------------

    def parameters(self) -> Parameters:
        """Named host copies: couplings/K/layers/J/weight, .../bias, scaling/log_scale (d,) in data order."""
        return self.network.layout.to_host(self.backend, self.flat)

    def set_parameters(self, named: Parameters) -> None:
        """Replace every parameter; ValueError where names or shapes do not fit."""
        self.network.layout.from_host(self.backend, self.flat, named)

    def prepare(
        self, preprocessing: Sequence[Step], info: DataInfo, eight_bit: bool, context: Context | None = None
    ) -> None:
        """Take on a data set before training: its preprocessing, its description, the scale of its context (None: as it
        is) and, if still open, its dtype."""
        spec = self.spec
        if self._dtype_is_open:
            spec = replace(spec, dtype="float32" if eight_bit else "float64")
        context, steps = context or self.context, tuple(preprocessing)
        self._build(spec, self.parameters(), steps, info, context, self.seed, self.init, self.backend)
        self._dtype_is_open = False

    # --- densities --------------------------------------------------------------------------------

    @on_device
    def log_prob(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        dtype: DTypeLike = np.float64,
        *,
        floor: float | None = None,
    ) -> Any:
        """Log-density in nats: (d,) -> float, (..., d) -> (...) of ``dtype``.

        context : (k,) or (..., k) for a flow with a context, broadcast against the rows of x. NaN gives NaN, also in a
        context; infinities, and points outside the support, give -inf. ``floor``, for samplers that refuse -inf:
        nothing is below it.

        Raises
        ------
        ValueError, TypeError
            The last axis is not d long, the context is missing or of another shape, or they are not real numbers.
        FloatingPointError
            A finite row gave no finite number: the parameters are broken, or it overflows on its way.
        """
        rows, shape, given = self._rows(x, context)
        if len(rows) <= self._few:
            if self._points is None:
                self._points = Points(self.spec, self._views, self.preprocessing)
            out = self._points.log_prob(rows, given, floor)
        else:
            out = self._log_prob_in_chunks(rows, given, floor)
        if shape == ():
            return float(out[0])
        return out.reshape(shape).astype(dtype, copy=False)

    def _log_prob_in_chunks(self, rows: NDArray[Any], given: NDArray[Any] | None, floor: float | None) -> FloatArray:
        """rows : (n, d) -> (n,)."""
        out = np.empty(len(rows), np.float64)

        def score(call: Call, at: slice) -> None:
            out[at] = self.backend.copy_out(call.ws.logp)

        bad, log_det = self._run("density", rows, given, score)
        out += log_det
        settle(out, rows, bad, "log_prob", floor)
        return out

    @on_device
    def log_prob_and_grad(
        self, x: ArrayLike, context: ArrayLike | None = None, *, floor: float | None = None
    ) -> tuple[Any, FloatArray]:
        """Log-density and its gradient by x, of one pass: see log_prob and grad_log_prob."""
        rows, shape, given = self._rows(x, context)
        out, log_prob = np.empty(rows.shape, np.float64), np.empty(len(rows), np.float64)

        def differentiate(call: Call, at: slice) -> None:
            gradient = self.backend.copy_out(call.out).astype(np.float64, copy=False)
            out[at] = steps_backward(self.preprocessing, gradient, np.asarray(rows[at], np.float64))
            log_prob[at] = self.backend.copy_out(call.ws.logp)

        bad, log_det = self._run("gradient", rows, given, differentiate)
        refuse_overflow(~np.isfinite(out).all(axis=1) & ~bad, "grad_log_prob")
        log_prob += log_det
        settle(log_prob, rows, bad, "log_prob", floor)
        out[bad] = np.nan
        return float(log_prob[0]) if shape == () else log_prob.reshape(shape), out.reshape(*shape, self.n_features)

    def grad_log_prob(self, x: ArrayLike, context: ArrayLike | None = None) -> FloatArray:
        """d log p / d x in nats per unit of x: (..., d) -> (..., d) float64. Rows that are not finite give NaN.

        By x alone, at a fixed context. Raises as log_prob.
        """
        return self.log_prob_and_grad(x, context)[1]

    def loss_and_gradients(
        self, x: ArrayLike, context: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> tuple[float, Parameters]:
        """Mean negative log-density of the rows (nats) and its gradients by every parameter, named as parameters().

        x : (n, d) finite; context : (k,) or (n, k); sample_weight : (n,), then it is the weighted mean. For gradient
        checks and small fits; training runs the same network in place.
        """
        rows, _, given = self._rows(x, context)
        z, bad, log_det = to_inputs(np.asarray(rows, np.float64), self.preprocessing, self.dtype)
        if bad.any() or len(rows) == 0 or (given is not None and np.isnan(given).any()):
            raise ValueError("loss_and_gradients needs at least one row, all finite")
        n, backend = len(z), self.backend
        ws, state = self.network.workspace(n, keep=True), backend.alloc(Slot.SIZE, np.float64)
        flat = backend.alloc(self.network.layout.size, self.spec.dtype)
        backend.copy_in(ws.weight, np.ones(n) if sample_weight is None else np.asarray(sample_weight, np.float64))
        with backend.computing():
            self._load(ws.x, z)
            ws.load_context(backend, given, slice(n))
            self.network.forward(ws, self._views)
            backend.loss(state, ws.dlogp, ws.logp, ws.weight)
            self.network.backward(ws, self._views, self.network.layout.views(flat), want_dx=False)
        before = np.average(np.broadcast_to(log_det, (n,)), weights=backend.copy_out(ws.weight))
        loss = float(backend.copy_out(state)[Slot.LOSS]) - float(before)
        return loss, self.network.layout.to_host(backend, flat)

    # --- the bijection ----------------------------------------------------------------------------

    @on_device
    def forward(self, x: ArrayLike, context: ArrayLike | None = None) -> tuple[FloatArray, Any]:
        """x : (..., d) -> latent h : (..., d), in data order, and log abs det dh/dx : (...) or a float, in nats."""
        rows, shape, given = self._rows(x, context)
        out, log_det = np.empty(rows.shape, np.float64), np.full(len(rows), self.network.log_det(self._views))

        def transform(call: Call, at: slice) -> None:
            out[at] = self.backend.copy_out(call.out)
            if call.ws.log_det is not None:
                log_det[at] += self.backend.copy_out(call.ws.log_det)

        bad, before = self._run("latent", rows, given, transform)
        out[bad] = np.nan
        return with_log_det(out, shape, log_det + before)

    @on_device
    def inverse(self, h: ArrayLike, context: ArrayLike | None = None) -> tuple[FloatArray, Any]:
        """Latent h : (..., d) -> x : (..., d) and log abs det dx/dh : (...), a float for one row, in nats."""
        rows, shape, given = self._rows(h, context, integers=True)
        out, log_det = np.empty(rows.shape, np.float64), np.full(len(rows), -self.network.log_det(self._views))
        for start in range(0, len(rows), CHUNK):
            at = slice(start, start + CHUNK)
            self._invert(out[at], log_det[at], np.asarray(rows[at], np.float64), given, at)
        return with_log_det(out, shape, log_det)

    def _invert(
        self, out: FloatArray, log_det: FloatArray, h: FloatArray, context: NDArray[Any] | None, at: slice
    ) -> None:
        """h : (n, d) -> out : (n, d) in data space, log_det : (n,) += the couplings' and the steps', one chunk."""
        with self.backend.computing(), self._calls.borrow("inverse", len(h)) as call:
            self._load(call.ws.h, h, self.spec.latent_columns)
            call.ws.load_context(self.backend, context, at)
            call.run()
            x = self.backend.copy_out(call.out).astype(np.float64, copy=False)
            if call.ws.log_det is not None:
                log_det += self.backend.copy_out(call.ws.log_det)
        with np.errstate(over="ignore", invalid="ignore"):
            out[...], before = undo_steps(self.preprocessing, x)
        log_det += before

    def sample(
        self,
        n: int,
        rng: int | np.random.Generator | np.random.RandomState | None = None,
        context: ArrayLike | None = None,
        return_log_prob: bool = False,
        first: int = 0,
    ) -> Any:
        """n exact samples : (n, d) float64 in data space, x = f^-1(h), h from the prior.

        context : (k,) for all of them, or (n, k), one for each, for a flow with a context.
        rng : an int is the Philox seed (row i depends on the seed and i alone; ``first`` is the number of the first); a
        Generator or RandomState gives that seed; None takes one from the operating system. return_log_prob : also
        their log-densities (n,).
        """
        n, seed = whole_number(n, "n"), seed_of(rng)
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        given = seen(rows_for(n, context_of(context, self.context)), self.context, self.dtype)
        if self.backend.device != "cpu" and self._there.usable and not return_log_prob:
            return self._there.sample(n, seed, given, first)
        fill = self.backend.fill_logistic if self.spec.prior == "logistic" else self.backend.fill_normal
        out = np.empty((n, self.n_features), np.float64)
        for start in range(0, n, CHUNK):
            part = out[start : start + CHUNK]
            h = self.backend.alloc(part.shape, np.float64)
            fill(h, seed, Purpose.SAMPLE, 0, first + start)
            self._invert(part, np.zeros(len(part)), self.backend.copy_out(h), given, slice(start, start + CHUNK))
        return (out, self.log_prob(out, context)) if return_log_prob else out

    # --- borders ----------------------------------------------------------------------------------

    def _rows(
        self, x: ArrayLike, context: ArrayLike | None, integers: bool = False
    ) -> tuple[NDArray[Any], tuple[int, ...], NDArray[Any] | None]:
        """Rows (n, d) as they are, their leading shape, what networks see of the context: (n, k), (1, k) or None."""
        rows, shape = as_rows(x, self.n_features, self.preprocessing, integers)
        rows, shape, given = paired(rows, shape, context_of(context, self.context))
        return rows, shape, seen(given, self.context, self.dtype)

    def _load(self, halves: Halves, z: FloatArray, parts: tuple[Any, Any] | None = None) -> None:
        for half, columns in zip(halves, parts or self.spec.columns, strict=True):
            self.backend.copy_in(half, z[:, columns])

    def _run(
        self, kind: str, rows: NDArray[Any], context: NDArray[Any] | None, take: Callable[[Call, slice], None]
    ) -> tuple[NDArray[np.bool_], FloatArray]:
        """Preprocess rows, run passes over chunks of them and hand these over.

        -> (n,) which rows are not finite, and (n,) the preprocessing's log-determinants
        """
        bad, log_det = np.empty(len(rows), np.bool_), np.empty(len(rows), np.float64)
        with self.backend.computing(), np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(rows), CHUNK):
                at = slice(start, min(start + CHUNK, len(rows)))
                row = np.asarray(rows[at], np.float64)
                z, bad[at], log_det[at] = to_inputs(row, self.preprocessing, self.dtype)
                with self._calls.borrow(kind, len(z)) as call:
                    self._load(call.ws.x, z)
                    bad[at] |= call.ws.load_context(self.backend, context, at)
                    call.run()
                    take(call, at)
        return bad, log_det


def _rebuild(arguments: tuple[Any, ...], keywords: dict[str, Any], dtype_is_open: bool) -> NICE:
    """What pickle calls."""
    flow = NICE.from_spec(*arguments, **keywords)
    flow._dtype_is_open = dtype_is_open
    return flow
