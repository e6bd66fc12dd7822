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

GPU = "cuda"  # the real one: `make test-gpu`

# Every way of running the kernels: add a line here and the whole contract is checked on it.
BACKENDS: dict[str, Callable[[], Backend]] = {
    "numba": lambda: get_backend("cpu", threads=1),
    "numba-2-threads": lambda: get_backend("cpu", threads=2),
    "cuda-emulated": lambda: CudaBackend(EmulatedDriver()),
    "cuda-emulated-backward": lambda: CudaBackend(EmulatedDriver(schedule=1, late=True, epilogues="all")),
    GPU: lambda: get_backend("cuda"),
}
LARGE = 500_000  # numbers in an array, for an emulated device


@functools.cache
def make_backend(name: str) -> Backend:
    if "emulated" in name and build.compiler() is None:
        pytest.skip(build.MISSING)
    return BACKENDS[name]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Emulated threads cost more than real ones: their largest arrays are slow tests."""
    for item in items:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if "emulated" in str(given.get("backend")) and given.get("n", 0) * given.get("d", 0) > LARGE:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.gpu] * (name == GPU)) for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


@pytest.fixture
def one_backend() -> Backend:
    """The first device, for tests of the tests."""
    return make_backend(next(iter(BACKENDS)))
