"""The kernel contract on a CPU: NumPy arrays, Numba kernels, matrix products by NumPy's BLAS."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nicecp.kernels import _numba_layers as layers
from nicecp.kernels import _numba_random as random
from nicecp.kernels.backend import ALIGNMENT, OPTIMIZERS, Array, Backend, Late, Slot
from nicecp.kernels.pool import SlicePool

_UPDATE_GRAIN = 16384  # elements, a multiple of the alignment; for fewer a second thread costs more than it saves
_LOAD_GRAIN = 16  # rows
_SLICED_PRODUCT = 2**24  # multiplications from which a product is sliced: some 0.2 ms, a slice costs 0.03 ms
_SLICE_GRAIN = 16  # columns or rows: a cache line of float32


def _fill_grain(out: Array) -> int:
    """Rows of a slice worth a thread: some 2^15 numbers."""
    return max(1, 2**15 // max(1, int(out.shape[1])))


def available_threads() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _BlasThreads:
    """BLAS has one number of threads for the process: the first call in saves it, the last one out restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._controller: Any = None
        self._saved: Any = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    @contextmanager
    def limit(self, threads: int) -> Iterator[None]:
        with self._lock:
            if self._controller is None:
                from threadpoolctl import ThreadpoolController

                self._controller = ThreadpoolController()
            limiter = self._controller.limit(limits=threads, user_api="blas")
            if self._inside == 0:
                self._saved = limiter
            self._inside += 1
            era = self._lock
        try:
            yield
        finally:
            with self._lock:
                if self._lock is era:  # else a fork came between, and this is the child: it has restored them
                    self._inside -= 1
                    if self._inside == 0:
                        self._saved.restore_original_limits()

    def _after_fork(self) -> None:
        """The threads that were inside, and perhaps held the lock, stayed in the parent."""
        self._lock = threading.Lock()
        if self._inside:
            self._inside = 0
            self._saved.restore_original_limits()


_blas_threads = _BlasThreads()


