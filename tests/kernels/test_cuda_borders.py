"""Border kernels of the CUDA backend that the contract does not have on every device yet, against plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nicecp.kernels.cuda_backend import CudaBackend
from tests import oracle
from tests.emulated import build
from tests.emulated.driver import EmulatedDriver
from tests.kernels.checks import Device, assert_close, new_state

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
SCHEDULES = pytest.mark.parametrize("schedule", [0, 1])
ROWS_COLUMNS = pytest.mark.parametrize(("n", "k"), [(1, 2), (31, 33), (1000, 3), (33, 1025), (1025, 9)])


def device_of(schedule: int, dtype: str, seed: int = 0) -> Device:
    return Device(CudaBackend(EmulatedDriver(schedule=schedule)), dtype, seed)


def gathered(source: NDArray[Any], index: NDArray[np.int64], cursor: int, n: int) -> NDArray[np.float64]:
    """out[i] = source[index[cursor * n + i]], 0 where that is negative."""
    at = index[cursor * n : (cursor + 1) * n]
    out = source[np.maximum(at, 0)].astype(float)
    out[at < 0] = 0
    return out


def logit(
    x: NDArray[np.float64], shift: NDArray[np.float64], scale: NDArray[np.float64], margin: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """z : (n, k), and each row's own part of log |det dz/dx| : (n,), by dz/dp = 1 / (p (1 - p))."""
    p = margin + (1 - 2 * margin) * (x - shift) * scale
    return np.log(p / (1 - p)), -np.log(p * (1 - p)).sum(axis=1)


