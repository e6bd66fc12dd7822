"""The whole bijection on a backend: couplings, scaling and prior over explicit workspaces.

Nothing here keeps state between calls but the layout: parameters and workspaces are passed in, so calls are reentrant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.coupling import Buffers, coupling_of, own_of
from nicecp.errors import DeviceError
from nicecp.kernels.backend import PRIORS, Array, Backend
from nicecp.params import Layout, Range, Views
from nicecp.spec import ModelSpec

Halves = tuple[Array, Array]  # (n, d0), (n, d1)

# What is kept of a forward pass for the backward pass. store: everything. halves: what every coupling reads and
# changes; its network is computed once more. recompute: the output; every coupling is inverted as well.
ACTIVATIONS = ("store", "halves", "recompute")


class Workspace:
    """Buffers for n rows. keep=False: scoring and sampling, in place. keep=True: for backward; see ACTIVATIONS.

    x : (n, d0), (n, d1) inputs, overwritten in place unless keep, and by a backward pass that recomputes (with what it
    makes of the output); h : the same shapes, latent; logp, dlogp, weight, log_det (of the couplings; None if they
    preserve volume) : (n,) float64; dx : gradients by the inputs (keep only). context : (n, k) standardised, or None
    without one; passes leave it as it is. before : (n,) float64 log-determinants of the rows' own on their way to x,
    part of logp; None, unless whoever loads rows sets it.
    """

    before: Array | None = None

    def __init__(self, backend: Backend, spec: ModelSpec, n: int, keep: bool, activations: str = "store") -> None:
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
        dtype, parts = np.dtype(spec.dtype), spec.part_sizes
        self.n, self.keep, self.activations = n, keep, activations
        store, in_place = keep and activations == "store", not keep or activations == "recompute"

        def halves() -> Halves:
            return backend.alloc((n, parts[0]), dtype), backend.alloc((n, parts[1]), dtype)

        self.x = halves()
        h = halves() if keep else None
        self.logp = backend.alloc(n, np.float64)
        self.dlogp = backend.alloc(n, np.float64)
        self.weight = backend.alloc(n, np.float64)
        self.log_det: Array | None = None if spec.volume_preserving else backend.alloc(n, np.float64)
        self.context: Array | None = backend.alloc((n, spec.n_context), dtype) if spec.n_context else None
        sizes = [spec.layer_sizes(k) for k in range(len(spec.couplings))]
        widest = max((size for layers in sizes for size in layers[1:-1]), default=0)
        # Two scratch buffers take turns: activations when scoring, their gradients in the backward pass.
        scratch = [backend.alloc(n * widest, dtype) for _ in range(2)]
        output = backend.alloc(n * max(layers[-1] for layers in sizes), dtype)  # a network's, or the gradient by it
        # Networks that are computed once more, one after the other, fill the same buffers.
        depth = max(len(layers) for layers in sizes) if keep and not store else 0
        again = [
            backend.alloc(n * max(layers[j] for layers in sizes if j < len(layers)), dtype) for j in range(1, depth)
        ]
        again_m = backend.alloc(output.shape if again and self.log_det is not None else 0, dtype)
        self.undone = backend.alloc(n, np.float64)  # takes the log_det of couplings that are inverted on the way back
        self.dcondition = halves() if keep else None

        def wide(part: int) -> Array | None:
            """What a network reads: a part's features and the context."""
            return backend.alloc((n, parts[part] + spec.n_context), dtype) if spec.n_context else None

        # Filled anew by every network, unless backward reads what is in them; gradients by them.
        inputs = (None, None) if store else (wide(0), wide(1))
        dinputs = (wide(0), wide(1)) if keep else (None, None)
        held: list[object] = []  # what a registered network saves, where one at a time is enough
        self.couplings: list[Buffers] = []
        self.moves: list[tuple[Halves, Halves] | None] = []  # before and behind a permutation in front of each coupling
        self.dxs: list[Halves] = []  # keep only: gradients by the halves in front of each coupling
        self.dx = halves() if keep else None
        # What is worked on in place moves to and fro between two pairs.
        moving = any(index is not None for index in spec.permutations)
        pairs = (self.x, halves()) if moving and in_place else None
        dpairs = (self.dx, halves() if moving else self.dx) if self.dx is not None else None
        turn, parts_now, begun = 0, list(self.x), False
        for k, layers in enumerate(sizes):
            coupling, move = spec.couplings[k], None
            if spec.permutations[k] is not None:
                turn = 1 - turn
                move = (parts_now[0], parts_now[1]), halves() if pairs is None else pairs[turn]
                parts_now = list(move[1])
            self.moves.append(move)
            if dpairs is not None:
                self.dxs.append(dpairs[turn])
            turns = [scratch[j % 2][: n * size].reshape(n, size) for j, size in enumerate(layers[1:-1])]
            if store:
                hidden = [backend.alloc((n, size), dtype) for size in layers[1:-1]]
            else:
                hidden = (
                    [again[j][: n * size].reshape(n, size) for j, size in enumerate(layers[1:-1])] if keep else turns
                )
            shared = output[: n * layers[-1]].reshape(n, layers[-1])
            factor, m = coupling.law != "additive", shared
            if keep and factor:  # m and the gradient by it
                m = backend.alloc(m.shape, dtype) if store else again_m[: m.size].reshape(m.shape)
            x = parts_now[coupling.transforms]
            y = x if in_place else backend.alloc((n, parts[coupling.transforms]), dtype)
            c, log_det = coupling.conditions_on, self.log_det if factor else None
            beside = self.context, wide(c) if store else inputs[c], dinputs[c], [] if store else held
            self.couplings.append(
                Buffers(x, y, parts_now[c], [*hidden, m], [*turns, shared], log_det, not begun, *beside)
            )
            begun = begun or factor
            parts_now[coupling.transforms] = y
        self.y = parts_now[0], parts_now[1]  # behind the last coupling
        self.h = self.y if h is None else h

    def load_context(self, backend: Backend, context: NDArray[Any] | None, at: slice) -> Any:
        """Rows ``at`` of a context as networks see it : (m, k), or (1, k) for all rows -> which are NaN, or False."""
        if context is None:
            return False
        part = np.broadcast_to(context[at] if len(context) > 1 else context, (self.n, context.shape[1]))
        backend.copy_in(self.context, part)
        return np.isnan(part).any(axis=1)


