"""The borders of the kernel contract on every device: rows of data into two parts, and back, against the oracle."""

from __future__ import annotations

import numpy as np
import pytest

from nicecp.kernels.backend import Backend, Purpose
from tests.kernels import checks
from tests.kernels.checks import Device, new_state
from tests.kernels.test_contract import DTYPES, ROWS_COLUMNS

PARTITION = pytest.mark.parametrize("partition", ["odd-even", "halves", "random"])


@DTYPES
@ROWS_COLUMNS
@PARTITION
def test_load_batch_dequantizes(backend: Backend, dtype: str, n: int, d: int, partition: str) -> None:
    checks.check_load_batch(backend, dtype, np.uint8, n, d, partition=partition)


@DTYPES
@ROWS_COLUMNS
@PARTITION
@pytest.mark.parametrize("data_type", [np.float32, np.float64])
def test_load_batch_standardises(backend: Backend, dtype: str, data_type: type, n: int, d: int, partition: str) -> None:
    checks.check_load_batch(backend, dtype, data_type, n, d, partition=partition)


def test_every_partition_sees_the_same_noise(backend: Backend) -> None:
    """Noise belongs to the data's column: joined again, rows are the same bits whatever the partition was."""
    device, d, n = Device(backend, "float32"), 21, 17
    data = device.put(device.rng.integers(0, 256, (n, d)), "uint8")
    index, state = device.put(np.arange(n), "int64"), device.put(new_state(EPOCH=4), "float64")
    shift, scale = device.put(np.zeros(d), "float64"), device.put(np.ones(d), "float64")
    found = []
    for partition in ("odd-even", "halves", "random"):
        order = device.put(checks.order_of(partition, d), "int64")
        x0, x1, weight, x = device.out(n, 11), device.out(n, 10), device.out(n, dtype="float64"), device.out(n, d)
        backend.load_batch(x0, x1, weight, data, index, index, order, shift, scale, state, 5, Purpose.TRAIN_NOISE)
        backend.join(x, x0, x1, order)
        found.append(device.get(x).tobytes())
    assert len(set(found)) == 1


@DTYPES
@pytest.mark.parametrize(("n", "d"), [(1, 2), (33, 7), (31, 33), (1025, 9), (200, 784)])
def test_dequantized_values_are_exact(backend: Backend, dtype: str, n: int, d: int) -> None:
    """(65536 k + bits) / 2^24 without rounding, never 1; rows and seed beyond 32 bits, no padding."""
    checks.check_load_batch(
        backend, dtype, np.uint8, n, d, plain=True, padding=False, first_row=2**32 - 5, seed=2**63 + 11, cursor=0
    )


def test_largest_dequantized_value_is_below_one(backend: Backend) -> None:
    """Pixels of 255 over many draws, the largest bits among them."""
    device = Device(backend, "float32")
    n, d = 4096, 64
    x0, x1, weight = device.out(n, d // 2), device.out(n, d // 2), device.out(n, dtype="float64")
    data = device.put(np.full((1, d), 255, np.uint8), "uint8")
    index, rows = device.put(np.zeros(n, np.int64), "int64"), device.put(np.arange(n), "int64")
    shift, scale = device.put(np.zeros(d), "float64"), device.put(np.ones(d), "float64")
    state, order = device.put(new_state(EPOCH=1), "float64"), device.put(checks.order_of("odd-even", d), "int64")
    backend.load_batch(x0, x1, weight, data, index, rows, order, shift, scale, state, 1, Purpose.TRAIN_NOISE)
    largest = max(device.get(x0).max(), device.get(x1).max())
    assert 1 - 2.0**-22 < largest < 1


def test_noise_is_a_matter_of_row_epoch_and_purpose_only(backend: Backend) -> None:
    """Batches of another size and order give a row the same values; another epoch, purpose, seed or row does not."""
    device = Device(backend, "float32")
    d, m = 11, 40
    data = device.put(np.full((m, d), 100, np.uint8), "uint8")
    shift, scale = device.put(np.zeros(d), "float64"), device.put(np.ones(d), "float64")
    parts = device.put(checks.order_of("odd-even", d), "int64")

    def load(order: list[int], n: int, cursor: int, epoch: int = 1, seed: int = 3, purpose: int = 0) -> list[bytes]:
        x0, x1, weight = device.out(n, 6), device.out(n, 5), device.out(n, dtype="float64")
        index = device.put(np.array(order), "int64")
        state = device.put(new_state(CURSOR=cursor, EPOCH=epoch), "float64")
        backend.load_batch(x0, x1, weight, data, index, index, parts, shift, scale, state, seed, purpose)
        return [bytes(a) + bytes(b) for a, b in zip(device.get(x0), device.get(x1), strict=True)]

    forward = load(list(range(m)), 10, 0)
    assert len(set(forward)) == 10
    assert load(list(range(m))[::-1], m, 0)[::-1][:10] == forward
    assert load(list(range(m)), 5, 1) == forward[5:]
    for other in (load(list(range(m)), 10, 0, **{key: 2**32 + 7 if key == "seed" else 2}) for key in
                  ("epoch", "seed", "purpose")):  # fmt: skip
        assert not set(other) & set(forward)


@DTYPES
@ROWS_COLUMNS
@PARTITION
def test_split_and_join(backend: Backend, dtype: str, n: int, d: int, partition: str) -> None:
    checks.check_split_join(backend, dtype, n, d, partition)


@DTYPES
@ROWS_COLUMNS
def test_permute(backend: Backend, dtype: str, n: int, d: int) -> None:
    checks.check_permute(backend, dtype, n, d)


@DTYPES
@ROWS_COLUMNS
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_logit(backend: Backend, dtype: str, n: int, d: int, margin: float) -> None:
    checks.check_logit(backend, dtype, n, d, margin)
    checks.check_logit(backend, dtype, n, d, margin, aliased=True, first=False)


@DTYPES
def test_logit_of_the_edges_and_beyond(backend: Backend, dtype: str) -> None:
    """Infinite at the very ends without a margin, log(m / (1 - m)) with one; NaN outside, in its own row alone."""
    device = Device(backend, dtype)
    x = device.put(np.array([[0.0, 0.5], [1.0, 0.5], [-1e-3, 0.5], [1.001, 0.5], [np.nan, 0.5], [0.25, 0.5]]))
    z, log_det = device.out(6, 2), device.out(6, dtype="float64")
    shift, scale = device.put(np.zeros(2), "float64"), device.put(np.ones(2), "float64")
    backend.logit_forward(z, log_det, x, shift, scale, 0.0, True)
    inf, nan = np.inf, np.nan
    np.testing.assert_allclose(device.get(z)[:, 0], [-inf, inf, nan, nan, nan, -np.log(3)], rtol=1e-6)
    np.testing.assert_array_equal(device.get(z)[:, 1], 0)
    np.testing.assert_allclose(device.get(log_det)[[0, 1, 5]], [inf, inf, np.log(16 / 3) + np.log(4)], rtol=1e-12)
    assert np.isnan(device.get(log_det)[2:5]).all()
    backend.logit_forward(z, log_det, x, shift, scale, 0.01, True)
    np.testing.assert_allclose(device.get(z)[:2, 0], [-np.log(99), np.log(99)], rtol=1e-6)
    assert np.isfinite(device.get(log_det)[:4]).all()
