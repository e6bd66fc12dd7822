"""Arguments of the wrong kind: refused before anything is done, in words that say what was expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nicecp import NICE, fit
from nicecp.checkpoint import load_run, save_run
from nicecp.describe import describe
from nicecp.records import EpochRecord
from nicecp.testing import check_gradients

TABLE = np.random.default_rng(0).normal(size=(90, 4))

STRUCTURED = np.zeros(90, [(name, float) for name in "abcd"])


def small(**given: Any) -> NICE:
    return NICE(**{"n_features": 4, "hidden": (5,), "n_couplings": 3, **given})


CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: small(seed=None), "seed must be a whole number, got None"),
    (lambda: small(hidden=5), "hidden must be a sequence of layer sizes such as .*, got 5"),
    (lambda: small(hidden="500"), "hidden must be a sequence"),
    (lambda: small(hidden=(5, 2.5)), "a hidden size must be a whole number, got 2.5"),
    (lambda: small(n_features=4.0), "n_features must be a whole number, got 4.0"),
    (lambda: small(n_couplings="3"), "n_couplings must be a whole number, got '3'"),
    (lambda: small(dtype="float"[::-1]), "dtype must be 'auto', 'float32' or 'float64', got 'taolf'"),
    (lambda: small(dtype=None), "dtype must be"),
    (lambda: small().sample("a"), "n must be a whole number, got 'a'"),  # type: ignore[arg-type]
    (lambda: small().sample(3, "a"), "rng .or a Generator. must be a whole number, got 'a'"),  # type: ignore[arg-type]
    (lambda: fit(small(), TABLE, epochs=1.5), "epochs must be a whole number, got 1.5"),  # type: ignore[arg-type]
    (lambda: fit(small(), TABLE, patience=2.5), "patience must be a whole number"),  # type: ignore[arg-type]
    (lambda: fit(small(), TABLE, seed=None), "seed must be a whole number, got None"),  # type: ignore[arg-type]
    (lambda: fit(small(), TABLE, callbacks=[3]), "a callback must be .*, got 3"),  # type: ignore[list-item]
    (lambda: fit(small(), TABLE, callbacks=3), "a callback must be .*, got 3"),  # type: ignore[arg-type]
    (lambda: fit("flow", TABLE), "flow must be a NICE, got 'flow'"),  # type: ignore[arg-type]
    (lambda: fit(TABLE, small()), r"flow must be a NICE, got array\([^\n]{,40}$"),  # type: ignore[arg-type]
    (lambda: fit(small(), TABLE, optimizer="adam"), "optimizer must be an AdaM or RMSProp object, got 'adam'"),  # type: ignore[arg-type]
    (lambda: small().log_prob(STRUCTURED), "structured array: pass numpy.lib.recfunctions.structured_to_unstructured"),
    (lambda: fit(small(), STRUCTURED), "array: .*structured array: pass numpy.lib.recfunctions"),
    (lambda: small().log_prob(TABLE > 0), r"dtype bool: pass x.astype\(float\)"),
    (lambda: small().log_prob(TABLE.astype(object)), "dtype object: pass numbers only"),
    (lambda: fit(small(), TABLE + 0j), "dtype complex128: pass real and imaginary parts"),
    (lambda: small().log_prob([["a"] * 4]), "dtype <U1$"),
    (lambda: check_gradients("flow", TABLE), "flow must be a NICE or a ModelSpec, got 'flow'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "words"), CALLS, ids=[words for _, words in CALLS])
def test_what_was_expected(call: Callable[[], object], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize("dtype", [np.float32, np.dtype("float32"), "float32"])
def test_dtypes_of_numpy(dtype: Any) -> None:
    flow = small(dtype=dtype)
    assert flow.spec.dtype == "float32"
    assert fit(flow, TABLE, epochs=1).epoch == 1
    assert flow.dtype == np.float32  # not open any more
    with pytest.raises(ValueError, match="unknown dtype 'float16'"):
        small(dtype=np.float16)


def test_a_refused_callback_leaves_the_flow_alone() -> None:
    flow = small()
    before = flow.parameters()
    with pytest.raises(TypeError):
        fit(flow, TABLE, epochs=1, callbacks=[print, 3])  # type: ignore[list-item]
    assert flow.preprocessing == ()
    for name, values in flow.parameters().items():
        np.testing.assert_array_equal(values, before[name])


def test_a_single_function_is_a_callback() -> None:
    seen: list[EpochRecord] = []
    record = fit(small(), TABLE, epochs=3, callbacks=seen.append)
    assert seen == record.history
    assert len(seen) == 3


def test_keeping_the_record_of_a_fit(tmp_path: Path) -> None:
    """As fit's docstring says; flow.save alone keeps no record."""
    flow = small()
    record = fit(flow, TABLE, epochs=3, seed=7)
    save_run(tmp_path / "flow.h5", flow, flow.parameters(), record)
    loaded, kept = load_run(tmp_path / "flow.h5")
    assert kept == record
    assert set(record.versions) >= {"nicecp", "numpy", "numba"}
    np.testing.assert_array_equal(loaded.log_prob(TABLE), flow.log_prob(TABLE))
    training = describe(str(tmp_path / "flow.h5"))["training"]
    assert (training["epochs"], training["seed"], len(training["history"])) == (3, 7, 3)
    flow.save(tmp_path / "alone.h5")
    assert describe(str(tmp_path / "alone.h5"))["training"] is None


