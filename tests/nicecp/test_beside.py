"""Context and weights of rows: where they come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from nicecp.beside import Beside, DataSpec, checked_context, effective_rows, relative_weights
from nicecp.data import open_source, open_splits
from nicecp.errors import DataError
from nicecp.sources import ArraySource, Source

TABLE = np.random.default_rng(0).normal(size=(60, 5))
CONTEXT = np.random.default_rng(1).normal(size=(60, 2))
WEIGHTS = np.random.default_rng(2).uniform(0.1, 1, 60)


def write(path: Path, **datasets: NDArray[Any]) -> str:
    """A file whose tables have columns a to e."""
    with h5py.File(path, "w") as file:
        for name, values in {"train": TABLE, **datasets}.items():
            file[name] = values
        file.attrs["columns"] = ["a", "b", "c", "d", "e"]
        file.attrs["units"] = np.array([b"m", b"s", b"K", b"kg", b"1"])
    return str(path)


@pytest.fixture
def table(tmp_path: Path) -> str:
    return write(tmp_path / "t.h5", ctx=CONTEXT, w=WEIGHTS)


def beside_of(source: Source) -> tuple[NDArray[Any], NDArray[Any]]:
    assert source.context is not None
    assert source.weight is not None
    return source.context, source.weight


# --- where they come from ------------------------


def test_columns_by_name_and_by_number(table: str, tmp_path: Path) -> None:
    positive = write(tmp_path / "p.h5", train=np.abs(TABLE))
    with open_splits(DataSpec(positive, "1, a", "e")) as splits:
        source = splits.train.source
        assert (source.n_features, source.info.columns, source.info.units) == (2, ("c", "d"), ("K", "kg"))
        assert np.array_equal(source.read(3, 60), np.abs(TABLE)[3:, [2, 3]])
        assert source.read(3, 9).flags.c_contiguous
        context, weight = beside_of(source)
        assert np.array_equal(context, np.abs(TABLE)[:, [1, 0]])
        assert source.context_names == ("b", "a")
        np.testing.assert_allclose(weight / weight[0], np.abs(TABLE)[:, 4] / abs(TABLE[0, 4]), rtol=1e-14)
    unnamed = open_source(DataSpec(np.abs(TABLE), "3", "0"))
    assert np.array_equal(unnamed.read(0, 60), np.abs(TABLE)[:, [1, 2, 4]])
    assert unnamed.context_names is None


@pytest.mark.parametrize("named", [False, True])
def test_datasets_beside_the_table(table: str, tmp_path: Path, named: bool) -> None:
    file = table if named else ""
    separator = ":" if named else ""
    with open_splits(DataSpec(table, f"{file}{separator}/ctx", f"{file}{separator}/w")) as splits:
        source = splits.train.source
        context, weight = beside_of(source)
        assert (source.n_features, source.context_names) == (5, None)
        assert np.array_equal(context, CONTEXT)
        np.testing.assert_allclose(weight, WEIGHTS / WEIGHTS.mean(), rtol=1e-14)
    elsewhere = write(tmp_path / "other.h5", v=CONTEXT[:, 0])
    with open_splits(DataSpec(TABLE, f"{elsewhere}:/v")) as splits:
        assert splits.train.source.context is not None
        assert np.array_equal(splits.train.source.context, CONTEXT[:, :1])


def test_names_of_a_dataset_s_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "t.h5", ctx=CONTEXT)
    with h5py.File(path, "a") as file:
        file["ctx"].attrs["columns"] = ["mass", "spin"]
    source = open_source(DataSpec(path, "/ctx"))
    source.close()
    assert source.context_names == ("mass", "spin")


def test_valid_and_test_rows_have_datasets_of_their_own(tmp_path: Path) -> None:
    parts = {"valid": TABLE[:7], "test": TABLE[:9], "ctx_valid": CONTEXT[:7] + 1, "ctx_test": CONTEXT[:9] + 2}
    path = write(tmp_path / "t.h5", ctx=CONTEXT, **parts)
    with open_splits(DataSpec(path, "/ctx")) as splits:
        for split, shift, rows in ((splits.train, 0, 60), (splits.valid, 1, 7), (splits.test, 2, 9)):
            assert split is not None
            assert split.source.context is not None
            assert np.array_equal(split.source.context, CONTEXT[:rows] + shift)
    with open_splits(DataSpec(path, "a")) as splits:
        assert splits.test is not None
        assert splits.test.source.context is not None
        assert np.array_equal(splits.test.source.context, TABLE[:9, :1]), "columns are those of each dataset"
    lonely = write(tmp_path / "l.h5", test=TABLE[:9], ctx=CONTEXT)
    with pytest.raises(DataError, match=r"60 rows for 9 rows .*/test'; store what belongs to these as '/ctx_test'"):
        open_splits(DataSpec(lonely, "/ctx"))
    named = write(tmp_path / "n.h5", test=TABLE[:9], train_ctx=CONTEXT, test_ctx=CONTEXT[:9] * 3)
    source = open_source(DataSpec(named, "/train_ctx"), "test")
    source.close()
    assert source.context is not None
    assert np.array_equal(source.context, CONTEXT[:9] * 3)


def test_arrays(table: str) -> None:
    source = open_source(DataSpec(TABLE, CONTEXT[:, 0], WEIGHTS[:, None]))
    context, weight = beside_of(source)
    assert context.shape == (60, 1)
    assert weight.shape == (60,)
    assert open_source(DataSpec(TABLE)).context is None
    with open_splits(DataSpec(table, CONTEXT)) as splits:
        assert splits.train.source.context is not None


def test_fingerprints_follow_context_weights_and_columns() -> None:
    def of(*given: Any) -> str:
        return open_source(DataSpec(TABLE, *given)).fingerprint()

    seen = {of(), of(CONTEXT), of(CONTEXT + 1e-12), of(CONTEXT, WEIGHTS), of(None, WEIGHTS), of("0"), of("1"),
            of(CONTEXT[:, :1]), of(None, WEIGHTS**2)}  # fmt: skip
    assert len(seen) == 9
    assert of() == ArraySource(TABLE).fingerprint(), "plain data keep theirs"
    assert of(CONTEXT, WEIGHTS) == of(CONTEXT, 4 * WEIGHTS)


# --- what is refused ------------------------


@pytest.mark.parametrize(
    ("context", "weights", "says"),
    [
        ("x", None, r"no column 'x' for --context; its columns are a, b, c, d, e"),
        ("5", None, r"no column '5' for --context"),
        ("a,a", None, r"column 'a' is named twice for --context"),
        ("a,", None, r"no column '' for --context"),
        ("a,b", "b", r"column 'b' cannot be context and weights at once"),
        (None, "a,b", r"--weights names 2 columns"),
        ("a,b", "c,d", r"--weights names 2 columns"),
        ("a,b,c,d", None, r"it has one column"),
        ("/nothing", None, r"t.h5:/nothing': no such dataset"),
        ("/short", None, r"t.h5:/short': context of 59 rows for 60 rows of .*t.h5:/train'"),
        (None, "/short", r"t.h5:/short': weights of 59 rows"),
        (None, "/ctx", r"t.h5:/ctx': weights are one number for each row, got shape \(60, 2\)"),
        ("/nan", None, r"t.h5:/nan': row 7, column 1 is nan"),
        (None, "/wnan", r"t.h5:/wnan': row 3, column 0 is nan"),
        (None, "a", r"the weight of row 5 is -1 \(rows"),
        (None, "/zero", r"t.h5:/zero': the weights of all 60 rows are 0"),
        ("/text", None, r"it holds strings"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, context: Any, weights: Any, says: str) -> None:
    bad, table = CONTEXT.copy(), np.abs(TABLE)
    bad[7, 1], table[5, 0] = np.nan, -1
    missing = np.where(np.arange(60) == 3, np.nan, WEIGHTS)
    path = write(tmp_path / "t.h5", train=table, ctx=CONTEXT, short=CONTEXT[:59, 0], nan=bad, wnan=missing,
                 zero=np.zeros(60), text=np.array([b"a"] * 60))  # fmt: skip
    with pytest.raises(DataError, match=says) as caught:
        open_splits(DataSpec(path, context, weights))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [-1e-9, np.nan, np.inf])
def test_bad_weights_are_named(bad: float) -> None:
    weights = WEIGHTS.copy()
    weights[17] = bad
    with pytest.raises(DataError, match=rf"'weights': the weight of row 17 is {bad:g} "):
        relative_weights(weights, 60, "weights")


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(TypeError, match="array of bool"):
        relative_weights(WEIGHTS > 0.5, 60, "weights")
    with pytest.raises(TypeError, match="masked"):
        checked_context(np.ma.masked_array(CONTEXT), 60, "context")
    with pytest.raises(DataError, match="rows of one or more columns"):
        checked_context(np.zeros((60, 0)), 60, "context")
    with pytest.raises(DataError, match="1 names for 2 columns"):
        Beside(ArraySource(TABLE), CONTEXT, context_names=["a"])
    with pytest.raises(DataError, match="no dataset of a file is named"):
        open_source(DataSpec(TABLE, "/ctx"))


# --- weights ------------------------


def test_relative_weights_do_not_know_their_scale() -> None:
    weights = WEIGHTS.copy()
    weights[:5] = 0
    relative = relative_weights(weights, 60, "w")
    assert relative[5:].mean() == pytest.approx(1, rel=1e-14)
    assert not relative[:5].any()
    for scale in (2.0**-1000, 2.0**900, 4096):
        assert np.array_equal(relative_weights(weights * scale, 60, "w"), relative)
    np.testing.assert_allclose(relative_weights(weights * 3e-7, 60, "w"), relative, rtol=1e-15)
    assert np.array_equal(weights[5:], WEIGHTS[5:]), "the caller's array is not changed"


def test_effective_rows() -> None:
    assert effective_rows(np.ones(50)) == pytest.approx(50)
    assert effective_rows(np.array([1.0, 0, 0])) == 1
    assert effective_rows(np.array([1.0, 1, 2])) == pytest.approx(16 / 6)
    assert effective_rows(np.zeros(3)) == 0
