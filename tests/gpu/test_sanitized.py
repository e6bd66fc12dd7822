"""Every kernel once at odd sizes, small enough for compute-sanitizer (benchmarks/gpu.sh): memory and races."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.kernels import checks

pytestmark = pytest.mark.gpu

N, D = 33, 31


@pytest.fixture(autouse=True, scope="module")
def each_array_on_its_own() -> Iterator[None]:
    """Without CuPy's pool, in whose large blocks the sanitizer does not see where an array ends."""
    cupy = pytest.importorskip("cupy")
    cupy.cuda.set_allocator(None)
    yield
    cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_each_kernel(gpu: Any, dtype: str) -> None:
    for data_type in (np.uint8, np.float32, np.float64):
        checks.check_load_batch(gpu, dtype, data_type, N, D)
    checks.check_split_join(gpu, dtype, N, D)
    checks.check_dense_forward(gpu, dtype, N, D, 65, True)
    checks.check_dense_backward(gpu, dtype, N, D, 65, True, (True, True, True))
    checks.check_couple(gpu, dtype, N, D, -1, True)
    for law in ("multiplicative", "affine"):
        checks.check_factor_forward(gpu, dtype, N, D, law, 1)
        checks.check_factor_backward(gpu, dtype, N, D, law)
    for sign in (1, -1):
        checks.check_spline_forward(gpu, dtype, N, D, sign)
    checks.check_spline_backward(gpu, dtype, N, D)
    for prior in ("logistic", "gaussian"):
        checks.check_scale_prior_forward(gpu, dtype, N, D, prior, False)
        checks.check_scale_prior_backward(gpu, dtype, N, D, prior, False)
    checks.check_scale_inverse(gpu, dtype, N, D, False)
    for optimizer in ("adam", "rmsprop"):
        slots = {"RATE": 1e-3, "RATE_DECAY": 1.0, "MOMENTUM": 0.9, "SQUARE_DECAY": 0.99, "LAMBDA": 1.0, "EPSILON": 1e-4}
        checks.check_update(gpu, dtype, optimizer, 1025, 2, 1e-4, **slots)


def test_loss_and_random_numbers(gpu: Any) -> None:
    rng = np.random.default_rng(1)
    checks.check_loss(gpu, N, rng.normal(size=N), np.ones(N), 3)
    out = gpu.alloc((N, D), np.float64)
    for fill in (gpu.fill_uniform, gpu.fill_normal, gpu.fill_logistic):
        fill(out, 1, 2, 3)
        assert np.isfinite(gpu.copy_out(out)).all()
