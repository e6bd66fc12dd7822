"""The CUDA backend on the driver for CuPy, on stand-ins for CuPy and cuBLASLt, with the kernels emulated on the CPU.

All that is not a GPU is the real thing. Its arrays are not NumPy's: what takes them for that fails.
"""

from __future__ import annotations

from typing import Any

from nicecp.kernels import cublaslt, cuda_source
from nicecp.kernels.cuda_backend import CudaBackend
from nicecp.kernels.cuda_cupy import CupyDriver
from tests.emulated import build
from tests.emulated.build import EmulatedKernel
from tests.emulated.memory import guarded
from tests.kernels.fake_arrays import FakeArray, span
from tests.kernels.fake_cupy import FakeCupy
from tests.kernels.fake_lt import FakeLt
from tests.kernels.fake_order import Access


def kernel_of(name: str) -> EmulatedKernel:
    return EmulatedKernel(build.unit(cuda_source.unit_of(name)), name)


def run_kernel(name: str, grid: Any, block: Any, arguments: Any) -> None:
    """A launch, in the backward order of threads and blocks."""
    kernel_of(name)(grid, block, arguments, 1)
    for host in arguments:
        if hasattr(host, "check"):
            host.check(name)


def accesses(name: str, arguments: Any) -> Access:
    """By the kernel's own parameters: what is const is read, what is not may be written. An update has its range."""
    access = Access()
    for position, (given, constant) in enumerate(zip(arguments, kernel_of(name).constants, strict=True)):
        if not isinstance(given, FakeArray) or not given.size:
            continue
        host = given.host
        if name.startswith(("update_adam", "update_rmsprop")) and position < 4:
            offset, size = (int(number) for number in arguments[-2:])
            host = host[offset : offset + size]
        (access.reads if constant else access.writes).add(span(host))
    return access


def stand_in_driver(precision: str = "float32", memory: int = 2**40, schedule: int = 1) -> CupyDriver:
    cupy, lt = FakeCupy(memory, guarded, schedule), FakeLt()
    cupy.run_kernel, cupy.accesses = run_kernel, accesses
    lt.run = lambda stream, work, access: cupy.streams[stream].put("product", work, access)
    return CupyDriver(cupy, cublaslt.Products(lt, precision == "tf32"), precision)


def stand_in(precision: str = "float32", schedule: int = 1) -> CudaBackend:
    return CudaBackend(stand_in_driver(precision, schedule=schedule))
