"""Fixtures shared by all tests: the devices that the kernel contract is checked on."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable

import pytest

from nicecp.kernels import get_backend
from nicecp.kernels.backend import Backend
from nicecp.kernels.cuda_backend import CudaBackend
from tests.emulated import build
from tests.emulated.driver import EmulatedDriver

# Under nohup, or in the background of a shell, this process ignores signals, and so would every command that it starts:
# a run respects that.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# Every way of running the kernels: add a line here and the whole contract is checked on it.
BACKENDS: dict[str, Callable[[], Backend]] = {
    "numba": lambda: get_backend("cpu", threads=1),
    "numba-2-threads": lambda: get_backend("cpu", threads=2),
    "cuda-emulated": lambda: CudaBackend(EmulatedDriver()),
    "cuda-emulated-backward": lambda: CudaBackend(EmulatedDriver(schedule=1, late=True, epilogues=True)),
}


@functools.cache
def make_backend(name: str) -> Backend:
    if "emulated" in name and build.compiler() is None:
        pytest.skip("g++ is not installed: the CUDA kernels are not run")
    return BACKENDS[name]()


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


@pytest.fixture
def one_backend() -> Backend:
    """The first device, for tests of the tests."""
    return make_backend(next(iter(BACKENDS)))
