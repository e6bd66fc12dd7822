"""BLAS at its address, from NumPy and from SciPy, and the barrier between threads."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from nicecp.kernels import _numba_native as native
from nicecp.kernels import numba_backend, numba_calls
from nicecp.kernels._numba_native import arrive
from nicecp.kernels.jit import kernel
from nicecp.kernels.numba_backend import NumbaBackend
from tests.kernels import checks


@kernel
def wait_for(sync, count):  # type: ignore[no-untyped-def]
    return arrive(sync, count)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("source", ["numpy", "scipy"])
def test_products_of_either_blas(monkeypatch: pytest.MonkeyPatch, source: str, dtype: str) -> None:
    """64-bit integers in one, 32-bit integers in the other; every transposition, every position of a slice."""
    name = {"float32": "sgemm", "float64": "dgemm"}[dtype]
    address = getattr(native, f"{source}_blas")(name)
    if not address:
        pytest.skip("this NumPy's BLAS exports no function under a known name")
    monkeypatch.setattr(numba_calls, "gemm_address", lambda dtype: address)
    backend = NumbaBackend(1)
    for shape in ((1, 1, 1), (31, 33, 5), (200, 17, 64)):
        for transpose_a in (False, True):
            for transpose_b in (False, True):
                checks.check_matmul(backend, dtype, *shape, transpose_a, transpose_b)
    monkeypatch.setattr(numba_backend, "_SLICED_PRODUCT", 0)
    sliced = NumbaBackend(3)
    checks.check_dense_forward(sliced, dtype, 33, 40, 65, True)
    checks.check_dense_backward(sliced, dtype, 33, 40, 65, True, (True, True, True))


def test_scipy_serves_where_numpy_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "numpy_blas", lambda name: 0)
    assert native.gemm_address.__wrapped__(np.float32) == native.scipy_blas("sgemm")
    assert native.scipy_blas("sgemm") != native.scipy_blas("dgemm") != 0


def test_the_barrier_opens_for_the_last_one() -> None:
    sync, passed = np.zeros(16, np.int64), []
    address = sync.ctypes.data

    def come(after: float) -> None:
        time.sleep(after)
        passed.append((after, wait_for(address, 3), time.monotonic()))

    start = time.monotonic()
    guests = [threading.Thread(target=come, args=(0.1 * number,)) for number in range(3)]
    for guest in guests:
        guest.start()
    for guest in guests:
        guest.join(timeout=300)
    assert [opened for _, opened, _ in passed] == [True] * 3
    assert min(when for _, _, when in passed) - start >= 0.2, "somebody went ahead"
    assert sync[0] == 3


def test_the_barrier_gives_up_when_called_off() -> None:
    sync, opened = np.zeros(16, np.int64), []
    address = sync.ctypes.data
    guest = threading.Thread(target=lambda: opened.append(wait_for(address, 2)))
    guest.start()
    time.sleep(0.05)
    assert opened == []
    sync[8] = 1
    guest.join(timeout=300)
    assert opened == [False]
