"""The kernel contract on a CPU: NumPy arrays, Numba kernels, matrix products by NumPy's BLAS."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

# Not when it is first needed: a child that is forked during an import by another thread waits for it for ever.
from nicecp.kernels import _numba_point  # noqa: F401
from nicecp.kernels import _numba_random as random
from nicecp.kernels._numba_spline import OUTPUTS, tile_function
from nicecp.kernels.backend import Array, Ready, Slot
from nicecp.kernels.numba_calls import NumbaCalls
from nicecp.kernels.tape import ANY, Op, Range, span

_LINE = 64  # bytes: slices of columns begin on cache lines
_SLICED_PRODUCT = 2**21  # multiplications from which a product is cut into parts, some 0.03 ms
_SLICED_UPDATE = 2**15  # elements from which an update or a sum is, and numbers from which a fill is
_SPLINE_WORK = 32  # a number of a spline, as numbers that are loaded
_SLICED_ROWS = 2**14  # numbers from which loading, scaling or scoring is cut by rows or columns: some 0.03 ms


class NumbaBackend(NumbaCalls):
    """See Backend.  threads=None: BLAS keeps its own threads, all else runs in the calling thread.

    Every operation is a call on a tape (kernels/tape.py) that compiled code replays: at once, or, between ``record``
    and what it returns, as often as one likes, without Python and without its lock.

    With a number of threads, large products are cut into as many parts, each computed by one BLAS thread. In a recorded
    step a part of a weight gradient is then updated by the thread that computed it: by even threads at once, by odd
    ones before their next product, so that one thread's update, bound by memory, meets the other's products.
    """

    name = "numba"
    device = "cpu"

    # --- borders ----------------------------------------------------------------------------------

    def load_batch(
        self,
        x0: Array,
        x1: Array,
        weight: Array,
        data: Array,
        index: Array,
        rows: Array,
        order: Array,
        shift: Array,
        scale: Array,
        state: Array,
        seed: int,
        purpose: int,
    ) -> None:
        n, (m, d), given = len(x0), data.shape, min(len(index), len(rows))
        _check_cursor(state, n, given)
        if data.dtype not in (np.uint8, np.float32, np.float64):
            raise ValueError(f"data must be uint8, float32 or float64, not {data.dtype}")
        place, interleaved = _places(order, d)
        wide = data.dtype == np.float64
        numbers = (n, d, m, purpose, seed - 2**64 * (seed >= 2**63), wide, given, interleaved)
        op = Op.LOAD_BYTES if data.dtype == np.uint8 else Op.LOAD_FLOATS
        halves = (x0, x1)
        other = (weight, data, index, rows, shift, scale, state, place if op == Op.LOAD_BYTES else order)
        over = self._cut(n, n * d, _SLICED_ROWS, 1)
        self._call(op, over, halves, other, numbers, (x0, x1, weight), other[1:], n * d)

    def split(self, x0: Array, x1: Array, x: Array, order: Array) -> None:
        d = x.shape[1]
        numbers = (d, _places(order, d)[1])
        self._call(Op.SPLIT, Range(len(x)), (x0, x1, x), (order,), numbers, (x0, x1), (x,))

    def join(self, x: Array, x0: Array, x1: Array, order: Array) -> None:
        d = x.shape[1]
        numbers = (d, _places(order, d)[1])
        self._call(Op.JOIN, Range(len(x)), (x0, x1, x), (order,), numbers, (x,), (x0, x1))

    def permute(self, y0: Array, y1: Array, x0: Array, x1: Array, index: Array) -> None:
        (n, d0), d = x0.shape, len(index)
        if x1.shape != (n, d - d0) or y0.shape != x0.shape or y1.shape != x1.shape or d0 != (d + 1) // 2:
            raise ValueError(f"{d} columns cannot go from {x0.shape} and {x1.shape} to {y0.shape} and {y1.shape}")
        _places(index, d)
        over = self._cut(n, n * d, _SLICED_ROWS, 1)
        self._call(Op.PERMUTE, over, (y0, y1, x0, x1), (index,), (d,), (y0, y1), (x0, x1), n * d)

    def logit_forward(
        self, z: Array, log_det: Array, x: Array, shift: Array, scale: Array, margin: float, first: bool
    ) -> None:
        over = self._cut(len(x), 16 * x.size, _SLICED_ROWS, 1)
        reads, other = (x, shift, scale), (log_det, shift, scale, np.array([margin]))
        self._call(
            Op.LOGIT_FORWARD,
            over,
            (z, x),
            other,
            (x.shape[1], first),
            (z, log_det),
            reads if first else (*reads, log_det),
            16 * x.size,
        )

    def gather(self, out: Array, source: Array, index: Array, state: Array) -> None:
        n, m, k = len(out), len(source), out.shape[1] if out.ndim > 1 else 1
        if out.shape[1:] != source.shape[1:] or not {out.dtype.name, source.dtype.name} <= {"float32", "float64"}:
            raise ValueError(f"cannot gather {source.dtype} {source.shape} into {out.dtype} {out.shape}")
        _check_cursor(state, n, len(index))
        numbers = (n, k, m, len(index), out.dtype == np.float64, source.dtype == np.float64)
        over, reads = self._cut(n, n * k, _SLICED_ROWS, 1), (source, index, state)
        self._call(Op.GATHER, over, (), (out, *reads), numbers, (out,), reads, n * k)

    def copy_columns(self, out: Array, out_start: int, x: Array, x_start: int, count: int) -> None:
        (n, width), from_ = out.shape, x.shape[1]
        if len(x) != n or min(out_start, x_start, count, width - out_start - count, from_ - x_start - count) < 0:
            raise ValueError(f"columns {x_start}+{count}, {out_start}+{count} are not in {x.shape}, {out.shape}")
        over, numbers = self._cut(n, n * count, _SLICED_ROWS, 1), (width, from_, out_start, x_start, count)
        self._call(Op.COPY_COLUMNS, over, (out, x), (), numbers, (out,), (x,), n * count)

    # --- dense layers -----------------------------------------------------------------------------

    def matmul(self, out: Array, a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False) -> None:
        rows, inner = a.shape[::-1] if transpose_a else a.shape
        numbers = (rows, out.shape[1], inner, transpose_a, transpose_b)
        self._call(Op.MATMUL, Range(1), (out, a, b), (), numbers, (out,), (a, b))

    def _cut_product(self, n: int, i: int, o: int, extent: int, item: int) -> Range:
        return self._cut(extent, n * i * o, _SLICED_PRODUCT, _LINE // item)

    def dense_forward(self, y: Array, x: Array, w: Array, b: Array, relu: bool) -> None:
        n, (i, o) = len(x), w.shape
        over = self._cut_product(n, i, o, o, w.itemsize)
        self._call(Op.DENSE_FORWARD, over, (y, x, w, b), (), (n, i, o, relu), (y,), (x, w, b), n * i * o)

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
        if relu or db is not None:
            over = self._cut(o, n * o, _SLICED_ROWS, _LINE // w.itemsize)
            bias = dy[0] if db is None else db  # stands in, not written
            numbers = (n, o, relu, db is not None)
            self._call(Op.BIAS_RELU_BACKWARD, over, (dy, bias, y), (), numbers, (dy, db), (y,), n * o)
        recording = self._recording.tape
        if recording is not None and self._recording.later:
            recording.barrier()  # what was put off comes after all threads have dy
            self._catch_up()
        if dx is None and dw is None:
            return
        over = self._cut_product(n, i, o, i, w.itemsize)
        edges = [over.edge(part) for part in range(over.parts + 1)]
        slices = list(enumerate(pairwise(edges)))
        rows = [span(w[a:b], part) for part, (a, b) in slices]
        gradients = [] if dw is None else [span(dw[a:b], part) for part, (a, b) in slices]
        work = n * i * o * ((dx is not None) + (dw is not None))
        self._call(Op.DENSE_BACKWARD, over, (dx, dw, dy, x, w), (), (n, i, o), (dx, *gradients), (dy, x, *rows), work)
        if ready is None or dw is None:
            return
        for part, (a, b) in slices:
            if recording is not None and part % 2:
                self._recording.later = (*self._recording.later, partial(self._ready, ready, part, a, b))
            else:
                self._ready(ready, part, a, b)

    def _ready(self, ready: Ready, part: int, start: int, stop: int) -> None:
        """Tell the caller; an update that he asks for is carried out by the thread that has these rows in its cache."""
        self._recording.owner = part
        try:
            ready(start, stop)
        finally:
            self._recording.owner = None

    # --- coupling ---------------------------------------------------------------------------------

    def couple(self, y: Array, x: Array, m: Array, sign: int) -> None:
        over = self._cut(y.size, y.size, _SLICED_UPDATE, _LINE // y.itemsize)
        self._call(Op.COUPLE, over, (y, x, m), (), (sign,), (y,), (x, m), y.size)

    def factor_forward(
        self, y: Array, log_det: Array, x: Array, m: Array, affine: bool, sign: int, first: bool
    ) -> None:
        over = self._cut(len(x), m.size, _SLICED_ROWS, 1)
        numbers = (x.shape[1], affine, sign, first)
        reads = (x, m) if first else (x, m, log_det)
        self._call(Op.FACTOR_FORWARD, over, (y, x, m), (log_det,), numbers, (y, log_det), reads, 8 * m.size)

    def factor_backward(
        self, dx: Array, dm: Array, dy: Array, dlog_det: Array, x: Array, m: Array, affine: bool
    ) -> None:
        over = self._cut(len(x), m.size, _SLICED_ROWS, 1)
        real, reads = (dx, dm, dy, x, m), (dy, dlog_det, x, m)
        self._call(Op.FACTOR_BACKWARD, over, real, (dlog_det,), (x.shape[1], affine), (dx, dm), reads, 8 * m.size)

    def spline_forward(self, y: Array, log_det: Array, x: Array, m: Array, sign: int, first: bool) -> None:
        n, k = x.shape
        _check_outputs(m, n, k)
        numbers = (k, tile_function("values" if sign > 0 else "inverses"), sign, first)
        reads = (x, m) if first else (x, m, log_det)
        over, work = self._cut(n, _SPLINE_WORK * m.size, _SLICED_ROWS, 1), _SPLINE_WORK * m.size
        self._call(Op.SPLINE_FORWARD, over, (y, x, m), (log_det,), numbers, (y, log_det), reads, work)

    def spline_backward(self, dx: Array, dm: Array, dy: Array, dlog_det: Array, x: Array, m: Array) -> None:
        n, k = x.shape
        _check_outputs(m, n, k)
        real, reads, numbers = (dx, dm, dy, x, m), (dy, dlog_det, x, m), (k, tile_function("gradients"))
        over, work = self._cut(n, _SPLINE_WORK * m.size, _SLICED_ROWS, 1), _SPLINE_WORK * m.size
        self._call(Op.SPLINE_BACKWARD, over, real, (dlog_det,), numbers, (dx, dm), reads, work)

    def accumulate(self, out: Array, x: Array) -> None:
        self._call(Op.ACCUMULATE, Range(1), (), (out, x), (len(out),), (out,), (x,))

    # --- scaling, prior, loss ---------------------------------------------------------------------

    def scale_prior_forward(
        self, logp: Array, h0: Array, h1: Array, x0: Array, x1: Array, s0: Array, s1: Array, prior: int
    ) -> None:
        for part, (h, x, s) in enumerate(((h0, x0, s0), (h1, x1, s1))):
            n, k = x.shape
            over = self._cut(n, x.size, _SLICED_ROWS, 1)
            numbers = (n, k, prior, part == 0)
            self._call(Op.SCALE_PRIOR_FORWARD, over, (h, x, s), (logp,), numbers, (logp, h), (x, s), 8 * x.size)

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
        for dx, ds, h, s in ((dx0, ds0, h0, s0), (dx1, ds1, h1, s1)):
            n, k = h.shape
            over = self._cut(k, h.size, _SLICED_ROWS, 64)
            real = (dx, s if ds is None else ds, h, s)  # s stands in, not written
            numbers = (n, k, prior, ds is not None)
            self._call(Op.SCALE_PRIOR_BACKWARD, over, real, (dlogp,), numbers, (dx, ds), (dlogp, h, s), 8 * h.size)

    def scale_inverse(self, x0: Array, x1: Array, h0: Array, h1: Array, s0: Array, s1: Array) -> None:
        for x, h, s in ((x0, h0, s0), (x1, h1, s1)):
            over = self._cut(len(h), h.size, _SLICED_ROWS, 1)
            self._call(Op.SCALE_INVERSE, over, (x, h, s), (), (*h.shape, 0, 0), (x,), (h, s), h.size)

    def loss(self, state: Array, dlogp: Array, logp: Array, weight: Array) -> None:
        self._call(Op.LOSS, Range(1), (), (state, dlogp, logp, weight), (len(logp),), (state, dlogp), (logp, weight))

    # --- optimiser --------------------------------------------------------------------------------

    def update(
        self, p: Array, g: Array, m: Array, v: Array, offset: int, size: int, state: Array, optimizer: int
    ) -> None:
        owner = self._recording.owner
        if owner is None:
            over = self._cut(size, size, _SLICED_UPDATE, 4 * _LINE)
            over = replace(over, start=offset)
        else:
            over = Range(size, 1, 1, offset, owner)
        part = slice(offset, offset + size)
        touched = ANY if over.parts > 1 else over.first
        parameters, gradient, first, second = (span(array[part], touched) for array in (p, g, m, v))
        writes, reads = (parameters, first, second), (gradient, state)
        self._call(Op.UPDATE, over, (p, g, m, v), (state,), (optimizer,), writes, reads, 8 * size)

    def advance(self, state: Array) -> None:
        self._catch_up()  # updates that were put off belong to this step
        self._call(Op.ADVANCE, Range(1), (), (state,), (), (state,), ())

    # --- random numbers ---------------------------------------------------------------------------

    def fill_uniform(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        self._fill(random.fill_uniform, out, seed, purpose, epoch, first_row)

    def fill_normal(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        self._fill(random.fill_normal, out, seed, purpose, epoch, first_row)

    def fill_logistic(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        self._fill(random.fill_logistic, out, seed, purpose, epoch, first_row)

    def _fill(self, kernel: Any, out: Array, seed: int, purpose: int, epoch: int, first_row: int) -> None:
        if self._recording.tape is not None:
            raise RuntimeError("random numbers are not recorded: fill them before the step")
        over, key = self._cut(len(out), out.size, _SLICED_UPDATE, 1), np.uint64(seed)

        def fill(me: int, crew: int) -> None:
            for part in range(me, over.parts, crew):
                a, b = over.edge(part), over.edge(part + 1)
                kernel(out[a:b], key, purpose, epoch, first_row + a)

        self._crew.run(fill, over.parts, lambda: None)


def _places(order: Array, d: int) -> tuple[Array, bool]:
    """The inverse of a permutation : (d,) int64, and whether it is the even columns and then the odd ones.

    ValueError for anything else: compiled code would write beyond its arrays.
    """
    if order.dtype != np.int64 or order.shape != (d,) or not np.array_equal(np.sort(order), np.arange(d)):
        raise ValueError(f"order must be a permutation of 0..{d - 1} as int64")
    place = np.empty(d, np.int64)
    place[order] = np.arange(d)
    d0 = (d + 1) // 2
    return place, bool((order[:d0] == np.arange(0, d, 2)).all() and (order[d0:] == np.arange(1, d, 2)).all())


def _check_outputs(m: Array, n: int, k: int) -> None:
    if m.shape != (n, OUTPUTS * k):
        raise ValueError(f"a spline of {k} columns needs {OUTPUTS} numbers for each, got an array of shape {m.shape}")


def _check_cursor(state: Array, n: int, given: int) -> None:
    cursor = int(state[Slot.CURSOR])
    if (cursor + 1) * n > given:
        raise ValueError(f"batch {cursor} of {n} rows lies beyond the index")
