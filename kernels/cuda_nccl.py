"""Sums over ranks by NCCL, one GPU a rank, on the streams of the CUDA backend's driver and inside its graphs.

Source: NCCL's user guide, https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/ (collectives may be captured from
2.9.6 on; all ranks must then capture and replay the same ones in the same order).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nicecp.errors import DeviceError
from nicecp.kernels.backend import Array
from nicecp.kernels.cuda_calls import Call
from nicecp.kernels.cuda_driver import Driver, Streams

CAPTURES = 20906  # the first version whose collectives may be captured
_INSTALL = "pip install nvidia-nccl-cu13 (nvidia-nccl-cu12 beside CuPy for CUDA 12), or use --device cpu"
# Summed before anything is captured, short and long: connections are made by the first messages.
FIRST_SUMS = tuple((count, dtype) for dtype in (np.float32, np.float64) for count in (1, 2**20))


class Nccl:
    """The ranks' communicator. All ranks make it at the same time; each on a GPU of its own.

    driver : of the backend; share(compute) : what rank 0 computes, on all ranks.
    Raises DeviceError where NCCL is missing or does not start.
    """

    def __init__(self, driver: Driver, size: int, rank: int, share: Callable[[Callable[[], Any]], Any]) -> None:
        if not isinstance(driver, Streams):
            raise DeviceError(f"NCCL cannot sum on {driver.name}: it needs a GPU through CuPy")
        self._driver, cupy = driver, driver.cupy
        nccl: Any = getattr(cupy.cuda, "nccl", None)
        if not getattr(nccl, "available", False):
            raise DeviceError(f"several GPUs sum their gradients by NCCL, which CuPy does not find: {_INSTALL}")
        self._nccl = nccl
        with self._reporting("start"):
            self._communicator = nccl.NcclCommunicator(size, tuple(share(nccl.get_unique_id)), rank)
            self.version = int(nccl.get_version())

    @property
    def captures(self) -> bool:
        """Whether a sum may be part of a captured step."""
        return self.version >= CAPTURES

    def describe(self) -> str:
        """Such as "NCCL 2.27.3"."""
        return f"NCCL {self.version // 10000}.{self.version // 100 % 100}.{self.version % 100}"

    def all_reduce(self, driver: Driver, out: Array, x: Array) -> None:
        """out = the sum over ranks of x, of the same size and dtype, or x itself; launched on the current stream."""
        assert isinstance(driver, Streams)
        kinds = {"float32": self._nccl.NCCL_FLOAT32, "float64": self._nccl.NCCL_FLOAT64}
        where = (driver.address(x), driver.address(out), out.size, kinds[str(out.dtype)])
        with self._reporting("sum"):
            self._communicator.allReduce(*where, self._nccl.NCCL_SUM, driver.stream)

    @contextlib.contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._nccl.NcclError as error:
            text = " ".join(str(error).split())
            remedy = "NCCL_DEBUG=INFO says more, and each rank needs a GPU of its own"
            raise DeviceError(f"NCCL failed to {what} ({text}): {remedy}") from error


@dataclass(eq=False, kw_only=True)
class SumOverRanks(Call):
    """out = the sum over ranks of x."""

    out: Array
    x: Array
    nccl: Nccl

    def writes(self) -> list[Array]:
        return [self.out]

    def reads(self) -> list[Array]:
        return [self.x]

    def prepare(self, driver: Driver) -> None:
        """Connected by sums of its own (CudaBackend.open_nccl)."""

    def run(self, driver: Driver) -> None:
        self.nccl.all_reduce(driver, self.out, self.x)


def bus_of(driver: Driver) -> str:
    """What tells the driver's GPU from all others of its machine."""
    assert isinstance(driver, Streams)
    return str(driver.cupy.cuda.Device().pci_bus_id)
