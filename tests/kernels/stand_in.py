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
from tests.kernels.fake_arrays import FakeArray
from tests.kernels.fake_cupy import FakeCupy
from tests.kernels.fake_lt import FakeLt


def run_kernel(name: str, grid: Any, block: Any, arguments: Any) -> None:
    """A launch, in the backward order of threads and blocks."""
    hosts = [one.host if isinstance(one, FakeArray) else one for one in arguments]
    EmulatedKernel(build.unit(cuda_source.unit_of(name)), name)(grid, block, hosts, 1)
    for host in hosts:
        if hasattr(host, "check"):
            host.check(name)


def stand_in_driver(precision: str = "float32", memory: int = 2**40) -> CupyDriver:
    cupy, lt = FakeCupy(memory, guarded), FakeLt()
    cupy.run_kernel = run_kernel
    lt.run = lambda stream, work: cupy.streams[stream].put("product", work)
    return CupyDriver(cupy, cublaslt.Products(lt, precision == "tf32"), precision)


def stand_in(precision: str = "float32") -> CudaBackend:
    return CudaBackend(stand_in_driver(precision))
