"""The borders of the CUDA backend: the logit of a row, and arguments that would lead a kernel beyond its arrays."""

from __future__ import annotations

import numpy as np
import pytest

from nicecp.kernels.cuda_backend import CudaBackend
from tests.emulated import build
from tests.emulated.driver import EmulatedDriver
from tests.kernels.checks import Device, new_state

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=build.MISSING)

SCHEDULES = pytest.mark.parametrize("schedule", [0, 1])


def device_of(schedule: int, dtype: str, seed: int = 0) -> Device:
    return Device(CudaBackend(EmulatedDriver(schedule=schedule)), dtype, seed)


@SCHEDULES
def test_logit_at_the_edges(schedule: int) -> None:
    """Without a margin 0 and 1 are infinitely far out, and what lies beyond is NaN."""
    device = device_of(schedule, "float64")
    z, log_det, one = device.out(4, 1), device.out(4, dtype="float64"), device.put(np.ones(1))
    x, zero = device.put(np.array([[0.0], [1.0], [0.5], [1.5]])), device.put(np.zeros(1))
    device.backend.logit_forward(z, log_det, x, zero, one, 0.0, True)  # type: ignore[attr-defined]
    np.testing.assert_allclose(device.get(z)[:, 0], [-np.inf, np.inf, 0, np.nan])
    np.testing.assert_allclose(device.get(log_det), [np.inf, np.inf, np.log(4), np.nan])


# --- what lies outside ------------------------


def test_rows_that_are_not_there_are_nan_and_batches_that_are_not_there_padding() -> None:
    device = device_of(0, "float32")
    x0, x1, weight, out = device.out(2, 2), device.out(2, 1), device.out(2, dtype="float64"), device.out(2, 3)
    data, index = device.put(np.ones((4, 3)), "float32"), device.put(np.array([1, 4]), "int64")
    shift, scale, order = device.put(np.zeros(3), "float64"), device.put(np.ones(3), "float64"), np.array([2, 0, 1])
    state, order = device.put(new_state(), "float64"), device.put(order, "int64")
    for cursor, first, second in ((0, 1, np.nan), (1, 0, 0)):
        device.backend.copy_in(state, new_state(CURSOR=cursor))
        device.backend.load_batch(x0, x1, weight, data, index, index, order, shift, scale, state, 0, 0)
        device.backend.gather(out, data, index, state)
        np.testing.assert_array_equal(device.get(x0), [[first] * 2, [second] * 2])
        np.testing.assert_array_equal(device.get(out), [[first] * 3, [second] * 3])
        assert device.get(weight).tolist() == [1 - cursor] * 2


@pytest.mark.parametrize("wrong", [[0, 1, 3], [0, 1, -1], [0, 0, 1]])
def test_an_order_that_is_no_permutation_is_refused(wrong: list[int]) -> None:
    device = device_of(0, "float64")
    x0, x1, x, order = device.out(2, 2), device.out(2, 1), device.out(2, 3), device.put(np.array(wrong), "int64")
    for mistake in (lambda: device.backend.split(x0, x1, x, order), lambda: device.backend.join(x, x0, x1, order)):
        with pytest.raises(ValueError, match="order must be a permutation"):
            mistake()
    with pytest.raises(ValueError, match="order"):
        device.backend.split(x0, x1, x, device.put(np.arange(3)))
    y0, y1, right = device.out(2, 2), device.out(2, 1), device.put(np.arange(3), "int64")
    with pytest.raises(ValueError, match="order must be a permutation"):
        device.backend.permute(y0, y1, x0, x1, order)
    wrong_halves = ((y1, y0, x1, x0), (y0, y1, x0, x0), (y0, y0, x0, x1), (y0, device.out(3, 1), x0, x1))
    for halves in wrong_halves:
        with pytest.raises(ValueError, match="expected float64 of shape"):
            device.backend.permute(*halves, right)


def test_orders_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of(0, "float64")
    x0, x1, x, order = device.out(2, 2), device.out(2, 1), device.out(2, 3), device.put(np.arange(3), "int64")
    looks: list[int] = []
    to_host = device.backend.driver.to_host  # type: ignore[attr-defined]
    monkeypatch.setattr(device.backend.driver, "to_host", lambda array: looks.append(array.size) or to_host(array))  # type: ignore[attr-defined]
    for _ in range(3):
        device.backend.split(x0, x1, x, order)
    assert looks == [3]
    for _ in range(100):  # as many flows: their orders are not kept for ever
        device.backend.split(x0, x1, x, device.put(np.arange(3), "int64"))
    assert len(device.backend._orders) <= 64  # type: ignore[attr-defined]
    assert looks == [3] * 101


def test_columns_and_rows_that_do_not_fit_are_refused() -> None:
    device = device_of(0, "float64")
    four, state = device.out(2, 4), device.out(64)
    for out_start, x_start, count in ((3, 0, 2), (0, 3, 2), (-1, 0, 1), (0, -1, 1), (0, 0, -1)):
        with pytest.raises(ValueError, match="are not in"):
            device.backend.copy_columns(device.out(2, 4), out_start, four, x_start, count)
    index = device.put(np.zeros(3), "int64")
    for out, source in (
        (device.out(3, 2), device.out(4)),
        (device.out(3), device.out(4, 1)),
        (device.out(3), device.out(4, dtype="int64")),
        (device.out(3, dtype="int64"), device.out(4)),
    ):
        with pytest.raises(ValueError):
            device.backend.gather(out, source, index, state)
