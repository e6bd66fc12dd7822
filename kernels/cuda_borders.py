"""The borders of the CUDA backend: rows of data <-> the two parts, and what else belongs to a batch's rows."""

from __future__ import annotations

import numpy as np

from nicecp.kernels.backend import Array, Slot
from nicecp.kernels.cuda_calls import named
from nicecp.kernels.cuda_device import CudaDevice, check
from nicecp.kernels.cuda_driver import Driver

_LOADS = {"uint8": "load_bytes", "float32": "load_floats", "float64": "load_doubles"}
KEPT_ORDERS = 64  # a flow has one, and two for every change of its partition
_GATHERS = {"float32": "gather_floats", "float64": "gather_doubles"}


class CudaBorders(CudaDevice):
    """See Backend."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._orders: dict[tuple[int, int], Array] = {}  # by address, which is taken as long as they are kept

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
        (n, d0), (m, d), given = x0.shape, data.shape, min(len(index), len(rows))
        if str(data.dtype) not in _LOADS:
            raise ValueError(f"data must be uint8, float32 or float64, not {data.dtype}")
        check(x0.dtype, x0=(x0, (n, d0)), x1=(x1, (n, d - d0)))
        check(np.float64, weight=(weight, (n,)), shift=(shift, (d,)), scale=(scale, (d,)), state=(state, (Slot.SIZE,)))
        check(np.int64, index=(index, (len(index),)), rows=(rows, (len(rows),)))
        self._check_order(order, d)
        numbers = (np.uint64(seed), np.uint32(purpose), np.int64(n), np.int32(d), np.int32(d0))
        reads = (data, index, rows, order, shift, scale, state)
        arguments = (x0, x1, weight, *reads, *numbers, np.int64(m), np.int64(given))
        self._launch(named(_LOADS[str(data.dtype)], x0), -(-n * d // 4), arguments, (x0, x1, weight), reads)

    def split(self, x0: Array, x1: Array, x: Array, order: Array) -> None:
        self._reorder("split", x, x0, x1, order, (x0, x1), (x,))

    def join(self, x: Array, x0: Array, x1: Array, order: Array) -> None:
        self._reorder("join", x, x0, x1, order, (x,), (x0, x1))

    def _reorder(
        self,
        kernel: str,
        x: Array,
        x0: Array,
        x1: Array,
        order: Array,
        writes: tuple[Array, ...],
        reads: tuple[Array, ...],
    ) -> None:
        (n, d), d0 = x.shape, x0.shape[1]
        check(x.dtype, x0=(x0, (n, d0)), x1=(x1, (n, d - d0)))
        self._check_order(order, d)
        arguments = (*writes, *reads, order, np.int64(n), np.int32(d), np.int32(d0))
        self._launch(named(kernel, x), n * d, arguments, writes, (*reads, order))

    def _check_order(self, order: Array, d: int) -> None:
        """ValueError unless it is a permutation: kernels would write beyond their arrays.

        An order never changes, so that one that was seen to be right is kept, and the host waits for the device once.
        """
        check(np.int64, order=(order, (d,)))
        key = self.driver.address(order), d
        if key in self._orders:
            return
        if not np.array_equal(np.sort(self.copy_out(order)), np.arange(d)):
            raise ValueError(f"order must be a permutation of 0..{d - 1}")
        if len(self._orders) >= KEPT_ORDERS:
            self._orders.clear()
        self._orders[key] = order

    def permute(self, y0: Array, y1: Array, x0: Array, x1: Array, index: Array) -> None:
        (n, d0), d = x0.shape, len(index)
        check(x0.dtype, y0=(y0, (n, d0)), y1=(y1, (n, d // 2)), x0=(x0, (n, (d + 1) // 2)), x1=(x1, (n, d // 2)))
        self._check_order(index, d)
        writes, reads = (y0, y1), (x0, x1, index)
        arguments = (*writes, *reads, np.int64(n), np.int32(d), np.int32(d0))
        self._launch(named("permute", y0), n * d, arguments, writes, reads)

    def gather(self, out: Array, source: Array, index: Array, state: Array) -> None:
        n, m = len(out), len(source)
        k = out.size // n if n else 0
        if out.shape[1:] != source.shape[1:] or out.ndim > 2:
            raise ValueError(f"cannot gather rows of shape {source.shape[1:]} into rows of shape {out.shape[1:]}")
        if str(source.dtype) not in _GATHERS:
            raise ValueError(f"source must be float32 or float64, not {source.dtype}")
        check(np.int64, index=(index, (len(index),)))
        check(np.float64, state=(state, (Slot.SIZE,)))
        reads = (source, index, state)
        arguments = (out, *reads, np.int64(n), np.int32(k), np.int64(m), np.int64(len(index)))
        self._launch(named(_GATHERS[str(source.dtype)], out), out.size, arguments, (out,), reads)

    def copy_columns(self, out: Array, out_start: int, x: Array, x_start: int, count: int) -> None:
        (n, out_width), x_width = out.shape, x.shape[1]
        check(out.dtype, x=(x, (n, x_width)))
        if not (0 <= out_start <= out_width - count and 0 <= x_start <= x_width - count and count >= 0):
            raise ValueError(f"{count} columns from {x_start} and {out_start} are not in {x.shape} and {out.shape}")
        sizes = [np.int32(number) for number in (out_width, out_start, x_width, x_start, count)]
        self._launch(named("copy_columns", out), n * count, (out, x, np.int64(n), *sizes), (out,), (x,))

    def logit_forward(
        self, z: Array, log_det: Array, x: Array, shift: Array, scale: Array, margin: float, first: bool
    ) -> None:
        n, k = x.shape
        check(z.dtype, z=(z, (n, k)), x=(x, (n, k)))
        check(np.float64, log_det=(log_det, (n,)), shift=(shift, (k,)), scale=(scale, (k,)))
        numbers = (np.float64(margin), np.int64(n), np.int32(k), np.int32(first))
        reads = (x, shift, scale) if first else (x, shift, scale, log_det)
        arguments = (z, log_det, x, shift, scale, *numbers)
        self._launch(named("logit_forward", z), (n, k), arguments, (z, log_det), reads)
