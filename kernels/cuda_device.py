"""The CUDA backend below the contract's operations: memory, calls carried out or written down, recording."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nicecp.kernels.backend import Array, Backend
from nicecp.kernels.cuda_calls import Call, Launch, Plain, by_row, spread
from nicecp.kernels.cuda_driver import Driver
from nicecp.kernels.cuda_plan import Plan
from nicecp.kernels.cuda_source import THREADS
from nicecp.kernels.device_arrays import Upload

_DLPACK_CUDA = (2, 13)  # DLDeviceType: kDLCUDA, kDLCUDAManaged


class CudaDevice(Backend):
    """What all operations share.  driver: the device (kernels/cuda_driver.py)."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._lock = threading.RLock()
        self._calls: list[Call] | None = None  # of the step that is being recorded
        self._coefficients = driver.alloc(8, np.float64)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.driver,)

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

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    # --- the array library, and arrays of others --------------------------------------------------

    @property
    def xp(self) -> Any:
        return self.driver.xp

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        with self._lock, self.driver.arithmetic():
            yield

    def owns(self, x: object) -> bool:
        where = getattr(x, "__dlpack_device__", None)
        return where is not None and int(where()[0]) in _DLPACK_CUDA

    def borrow(self, x: Any) -> Array:
        with self._lock:
            return self.driver.borrow(x)

    def result(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        with self._lock:
            return self.driver.result(shape, dtype)

    def hand_over(self) -> None:
        with self._lock:
            self.driver.hand_over()

    def pinned(self, shape: int | Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        with self._lock:
            return self.driver.pinned(shape, dtype)

    def upload(self, dst: Array, src: NDArray[Any]) -> Upload:
        with self._lock:
            token = self.driver.upload(dst, src)

        def ready() -> None:
            with self._lock:
                self.driver.wait(token)

        return Upload(ready, partial(self.driver.uploaded, token))

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


def check(dtype: DTypeLike, **arrays: tuple[Array, tuple[int, ...]]) -> None:
    """ValueError unless every array is of this dtype and of the shape beside it: a kernel would run past its end."""
    for name, (array, shape) in arrays.items():
        if array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} of shape {array.shape}"
            raise ValueError(f"{name}: expected {np.dtype(dtype)} of shape {shape}, got {found}")
