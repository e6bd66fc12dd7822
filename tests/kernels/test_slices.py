"""Calls in parts over several threads: the same numbers, every row's update once, and no thread ahead of another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nicecp import train
from nicecp.flow import NICE
from nicecp.kernels import numba_backend, numba_calls
from nicecp.kernels.backend import Purpose, Slot
from nicecp.kernels.numba_backend import NumbaBackend
from nicecp.kernels.tape import Field, Op, Range, Tape, span
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer
from tests.kernels import checks


@pytest.fixture(params=[2, 3])
def slicing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NumbaBackend:
    """A backend that cuts calls of any size into parts, and has a thread for each part."""
    for least in ("_SLICED_PRODUCT", "_SLICED_UPDATE", "_SLICED_ROWS"):
        monkeypatch.setattr(numba_backend, least, 0)
    monkeypatch.setattr(numba_calls, "_CREW_WORK", 0)
    return NumbaBackend(request.param)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "i", "o"), [(1, 33, 40), (31, 40, 1), (7, 1, 33), (33, 100, 65)])
@pytest.mark.parametrize("relu", [False, True])
def test_layers_in_parts_agree_with_the_oracle(
    slicing: NumbaBackend, dtype: str, n: int, i: int, o: int, relu: bool
) -> None:
    with slicing.computing():
        checks.check_dense_forward(slicing, dtype, n, i, o, relu)
        checks.check_dense_backward(slicing, dtype, n, i, o, relu, (True, True, True))
        checks.check_dense_backward(slicing, dtype, n, i, o, relu, (True, False, False))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "d"), [(1, 2), (5, 3), (33, 300)])
def test_borders_in_parts_agree_with_the_oracle(slicing: NumbaBackend, dtype: str, n: int, d: int) -> None:
    checks.check_load_batch(slicing, dtype, np.uint8, n, d)
    checks.check_load_batch(slicing, dtype, np.float32, n, d)
    checks.check_logit(slicing, dtype, n, d, 0.01, first=False)
    checks.check_load_batch(slicing, dtype, np.uint8, n, d, partition="random")
    checks.check_load_batch(slicing, dtype, np.float64, n, d, partition="random")
    checks.check_permute(slicing, dtype, n, d)
    checks.check_couple(slicing, dtype, n, d, -1, True)
    for law in ("multiplicative", "affine"):
        checks.check_factor_forward(slicing, dtype, n, d, law, -1)
        checks.check_factor_backward(slicing, dtype, n, d, law, aliased=True)
    checks.check_spline_forward(slicing, dtype, n, d, -1, first=False)
    checks.check_spline_backward(slicing, dtype, n, d, aliased=True)
    for prior in ("gaussian", "logistic"):
        checks.check_scale_prior_forward(slicing, dtype, n, d, prior, True)
        checks.check_scale_prior_backward(slicing, dtype, n, d, prior, True)
    checks.check_scale_inverse(slicing, dtype, n, d, True)


def test_every_row_is_ready_once_and_complete(slicing: NumbaBackend) -> None:
    rng = np.random.default_rng(0)
    n, i, o = 5, 100, 7
    x, w, dy, y = (rng.normal(size=shape) for shape in ((n, i), (i, o), (n, o), (n, o)))
    dx, dw, db = np.empty((n, i)), np.full((i, o), np.nan), np.empty(o)
    seen, expected = np.zeros(i, int), x.T @ dy

    def ready(start: int, stop: int) -> None:
        np.testing.assert_allclose(dw[start:stop], expected[start:stop], rtol=1e-12)
        seen[start:stop] += 1

    slicing.dense_backward(dx, dw, db, dy, y, x, w, False, ready)
    assert (seen == 1).all()
    seen[:] = 0
    recorded: list[tuple[int, int]] = []

    def step() -> None:
        for _ in range(2):
            slicing.dense_backward(dx, dw, db, dy, y, x, w, False, lambda a, b: recorded.append((a, b)))
            told.append(len(recorded))

    told: list[int] = []
    slicing.record(step)
    for start, stop in recorded:
        seen[start:stop] += 1
    assert (seen == 2).all()
    parts = len(recorded) // 2
    assert told == [-(-parts // 2), parts + -(-parts // 2)], "odd parts wait for the next call"


D = 40  # so that rows of the first layer's weights, the last ones to be updated, are cut into parts as well


def trained(
    backend: NumbaBackend, by_layer: int, monkeypatch: pytest.MonkeyPatch, bad_row: bool = False
) -> dict[str, np.ndarray]:
    data = np.random.default_rng(1).normal(size=(256, D))
    if bad_row:
        data[17] = 1e308
    monkeypatch.setattr(train, "UPDATE_BY_LAYER", by_layer)
    flow = NICE(D, (40, 36), 3, init="he", seed=3, threads=1)
    flow = NICE.from_spec(flow.spec, flow.parameters(), backend=backend)
    split = Split.contiguous(ArraySource(data), 0, len(data), Purpose.TRAIN_NOISE)
    with np.errstate(all="ignore"):
        trainer = Trainer(flow, split, None, TrainConfig(epochs=3, batch_size=32))
        trainer.run()
    assert trainer.state[Slot.SKIPPED] == (3 if bad_row else 0)
    return flow.parameters()


@pytest.mark.parametrize("bad_row", [False, True])
@pytest.mark.parametrize("by_layer", [0, 2**40])
def test_training_in_parts_is_training(
    slicing: NumbaBackend, by_layer: int, bad_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed by several threads, some updates put off to the next layer, against one thread and one update."""
    results = [
        trained(backend, by, monkeypatch, bad_row) for backend, by in ((slicing, by_layer), (NumbaBackend(1), 2**40))
    ]
    fresh = NICE(D, (40, 36), 3, init="he", seed=3, threads=1).parameters()
    for name, values in results[0].items():
        np.testing.assert_allclose(values, results[1][name], rtol=0, atol=1e-11, err_msg=name)
        assert np.abs(values - fresh[name]).max() > 1e-4, f"{name} was not trained"


