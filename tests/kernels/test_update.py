"""The optimisers of the kernel contract against the oracle: one update, long series, ranges, skipped steps, rates."""

from __future__ import annotations

import numpy as np
import pytest

from nicecp.kernels.backend import OPTIMIZERS, Backend, Slot
from tests import oracle
from tests.kernels import checks
from tests.kernels.checks import Device, new_state

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
ADAM = {"RATE": 1e-3, "RATE_DECAY": 1, "MOMENTUM": 0.9, "SQUARE_DECAY": 0.99, "LAMBDA": 1, "EPSILON": 1e-4}
RMSPROP = {"RATE": 1e-3, "RATE_DECAY": 1.0005, "RATE_FLOOR": 1e-4, "MOMENTUM": 0.5, "SQUARE_DECAY": 0.95}
RMSPROP |= {"EPSILON": 0.01}
HYPER = {"adam": ADAM, "rmsprop": RMSPROP}


@DTYPES
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("size", [1, 31, 33, 1000, 1025, 50_000])
def test_update(backend: Backend, dtype: str, optimizer: str, size: int) -> None:
    checks.check_update(backend, dtype, optimizer, size, 3, checks.TOLERANCE[dtype], **{**HYPER[optimizer], "STEP": 4})


@DTYPES
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_update_in_a_long_series(backend: Backend, dtype: str, optimizer: str) -> None:
    """500 steps from step 0, AdaM with a decaying first moment, the rate falling to its floor on the way."""
    slots = {**HYPER[optimizer], "RATE": 1e-2, "RATE_DECAY": 1.01, "RATE_FLOOR": 1e-3, "LAMBDA": 0.999}
    checks.check_update(backend, dtype, optimizer, 33, 500, checks.TOLERANCE[dtype], **slots)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_momentum_of_the_decayed_first_moment(backend: Backend, optimizer: str) -> None:
    """lambda < 1 late in training: the coefficient decays with the step, the bias correction does not."""
    slots = {**HYPER[optimizer], "LAMBDA": 0.9, "STEP": 30}
    checks.check_update(backend, "float64", optimizer, 33, 2, 1e-13, **slots)