class Network:
    """Forward, inverse and backward of a flow in its own input space (after preprocessing)."""

    def __init__(self, spec: ModelSpec, backend: Backend) -> None:
        self.spec, self.backend = spec, backend
        self.layout = Layout(spec)
        self.order: Array = backend.asarray(spec.column_order)  # (d,) int64: which data columns are in which part
        same = spec.latent_order is spec.column_order
        self.latent_order: Array = self.order if same else backend.asarray(spec.latent_order)
        # In front of each coupling: how the halves are permuted, and the inverse of that; None where they are not.
        self.permutations = [
            None if index is None else (backend.asarray(index), backend.asarray(np.argsort(index)))
            for index in spec.permutations
        ]
        self.prior = PRIORS[spec.prior]
        self.couplings = [coupling_of(coupling) for coupling in spec.couplings]
        if spec.registered and backend.device != "cpu":
            names = ", ".join(repr(name) for name in spec.registered)
            raise DeviceError(f"{names} run in Python on a CPU, not on {backend.device!r}: use device 'cpu'")

    def workspace(self, n: int, keep: bool, activations: str = "store") -> Workspace:
        return Workspace(self.backend, self.spec, n, keep, activations)

    def forward(self, ws: Workspace, params: Views) -> None:
        """ws.x -> ws.h and ws.logp = log p(h) + sum(s) + log det of the couplings [+ ws.before], in nats per row.

        Pair: backward.
        """
        each = zip(self.couplings, ws.couplings, params.couplings, params.own, strict=True)
        for k, (coupling, at, layers, own) in enumerate(each):
            move = ws.moves[k]
            if move is not None:
                self._permute(k, 0, *move)
            coupling.forward(self.backend, at, layers, own_of(own))
        self.backend.scale_prior_forward(ws.logp, *ws.h, *ws.y, *params.scaling, self.prior)
        if ws.log_det is not None:
            self.backend.accumulate(ws.logp, ws.log_det)
        if ws.before is not None:
            self.backend.accumulate(ws.logp, ws.before)

    def backward(
        self,
        ws: Workspace,
        params: Views,
        grads: Views | None,
        want_dx: bool,
        ready: Callable[[Range], None] | None = None,
    ) -> None:
        """ws.dlogp (the loss's gradient by each row's log-density) -> grads and, if want_dx, ws.dx.

        Needs a workspace with keep after forward. ready(range) is called when the gradients of that range of the flat
        buffer are complete and its parameters will not be read again.
        """
        self.backward_prior(ws, params, grads, ready)
        for k in range(len(self.couplings) - 1, -1, -1):
            self.backward_coupling(k, ws, params, grads, want_dx, ready)

    def backward_prior(
        self, ws: Workspace, params: Views, grads: Views | None, ready: Callable[[Range], None] | None = None
    ) -> None:
        """The first part of backward: ws.dlogp -> the gradient behind the last coupling, and by the scaling."""
        if not ws.dxs:
            raise ValueError("backward needs a workspace that keeps activations")
        ds0, ds1 = grads.scaling if grads is not None else (None, None)
        self.backend.scale_prior_backward(*ws.dxs[-1], ds0, ds1, ws.dlogp, *ws.h, *params.scaling, self.prior)
        if ready is not None:
            ready(self.layout.scaling)

    def backward_coupling(
        self,
        k: int,
        ws: Workspace,
        params: Views,
        grads: Views | None,
        want_dx: bool,
        ready: Callable[[Range], None] | None = None,
    ) -> None:
        """Of backward: coupling k, when those above it are done. The gradient in front of it, and of its parameters."""
        dx, coupling, at, layers = ws.dxs[k], self.couplings[k], ws.couplings[k], params.couplings[k]
        own, move = own_of(params.own[k]), ws.moves[k]
        assert ws.dcondition is not None
        if ws.activations == "halves":
            coupling.refill(self.backend, at, layers, own)
        elif ws.activations == "recompute":
            coupling.inverse(self.backend, replace(at, log_det=ws.undone, first=True), layers, own)
        c = coupling.conditions_on
        # Nobody reads the gradient by the data during training: the first coupling's last product is left out.
        dcondition = ws.dcondition[c] if want_dx or k > 0 else None
        coupling.backward(
            self.backend,
            at,
            dcondition,
            grads.couplings[k] if grads is not None else None,
            dx[coupling.transforms],
            ws.dlogp,
            layers,
            None if ready is None else partial(_part_ready, ready, self.layout.layers[k]),
            own,
            None if grads is None else own_of(grads.own[k]),
        )
        if ready is not None and self.layout.own[k].size:
            ready(self.layout.own[k])
        if dcondition is not None:
            self.backend.couple(dx[c], dx[c], dcondition, 1)
        if move is not None:
            self._permute(k, 1, dx, ws.dxs[k - 1])
            if ws.activations == "recompute":
                self._permute(k, 1, *move[::-1])

    def inverse(self, ws: Workspace, params: Views) -> None:
        """ws.h -> ws.x and ws.log_det, of the inverse (a workspace without keep: in place)."""
        self.backend.scale_inverse(*ws.y, *ws.h, *params.scaling)
        self.invert_couplings(ws, params)

    def invert_couplings(self, ws: Workspace, params: Views) -> None:
        """ws.y -> ws.x and ws.log_det, of the inverse (a workspace that works in place)."""
        begun = False
        for k in range(len(self.couplings) - 1, -1, -1):
            at = replace(ws.couplings[k], first=not begun)
            begun = begun or at.log_det is not None
            self.couplings[k].inverse(self.backend, at, params.couplings[k], own_of(params.own[k]))
            move = ws.moves[k]
            if move is not None:
                self._permute(k, 1, *move[::-1])

    def _permute(self, k: int, back: int, start: Halves, to: Halves) -> None:
        """Halves in front of the permutation before coupling k -> those behind it; back 1: its inverse."""
        permutation = self.permutations[k]
        assert permutation is not None
        self.backend.permute(*to, *start, permutation[back])

    def log_det(self, params: Views) -> float:
        """log abs det of the scaling, the same for every row: sum(s), in nats."""
        s0, s1 = (self.backend.copy_out(part).astype(np.float64) for part in params.scaling)
        return float(s0.sum() + s1.sum())


def _part_ready(ready: Callable[[Range], None], ranges: list[Range], j: int, start: int, stop: int | None) -> None:
    """Elements start..stop-1 (None: to the end) of layer j's range."""
    ready(Range(ranges[j].offset + start, (ranges[j].size if stop is None else stop) - start))