def test_the_number_of_threads_at_work_does_not_show(slicing: NumbaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are cut for the backend's threads: fewer of them, when others are busy, give the same bits."""
    whole = trained(slicing, 0, monkeypatch)
    monkeypatch.setattr(slicing._crew, "threads", 1)
    alone = trained(slicing, 0, monkeypatch)
    for name, values in whole.items():
        assert values.tobytes() == alone[name].tobytes(), name


# --- the tape ---------------------------------------------------------------------------------------------------------


def barriers(*calls: Callable[[Tape], None]) -> int:
    tape = Tape()
    for call in calls:
        call(tape)
    return int((tape.finish()[:, Field.OP] == Op.BARRIER).sum())


def test_a_barrier_stands_where_threads_meet() -> None:
    a, b = np.zeros(100), np.zeros(100)

    def call(writes: list[tuple[int, int, int]], reads: list[tuple[int, int, int]]) -> Callable[[Tape], None]:
        return lambda tape: tape.add(Op.COUPLE, Range(100), (a,), (), (), writes, reads)

    everyone, mine, other = span(a), span(a, 0), span(a, 1)
    assert barriers(call([everyone], []), call([span(b)], [everyone])) == 1, "read after write"
    assert barriers(call([], [everyone]), call([everyone], [])) == 1, "write after read"
    assert barriers(call([everyone], []), call([everyone], [])) == 1, "write after write"
    assert barriers(call([], [everyone]), call([], [everyone])) == 0, "two readers"
    assert barriers(call([everyone], []), call([span(b)], [])) == 0, "other arrays"
    assert barriers(call([mine], []), call([mine], [])) == 0, "the same thread"
    assert barriers(call([mine], []), call([], [other])) == 1, "another thread"
    assert barriers(call([span(a[:50])], []), call([], [span(a[50:])])) == 0, "neighbours"
    assert barriers(call([span(a[:51])], []), call([], [span(a[50:])])) == 1, "one number in common"
    assert barriers(call([everyone], []), call([], [everyone]), call([], [everyone])) == 1, "once is enough"


def test_arrays_that_compiled_code_would_misread_are_refused() -> None:
    backend = NumbaBackend(1)
    x = np.zeros((4, 6))
    with pytest.raises(ValueError, match="C-contiguous"):
        backend.couple(x.T, x.T, x.T, 1)
    with pytest.raises(ValueError, match="one tape has one dtype: float32 beside float64"):
        backend.couple(x, x, x.astype(np.float32), 1)
    half, index, state = np.zeros((4, 6), np.float16), np.zeros(4, np.int64), np.zeros(64)
    halves, ones = (np.zeros((4, 3)), np.zeros((4, 3))), np.ones(6)
    with pytest.raises(ValueError, match="uint8, float32 or float64"):
        backend.load_batch(*halves, np.zeros(4), half, index, index, np.arange(6), ones, ones, state, 0, 0)
    for order in (np.arange(5), np.arange(1, 7), np.zeros(6, np.int64), np.arange(6.0)):
        with pytest.raises(ValueError, match=r"order must be a permutation of 0..5 as int64"):
            backend.split(*halves, x, order)
        with pytest.raises(ValueError, match=r"order must be a permutation|columns cannot go from"):
            backend.permute(np.zeros((4, 3)), np.zeros((4, 3)), *halves, order)
    for wrong in ((np.zeros((4, 2)), np.zeros((4, 4))), (np.zeros((3, 3)), np.zeros((4, 3)))):
        with pytest.raises(ValueError, match=r"6 columns cannot go from \(4, 3\) and \(4, 3\) to"):
            backend.permute(*wrong, *halves, np.arange(6))
        with pytest.raises(ValueError, match=r"6 columns cannot go from"):
            backend.permute(*halves, *wrong, np.arange(6))


def test_calls_of_a_permutation_wait_for_each_other() -> None:
    """What it reads and writes is declared: between calls that share halves there is a barrier, else none."""
    backend, index = NumbaBackend(2), np.array([3, 1, 0, 2])
    a, b, c = ((np.zeros((5, 2)), np.zeros((5, 2))) for _ in range(3))

    def recorded(*calls: tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]) -> int:
        tape = backend.write_down(lambda: [backend.permute(*y, *x, index) for y, x in calls] and None)
        return int((tape.finish()[:, Field.OP] == Op.BARRIER).sum())

    assert recorded((b, a), (c, a)) == 0, "two readers"
    assert recorded((b, a), (c, b)) == recorded((b, a), (a, c)) == recorded((b, a), (b, c)) == 1
    assert recorded(((b[0], c[1]), a), (c, (a[0], b[1]))) == 1, "the second halves alone"


