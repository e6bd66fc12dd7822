"""A training step of several ranks: each one's rows, the exchange of log-densities, the sum of gradients in buckets.

The loss is computed by every rank from all rows' log-densities, in the same order whatever the number of ranks, so that
what a bad number leads to is decided alike. A rank's gradients are those of its own rows by the loss over all of them:
their sum over ranks is the gradient, up to rounding. That sum is begun for some couplings while the backward pass goes
on with those in front of them.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nicecp.errors import TrainingError
from nicecp.kernels.backend import Array, Backend
from nicecp.network import Network, Workspace
from nicecp.parallel import Communicator, Pending
from nicecp.params import Layout, Range, Views

LOOK_EVERY = 16  # steps of a GPU after which ranks look whether one of them has asked to stop
BUCKET_BYTES = 2**22  # of gradients from which a sum is begun: below, messages cost more than they hide


def own_rows(batch_size: int, communicator: Communicator) -> range:
    """The rows of every batch that are this rank's, as even as it goes.

    Raises ValueError where some rank would have none.
    """
    rank, size = communicator.rank, communicator.size
    if size > batch_size:
        raise ValueError(
            f"{size} ranks are more than the {batch_size} rows of a batch: use at most {batch_size} ranks, or a larger "
            "--batch-size"
        )
    return range(batch_size * rank // size, batch_size * (rank + 1) // size)


@dataclass(frozen=True)
class Bucket:
    """Couplings ``first`` to ``last`` and where their parameters are, with the scaling's for the last coupling."""

    first: int
    last: int
    range: Range


def buckets_of(layout: Layout, item: int, least: int = BUCKET_BYTES) -> list[Bucket]:
    """The flat buffer in ranges of at least so many bytes (the last one: what is left), in order of backward."""
    buckets, last, stop = [], len(layout.couplings) - 1, layout.size
    for k in range(last, -1, -1):
        start = layout.couplings[k].offset
        if (stop - start) * item >= least or k == 0:
            buckets.append(Bucket(k, last, Range(start, stop - start)))
            last, stop = k - 1, start
    return buckets


class Shared(Protocol):
    """What a SharedStep knows of a Trainer."""

    backend: Backend
    network: Network
    views: Views
    g: Array
    state: Array

    @property
    def workspace(self) -> Workspace: ...
    def load(self) -> None: ...
    def update(self, part: Range) -> None: ...