@pytest.mark.parametrize(
    "change",
    [
        np.ndarray.tolist,
        lambda x: x.astype(">f8"),
        np.asfortranarray,
        lambda x: x.repeat(2, axis=0)[::2],
        lambda x: x[::-1][::-1],
        lambda x: x.astype(np.longdouble),
        pd.DataFrame,
        lambda x: np.frombuffer(x.tobytes()).reshape(90, 4),
    ],
    ids=["list", "big-endian", "Fortran order", "strided", "reversed", "longdouble", "pandas", "read-only"],
)
def test_the_same_numbers_in_another_form(change: Callable[[Any], Any]) -> None:
    flow, same = small(), change(TABLE)
    np.testing.assert_array_equal(flow.log_prob(same), flow.log_prob(TABLE))
    one, other = small(), small()
    fit(one, TABLE, epochs=1)
    fit(other, same, epochs=1)
    np.testing.assert_array_equal(other.log_prob(TABLE), one.log_prob(TABLE))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.int16, np.uint32])
def test_numbers_of_other_types_are_what_they_say(dtype: Any) -> None:
    flow, x = small(), (TABLE * 5 + 20).astype(dtype)
    np.testing.assert_array_equal(flow.log_prob(x), flow.log_prob(x.astype(float)))
    one, other = small(), small()
    fit(one, x, epochs=1)
    fit(other, x.astype(float), epochs=1)
    np.testing.assert_allclose(other.log_prob(TABLE), one.log_prob(TABLE), rtol=1e-6)  # float32 is standardised as read


def test_a_table_of_pandas_keeps_its_names() -> None:
    flow = small()
    fit(flow, pd.DataFrame(TABLE, columns=["a", "b", "c", "d"]), epochs=1)
    assert flow.names == ("a", "b", "c", "d")
    fit(unnamed := small(), pd.DataFrame(TABLE), epochs=1)
    assert unnamed.info.columns is None
    frame = pd.DataFrame(TABLE, columns=["a", "b", "c", "d"])
    frame.loc[3, "c"] = np.nan
    with pytest.raises(ValueError, match=r"row 3, column 2 \('c'\) is nan"):
        fit(small(), frame)


def test_any_of_numpys_generators_may_draw() -> None:
    flow = small()
    np.testing.assert_array_equal(flow.sample(3, np.random.RandomState(5)), flow.sample(3, np.random.RandomState(5)))
    state = np.random.RandomState(5)
    assert np.abs(flow.sample(3, state) - flow.sample(3, state)).max() > 1e-3
