"""CUDA kernels whose threads wait for one another, in orders of threads that are neither forward nor backward."""

from __future__ import annotations

import numpy as np
import pytest

from nicecp.kernels.cuda_backend import CudaBackend
from tests.emulated import build
from tests.emulated.driver import EmulatedDriver
from tests.kernels import checks

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)


@pytest.fixture(params=[2, 7, 1_000_003])
def mixed(request: pytest.FixtureRequest) -> CudaBackend:
    return CudaBackend(EmulatedDriver(schedule=request.param))


DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


@DTYPES
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 31), (100, 300), (7, 1025)])
def test_sums_over_rows_and_columns(mixed: CudaBackend, dtype: str, n: int, k: int) -> None:
    checks.check_dense_backward(mixed, dtype, n, 3, k, True, (True, True, True))
    checks.check_factor_forward(mixed, dtype, n, k, "affine", -1, first=False)
    checks.check_spline_forward(mixed, dtype, n, k, 1, first=False)
    for prior in ("gaussian", "logistic"):
        checks.check_scale_prior_forward(mixed, dtype, n, k + 1, prior, False)
        checks.check_scale_prior_backward(mixed, dtype, n, k + 1, prior, True)
    rng = np.random.default_rng(n)
    checks.check_loss(mixed, n * k, rng.normal(-9, 1, n * k), rng.uniform(0.5, 1, n * k), 3)


@DTYPES
def test_the_order_of_threads_does_not_show(mixed: CudaBackend, dtype: str) -> None:
    """Sums have an order of their own: the same bits as forward."""
    results = []
    for backend in (mixed, CudaBackend(EmulatedDriver())):
        device = checks.Device(backend, dtype, seed=1)
        n, d = 130, 270
        h, s, dlogp = (
            device.put(device.normal(n, d)),
            device.put(device.normal(d)),
            device.put(device.normal(n), "float64"),
        )
        dx, ds, logp, db = device.out(n, d), device.out(d), device.out(n, dtype="float64"), device.out(d)
        backend.scale_prior_backward(dx, dx, ds, ds, dlogp, h, h, s, s, 1)
        backend.scale_prior_forward(logp, dx, dx, h, h, s, s, 1)
        backend.dense_backward(None, None, db, h, h, device.out(n, 2), device.out(2, d), True)
        results.append([device.get(array).tobytes() for array in (dx, ds, logp, db)])
    assert results[0] == results[1]