def test_what_cannot_be_recorded_is_refused() -> None:
    backend, x = NumbaBackend(1), np.zeros((4, 6))
    with pytest.raises(RuntimeError, match="random numbers are not recorded"):
        backend.record(lambda: backend.fill_uniform(x, 0, 0, 0))
    with pytest.raises(RuntimeError, match="already"):
        backend.record(lambda: backend.record(lambda: None))  # type: ignore[arg-type, return-value]
    backend.fill_uniform(x, 0, 0, 0)  # an error ends the recording
    assert x.any()


def test_a_batch_beyond_the_window_is_padding_when_replayed() -> None:
    """The cursor is on the device: a recorded step that runs too often reads nothing that is not there."""
    backend, data = NumbaBackend(1), np.full((4, 2), 7.0)
    (x0, x1), weight, state = (np.ones((3, 1)), np.ones((3, 1))), np.ones(3), np.zeros(64)
    index = np.arange(4)
    load = backend.record(
        lambda: backend.load_batch(
            x0, x1, weight, data, index, index, np.arange(2), np.zeros(2), np.ones(2), state, 0, 0
        )
    )
    load()
    assert (x0 == 7).all()
    assert (weight == 1).all()
    state[2] = 1  # CURSOR: rows 3 to 5 of 4
    load()
    assert not np.concatenate([x0[:, 0], x1[:, 0], weight]).any()