class SharedStep:
    """The step of a Trainer whose batches are shared by a communicator's ranks.

    request : signal number, or -1 where there is none, with which this rank asks all to stop; ``stop`` is what the
    ranks agreed on in the last step: 0, or the number that the first rank which has one asks with.
    """

    def __init__(self, trainer: Shared, grads: Views, batch_size: int, communicator: Communicator) -> None:
        self._trainer, self._grads, self._communicator = trainer, grads, communicator
        self._batch = batch_size
        self.own = own_rows(batch_size, communicator)
        self.request = self.stop = 0
        backend = trainer.backend
        # One message: log-densities and weights of all rows, and a number of every rank's. What a rank sends is 0 where
        # others have something to say.
        self._sent, self._all = (backend.alloc(2 * batch_size + communicator.size, np.float64) for _ in range(2))
        self._sent_request = 0
        self._dlogp = backend.alloc(batch_size, np.float64)
        own, ws = slice(self.own.start, self.own.stop), trainer.workspace
        ws.logp, ws.weight = self._sent[:batch_size][own], self._sent[batch_size : 2 * batch_size][own]
        ws.dlogp = self._dlogp[own]
        self._buckets = buckets_of(trainer.network.layout, trainer.g.dtype.itemsize)
        self._steps = 0

    # --- the step -----------------------------------------------------------------------------------------------------

    def record(self) -> Callable[[], None]:
        """A runnable that carries out one step: in one piece where the backend records sums as well."""
        return self._in_one() if self._communicator.captures else self._in_parts()

    def _forward(self) -> None:
        self._trainer.load()
        self._trainer.network.forward(self._trainer.workspace, self._trainer.views)

    def _backward(self, bucket: Bucket) -> None:
        trainer, batch = self._trainer, self._batch
        network, views, ws = trainer.network, trainer.views, trainer.workspace
        if bucket.last == len(network.couplings) - 1:
            trainer.backend.loss(trainer.state, self._dlogp, self._all[:batch], self._all[batch : 2 * batch])
            network.backward_prior(ws, views, self._grads)
        for k in range(bucket.last, bucket.first - 1, -1):
            network.backward_coupling(k, ws, views, self._grads, want_dx=False)

    def _in_one(self) -> Callable[[], None]:
        trainer, communicator = self._trainer, self._communicator

        def step() -> None:
            self._forward()
            communicator.begin_sum(self._all, self._sent)
            for bucket in self._buckets:
                self._backward(bucket)
                self._begin_sum(bucket.range)
                trainer.update(bucket.range)
            trainer.backend.advance(trainer.state)

        launch = trainer.backend.record(step)

        def run() -> None:
            self._send_request()
            launch()
            self._steps += 1
            if self._steps % LOOK_EVERY == 0:  # the same steps on all ranks; to look waits for the device
                self._hear()

        return run

    def _in_parts(self) -> Callable[[], None]:
        trainer, backend = self._trainer, self._trainer.backend
        start = backend.record(self._forward)
        parts = []
        for bucket in self._buckets:
            update = backend.record(partial(trainer.update, bucket.range))
            parts.append((bucket, backend.record(partial(self._backward, bucket)), update))
        end = backend.record(partial(backend.advance, trainer.state))

        def run() -> None:
            self._send_request()
            start()
            self._begun(self._all, self._sent).wait()
            self._hear()
            begun: deque[tuple[Pending, Callable[[], None]]] = deque()
            for bucket, part, update in parts:
                part()
                begun.append((self._begin_sum(bucket.range), update))
                while begun and begun[0][0].poll():
                    begun.popleft()[1]()
            for pending, update in begun:
                pending.wait()
                update()
            end()

        return run

    def _send_request(self) -> None:
        """With the next step's message: whether this rank asks to stop."""
        request, place = self.request, 2 * self._batch + self._communicator.rank  # a signal may come in between
        if request != self._sent_request:
            self._trainer.backend.copy_in(self._sent[place : place + 1], np.array([float(request)]))
            self._sent_request = request

    def _hear(self) -> None:
        """Who has asked to stop, in the last step's message."""
        stops = self._trainer.backend.copy_out(self._all[2 * self._batch :])
        self.stop = next((int(number) for number in stops if number), 0)

    def _sum(self, array: Array) -> None:
        self._begun(array).wait()

    def _begin_sum(self, part: Range) -> Pending:
        return self._begun(self._trainer.g[part.offset : part.offset + part.size])

    def _begun(self, out: Array, part: Array | None = None) -> Pending:
        if self._communicator.on_device or isinstance(out, np.ndarray):
            return self._communicator.begin_sum(out, part)
        return _Staged(self._communicator, self._trainer.backend, out, part)

    # --- what proves it -----------------------------------------------------------------------------------------------

    def checksum(self, *buffers: Array) -> int:
        """CRC-32 of buffers that should be the same on all ranks.

        Raises TrainingError on all ranks unless they are, to the bit.
        """
        own = 0
        for buffer in buffers:
            own = zlib.crc32(np.ascontiguousarray(self._trainer.backend.copy_out(buffer)).data, own)
        found: NDArray[np.float64] = np.zeros(self._communicator.size)
        found[self._communicator.rank] = own
        host = self._trainer.backend.asarray(found)
        self._sum(host)
        found = self._trainer.backend.copy_out(host)
        odd = np.flatnonzero(found != found[0])
        if len(odd):
            problem = f"rank {int(odd[0])} does not hold the same parameters as rank 0 any more"
            raise TrainingError(f"{problem}; go on from the last checkpoint, and have the memory and network checked")
        return own


class _Staged:
    """A sum of a device's array by a communicator of the host."""

    def __init__(self, communicator: Communicator, backend: Backend, out: Array, part: Array | None) -> None:
        self._backend, self._array = backend, out
        self._host = backend.copy_out(out if part is None else part)
        self._pending = communicator.begin_sum(self._host)

    def poll(self) -> bool:
        self._pending.poll()
        return False  # it has to be taken back to the device, which ``wait`` does

    def wait(self) -> None:
        self._pending.wait()
        self._backend.copy_in(self._array, self._host)
