"""The device of every rank: CPUs, or a GPU for each, whose sums NCCL carries out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from nicecp.errors import DeviceError
from nicecp.kernels import detect
from nicecp.kernels.backend import Array, Backend
from nicecp.kernels.cuda_driver import Streams
from nicecp.machine import open_backend
from nicecp.parallel import DONE, Communicator, Pending

T = TypeVar("T")
logger = logging.getLogger("nicecp")


def open_for(communicator: Communicator, device: str, threads: int | None = None) -> Backend:
    """This rank's backend: of several, each gets a GPU of its own, by its number among those on its machine.

    threads : of each rank; by default its share of the CPUs. Where some rank has no GPU of its own, device "auto" is
    the CPU on all of them, and a warning says why if there is a driver.

    Raises DeviceError as nicecp.kernels.get_backend, and on all ranks where "cuda" is asked for and some rank has none.
    """
    threads = communicator.threads() if threads is None else threads
    if communicator.size == 1 or device not in ("auto", "cuda"):
        return open_backend(device, threads)
    detect.use(communicator.here(communicator.rank).index(communicator.rank))
    problem, backend, bus = detect.problem(), None, ""
    if not problem:
        from nicecp.kernels.cuda_nccl import bus_of

        backend = open_backend("cuda", threads)
        bus = bus_of(backend.driver)  # type: ignore[attr-defined]
    others = communicator.here(bus)
    if bus and others.count(bus) > 1:
        problem = f"{len(others)} ranks on this machine have {len(set(others))} GPU(s): start one rank for each GPU"
    without = np.zeros(communicator.size)
    without[communicator.rank] = bool(problem)
    communicator.sum(without)
    if backend is not None and not without.any():
        return backend
    found = next((text for text in communicator.here(problem) if text), "")
    why = found or f"rank {int(np.flatnonzero(without)[0])} has no GPU of its own: see its machine"
    if device == "cuda":
        raise DeviceError(f"device 'cuda': {why} (without a GPU: --device cpu)")
    if detect.has_driver():
        logger.warning("device auto: all ranks compute on CPUs, not on GPUs: %s", why)
    return open_backend("cpu", threads)


@runtime_checkable
class SumsOnDevice(Protocol):
    """What the CUDA backend has beside the kernel contract."""

    driver: Any

    def open_nccl(self, size: int, rank: int, share: Callable[[Callable[[], Any]], Any]) -> Any: ...
    def sum_over_ranks(self, nccl: Any, out: Array, x: Array) -> None: ...


def with_device_sums(communicator: Communicator, backend: object) -> Communicator:
    """The communicator whose sums work on the backend's own arrays, where it is a GPU's and there are other ranks."""
    if communicator.on_device or communicator.size == 1 or not isinstance(backend, SumsOnDevice):
        return communicator
    return OnDevice(communicator, backend) if isinstance(backend.driver, Streams) else communicator


class OnDevice:
    """Sums of a GPU's arrays by NCCL, in the order of the backend's calls; all else by the communicator of the host."""

    on_device = True

    def __init__(self, host: Communicator, backend: SumsOnDevice) -> None:
        self._host, self._backend = host, backend
        self.rank, self.size = host.rank, host.size
        self._nccl = backend.open_nccl(host.size, host.rank, host.from_first)

    @property
    def captures(self) -> bool:
        return bool(self._nccl.captures)

    def sum(self, array: Array) -> None:
        self.begin_sum(array).wait()

    def begin_sum(self, out: Array, part: Array | None = None) -> Pending:
        if isinstance(out, np.ndarray):
            return self._host.begin_sum(out, part)
        self._backend.sum_over_ranks(self._nccl, out, out if part is None else part)
        return DONE  # what reads the sum is launched after it

    def from_first(self, compute: Callable[[], T]) -> T:
        return self._host.from_first(compute)

    def gather(self, rows: Array) -> Array | None:
        return self._host.gather(rows)

    def here(self, value: T) -> list[T]:
        return self._host.here(value)

    def threads(self) -> int:
        return self._host.threads()

    def describe(self) -> str:
        return ", ".join(part for part in (self._host.describe(), self._nccl.describe()) if part)
