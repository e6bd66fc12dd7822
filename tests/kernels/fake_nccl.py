"""A stand-in for cupy.cuda.nccl on the stand-in for CuPy: sums that are carried out when their stream is."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.fake_cupy import FakeCupy
from tests.kernels.fake_order import Access, span_of


class NcclError(RuntimeError):
    pass


class FakeNccl:
    """The module for one rank. total(array) : the sum over ranks; it waits for the others."""

    available = True
    NCCL_SUM, NCCL_FLOAT32, NCCL_FLOAT64 = 0, 7, 8
    NcclError = NcclError

    def __init__(self, cupy: FakeCupy, total: Callable[[NDArray[Any]], NDArray[Any]], version: int = 22703) -> None:
        self.cupy, self.total, self.version = cupy, total, version
        self.made: list[tuple[int, int]] = []  # (size, rank)
        self.sums: list[int] = []  # numbers of every sum that was carried out

    def get_version(self) -> int:
        return self.version

    def get_unique_id(self) -> tuple[int, ...]:
        return tuple(range(128))

    def NcclCommunicator(self, size: int, number: tuple[int, ...], rank: int) -> FakeNccl:
        assert number == tuple(range(128))
        if size == 99:
            raise NcclError("NCCL_ERROR_INVALID_USAGE: invalid usage")
        self.made.append((size, rank))
        return self

    def allReduce(self, sent: int, received: int, count: int, kind: int, op: int, stream: int) -> None:
        assert op == self.NCCL_SUM
        dtype = np.dtype(np.float32 if kind == self.NCCL_FLOAT32 else np.float64)

        def work() -> None:
            raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(sent)
            total = np.ascontiguousarray(self.total(np.frombuffer(raw, dtype).copy()))
            ctypes.memmove(received, total.ctypes.data, total.nbytes)
            self.sums.append(count)

        size = count * dtype.itemsize
        self.cupy.streams[stream].put("allReduce", work, Access({span_of(sent, size)}, {span_of(received, size)}))
