"""NICE: the flow that users hold.  Dinh, Krueger, Bengio 2015, arXiv 1410.8516."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from nicecp.borders import as_rows, refuse_overflow, seed_of
from nicecp.calls import Call, Calls
from nicecp.density import Density
from nicecp.kernels import get_backend
from nicecp.kernels.backend import Array, Backend, Purpose
from nicecp.network import Halves, Network
from nicecp.params import initial_parameters
from nicecp.preprocessing import Step, apply_steps, steps_backward, undo_steps
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
    coupling : "additive", "multiplicative" or "affine", or several of these
        The law of all couplings, or a sequence of laws that is gone through again and again (nicecp.coupling).
    partition : "odd-even", "halves" or a sequence of int
        The two parts that couplings change in turn: even and odd features, the first and the second half, or the first
        and the second half of a permutation of the features' numbers.
    network : "mlp" or a registered name
        What couplings read: dense ReLU layers, or a network of one's own. A law of one's own is a name in ``coupling``.
        See nicecp.registry and docs/extending.md.
    init : "paper" or "he"
        Initial weights; see nicecp.params.initial_parameters.
    preprocessing : sequence of steps
        Applied to data in order before the couplings; log-densities are reported in the space before them.
    device, threads
        See nicecp.kernels.get_backend.

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
        network: str = "mlp",
        init: str = "paper",
        preprocessing: Sequence[Step] = (),
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        open_dtype = isinstance(dtype, str) and dtype == "auto"
        name = "float64" if open_dtype else dtype
        spec = spec_of(n_features, hidden, n_couplings, prior, name, coupling, partition, network)
        self._build(spec, None, tuple(preprocessing), DataInfo(), seed, init, get_backend(device, threads))
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
        init: str = "paper",
        backend: Backend | None = None,
    ) -> NICE:
        """A flow from its architecture, with these parameters (names of spec.parameter_shapes()) or fresh ones."""
        flow = cls.__new__(cls)
        flow._build(spec, parameters, tuple(preprocessing), info or DataInfo(), seed, init, backend or get_backend())
        flow._dtype_is_open = False
        return flow

    def _build(
        self,
        spec: ModelSpec,
        parameters: Parameters | None,
        preprocessing: tuple[Step, ...],
        info: DataInfo,
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
        self.spec, self.preprocessing, self.info, self.seed, self.init = spec, preprocessing, info, seed, init
        self.backend = backend
        self.network = Network(spec, backend)
        self.flat: Array = backend.alloc(self.network.layout.size, spec.dtype)
        self._views = self.network.layout.views(self.flat)
        self._calls = Calls(self.network, self._views)
        self.set_parameters(initial_parameters(backend, spec, seed, init) if parameters is None else parameters)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.spec, self.parameters(), self.preprocessing, self.info, self.seed, self.init, self.backend)
        return _rebuild, (*arguments, self._dtype_is_open)

    def __repr__(self) -> str:
        hidden = "-".join(str(size) for size in self.spec.couplings[0].hidden)
        return (
            f"NICE({self.n_features} features, {len(self.spec.couplings)} {self.spec.couplings[0].law} couplings "
            f"of {hidden or 'no hidden layer'}, {self.spec.prior} prior, {self.spec.dtype})"
        )

    # --- what it is -------------------------------------------------------------------------------

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of parameters and computation."""
        return np.dtype(self.spec.dtype)

    @property
    def n_parameters(self) -> int:
        return self.spec.n_parameters

    def parameters(self) -> Parameters:
        """Named host copies: couplings/K/layers/J/weight, .../bias, scaling/log_scale (d,) in data order."""
        return self.network.layout.to_host(self.backend, self.flat)

    def set_parameters(self, named: Parameters) -> None:
        """Replace every parameter; ValueError where names or shapes do not fit."""
        self.network.layout.from_host(self.backend, self.flat, named)

    def prepare(self, preprocessing: Sequence[Step], info: DataInfo, eight_bit: bool) -> None:
        """Take on a data set before training: its preprocessing, its description and, if still open, its dtype."""
        spec = self.spec
        if self._dtype_is_open:
            spec = replace(spec, dtype="float32" if eight_bit else "float64")
        self._build(spec, self.parameters(), tuple(preprocessing), info, self.seed, self.init, self.backend)
        self._dtype_is_open = False

    # --- densities --------------------------------------------------------------------------------

    def log_prob(
        self, x: ArrayLike, context: None = None, dtype: DTypeLike = np.float64, *, floor: float | None = None
    ) -> Any:
        """Log-density in nats: (d,) -> float, (..., d) -> (...) of ``dtype``.

        NaN gives NaN; infinities, and points outside the support, give -inf. ``floor``, for samplers that refuse -inf:
        nothing is below it.

        Raises
        ------
        ValueError, TypeError
            The last axis is not d long, or x is not real numbers.
        FloatingPointError
            A finite row gave no finite number: the parameters are broken, or it overflows on its way.
        """
        self._refuse_context(context)
        rows, shape = self._rows(x)
        out = np.empty(len(rows), np.float64)

        def score(call: Call, at: slice) -> None:
            out[at] = self.backend.copy_out(call.ws.logp)

        bad, log_det = self._run("density", rows, score)
        out += log_det
        self._settle(out, rows, bad, "log_prob", floor)
        if shape == ():
            return float(out[0])
        return out.reshape(shape).astype(dtype, copy=False)

    def log_prob_and_grad(
        self, x: ArrayLike, context: None = None, *, floor: float | None = None
    ) -> tuple[Any, FloatArray]:
        """Log-density and its gradient by x, of one pass: see log_prob and grad_log_prob."""
        self._refuse_context(context)
        rows, shape = self._rows(x)
        out, log_prob = np.empty(rows.shape, np.float64), np.empty(len(rows), np.float64)

        def differentiate(call: Call, at: slice) -> None:
            gradient = self.backend.copy_out(call.out).astype(np.float64, copy=False)
            out[at] = steps_backward(self.preprocessing, gradient, np.asarray(rows[at], np.float64))
            log_prob[at] = self.backend.copy_out(call.ws.logp)

        bad, log_det = self._run("gradient", rows, differentiate)
        refuse_overflow(~np.isfinite(out).all(axis=1) & ~bad, "grad_log_prob")
        log_prob += log_det
        self._settle(log_prob, rows, bad, "log_prob", floor)
        out[bad] = np.nan
        return float(log_prob[0]) if shape == () else log_prob.reshape(shape), out.reshape(*shape, self.n_features)

    def grad_log_prob(self, x: ArrayLike, context: None = None) -> FloatArray:
        """d log p / d x in nats per unit of x: (..., d) -> (..., d) float64. Rows that are not finite give NaN.

        Raises as log_prob.
        """
        return self.log_prob_and_grad(x, context)[1]

    def loss_and_gradients(self, x: ArrayLike) -> tuple[float, Parameters]:
        """Mean negative log-density of the rows (nats) and its gradients by every parameter, named as parameters().

        x : (n, d) finite. For gradient checks and small fits; training runs the same network in place.
        """
        rows, _ = self._rows(x)
        z, bad, log_det = self._to_inputs(np.asarray(rows, np.float64))
        if bad.any() or len(rows) == 0:
            raise ValueError("loss_and_gradients needs at least one row, all finite")
        n = rows.shape[0]
        ws = self.network.workspace(n, keep=True)
        flat = self.backend.alloc(self.network.layout.size, self.spec.dtype)
        with self.backend.computing():
            self._load(ws.x, z)
            self.network.forward(ws, self._views)
            self.backend.copy_in(ws.dlogp, np.full(n, -1.0 / n))
            self.network.backward(ws, self._views, self.network.layout.views(flat), want_dx=False)
        loss = -float(self.backend.copy_out(ws.logp).mean()) - float(np.mean(log_det))
        return loss, self.network.layout.to_host(self.backend, flat)

    # --- the bijection ----------------------------------------------------------------------------

    def forward(self, x: ArrayLike) -> tuple[FloatArray, Any]:
        """x : (..., d) -> latent h : (..., d) and log abs det dh/dx : (...), a float for one row, in nats."""
        rows, shape = self._rows(x)
        out = np.empty(rows.shape, np.float64)

        log_det = np.full(len(rows), self.network.log_det(self._views))

        def transform(call: Call, at: slice) -> None:
            out[at] = self.backend.copy_out(call.out)
            if call.ws.log_det is not None:
                log_det[at] += self.backend.copy_out(call.ws.log_det)

        bad, before = self._run("latent", rows, transform)
        out[bad] = np.nan
        return self._with_log_det(out, shape, log_det + before)

    def inverse(self, h: ArrayLike) -> tuple[FloatArray, Any]:
        """Latent h : (..., d) -> x : (..., d) and log abs det dx/dh : (...), a float for one row, in nats."""
        rows, shape = self._rows(h, integers=True)
        out = np.empty(rows.shape, np.float64)
        log_det = np.full(len(rows), -self.network.log_det(self._views))
        for start in range(0, len(rows), CHUNK):
            at = slice(start, start + CHUNK)
            self._invert(out[at], log_det[at], np.asarray(rows[at], np.float64))
        return self._with_log_det(out, shape, log_det)

    def _invert(self, out: FloatArray, log_det: FloatArray, h: FloatArray) -> None:
        """h : (n, d) -> out : (n, d) in data space, log_det : (n,) += the couplings' and the steps', one chunk."""
        with self.backend.computing(), self._calls.borrow("inverse", len(h)) as call:
            self._load(call.ws.h, h)
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
        rng: int | np.random.Generator | None = None,
        context: None = None,
        return_log_prob: bool = False,
        first: int = 0,
    ) -> Any:
        """n exact samples : (n, d) float64 in data space, x = f^-1(h), h from the prior.

        rng : an int is the Philox seed (row i depends on the seed and i alone, so a longer draw begins with a shorter
        one); a Generator gives that seed; None takes one from the operating system. return_log_prob : also their
        log-densities (n,), those that log_prob gives for them. first : number of the first row.
        """
        self._refuse_context(context)
        n, seed = whole_number(n, "n"), seed_of(rng)
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        fill = self.backend.fill_logistic if self.spec.prior == "logistic" else self.backend.fill_normal
        out = np.empty((n, self.n_features), np.float64)
        for start in range(0, n, CHUNK):
            part = out[start : start + CHUNK]
            h = self.backend.alloc(part.shape, np.float64)
            fill(h, seed, Purpose.SAMPLE, 0, first + start)
            self._invert(part, np.zeros(len(part)), self.backend.copy_out(h))
        return (out, self.log_prob(out)) if return_log_prob else out

    # --- borders ----------------------------------------------------------------------------------

    def _refuse_context(self, context: None) -> None:
        if context is not None:
            raise ValueError("this flow has no context (n_context = 0): leave context out")

    def _rows(self, x: ArrayLike, integers: bool = False) -> tuple[NDArray[Any], tuple[int, ...]]:
        return as_rows(x, self.n_features, self.preprocessing, integers)

    def _settle(
        self, out: FloatArray, rows: NDArray[Any], bad: NDArray[np.bool_], what: str, floor: float | None
    ) -> None:
        """Log-densities of rows that are not finite, and of all no less than the floor, in place."""
        refuse_overflow(~np.isfinite(out) & ~bad, what)
        if bad.any():
            out[bad] = np.where(np.isnan(rows[bad]).any(axis=1), np.nan, -np.inf)
        if floor is not None:
            np.maximum(out, floor, out=out)

    def _to_inputs(self, rows: FloatArray) -> tuple[FloatArray, NDArray[np.bool_], float | FloatArray]:
        """Data rows -> the network's inputs, which rows are not finite (zeroed), and the steps' log-determinants."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            z, log_det = apply_steps(self.preprocessing, rows)
            bad = ~np.isfinite(z.astype(self.dtype, copy=False)).all(axis=1)
        if bad.any():
            z = np.where(bad[:, None], 0.0, z)
        return z, bad, log_det

    def _load(self, halves: Halves, z: FloatArray) -> None:
        for half, columns in zip(halves, self.spec.columns, strict=True):
            self.backend.copy_in(half, z[:, columns])

    def _run(
        self, kind: str, rows: NDArray[Any], take: Callable[[Call, slice], None]
    ) -> tuple[NDArray[np.bool_], FloatArray]:
        """Preprocess rows, run passes over chunks of them and hand these over.

        -> (n,) which rows are not finite, and (n,) the preprocessing's log-determinants
        """
        bad, log_det = np.empty(len(rows), np.bool_), np.empty(len(rows), np.float64)
        with self.backend.computing(), np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(rows), CHUNK):
                at = slice(start, min(start + CHUNK, len(rows)))
                z, bad[at], log_det[at] = self._to_inputs(np.asarray(rows[at], np.float64))
                with self._calls.borrow(kind, len(z)) as call:
                    self._load(call.ws.x, z)
                    call.run()
                    take(call, at)
        return bad, log_det

    def _with_log_det(self, rows: FloatArray, shape: tuple[int, ...], log_det: FloatArray) -> tuple[FloatArray, Any]:
        rows = rows.reshape(*shape, self.n_features)
        return rows, float(log_det[0]) if shape == () else log_det.reshape(shape)


def _rebuild(
    spec: ModelSpec,
    parameters: Parameters,
    preprocessing: tuple[Step, ...],
    info: DataInfo,
    seed: int,
    init: str,
    backend: Backend,
    dtype_is_open: bool,
) -> NICE:
    """What pickle calls."""
    flow = NICE.from_spec(spec, parameters, preprocessing, info, seed, init=init, backend=backend)
    flow._dtype_is_open = dtype_is_open
    return flow