@DTYPES
@SCHEDULES
@pytest.mark.parametrize("source_type", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_gather(dtype: str, schedule: int, source_type: str, shape: tuple[int, ...]) -> None:
    device, n, cursor = device_of(schedule, dtype), 300, 2
    source = device.rng.normal(size=(50, *shape)).astype(source_type)
    index = device.rng.integers(-2, 50, (cursor + 1) * n + 5)
    state = device.put(new_state(CURSOR=cursor), "float64")
    out, source_on, index_on = device.out(n, *shape), device.put(source, source_type), device.put(index, "int64")
    device.backend.gather(out, source_on, index_on, state)  # type: ignore[attr-defined]
    expected = gathered(source, index, cursor, n).astype(dtype)
    np.testing.assert_array_equal(device.get(out), expected)
    device.backend.copy_in(state, new_state(CURSOR=cursor + 1))
    device.backend.gather(out, source_on, index_on, state)  # type: ignore[attr-defined]
    assert not device.get(out).any(), "beyond the index is padding"


def test_gather_of_a_row_that_is_not_there_is_nan() -> None:
    device = device_of(0, "float64")
    out, source, state = device.out(3), device.put(np.arange(4.0)), device.put(new_state(), "float64")
    device.backend.gather(out, source, device.put(np.array([3, 4, -1]), "int64"), state)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(device.get(out), [3, np.nan, 0])
    for wrong in (device.out(3, 2), device.out(3, dtype="int64")):
        with pytest.raises(ValueError):
            device.backend.gather(wrong, source, device.put(np.zeros(3), "int64"), state)  # type: ignore[attr-defined]


@DTYPES
@SCHEDULES
@pytest.mark.parametrize(
    ("widths", "starts", "count"),
    [((7, 5), (2, 1), 3), ((5, 9), (0, 4), 5), ((1, 1), (0, 0), 1), ((40, 33), (0, 0), 33), ((4, 4), (1, 2), 0)],
)
def test_copy_columns(dtype: str, schedule: int, widths: tuple[int, int], starts: tuple[int, int], count: int) -> None:
    device = device_of(schedule, dtype)
    out, x = (device.normal(33, width) for width in widths)
    device_out = device.put(out)
    device.backend.copy_columns(device_out, starts[0], device.put(x), starts[1], count)  # type: ignore[attr-defined]
    out[:, starts[0] : starts[0] + count] = x[:, starts[1] : starts[1] + count]
    np.testing.assert_array_equal(device.get(device_out), out)


@pytest.mark.parametrize(("out_start", "x_start", "count"), [(3, 0, 2), (0, 3, 2), (-1, 0, 1), (0, -1, 1), (0, 0, -1)])
def test_copy_columns_that_do_not_lie_there(out_start: int, x_start: int, count: int) -> None:
    device = device_of(0, "float64")
    with pytest.raises(ValueError, match="columns"):
        device.backend.copy_columns(device.out(2, 4), out_start, device.out(2, 4), x_start, count)  # type: ignore[attr-defined]


@DTYPES
@SCHEDULES
@ROWS_COLUMNS
@pytest.mark.parametrize(("first", "aliased"), [(True, False), (False, True)])
def test_logit_forward(dtype: str, schedule: int, n: int, k: int, first: bool, aliased: bool) -> None:
    device, margin = device_of(schedule, dtype, seed=n), 0.05
    shift, scale = device.rng.normal(size=k), device.rng.uniform(0.5, 2, k)
    x = (shift + device.rng.uniform(0.01, 0.99, (n, k)) / scale).astype(dtype).astype(float)
    device_x, log_det = device.put(x), device.out(n, dtype="float64")
    z = device_x if aliased else device.out(n, k)
    numbers = [device.put(a, "float64") for a in (shift, scale)]
    device.backend.logit_forward(z, log_det, device_x, *numbers, margin, first)  # type: ignore[attr-defined]
    expected, expected_log_det = logit(x, shift, scale, margin)
    device.close(z, expected, "z")
    expected_log_det += 0 if first else device.get(device.out(n, dtype="float64"))
    assert_close(device.get(log_det), expected_log_det, 1e-12, "log_det")


@SCHEDULES
def test_logit_at_the_edges(schedule: int) -> None:
    """Without a margin 0 and 1 are infinitely far out, and what lies beyond is NaN."""
    device = device_of(schedule, "float64")
    z, log_det, one = device.out(4, 1), device.out(4, dtype="float64"), device.put(np.ones(1))
    x, zero = device.put(np.array([[0.0], [1.0], [0.5], [1.5]])), device.put(np.zeros(1))
    device.backend.logit_forward(z, log_det, x, zero, one, 0.0, True)  # type: ignore[attr-defined]
    np.testing.assert_allclose(device.get(z)[:, 0], [-np.inf, np.inf, 0, np.nan])
    np.testing.assert_allclose(device.get(log_det), [np.inf, np.inf, np.log(4), np.nan])


# --- any permutation of the columns ------------------------------------------------------------


def permuted(device: Device, d: int, partition: str) -> NDArray[np.int64]:
    """An order of the columns, put in the place of even and odd ones."""
    order = np.arange(d) if partition == "halves" else device.rng.permutation(d)
    device.backend._orders[d] = device.put(order, "int64")  # type: ignore[attr-defined]
    return order


PARTITIONS = pytest.mark.parametrize("partition", ["halves", "permutation"])


@DTYPES
@SCHEDULES
@PARTITIONS
@pytest.mark.parametrize(("n", "d"), [(5, 2), (33, 31), (9, 100)])
@pytest.mark.parametrize("data_type", [np.uint8, np.float32, np.float64])
def test_load_batch_in_any_order(dtype: str, schedule: int, partition: str, n: int, d: int, data_type: type) -> None:
    device = device_of(schedule, dtype, seed=d)
    order, (d0, d1) = permuted(device, d, partition), ((d + 1) // 2, d // 2)
    data = device.rng.integers(0, 256, (n + 4, d)).astype(data_type)
    index = device.rng.integers(-1, n + 4, 3 * n)
    rows, state = 2**32 + np.arange(3 * n), new_state(CURSOR=2, EPOCH=4)
    shift, scale = device.rng.normal(size=d), device.rng.uniform(0.5, 2, d)
    x0, x1, weight = device.out(n, d0), device.out(n, d1), device.out(n, dtype="float64")
    arrays = [device.put(a, a.dtype) for a in (data, index, rows, shift, scale, state)]
    device.backend.load_batch(x0, x1, weight, *arrays, 2**40 + 3, 1)
    e0, e1, expected_weight = oracle.load_batch(n, data, index, rows, shift, scale, state, 2**40 + 3, 1)
    x = oracle.interleave(e0, e1, d)
    device.close(x0, x[:, order[:d0]], "part 0")
    device.close(x1, x[:, order[d0:]], "part 1")
    np.testing.assert_array_equal(device.get(weight), expected_weight)


@DTYPES
@SCHEDULES
@PARTITIONS
def test_split_and_join_in_any_order(dtype: str, schedule: int, partition: str) -> None:
    device, n, d = device_of(schedule, dtype), 300, 9
    order, x = permuted(device, d, partition), device.normal(n, d)
    x0, x1, joined = device.out(n, 5), device.out(n, 4), device.out(n, d)
    device.backend.split(x0, x1, device.put(x))
    device.close(x0, x[:, order[:5]], "part 0", 0)
    device.close(x1, x[:, order[5:]], "part 1", 0)
    device.backend.join(joined, x0, x1)
    device.close(joined, x, "join after split", 0)


def test_a_row_that_is_not_there_is_nan_and_a_batch_that_is_not_there_padding() -> None:
    device = device_of(0, "float32")
    x0, x1, weight = device.out(2, 2), device.out(2, 1), device.out(2, dtype="float64")
    data, index = device.put(np.ones((4, 3)), "float32"), device.put(np.array([1, 4]), "int64")
    shift, scale, state = device.put(np.zeros(3), "float64"), device.put(np.ones(3), "float64"), new_state()
    device_state = device.put(state, "float64")
    device.backend.load_batch(x0, x1, weight, data, index, index, shift, scale, device_state, 0, 0)
    np.testing.assert_array_equal(device.get(x0), [[1, 1], [np.nan, np.nan]])
    device.backend.copy_in(device_state, new_state(CURSOR=1))
    device.backend.load_batch(x0, x1, weight, data, index, index, shift, scale, device_state, 0, 0)
    assert not device.get(x0).any()
    assert not device.get(weight).any()