class NumbaBackend(Backend):
    """See Backend.  threads=None: slices use all CPUs of the process, BLAS keeps its own setting.

    With a number of threads, large matrix products are sliced over our own pool, each slice by one BLAS thread: a
    slice of a weight gradient is then updated by the thread that computed it, while the other one computes, since an
    update is bound by memory and a product is not. The slices depend on shapes and threads alone.
    """

    name = "numba"
    device = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.blas_threads = threads
        self.threads = threads if threads is not None else available_threads()
        self._pool = SlicePool(self.threads)

    def __reduce__(self) -> tuple[Any, ...]:
        return NumbaBackend, (self.blas_threads,)

    # --- arrays -----------------------------------------------------------------------------------

    def alloc(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        item = np.dtype(dtype)
        size = int(np.prod(dims, dtype=np.int64)) * item.itemsize
        raw = np.zeros(size + ALIGNMENT, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        return raw[offset : offset + size].view(item).reshape(dims)

    def asarray(self, host: NDArray[Any]) -> Array:
        return np.ascontiguousarray(host)

    def copy_in(self, dst: Array, src: NDArray[Any]) -> None:
        if dst.shape != src.shape:
            raise ValueError(f"cannot copy an array of shape {src.shape} into one of shape {dst.shape}")
        dst[...] = src

    def copy_out(self, src: Array) -> NDArray[Any]:
        return np.array(src)

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext() if self.blas_threads is None else _blas_threads.limit(1)

    def _slicing(self, n: int, i: int, o: int) -> bool:
        """Whether products of (n, i) by (i, o) are sliced."""
        return self.blas_threads is not None and self.threads > 1 and n * i * o >= _SLICED_PRODUCT

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        return step

    def synchronize(self) -> None:
        """Calls return when their work is done."""

    # --- borders ----------------------------------------------------------------------------------

    def load_batch(
        self,
        x0: Array,
        x1: Array,
        weight: Array,
        data: Array,
        index: Array,
        rows: Array,
        shift: Array,
        scale: Array,
        state: Array,
        seed: int,
        purpose: int,
    ) -> None:
        n, cursor, epoch = x0.shape[0], int(state[Slot.CURSOR]), int(state[Slot.EPOCH])
        index, rows = index[cursor * n : (cursor + 1) * n], rows[cursor * n : (cursor + 1) * n]
        if index.shape[0] != n or rows.shape[0] != n:
            raise ValueError(f"batch {cursor} of {n} rows lies beyond the index")

        if data.dtype == np.uint8:
            key = np.uint64(seed)

            def load(a: int, b: int) -> None:
                random.load_bytes(
                    x0[a:b], x1[a:b], weight[a:b], data, index[a:b], rows[a:b], shift, scale, epoch, key, purpose
                )
        else:

            def load(a: int, b: int) -> None:
                random.load_floats(x0[a:b], x1[a:b], weight[a:b], data, index[a:b], shift, scale)

        grain = _LOAD_GRAIN * max(1, 1024 // data.shape[1])
        self._pool.run(load, 0, n, grain)

    def split(self, x0: Array, x1: Array, x: Array) -> None:
        x0[...] = x[:, 0::2]
        x1[...] = x[:, 1::2]

    def join(self, x: Array, x0: Array, x1: Array) -> None:
        x[:, 0::2] = x0
        x[:, 1::2] = x1

    # --- dense layers -----------------------------------------------------------------------------

    def matmul(self, out: Array, a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False) -> None:
        np.matmul(a.T if transpose_a else a, b.T if transpose_b else b, out=out)

    def dense_forward(self, y: Array, x: Array, w: Array, b: Array, relu: bool) -> None:
        n, (i, o) = len(x), w.shape
        if self._slicing(n, i, o):

            def columns(start: int, stop: int) -> None:
                np.matmul(x, w[:, start:stop], out=y[:, start:stop])
                layers.bias_relu_forward(y, b, relu, start, stop)

            self._pool.run(columns, 0, o, _SLICE_GRAIN)
            return
        np.matmul(x, w, out=y)
        layers.bias_relu_forward(y, b, relu, 0, y.shape[1])

    def dense_backward(
        self,
        dx: Array | None,
        dw: Array | None,
        db: Array | None,
        dy: Array,
        y: Array,
        x: Array,
        w: Array,
        relu: bool,
        ready: Callable[[int, int], None] | None = None,
        late: Late | None = None,
    ) -> None:
        if db is not None:
            layers.bias_relu_backward(dy, db, y, relu)
        elif relu:
            layers.relu_backward(dy, y)

        def rows(start: int, stop: int) -> None:
            # The first slice is updated at its end, the others at the beginning of their thread's next slice: one
            # thread's update, bound by memory, then meets the other's products, and not its update.
            me = threading.get_ident()
            if start > 0 and late is not None and me in late:
                late.pop(me)()
            if dx is not None:
                np.matmul(dy, w[start:stop].T, out=dx[:, start:stop])
            if dw is not None:
                np.matmul(x[:, start:stop].T, dy, out=dw[start:stop])
                if ready is not None:
                    if start > 0 and late is not None:
                        late[me] = partial(ready, start, stop)
                    else:
                        ready(start, stop)

        i, o = w.shape
        if self._slicing(len(dy), i, o):
            self._pool.run(rows, 0, i, _SLICE_GRAIN)
        else:
            rows(0, i)

    # --- coupling ---------------------------------------------------------------------------------

    def couple(self, y: Array, x: Array, m: Array, sign: int) -> None:
        if sign == 1:
            layers.add(y, x, m)
        else:
            layers.subtract(y, x, m)

    # --- scaling, prior, loss ---------------------------------------------------------------------

    def scale_prior_forward(
        self, logp: Array, h0: Array, h1: Array, x0: Array, x1: Array, s0: Array, s1: Array, prior: int
    ) -> None:
        layers.scale_prior_forward(logp, h0, x0, s0, prior, True)
        layers.scale_prior_forward(logp, h1, x1, s1, prior, False)

    def scale_prior_backward(
        self,
        dx0: Array,
        dx1: Array,
        ds0: Array | None,
        ds1: Array | None,
        dlogp: Array,
        h0: Array,
        h1: Array,
        s0: Array,
        s1: Array,
        prior: int,
    ) -> None:
        # Without ds the scale stands in for it: never written, and the kernel keeps one compiled signature.
        layers.scale_prior_backward(dx0, s0 if ds0 is None else ds0, dlogp, h0, s0, prior, ds0 is not None)
        layers.scale_prior_backward(dx1, s1 if ds1 is None else ds1, dlogp, h1, s1, prior, ds1 is not None)

    def scale_inverse(self, x0: Array, x1: Array, h0: Array, h1: Array, s0: Array, s1: Array) -> None:
        layers.scale_inverse(x0, h0, s0)
        layers.scale_inverse(x1, h1, s1)

    def loss(self, state: Array, dlogp: Array, logp: Array, weight: Array) -> None:
        layers.loss(state, dlogp, logp, weight)

    # --- optimiser --------------------------------------------------------------------------------

    def update(
        self, p: Array, g: Array, m: Array, v: Array, offset: int, size: int, state: Array, optimizer: int
    ) -> None:
        kernel = layers.update_adam if optimizer == OPTIMIZERS["adam"] else layers.update_rmsprop
        self._pool.run(lambda a, b: kernel(p, g, m, v, a, b, state), offset, offset + size, _UPDATE_GRAIN)

    def advance(self, state: Array) -> None:
        state[Slot.CURSOR] += 1.0
        if state[Slot.SKIP] != 0.0:
            state[Slot.SKIPPED] += 1.0
            return
        state[Slot.STEP] += 1.0
        rate = state[Slot.RATE]
        state[Slot.RATE] = max(rate / state[Slot.RATE_DECAY], min(rate, state[Slot.RATE_FLOOR]))

    # --- random numbers ---------------------------------------------------------------------------

    def fill_uniform(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        key = np.uint64(seed)
        self._pool.run(
            lambda a, b: random.fill_uniform(out[a:b], key, purpose, epoch, first_row + a),
            0,
            len(out),
            _fill_grain(out),
        )

    def fill_normal(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        key = np.uint64(seed)
        self._pool.run(
            lambda a, b: random.fill_normal(out[a:b], key, purpose, epoch, first_row + a), 0, len(out), _fill_grain(out)
        )

    def fill_logistic(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        key = np.uint64(seed)
        self._pool.run(
            lambda a, b: random.fill_logistic(out[a:b], key, purpose, epoch, first_row + a),
            0,
            len(out),
            _fill_grain(out),
        )
