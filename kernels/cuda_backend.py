"""The kernel contract on a GPU: kernels of ours (kernels/*.cu) and matrix products, through a driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nicecp.kernels.backend import SPLINE_BINS, Array, Ready, Slot
from nicecp.kernels.cuda_borders import CudaBorders
from nicecp.kernels.cuda_calls import (
    GRADIENTS,
    MAIN,
    UPDATES,
    BiasBackward,
    BiasForward,
    Coefficients,
    Couple,
    Launch,
    Plain,
    Product,
    Update,
    named,
)
from nicecp.kernels.cuda_device import check
from nicecp.kernels.cuda_nccl import FIRST_SUMS, Nccl, SumOverRanks
from nicecp.kernels.cuda_source import SCALE_COLUMNS, THREADS


class CudaBackend(CudaBorders):
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

    # --- dense layers -----------------------------------------------------------------------------

    def matmul(self, out: Array, a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False) -> None:
        rows, inner = a.shape[::-1] if transpose_a else a.shape
        columns = b.shape[0] if transpose_b else b.shape[1]
        check(out.dtype, out=(out, (rows, columns)), a=(a, a.shape))
        check(out.dtype, b=(b, (columns, inner) if transpose_b else (inner, columns)))
        self._do(Product(out=out, a=a, b=b, transpose_a=transpose_a, transpose_b=transpose_b))

    def dense_forward(self, y: Array, x: Array, w: Array, b: Array, relu: bool) -> None:
        n, (i, o) = len(x), w.shape
        check(y.dtype, y=(y, (n, o)), x=(x, (n, i)), w=(w, (i, o)), b=(b, (o,)))
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
        check(dy.dtype, dy=(dy, (n, o)), y=(y, (n, o)), x=(x, (n, i)), w=(w, (i, o)), **outputs)
        if relu or db is not None:
            # Without a mask nobody but the update waits for it.
            self._do(BiasBackward(dy=dy, db=db, y=y, relu=relu, lane=MAIN if relu else GRADIENTS))
        # The weight gradient needs dy alone: it runs beside dx, which the layers below wait for.
        if dw is not None:
            self._do(Product(out=dw, a=x, b=dy, transpose_a=True, lane=GRADIENTS))
        if dx is not None:
            self._do(Product(out=dx, a=dy, b=w, transpose_b=True))
        if ready is not None and dw is not None:
            ready(0, i)

    # --- coupling ---------------------------------------------------------------------------------

    def couple(self, y: Array, x: Array, m: Array, sign: int) -> None:
        check(y.dtype, x=(x, y.shape), m=(m, y.shape), y=(y, y.shape))
        self._do(Couple(y=y, x=x, m=m, sign=sign))

    def factor_forward(
        self, y: Array, log_det: Array, x: Array, m: Array, affine: bool, sign: int, first: bool
    ) -> None:
        n, k = x.shape
        check(y.dtype, y=(y, (n, k)), x=(x, (n, k)), m=(m, (n, 2 * k if affine else k)))
        check(np.float64, log_det=(log_det, (n,)))
        numbers = (np.int64(n), np.int32(k), np.int32(affine), np.int32(sign), np.int32(first))
        reads = (x, m) if first else (x, m, log_det)
        self._launch(named("factor_forward", y), (n, k), (y, log_det, x, m, *numbers), (y, log_det), reads)

    def factor_backward(
        self, dx: Array, dm: Array, dy: Array, dlog_det: Array, x: Array, m: Array, affine: bool
    ) -> None:
        n, k = x.shape
        wide = (n, 2 * k if affine else k)
        check(dx.dtype, dx=(dx, (n, k)), dm=(dm, wide), dy=(dy, (n, k)), x=(x, (n, k)), m=(m, wide))
        check(np.float64, dlog_det=(dlog_det, (n,)))
        reads = (dy, dlog_det, x, m)
        arguments = (dx, dm, *reads, np.int64(n), np.int32(k), np.int32(affine))
        self._launch(named("factor_backward", dx), n * k, arguments, (dx, dm), reads)

    def spline_forward(self, y: Array, log_det: Array, x: Array, m: Array, sign: int, first: bool) -> None:
        n, k = x.shape
        check(y.dtype, y=(y, (n, k)), x=(x, (n, k)), m=(m, (n, (3 * SPLINE_BINS - 1) * k)))
        check(np.float64, log_det=(log_det, (n,)))
        numbers = (np.int64(n), np.int32(k), np.int32(sign), np.int32(first))
        reads = (x, m) if first else (x, m, log_det)
        self._launch(named("spline_forward", y), (n, k), (y, log_det, x, m, *numbers), (y, log_det), reads)

    def spline_backward(self, dx: Array, dm: Array, dy: Array, dlog_det: Array, x: Array, m: Array) -> None:
        n, k = x.shape
        wide = (n, (3 * SPLINE_BINS - 1) * k)
        check(dx.dtype, dx=(dx, (n, k)), dm=(dm, wide), dy=(dy, (n, k)), x=(x, (n, k)), m=(m, wide))
        check(np.float64, dlog_det=(dlog_det, (n,)))
        reads = (dy, dlog_det, x, m)
        arguments = (dx, dm, *reads, np.int64(n), np.int32(k))
        self._launch(named("spline_backward", dx), n * k, arguments, (dx, dm), reads)

    def accumulate(self, out: Array, x: Array) -> None:
        check(np.float64, out=(out, (len(out),)), x=(x, (len(out),)))
        self._launch("accumulate_f64", len(out), (out, x, np.int64(len(out))), (out,), (out, x))

    # --- scaling, prior, loss ---------------------------------------------------------------------

    def scale_prior_forward(
        self, logp: Array, h0: Array, h1: Array, x0: Array, x1: Array, s0: Array, s1: Array, prior: int
    ) -> None:
        (n, d0), d1 = x0.shape, x1.shape[1]
        check(h0.dtype, h0=(h0, (n, d0)), h1=(h1, (n, d1)), x0=(x0, (n, d0)), x1=(x1, (n, d1)))
        check(h0.dtype, s0=(s0, (d0,)), s1=(s1, (d1,)))
        check(np.float64, logp=(logp, (n,)))
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
        check(dx0.dtype, dx0=(dx0, (n, d0)), dx1=(dx1, (n, d1)), h0=(h0, (n, d0)), h1=(h1, (n, d1)))
        check(dx0.dtype, s0=(s0, (d0,)), s1=(s1, (d1,)))
        check(np.float64, dlogp=(dlogp, (n,)))
        if (ds0 is None) != (ds1 is None):
            raise ValueError("ds0 and ds1 are both wanted or both None")
        sums = () if ds0 is None or ds1 is None else (ds0, ds1)
        if sums:
            check(dx0.dtype, ds0=(ds0, (d0,)), ds1=(ds1, (d1,)))
        sizes = (np.int64(n), np.int32(d0), np.int32(d1), np.int32(prior), np.int32(len(sums) > 0))
        reads = (dlogp, h0, h1, s0, s1)
        arguments = (dx0, dx1, *(sums or (dx0, dx1)), *reads, *sizes)  # dx stands in, not written
        grid = -(-d0 // SCALE_COLUMNS) - (-d1 // SCALE_COLUMNS)
        what = Launch(named("scale_prior_backward", dx0), (grid,), (THREADS,), arguments)
        self._do(Plain(what=what, written=(dx0, dx1, *sums), read=reads))

    def scale_inverse(self, x0: Array, x1: Array, h0: Array, h1: Array, s0: Array, s1: Array) -> None:
        (n, d0), d1 = h0.shape, h1.shape[1]
        check(x0.dtype, x0=(x0, (n, d0)), x1=(x1, (n, d1)), h0=(h0, (n, d0)), h1=(h1, (n, d1)))
        check(x0.dtype, s0=(s0, (d0,)), s1=(s1, (d1,)))
        reads = (h0, h1, s0, s1)
        arguments = (x0, x1, *reads, np.int64(n), np.int32(d0), np.int32(d1))
        self._launch(named("scale_inverse", x0), n * (d0 + d1), arguments, (x0, x1), reads)

    def loss(self, state: Array, dlogp: Array, logp: Array, weight: Array) -> None:
        n = len(logp)
        check(np.float64, state=(state, (Slot.SIZE,)), dlogp=(dlogp, (n,)), logp=(logp, (n,)), weight=(weight, (n,)))
        what = Launch("loss_f64", (1,), (THREADS,), (state, dlogp, logp, weight, np.int64(n)))
        self._do(Plain(what=what, written=(state, dlogp), read=(state, logp, weight)))

    # --- optimiser --------------------------------------------------------------------------------

    def update(
        self, p: Array, g: Array, m: Array, v: Array, offset: int, size: int, state: Array, optimizer: int
    ) -> None:
        check(p.dtype, p=(p, (p.size,)), g=(g, (p.size,)), m=(m, (p.size,)), v=(v, (p.size,)))
        check(np.float64, state=(state, (Slot.SIZE,)))
        if not 0 <= offset <= p.size - size:
            raise ValueError(f"elements {offset} to {offset + size} of {p.size}")
        buffers: dict[str, Any] = {"p": p, "g": g, "m": m, "v": v, "state": state, "optimizer": optimizer}
        shared: dict[str, Any] = {"coefficients": self._coefficients, "offset": offset, "size": size, "lane": UPDATES}
        first = Coefficients(out=self._coefficients, state=state, optimizer=optimizer, lane=UPDATES)
        self._do(first, Update(**buffers, **shared))

    def advance(self, state: Array) -> None:
        check(np.float64, state=(state, (Slot.SIZE,)))
        what = Launch("advance_f64", (1,), (1,), (state,))
        self._do(Plain(what=what, written=(state,), read=(state,)))

    # --- other ranks ------------------------------------------------------------------------------

    def open_nccl(self, size: int, rank: int, share: Callable[[Callable[[], Any]], Any]) -> Nccl:
        """The communicator of so many ranks, each of which calls this; see Nccl."""
        with self._lock:
            nccl = Nccl(self.driver, size, rank, share)
            first = [self.alloc(count, dtype) for count, dtype in FIRST_SUMS]
            for array in first:
                self.sum_over_ranks(nccl, array, array)
            self.synchronize()
            return nccl

    def sum_over_ranks(self, nccl: Nccl, out: Array, x: Array) -> None:
        """out = the sum over ranks of x : (size,), out itself or beside it; every rank calls it, in the same order."""
        check(out.dtype, out=(out, (out.size,)), x=(x, (out.size,)))
        self._do(SumOverRanks(out=out, x=x, nccl=nccl, lane=UPDATES))

    # --- random numbers ---------------------------------------------------------------------------

    def fill_uniform(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        self._fill("fill_uniform", 8, out, seed, purpose, epoch, first_row)

    def fill_normal(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        self._fill("fill_normal", 2, out, seed, purpose, epoch, first_row)

    def fill_logistic(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        self._fill("fill_logistic", 2, out, seed, purpose, epoch, first_row)

    def _fill(self, kernel: str, each: int, out: Array, seed: int, purpose: int, epoch: int, first_row: int) -> None:
        n, k = out.shape
        counter = (np.uint64(seed), np.uint32(purpose), np.uint32(epoch), np.int64(first_row))
        with self._lock:  # no other thread is recording
            if self._calls is not None:
                raise RuntimeError("random numbers are not recorded: fill them before the step")
            arguments = (out, np.int64(n), np.int32(k), *counter)
            self._launch(named(kernel, out), -(-n * k // each), arguments, (out,), ())
