"""From data to a trained flow and its score: preprocessing, dtype, files, and what is refused, changing nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import fit
from nicecp.errors import DataError, TrainingError
from nicecp.evaluate import Evaluator, evaluate
from nicecp.flow import NICE
from nicecp.kernels.backend import Backend, Purpose
from nicecp.optimizers import AdaM
from nicecp.preprocessing import Dequantize, Standardize, Step
from nicecp.sources import ArraySource
from nicecp.split import Split
from tests import gates, oracle
from tests.mutants import Mutant

TABLE = np.random.default_rng(1).normal(size=(90, 4)) * [1, 2, 3, 4] + [5, 0, 0, -5]
IMAGES = np.random.default_rng(2).integers(0, 256, (90, 4), np.uint8)
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 25, "patience": None}


def small(**options: Any) -> NICE:
    return NICE(4, (5,), 3, threads=1, **options)


def state_of(flow: NICE) -> dict[str, Any]:
    """Everything about a flow that a refused fit must not touch."""
    steps = [(s.kind, s.attrs(), {name: v.tolist() for name, v in s.arrays().items()}) for s in flow.preprocessing]
    parameters = {name: value.tolist() for name, value in flow.parameters().items()}
    return {"spec": flow.spec, "steps": steps, "info": flow.info, "parameters": parameters, "repr": repr(flow)}


# --- dtype and preprocessing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "dtype", "expected"),
    [
        (IMAGES, "auto", "float32"),
        (TABLE, "auto", "float64"),
        (TABLE.astype(np.float32), "auto", "float64"),
        (IMAGES, "float64", "float64"),
        (TABLE, "float32", "float32"),
    ],
)
def test_dtype(data: np.ndarray, dtype: str, expected: str) -> None:
    flow = small(dtype=dtype)
    record = fit(flow, data, **QUICK)
    assert flow.dtype == expected
    assert all(value.dtype == expected for value in flow.parameters().values())
    assert len(record.history) == record.epoch == 2
    fit(flow, data, **QUICK)  # and it is settled
    assert flow.dtype == expected


def test_dtype_is_settled_by_the_first_data() -> None:
    flow = small()
    fit(flow, IMAGES, **QUICK)
    before = state_of(flow)
    with pytest.raises(DataError, match="8-bit"):
        fit(flow, TABLE, **QUICK)
    assert state_of(flow) == before


def test_preprocessing_is_chosen_by_the_data() -> None:
    images, table = small(), small()
    fit(images, IMAGES, value_range=(-1, 1), **QUICK)
    assert [(step.kind, step.attrs()) for step in images.preprocessing] == [
        ("dequantize", {"low": -1, "high": 1, "levels": 256})
    ]
    fit(table, TABLE, valid_fraction=0, **QUICK)
    (step,) = table.preprocessing
    assert isinstance(step, Standardize)
    np.testing.assert_allclose(step.mean, TABLE.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(step.std, TABLE.std(axis=0), rtol=1e-12)
    plain = small()
    fit(plain, TABLE, standardize=False, **QUICK)
    assert plain.preprocessing == ()


@pytest.mark.parametrize(
    ("data", "given", "says"),
    [(IMAGES, {"standardize": False}, "standardize out"), (TABLE, {"value_range": (-1.0, 1.0)}, "value_range out")],
)
def test_arguments_that_would_have_no_effect_are_refused(data: np.ndarray, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit(small(), data, **QUICK, **given)
    fit(small(), TABLE, logit=0.1, value_range=(-99.0, 99.0), **QUICK)


def test_a_flow_keeps_preprocessing_of_its_own() -> None:
    own = Standardize(np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0]))
    flow = small(preprocessing=(own,))
    fit(flow, TABLE, **QUICK)
    assert flow.preprocessing == (own,)
    assert flow.dtype == np.float64
    flow = small(preprocessing=(Dequantize(-3, 4),))
    fit(flow, IMAGES, value_range=(0, 1), **QUICK)
    assert flow.preprocessing == (Dequantize(-3, 4),)
    assert flow.dtype == np.float32

    flow = small()
    fit(flow, TABLE, **QUICK)
    first = flow.preprocessing
    fit(flow, TABLE * 7, **QUICK)  # training goes on in the same space
    assert flow.preprocessing == first


@pytest.mark.parametrize(
    ("preprocessing", "data", "says"),
    [
        ((Standardize(np.zeros(4), np.ones(4)),), IMAGES, "8-bit data, but the flow was trained on float data"),
        ((Dequantize(),), TABLE, "float64 data, but the flow was trained on 8-bit data"),
        ((Dequantize(),), IMAGES[:, :3], "3 columns, but the flow has 4"),
        ((), IMAGES[:, :3], "3 columns, but the flow has 4"),
        ((), np.hstack([TABLE, TABLE]), "8 columns, but the flow has 4"),
        ((), np.where(TABLE[3, 2] == TABLE, np.nan, TABLE), "nan"),
        ((), TABLE * [1, 1, 0, 1], "constant columns make the likelihood unbounded: 2"),
    ],
)
def test_data_that_do_not_fit_change_nothing(preprocessing: tuple[Step, ...], data: np.ndarray, says: str) -> None:
    flow = small(preprocessing=preprocessing)
    before = state_of(flow)
    with pytest.raises(DataError, match=says):
        fit(flow, data, **QUICK)
    assert state_of(flow) == before
    eight_bit = preprocessing == (Dequantize(),)
    fit(flow, IMAGES if eight_bit else TABLE, **QUICK)  # it can still be trained on its own kind
    assert flow.dtype == ("float32" if eight_bit else "float64")


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range(seed: int) -> None:
    flow = small()
    before = state_of(flow)
    with pytest.raises(ValueError, match=f"seed must be .*got {seed}"):
        fit(flow, TABLE, seed=seed)
    assert state_of(flow) == before


def test_masked_arrays_are_refused() -> None:
    """np.asarray would bring back the values that their owner had masked."""
    masked: Any = np.ma.masked_less(TABLE, 0.0)
    flow = small()
    for call in (lambda: fit(flow, masked), lambda: ArraySource(masked), lambda: flow.log_prob(masked)):
        with pytest.raises(TypeError, match="mask"):
            call()
    for method in (flow.forward, flow.inverse, flow.grad_log_prob, flow.loss_and_gradients):
        with pytest.raises(TypeError, match="mask"):
            method(np.ma.array(TABLE))  # nothing masked, and still: the next one might be


def test_fitting_learns_and_says_what_it_reached() -> None:
    flow = small(init="he")
    seen: list[int] = []
    look = [lambda record: seen.append(record.epoch)]
    record = fit(flow, TABLE, epochs=30, batch_size=25, optimizer=AdaM(rate=1e-2), callbacks=look)
    assert seen == list(range(1, len(record.history) + 1))
    assert record.history[-1].train_log_likelihood > record.history[0].train_log_likelihood + 0.05
    held = Split.keyed(ArraySource(TABLE), 1 / 6, 0, True, Purpose.VALID_NOISE)
    assert evaluate(flow, held).mean == pytest.approx(record.best_valid_log_likelihood, rel=1e-12)
    assert record.best_valid_log_likelihood == max(row.valid_log_likelihood for row in record.history)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="open descriptors are listed by /proc")
def test_files_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "closed.h5"
    with h5py.File(path, "w") as file:
        file["train"], file["valid"], file["test"] = TABLE, TABLE[:20], TABLE[:20]
        file["other/train"] = np.full((50, 4), 1e200)

    def still_open() -> list[str]:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if link.is_symlink() and "closed.h5" in os.readlink(link)]

    def look(record: Any) -> None:
        opened.extend(still_open())

    opened: list[str] = []
    fit(small(), str(path), callbacks=[look], **QUICK)
    assert opened
    assert still_open() == []
    with pytest.raises(DataError, match="4 columns, but the flow has 5"):
        fit(NICE(5, (5,), 3), str(path))
    assert still_open() == []
    with pytest.raises(TrainingError):
        fit(small(prior="gaussian"), f"{path}:/other/train", standardize=False, allow_constant=True)
    assert still_open() == []

    def fail(record: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(small(), path, callbacks=[fail], **QUICK)
    assert still_open() == []


# --- scores ---------------------------------------------------------------------------------------------------------


def flow_with(steps: tuple[Step, ...], backend: Backend) -> NICE:
    spec = gates.make_spec(4, [(5,), (3,), (4,)])
    return NICE.from_spec(spec, gates.draw_parameters(spec), steps, backend=backend)


FIRST = Standardize(np.array([1.0, 2, 3, 4]), np.array([0.5, 2, 3, 0.25]))
SECOND = Standardize(np.array([0.5, -1, 0, 2]), np.array([3.0, 0.5, 1, 2]))


@pytest.mark.parametrize("steps", [(), (FIRST,), (FIRST, SECOND), (FIRST, SECOND, FIRST)])
def test_evaluation_is_log_prob_for_floats(backend: Backend, steps: tuple[Step, ...]) -> None:
    flow = flow_with(steps, backend)
    expected = flow.log_prob(TABLE[7:])
    evaluator = Evaluator(flow, Split.contiguous(ArraySource(TABLE), 7, 90, Purpose.TEST_NOISE), batch_size=20)
    np.testing.assert_allclose(evaluator.row_log_probs(flow._views, 0, 0), expected, rtol=1e-12)
    got = evaluator.run(flow._views, 0, 0)
    assert (got.rows, got.bits_per_dim) == (83, None)
    assert got.mean == pytest.approx(expected.mean(), rel=1e-12)
    assert got.standard_error == pytest.approx(expected.std(ddof=1) / np.sqrt(83), rel=1e-12)
    assert got.minimum == pytest.approx(expected.min(), rel=1e-12)


@pytest.mark.parametrize("steps", [(Dequantize(),), (Dequantize(-2, 3), FIRST), (Dequantize(0, 255), FIRST, SECOND)])
def test_evaluation_is_log_prob_of_the_dequantized_points(backend: Backend, steps: tuple[Any, ...]) -> None:
    """The noise is that of the row, the seed, the purpose and the epoch: drawn anew for every epoch, and repeatable."""
    flow, seed, first = flow_with(steps, backend), 2**40 + 3, 11
    split = Split.contiguous(ArraySource(IMAGES), first, 90, Purpose.TEST_NOISE)
    low, high = steps[0].low, steps[0].high
    means = []
    for epoch in (0, 1, 1, 300):
        bits = oracle.uniform_bits(seed, Purpose.TEST_NOISE, epoch, np.arange(first, 90), 4)
        x = low + (high - low) * (65536 * IMAGES[first:].astype(float) + bits) / 2**24
        expected = flow.log_prob(x)
        got = Evaluator(flow, split, batch_size=20).row_log_probs(flow._views, seed, epoch)
        np.testing.assert_allclose(got, expected, rtol=1e-12)
        result = evaluate(flow, split, seed, epoch)
        assert result.mean == pytest.approx(expected.mean(), rel=1e-12)
        bits_per_dim = -(expected.mean() - 4 * np.log(256 / (high - low))) / (4 * np.log(2))
        assert result.bits_per_dim == pytest.approx(bits_per_dim, rel=1e-12)
        means.append(result.mean)
    assert means[1] == means[2]
    assert len(set(means)) == 3


def test_products_run_within_the_threads_that_were_asked_for(one_backend: Backend) -> None:
    inside: list[bool] = [False]
    seen: list[bool] = []

    @contextmanager
    def computing(original: Any) -> Iterator[None]:
        inside[0] = True
        with original():
            yield
        inside[0] = False

    def dense_forward(original: Any, *args: Any) -> None:
        seen.append(inside[0])
        original(*args)

    spied: Any = Mutant(one_backend, computing=computing, dense_forward=dense_forward)
    flow = flow_with((), spied)
    calls: tuple[Any, ...] = (
        lambda: fit(flow, TABLE, **QUICK),
        lambda: evaluate(flow, Split.contiguous(ArraySource(TABLE), 0, 90, Purpose.TEST_NOISE)),
        *(lambda name=name: getattr(flow, name)(TABLE) for name in ("log_prob", "grad_log_prob", "forward", "inverse")),
        lambda: flow.sample(3, 1),
        lambda: flow.loss_and_gradients(TABLE),
    )
    for call in calls:
        seen.clear()
        flow._few = 0  # else log_prob scores these rows one by one, without the backend
        call()
        assert seen
        assert all(seen)


# --- overflow -------------------------------------------------------------------------------------------------------


def overflowing(dtype: str) -> NICE:
    """Rows with a huge first column overflow in the first coupling: infinity less infinity."""
    flow = NICE(4, (2,), 3, dtype=dtype, threads=1)
    parameters = {name: np.zeros_like(value) for name, value in flow.parameters().items()}
    large = np.sqrt(np.finfo(dtype).max) * 100
    parameters["couplings/0/layers/0/weight"][0] = large
    parameters["couplings/0/layers/1/weight"][:] = [[1], [-1]]
    flow.set_parameters(parameters)
    return flow


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_on_which_the_network_overflows_are_named(dtype: str) -> None:
    flow, x = overflowing(dtype), TABLE.copy()
    fine = flow.log_prob(x)
    assert np.isfinite(fine).all()
    x[41, 0] = np.sqrt(np.finfo(dtype).max)
    x[40, 1] = np.nan  # a row that is not finite is no mistake
    for method in (flow.log_prob, flow.grad_log_prob):
        with pytest.raises(FloatingPointError, match=rf"^{method.__name__} of row 41 "):
            method(x)
        with pytest.raises(FloatingPointError, match="row 1500 "):
            method(np.concatenate([np.tile(TABLE, (20, 1))[:1500], x[41:]]))
    x[40] = 0
    source = ArraySource(x, "rows.h5")
    with pytest.raises(DataError, match=r"^'rows.h5': .*row 41 .*; "):
        evaluate(flow, Split.contiguous(source, 30, 90, Purpose.TEST_NOISE))
    x[41, 0] = 0
    held = Split.keyed(source, 0.5, 3, True, Purpose.TEST_NOISE)
    row = int(held.rows_of_block(0)[-2])
    x[row, 0] = np.sqrt(np.finfo(dtype).max)
    with pytest.raises(DataError, match=rf"row {row} "):
        evaluate(flow, held)


def test_a_validation_that_overflows_does_not_end_the_training() -> None:
    flow, x = overflowing("float64"), TABLE[:20].copy()
    x[3, 0] = 1e160
    split = Split.contiguous(ArraySource(x), 0, 20, Purpose.VALID_NOISE)
    assert np.isnan(Evaluator(flow, split).run(flow._views, 0, 1).mean)
