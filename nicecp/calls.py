"""Passes over a network for so many rows, written down once and kept: a workspace and what runs on it.

To write a pass down costs more than to carry it out for a few rows, and people ask for one point again and again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from nicecp.kernels.backend import Array
from nicecp.network import Network
from nicecp.params import Views

KEPT_BYTES = {"cpu": 2**22, "cuda": 2**27}  # of buffers: larger passes take longer than to write them down
KEPT = 16  # passes in all


class Call:
    """One kind of pass for n rows. ``ws`` takes the input, and in ws.context the context if the flow has one; ``out`` :
    (n, d) the result, but for kind "density".

    density: ws.x -> ws.logp; latent: ws.x -> out = h; inverse: ws.h -> out = x; gradient: ws.x -> out = d log p / d x.
    """

    def __init__(self, network: Network, views: Views, kind: str, n: int) -> None:
        self._network, self._views, backend = network, views, network.backend
        self.ws = network.workspace(n, keep=kind == "gradient")
        self.out: Array = None
        if kind != "density":
            self.out = backend.alloc((n, network.spec.n_features), network.spec.dtype)
        if kind == "gradient":
            backend.copy_in(self.ws.dlogp, np.ones(n))
        self.run = backend.record({"density": self._density, "latent": self._latent, "inverse": self._inverse,
                                   "gradient": self._gradient}[kind])  # fmt: skip

    def _density(self) -> None:
        self._network.forward(self.ws, self._views)

    def _latent(self) -> None:
        self._density()
        self._network.backend.join(self.out, *self.ws.h, self._network.latent_order)

    def _inverse(self) -> None:
        self._network.inverse(self.ws, self._views)
        self._network.backend.join(self.out, *self.ws.x, self._network.order)

    def _gradient(self) -> None:
        self._density()
        self._network.backward(self.ws, self._views, None, want_dx=True)
        assert self.ws.dx is not None
        self._network.backend.join(self.out, *self.ws.dx, self._network.order)


class Calls:
    """Passes over one network with parameters at one place, for any number of threads: each borrows its own."""

    def __init__(self, network: Network, views: Views) -> None:
        self._network, self._views = network, views
        self._spare: defaultdict[tuple[str, int], list[Call]] = defaultdict(list)

    @contextmanager
    def borrow(self, kind: str, n: int) -> Iterator[Call]:
        """A call of that kind for n rows that nobody else uses meanwhile.

        Each access to the spare ones is a single operation, so that it needs no lock, which a forked child might find
        held by a thread that it does not have.
        """
        try:
            call = self._spare[kind, n].pop()
        except IndexError:
            call = Call(self._network, self._views, kind, n)
        yield call
        if n * self._row_bytes(kind) <= KEPT_BYTES[self._network.backend.device]:
            if sum(map(len, list(self._spare.values()))) >= KEPT:
                self._spare.clear()
            self._spare[kind, n].append(call)

    def _row_bytes(self, kind: str) -> int:
        """Of the buffers, about."""
        spec = self._network.spec
        hidden = [sum(coupling.hidden) for coupling in spec.couplings]
        return (
            4 * (spec.n_features + spec.n_context) + (sum(hidden) if kind == "gradient" else max(hidden))
        ) * np.dtype(spec.dtype).itemsize
