"""Products in slices over several threads: the same numbers, and every row's update exactly once."""

from __future__ import annotations

import numpy as np
import pytest

from nicecp import train
from nicecp.flow import NICE
from nicecp.kernels import numba_backend
from nicecp.kernels.backend import Late, Purpose
from nicecp.kernels.numba_backend import NumbaBackend
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer
from tests.kernels import checks


@pytest.fixture(params=[2, 3])
def slicing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NumbaBackend:
    """A backend that slices products of any size."""
    monkeypatch.setattr(numba_backend, "_SLICED_PRODUCT", 0)
    return NumbaBackend(request.param)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "i", "o"), [(1, 33, 40), (31, 40, 1), (7, 1, 33), (33, 100, 65)])
@pytest.mark.parametrize("relu", [False, True])
def test_sliced_layers_agree_with_the_oracle(
    slicing: NumbaBackend, dtype: str, n: int, i: int, o: int, relu: bool
) -> None:
    with slicing.computing():
        checks.check_dense_forward(slicing, dtype, n, i, o, relu)
        checks.check_dense_backward(slicing, dtype, n, i, o, relu, (True, True, True))
        checks.check_dense_backward(slicing, dtype, n, i, o, relu, (True, False, False))


def test_every_row_is_ready_once_and_complete(slicing: NumbaBackend) -> None:
    rng = np.random.default_rng(0)
    n, i, o = 5, 100, 7
    x, w, dy, y = (rng.normal(size=shape) for shape in ((n, i), (i, o), (n, o), (n, o)))
    dx, dw, db = np.empty((n, i)), np.full((i, o), np.nan), np.empty(o)
    late: Late = {}
    for turn in range(1, 4):  # what one call puts off, the next one does
        seen = np.zeros(i, int)
        expected = x.T @ dy

        def ready(start: int, stop: int, seen: np.ndarray = seen, expected: np.ndarray = expected) -> None:
            np.testing.assert_allclose(dw[start:stop], expected[start:stop], rtol=1e-12)
            seen[start:stop] += 1

        slicing.dense_backward(dx, dw, db, dy, y, x, w, False, ready, late)
        assert late, turn
        assert seen.max() == 1
        for call in late.values():
            call()
        late.clear()
        assert (seen == 1).all()


def test_training_in_slices_is_training(slicing: NumbaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates by layer and slice, some put off to the next layer, against one update at the end on one thread."""
    data = np.random.default_rng(1).normal(size=(256, 5))
    results = []
    for backend, by_layer in ((slicing, 0), (NumbaBackend(1), 2**40)):
        monkeypatch.setattr(train, "UPDATE_BY_LAYER", by_layer)
        flow = NICE(5, (40, 36), 3, init="he", seed=3, threads=1)
        flow = NICE.from_spec(flow.spec, flow.parameters(), backend=backend)
        split = Split.contiguous(ArraySource(data), 0, len(data), Purpose.TRAIN_NOISE)
        Trainer(flow, split, None, TrainConfig(epochs=3, batch_size=32)).run()
        results.append(flow.parameters())
    fresh = NICE(5, (40, 36), 3, init="he", seed=3, threads=1).parameters()
    for name, values in results[0].items():
        np.testing.assert_allclose(values, results[1][name], rtol=0, atol=1e-11, err_msg=name)
        assert np.abs(values - fresh[name]).max() > 1e-4, f"{name} was not trained"
