"""What belongs to rows beside their features, context and weights, on its way to where it is needed: the contract."""

from __future__ import annotations

import numpy as np
import pytest

from nicecp.kernels.backend import Backend
from nicecp.kernels.numba_backend import NumbaBackend
from tests.kernels import checks
from tests.kernels.checks import Device, new_state

TYPES = pytest.mark.parametrize("source_type", ["float32", "float64"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
ROWS = pytest.mark.parametrize("n", [1, 31, 33, 1000, 1025])


@DTYPES
@TYPES
@ROWS
@pytest.mark.parametrize("k", [None, 1, 3, 33])
def test_gather(backend: Backend, dtype: str, source_type: str, n: int, k: int | None) -> None:
    checks.check_gather(backend, dtype, source_type, n, k)
    checks.check_gather(backend, dtype, source_type, n, k, cursor=0, padding=False)


def test_gathered_weights_are_float64_beside_a_float32_flow(backend: Backend) -> None:
    """A recorded step loads both; 0.1 keeps all of its digits, and each replay reads the cursor anew."""
    device = Device(backend, "float32")
    weight, context = device.out(2, dtype="float64"), device.out(2, 2)
    source = device.put(np.array([0.1, 0.2, 0.3]), "float64")
    table, index = device.put(np.arange(6.0).reshape(3, 2), "float64"), device.put(np.array([2, 0, 1, -1]), "int64")
    state, m = device.put(new_state(), "float64"), device.put(np.ones((2, 2)))

    def step() -> None:
        backend.gather(weight, source, index, state)
        backend.gather(context, table, index, state)
        backend.couple(context, context, m, 1)

    run = backend.record(step)
    run()
    assert device.get(weight).tolist() == [0.3, 0.1]
    assert device.get(context).tolist() == [[5, 6], [1, 2]]
    backend.copy_in(state, new_state(CURSOR=1))
    run()
    assert device.get(weight).tolist() == [0.2, 0]
    assert device.get(context).tolist() == [[3, 4], [1, 1]]


@DTYPES
@ROWS
def test_copy_columns(backend: Backend, dtype: str, n: int) -> None:
    checks.check_copy_columns(backend, dtype, n, (7, 5), (2, 0), 5)
    checks.check_copy_columns(backend, dtype, n, (5, 33), (0, 31), 2)
    checks.check_copy_columns(backend, dtype, n, (33, 33), (0, 0), 33)
    checks.check_copy_columns(backend, dtype, n, (1, 2), (0, 1), 1)


@pytest.mark.parametrize("parts", [2, 3])
def test_in_parts_over_several_threads(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nicecp.kernels.numba_backend._SLICED_ROWS", 0)
    backend = NumbaBackend(parts)
    for n in (1, 5, 33):
        for dtype in ("float32", "float64"):
            checks.check_gather(backend, dtype, "float32", n, None)
            checks.check_gather(backend, dtype, "float64", n, 3)
            checks.check_copy_columns(backend, dtype, n, (7, 5), (2, 1), 4)


def test_arrays_that_compiled_code_would_misread_are_refused() -> None:
    backend, index, state = NumbaBackend(1), np.zeros(4, np.int64), np.zeros(64)
    for out, source in (
        (np.zeros((4, 2)), np.zeros((4, 3))),
        (np.zeros(4), np.zeros((4, 1))),
        (np.zeros(4), np.zeros(4, np.int64)),
        (np.zeros(4, np.float16), np.zeros(4)),
    ):
        with pytest.raises(ValueError, match="cannot gather"):
            backend.gather(out, source, index, state)
    with pytest.raises(ValueError, match="lies beyond the index"):
        backend.gather(np.zeros(5), np.zeros(4), index, state)
    x, out = np.zeros((4, 3)), np.zeros((4, 5))
    for starts_and_count in ((3, 0, 3), (0, 2, 2), (-1, 0, 1), (0, -1, 1), (0, 0, -1)):
        with pytest.raises(ValueError, match="are not in"):
            backend.copy_columns(out, starts_and_count[0], x, starts_and_count[1], starts_and_count[2])
    with pytest.raises(ValueError, match="are not in"):
        backend.copy_columns(out[:3], 0, x, 0, 1)


def test_a_batch_beyond_the_window_is_padding_when_replayed() -> None:
    """The cursor is on the device: a recorded step that runs too often reads nothing that is not there."""
    backend, out, state, index = NumbaBackend(1), np.ones((3, 2)), np.zeros(64), np.arange(4)
    source = np.full((4, 2), 7.0)
    run = backend.record(lambda: backend.gather(out, source, index, state))
    run()
    assert (out == 7).all()
    state[2] = 1  # CURSOR: rows 3 to 5 of 4
    run()
    assert not out.any()
