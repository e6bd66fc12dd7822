"""The kernel contract on a GPU: kernels of ours (kernels/*.cu) and matrix products, through a driver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nicecp.kernels.backend import Array, Backend, Ready, Slot
from nicecp.kernels.cuda_calls import (
    BiasBackward,
    BiasForward,
    Call,
    Coefficients,
    Couple,
    Launch,
    Plain,
    Product,
    Update,
    by_row,
    named,
    spread,
)
from nicecp.kernels.cuda_driver import Driver
from nicecp.kernels.cuda_plan import Plan
from nicecp.kernels.cuda_source import SCALE_COLUMNS, THREADS

_LOADS = {"uint8": "load_bytes", "float32": "load_floats", "float64": "load_doubles"}
_GATHERS = {"float32": "gather_floats", "float64": "gather_doubles"}


class CudaBackend(Backend):
    """See Backend.  driver: the device (kernels/cuda_driver.py).

    Calls launch and return. Their arguments are checked on the host, as far as shapes and dtypes tell; what only the
    device knows is not: a batch beyond the index is padding, an index beyond the data NaN.

    ``record`` calls the step once and writes its calls down without launching any; what they need, compiled kernels,
    masks, algorithms of products, is made then, so that the driver's capture that follows allocates and loads nothing.
    The graph keeps the addresses of the step's arrays, and what ``record`` returns keeps the arrays.

    Several threads may use one backend; each call, recording and replay has it for itself.
    """

    name = "cuda"
    device = "cuda"

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._lock = threading.RLock()
        self._calls: list[Call] | None = None  # of the step that is being recorded
        self._coefficients = driver.alloc(8, np.float64)
        self._orders: dict[int, Array] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return CudaBackend, (self.driver,)

    # --- arrays -----------------------------------------------------------------------------------

    def alloc(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        with self._lock:
            return self.driver.alloc(shape, dtype)

    def asarray(self, host: NDArray[Any]) -> Array:
        out = self.alloc(np.shape(host), host.dtype)
        self.copy_in(out, host)
        return out

    def copy_in(self, dst: Array, src: NDArray[Any]) -> None:
        if dst.shape != np.shape(src):
            raise ValueError(f"cannot copy an array of shape {np.shape(src)} into one of shape {dst.shape}")
        with self._lock:
            self.driver.to_device(dst, np.ascontiguousarray(src, dst.dtype).reshape(dst.shape))

    def copy_out(self, src: Array) -> NDArray[Any]:
        with self._lock:
            return self.driver.to_host(src)

    def assign(self, dst: Array, src: Array) -> None:
        if dst.shape != src.shape:
            raise ValueError(f"cannot assign an array of shape {src.shape} to one of shape {dst.shape}")
        if dst.size:
            self.copy_columns(dst.reshape(1, -1), 0, src.reshape(1, -1), 0, dst.size)

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    # --- calls ------------------------------------------------------------------------------------

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        with self._lock:
            plan = self.plan(step)
            launch = self.driver.capture(plan.play)

        def run(keep: Plan = plan) -> None:
            with self._lock:
                launch()

        return run

    def plan(self, step: Callable[[], None]) -> Plan:
        """The launches of a step, none of them carried out."""
        with self._lock:
            if self._calls is not None:
                raise RuntimeError("a step is being recorded already")
            calls = self._calls = []
            try:
                step()
            finally:
                self._calls = None
            return Plan(self.driver, calls)

    def synchronize(self) -> None:
        with self._lock:
            self.driver.synchronize()

    def _do(self, *calls: Call) -> None:
        """Write calls down if a step is being recorded, else launch them."""
        with self._lock:
            for call in calls:
                for array in (*call.writes(), *call.reads()):
                    if not array.flags.c_contiguous:
                        raise ValueError("kernels work on C-contiguous arrays")
                if self._calls is None:
                    call.run(self.driver)
                else:
                    self._calls.append(call)

    def _launch(
        self,
        kernel: str,
        size: int | tuple[int, int],
        arguments: Sequence[Any],
        writes: Sequence[Array],
        reads: Sequence[Array],
    ) -> None:
        """A kernel over so many elements, or over rows of so many columns whose sums it takes."""
        if isinstance(size, int):
            what = Launch(kernel, spread(self.driver, size), (THREADS,), tuple(arguments))
        else:
            what = Launch(kernel, *by_row(self.driver, *size), tuple(arguments))
        self._do(Plain(what=what, written=tuple(writes), read=tuple(reads)))

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
        (n, d0), (m, d), given = x0.shape, data.shape, min(len(index), len(rows))
        if str(data.dtype) not in _LOADS:
            raise ValueError(f"data must be uint8, float32 or float64, not {data.dtype}")
        _check(x0.dtype, x0=(x0, (n, d0)), x1=(x1, (n, d - d0)))
        _check(np.float64, weight=(weight, (n,)), shift=(shift, (d,)), scale=(scale, (d,)), state=(state, (Slot.SIZE,)))
        _check(np.int64, index=(index, (len(index),)), rows=(rows, (len(rows),)))
        order = self._order(d)
        numbers = (np.uint64(seed), np.uint32(purpose), np.int64(n), np.int32(d), np.int32(d0))
        reads = (data, index, rows, order, shift, scale, state)
        arguments = (x0, x1, weight, *reads, *numbers, np.int64(m), np.int64(given))
        self._launch(named(_LOADS[str(data.dtype)], x0), -(-n * d // 4), arguments, (x0, x1, weight), reads)

    def split(self, x0: Array, x1: Array, x: Array) -> None:
        self._reorder("split", x, x0, x1, (x0, x1), (x,))

    def join(self, x: Array, x0: Array, x1: Array) -> None:
        self._reorder("join", x, x0, x1, (x,), (x0, x1))

    def _reorder(
        self, kernel: str, x: Array, x0: Array, x1: Array, writes: tuple[Array, ...], reads: tuple[Array, ...]
    ) -> None:
        (n, d), d0 = x.shape, x0.shape[1]
        _check(x.dtype, x0=(x0, (n, d0)), x1=(x1, (n, d - d0)))
        order = self._order(d)
        arguments = (*writes, *reads, order, np.int64(n), np.int32(d), np.int32(d0))
        self._launch(named(kernel, x), n * d, arguments, writes, (*reads, order))

    def _order(self, d: int) -> Array:
        """(d,) int64: columns of part 0, then those of part 1."""
        if d not in self._orders:
            self._orders[d] = self.asarray(np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)]))
        return self._orders[d]

    def gather(self, out: Array, source: Array, index: Array, state: Array) -> None:
        n, m = len(out), len(source)
        k = out.size // n if n else 0
        if out.shape[1:] != source.shape[1:] or out.ndim > 2:
            raise ValueError(f"cannot gather rows of shape {source.shape[1:]} into rows of shape {out.shape[1:]}")
        if str(source.dtype) not in _GATHERS:
            raise ValueError(f"source must be float32 or float64, not {source.dtype}")
        _check(np.int64, index=(index, (len(index),)))
        _check(np.float64, state=(state, (Slot.SIZE,)))
        reads = (source, index, state)
        arguments = (out, *reads, np.int64(n), np.int32(k), np.int64(m), np.int64(len(index)))
        self._launch(named(_GATHERS[str(source.dtype)], out), out.size, arguments, (out,), reads)

    def copy_columns(self, out: Array, out_start: int, x: Array, x_start: int, count: int) -> None:
        (n, out_width), x_width = out.shape, x.shape[1]
        _check(out.dtype, x=(x, (n, x_width)))
        if not (0 <= out_start <= out_width - count and 0 <= x_start <= x_width - count and count >= 0):
            raise ValueError(
                f"columns {x_start} and {out_start}, {count} of them, do not lie in {x.shape}, {out.shape}"
            )
        sizes = [np.int32(number) for number in (out_width, out_start, x_width, x_start, count)]
        self._launch(named("copy_columns", out), n * count, (out, x, np.int64(n), *sizes), (out,), (x,))

    # --- dense layers -----------------------------------------------------------------------------

    def matmul(self, out: Array, a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False) -> None:
        rows, inner = a.shape[::-1] if transpose_a else a.shape
        columns = b.shape[0] if transpose_b else b.shape[1]
        _check(out.dtype, out=(out, (rows, columns)), a=(a, a.shape))
        _check(out.dtype, b=(b, (columns, inner) if transpose_b else (inner, columns)))
        self._do(Product(out=out, a=a, b=b, transpose_a=transpose_a, transpose_b=transpose_b))

    def dense_forward(self, y: Array, x: Array, w: Array, b: Array, relu: bool) -> None:
        n, (i, o) = len(x), w.shape
        _check(y.dtype, y=(y, (n, o)), x=(x, (n, i)), w=(w, (i, o)), b=(b, (o,)))
        self._do(Product(out=y, a=x, b=w), BiasForward(y=y, b=b, relu=relu))

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
        ready: Ready | None = None,
    ) -> None:
        n, (i, o) = len(dy), w.shape
        outputs = {name: (array, shape) for name, array, shape in (("dx", dx, (n, i)), ("dw", dw, (i, o)),
                                                                   ("db", db, (o,))) if array is not None}  # fmt: skip
        _check(dy.dtype, dy=(dy, (n, o)), y=(y, (n, o)), x=(x, (n, i)), w=(w, (i, o)), **outputs)
        if relu or db is not None:
            self._do(BiasBackward(dy=dy, db=db, y=y, relu=relu))
        # The weight gradient needs dy alone: it runs beside dx, which the layers below wait for.
        if dw is not None:
            self._do(Product(out=dw, a=x, b=dy, transpose_a=True, side=True))
        if dx is not None:
            self._do(Product(out=dx, a=dy, b=w, transpose_b=True))
        if ready is not None and dw is not None:
            ready(0, i)

    # --- coupling ---------------------------------------------------------------------------------

    def couple(self, y: Array, x: Array, m: Array, sign: int) -> None:
        _check(y.dtype, x=(x, y.shape), m=(m, y.shape), y=(y, y.shape))
        self._do(Couple(y=y, x=x, m=m, sign=sign))

    def factor_forward(
        self, y: Array, log_det: Array, x: Array, m: Array, affine: bool, sign: int, first: bool
    ) -> None:
        n, k = x.shape
        _check(y.dtype, y=(y, (n, k)), x=(x, (n, k)), m=(m, (n, 2 * k if affine else k)))
        _check(np.float64, log_det=(log_det, (n,)))
        numbers = (np.int64(n), np.int32(k), np.int32(affine), np.int32(sign), np.int32(first))
        reads = (x, m) if first else (x, m, log_det)
        self._launch(named("factor_forward", y), (n, k), (y, log_det, x, m, *numbers), (y, log_det), reads)

    def factor_backward(
        self, dx: Array, dm: Array, dy: Array, dlog_det: Array, x: Array, m: Array, affine: bool
    ) -> None:
        n, k = x.shape
        wide = (n, 2 * k if affine else k)
        _check(dx.dtype, dx=(dx, (n, k)), dm=(dm, wide), dy=(dy, (n, k)), x=(x, (n, k)), m=(m, wide))
        _check(np.float64, dlog_det=(dlog_det, (n,)))
        reads = (dy, dlog_det, x, m)
        arguments = (dx, dm, *reads, np.int64(n), np.int32(k), np.int32(affine))
        self._launch(named("factor_backward", dx), n * k, arguments, (dx, dm), reads)

    def accumulate(self, out: Array, x: Array) -> None:
        _check(np.float64, out=(out, (len(out),)), x=(x, (len(out),)))
        self._launch("accumulate_f64", len(out), (out, x, np.int64(len(out))), (out,), (out, x))

    # --- scaling, prior, loss ---------------------------------------------------------------------

    def scale_prior_forward(
        self, logp: Array, h0: Array, h1: Array, x0: Array, x1: Array, s0: Array, s1: Array, prior: int
    ) -> None:
        (n, d0), d1 = x0.shape, x1.shape[1]
        _check(h0.dtype, h0=(h0, (n, d0)), h1=(h1, (n, d1)), x0=(x0, (n, d0)), x1=(x1, (n, d1)))
        _check(h0.dtype, s0=(s0, (d0,)), s1=(s1, (d1,)))
        _check(np.float64, logp=(logp, (n,)))
        reads, numbers = (x0, x1, s0, s1), (np.int64(n), np.int32(d0), np.int32(d1), np.int32(prior))
        arguments = (logp, h0, h1, *reads, *numbers)
        self._launch(named("scale_prior_forward", h0), (n, d0), arguments, (logp, h0, h1), reads)

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
        (n, d0), d1 = h0.shape, h1.shape[1]
        _check(dx0.dtype, dx0=(dx0, (n, d0)), dx1=(dx1, (n, d1)), h0=(h0, (n, d0)), h1=(h1, (n, d1)))
        _check(dx0.dtype, s0=(s0, (d0,)), s1=(s1, (d1,)))
        _check(np.float64, dlogp=(dlogp, (n,)))
        if (ds0 is None) != (ds1 is None):
            raise ValueError("ds0 and ds1 are both wanted or both None")
        sums = () if ds0 is None or ds1 is None else (ds0, ds1)
        if sums:
            _check(dx0.dtype, ds0=(ds0, (d0,)), ds1=(ds1, (d1,)))
        sizes = (np.int64(n), np.int32(d0), np.int32(d1), np.int32(prior), np.int32(len(sums) > 0))
        reads = (dlogp, h0, h1, s0, s1)
        arguments = (dx0, dx1, *(sums or (dx0, dx1)), *reads, *sizes)  # dx stands in, not written
        grid = -(-d0 // SCALE_COLUMNS) - (-d1 // SCALE_COLUMNS)
        what = Launch(named("scale_prior_backward", dx0), (grid,), (THREADS,), arguments)
        self._do(Plain(what=what, written=(dx0, dx1, *sums), read=reads))

    def scale_inverse(self, x0: Array, x1: Array, h0: Array, h1: Array, s0: Array, s1: Array) -> None:
        (n, d0), d1 = h0.shape, h1.shape[1]
        _check(x0.dtype, x0=(x0, (n, d0)), x1=(x1, (n, d1)), h0=(h0, (n, d0)), h1=(h1, (n, d1)))
        _check(x0.dtype, s0=(s0, (d0,)), s1=(s1, (d1,)))
        reads = (h0, h1, s0, s1)
        arguments = (x0, x1, *reads, np.int64(n), np.int32(d0), np.int32(d1))
        self._launch(named("scale_inverse", x0), n * (d0 + d1), arguments, (x0, x1), reads)

    def loss(self, state: Array, dlogp: Array, logp: Array, weight: Array) -> None:
        n = len(logp)
        _check(np.float64, state=(state, (Slot.SIZE,)), dlogp=(dlogp, (n,)), logp=(logp, (n,)), weight=(weight, (n,)))
        what = Launch("loss_f64", (1,), (THREADS,), (state, dlogp, logp, weight, np.int64(n)))
        self._do(Plain(what=what, written=(state, dlogp), read=(state, logp, weight)))

    # --- optimiser --------------------------------------------------------------------------------

    def update(
        self, p: Array, g: Array, m: Array, v: Array, offset: int, size: int, state: Array, optimizer: int
    ) -> None:
        _check(p.dtype, p=(p, (p.size,)), g=(g, (p.size,)), m=(m, (p.size,)), v=(v, (p.size,)))
        _check(np.float64, state=(state, (Slot.SIZE,)))
        if not 0 <= offset <= p.size - size:
            raise ValueError(f"elements {offset} to {offset + size} of {p.size}")
        buffers: dict[str, Any] = {"p": p, "g": g, "m": m, "v": v, "state": state, "optimizer": optimizer}
        shared: dict[str, Any] = {"coefficients": self._coefficients, "offset": offset, "size": size, "side": True}
        first = Coefficients(out=self._coefficients, state=state, optimizer=optimizer, side=True)
        self._do(first, Update(**buffers, **shared))

    def advance(self, state: Array) -> None:
        _check(np.float64, state=(state, (Slot.SIZE,)))
        what = Launch("advance_f64", (1,), (1,), (state,))
        self._do(Plain(what=what, written=(state,), read=(state,)))

    # --- random numbers ---------------------------------------------------------------------------

    def fill_uniform(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        self._fill("fill_uniform", 8, out, seed, purpose, epoch, first_row)

    def fill_normal(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        self._fill("fill_normal", 2, out, seed, purpose, epoch, first_row)

    def fill_logistic(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        self._fill("fill_logistic", 2, out, seed, purpose, epoch, first_row)

    def _fill(self, kernel: str, each: int, out: Array, seed: int, purpose: int, epoch: int, first_row: int) -> None:
        if self._calls is not None:
            raise RuntimeError("random numbers are not recorded: fill them before the step")
        n, k = out.shape
        counter = (np.uint64(seed), np.uint32(purpose), np.uint32(epoch), np.int64(first_row))
        self._launch(named(kernel, out), -(-n * k // each), (out, np.int64(n), np.int32(k), *counter), (out,), ())


def _check(dtype: DTypeLike, **arrays: tuple[Array, tuple[int, ...]]) -> None:
    """ValueError unless every array is of this dtype and of the shape beside it: a kernel would run past its end."""
    for name, (array, shape) in arrays.items():
        if array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} of shape {array.shape}"
            raise ValueError(f"{name}: expected {np.dtype(dtype)} of shape {shape}, got {found}")