@DTYPES
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("size", [200, 70_000])
def test_update_of_ranges_is_the_update_of_the_whole(backend: Backend, dtype: str, optimizer: str, size: int) -> None:
    """Bit for bit, and what is outside a range is left alone."""
    device = Device(backend, dtype)
    start = [device.normal(size) for _ in range(4)]
    start[3] = abs(start[3])
    state = device.put(new_state(**HYPER[optimizer], STEP=2), "float64")

    def run(ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        p, g, m, v = (device.put(a) for a in start)
        for offset, length in ranges:
            backend.update(p, g, m, v, offset, length, state, OPTIMIZERS[optimizer])
        return [device.get(a) for a in (p, g, m, v)]

    whole = run([(0, size)])
    parts = run([(128, size - 128), (0, 64), (64, 33), (97, 31)])
    middle = run([(64, 37)])
    for name, before, all_at_once, in_parts, one_part in zip("pgmv", start, whole, parts, middle, strict=True):
        assert np.array_equal(all_at_once, in_parts), name
        inside = (np.arange(size) >= 64) & (np.arange(size) < 64 + 37)
        assert np.array_equal(one_part[inside], all_at_once[inside]), name
        assert np.array_equal(one_part[~inside], before[~inside]), f"{name} outside the range"
        assert np.array_equal(all_at_once, before) == (name == "g")


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_a_loss_that_is_not_finite_leaves_the_parameters_alone(backend: Backend, optimizer: str) -> None:
    """loss, update and advance as in a training step; the next good batch goes on from where it was."""
    device = Device(backend, "float64")
    buffers = [device.put(device.normal(33)) for _ in range(3)] + [device.put(np.full(33, 0.5))]
    before = [device.get(a) for a in buffers]
    state, dlogp, weight = device.put(new_state(**HYPER[optimizer], STEP=5)), device.out(2), device.put(np.ones(2))
    p, g, m, v = buffers

    def step(logp: list[float]) -> None:
        backend.loss(state, dlogp, device.put(np.array(logp)), weight)
        backend.update(p, g, m, v, 0, 33, state, OPTIMIZERS[optimizer])
        backend.advance(state)

    step([np.nan, 1.0])
    assert all(np.array_equal(device.get(a), b) for a, b in zip(buffers, before, strict=True))
    after = device.get(state)
    assert after[[Slot.STEP, Slot.CURSOR, Slot.SKIPPED, Slot.SKIP]].tolist() == [5, 1, 1, 1]
    assert after[Slot.RATE] == HYPER[optimizer]["RATE"]
    step([2.0, 1.0])
    assert not np.array_equal(device.get(p), before[0])
    assert device.get(state)[[Slot.STEP, Slot.CURSOR, Slot.SKIPPED, Slot.SKIP]].tolist() == [6, 2, 1, 0]


@DTYPES
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("size", [5, 33, 50_000])
def test_gradients_that_are_not_finite_move_nothing(backend: Backend, dtype: str, optimizer: str, size: int) -> None:
    """Their own parameters stay, the others move; the step counts as skipped, and the next one is a good one."""
    device = Device(backend, dtype)
    p, g, m, v = (device.normal(size) for _ in range(4))
    v, bad = abs(v), [0, size // 2, size - 1]
    g[bad] = [np.nan, np.inf, -np.inf]
    state = new_state(**HYPER[optimizer], STEP=3, CURSOR=40, LOSS=2)
    state[Slot.LOSS_RING + 8] = 2
    device_p, device_g, device_m, device_v, device_state = (
        device.put(p), device.put(g), device.put(m), device.put(v), device.put(state, "float64"),
    )  # fmt: skip
    backend.update(device_p, device_g, device_m, device_v, 0, size, device_state, OPTIMIZERS[optimizer])
    expected = oracle.update(p, g, m, v, 0, size, state, optimizer)
    for name, found, before, wanted in zip("pmv", (device_p, device_m, device_v), (p, m, v), expected, strict=True):
        device.close(found, wanted, name, 10 * device.tolerance)
        assert np.array_equal(device.get(found)[bad], before[bad]), name
    assert device.get(device_state)[Slot.BAD_GRADIENT] == 1
    backend.advance(device_state)
    state[Slot.BAD_GRADIENT] = 1
    np.testing.assert_array_equal(device.get(device_state), oracle.advance(state))
    after = device.get(device_state)
    assert after[[Slot.STEP, Slot.CURSOR, Slot.SKIPPED, Slot.BAD_GRADIENT]].tolist() == [4, 41, 1, 0]
    assert np.isnan(after[Slot.LOSS_RING + 8])
    backend.update(device_p, device.put(np.ones(size)), device_m, device_v, 0, size, device_state, 0)
    assert device.get(device_state)[Slot.BAD_GRADIENT] == 0


@pytest.mark.parametrize(
    ("rate", "decay", "floor", "expected"),
    [
        (1e-3, 1.25, 1e-4, 8e-4),
        (1.1e-4, 1.25, 1e-4, 1e-4),
        (1e-4, 1.25, 1e-4, 1e-4),
        (5e-5, 1.25, 1e-4, 5e-5),
        (1, 1, 0, 1),
    ],
)
def test_advance_decays_the_rate_to_its_floor(
    backend: Backend, rate: float, decay: float, floor: float, expected: float
) -> None:
    device = Device(backend, "float64")
    state = new_state(RATE=rate, RATE_DECAY=decay, RATE_FLOOR=floor, STEP=8, CURSOR=4, SKIPPED=1, EPOCH=2, LOSS=3)
    device_state = device.put(state)
    backend.advance(device_state)
    after = device.get(device_state)
    assert after[Slot.RATE] == pytest.approx(expected, rel=1e-15)
    assert np.allclose(after, oracle.advance(state), rtol=1e-15, atol=0)
    assert (after != state).sum() == 2 + (expected != rate)
