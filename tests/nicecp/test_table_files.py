"""Compound tables, groups of columns, chains, chosen rows and columns, and columns matched by name."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import nicecp
from nicecp import table_files
from nicecp.data import open_source, open_splits
from nicecp.data_spec import DataSpec
from nicecp.errors import DataError
from nicecp.rows import row_range
from nicecp.scoring import score

X = np.random.default_rng(0).normal(size=(500, 3))
NAMES = ("mass", "phi", "n")


def records(x: np.ndarray = X) -> np.ndarray:
    """Four fields, the last of text."""
    table = np.zeros(len(x), [("mass", "f8"), ("phi", "f4"), ("n", "i4"), ("label", "S5")])
    table["mass"], table["phi"], table["n"] = x[:, 0], x[:, 1], np.round(10 * x[:, 2])
    return table


def expected(x: np.ndarray = X) -> np.ndarray:
    return np.stack([x[:, 0], x[:, 1].astype(np.float32), np.round(10 * x[:, 2])], axis=1)


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    def make(fill: Callable[[h5py.File], Any]) -> str:
        path = tmp_path / "table.h5"
        with h5py.File(path, "w") as f:
            fill(f)
        return str(path)

    return make


def read(spec: Any) -> tuple[np.ndarray, tuple[str, ...] | None]:
    source = open_source(spec)
    try:
        whole = source.read(0, source.n_rows)
        assert np.array_equal(source.read(3, 7), whole[3:7])
        return whole, source.info.columns
    finally:
        source.close()


@pytest.mark.parametrize("storage", [{}, {"chunks": (64,), "compression": "gzip"}, {"chunks": (64,)}])
def test_compound_tables(file: Callable[..., str], storage: dict[str, Any]) -> None:
    path = file(lambda f: f.create_dataset("events", data=records(), **storage))
    whole, columns = read(DataSpec(path, columns="mass,phi,n"))
    assert columns == NAMES
    assert whole.dtype == np.float64
    assert np.array_equal(whole, expected())
    swapped, columns = read(DataSpec(path + ":/events", columns="n,mass"))
    assert columns == ("n", "mass")
    assert np.array_equal(swapped, expected()[:, [2, 0]])
    with pytest.raises(DataError, match=r"'label' holds no numbers.*--columns mass,phi,n"):
        open_source(path)
    with pytest.raises(DataError, match="no column 'charge'"):
        open_source(DataSpec(path, columns="mass,charge"))
    with pytest.raises(DataError, match="named twice"):
        open_source(DataSpec(path, columns="mass,mass"))


def test_single_precision_compounds_stay_so(file: Callable[..., str]) -> None:
    table = np.zeros(10, [("a", "f4"), ("b", "f4")])
    assert read(file(lambda f: f.create_dataset("train", data=table)))[0].dtype == np.float32


def test_hostile_compounds(file: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Short chunks are noticed, as are too many fields; fields that are not used may be anything."""

    def short(f: h5py.File) -> None:
        d = f.create_dataset("events", data=records(), chunks=(100,), compression="gzip")
        d.id.write_direct_chunk((200,), zlib.compress(b"\0" * 50))

    with pytest.raises(DataError, match="unpacks to 50 bytes"):
        read(DataSpec(file(short), columns="mass,phi"))

    monkeypatch.setattr(table_files, "MAX_FIELDS", 3)
    with pytest.raises(DataError, match="4 fields"):
        table_files.CompoundSource(file(lambda f: f.create_dataset("events", data=records())), "/events")
    monkeypatch.undo()

    nan = records()
    nan["phi"][7] = np.nan
    with pytest.raises(DataError, match=r"row 7, column 1 \('phi'\) is nan"):
        read(DataSpec(file(lambda f: f.create_dataset("events", data=nan)), columns="mass,phi"))


@pytest.mark.parametrize("storage", [{}, {"chunks": (64,)}, {"chunks": (64,), "compression": "gzip", "shuffle": True}])
def test_parts_of_varying_length_are_never_read(file: Callable[..., str], storage: dict[str, Any]) -> None:
    """Numbers beside text, lists and references come out whole although the heap of these is ruined."""
    inner = [("k", "i2"), ("v", h5py.vlen_dtype("f8"))]
    kind = [("s", h5py.string_dtype()), ("x", ">f8"), ("v", h5py.vlen_dtype("i4")), ("n", ">i2"), ("in", inner),
            ("r", h5py.ref_dtype), ("h", "f2"), ("f", "f4")]  # fmt: skip

    def fill(f: h5py.File) -> None:
        rows = np.zeros(500, kind)
        rows["x"], rows["n"], rows["h"], rows["f"] = X[:, 0], np.arange(500) - 250, 0.5, X[:, 1]
        for i in range(500):
            rows["s"][i], rows["v"][i], rows["in"]["v"][i] = "x" * (i % 50), np.arange(i % 7, dtype="i4"), np.ones(2)
            rows["r"][i] = f.ref
        f.create_dataset("events", data=rows, **storage)

    path = Path(file(fill))
    data, at = bytearray(path.read_bytes()), -1
    while (at := data.find(b"GCOL", at + 1)) >= 0:
        size = int.from_bytes(data[at + 8 : at + 16], "little")
        data[at : at + size] = b"\xff" * size
    path.write_bytes(data)
    whole, _ = read(DataSpec(str(path), columns="h,n,x,f"))
    want = np.stack([np.full(500, 0.5), np.arange(500) - 250, X[:, 0], X[:, 1].astype(np.float32)], axis=1)
    assert np.array_equal(whole, want)


def columns_of(f: h5py.Group, x: np.ndarray = X) -> None:
    for name, values in zip(NAMES, expected(x).T, strict=True):
        f[name] = values


def test_groups_of_columns(file: Callable[..., str]) -> None:
    def fill(f: h5py.File) -> None:
        columns_of(f.create_group("run/events"))
        f["run/events/mask"] = np.zeros(7)

    path = file(fill)
    whole, columns = read(DataSpec(path + ":/run/events", columns="phi,mass"))
    assert columns == ("phi", "mass")
    assert np.array_equal(whole, expected()[:, [1, 0]])
    with pytest.raises(DataError, match="numbers of rank 2 or more"):
        open_source(path + ":/run/events")  # columns of two lengths
    with pytest.raises(DataError, match=r"'mask' has 7 rows"):
        open_source(DataSpec(path + ":/run/events", columns="mass,mask"))
    with pytest.raises(DataError, match=r"energy.*no such dataset"):
        open_source(DataSpec(path + ":/run/events", columns="mass,energy"))


def test_a_file_of_columns_with_test_rows(file: Callable[..., str]) -> None:
    def fill(f: h5py.File) -> None:
        columns_of(f.create_group("train"))
        columns_of(f.create_group("test"), X[:50])

    path = file(fill)
    with open_splits(path) as splits:
        assert splits.test is not None
        assert len(splits.test) == 50
        assert splits.train.source.info.columns == ("mass", "n", "phi")  # in order of name
    assert open_source(path, "test").n_rows == 50
    root = file(columns_of)
    assert np.array_equal(read(root)[0], expected()[:, [0, 2, 1]])


def test_chains(file: Callable[..., str]) -> None:
    """(steps, walkers, d): burnt, thinned, and flattened step by step; reading any range of rows is the same."""
    chain = np.random.default_rng(1).normal(size=(40, 6, 3))
    path = file(lambda f: f.create_dataset("mcmc/chain", data=chain))
    for burn, thin in ((0, 1), (10, 1), (10, 4), (39, 2), (7, 50)):
        source = open_source(DataSpec(path, burn=burn, thin=thin))  # type: ignore[arg-type]
        want = chain[burn::thin].reshape(-1, 3)
        assert (source.n_rows, source.n_features) == want.shape
        for start, stop in ((0, len(want)), (1, 2), (3, 6), (5, 6), (0, 0)):
            assert np.array_equal(source.read(start, stop), want[start:stop])
    assert open_source(path).n_features == 18  # without: one row per step
    with pytest.raises(DataError, match="nothing is left of its 40 steps"):
        open_source(DataSpec(path, burn="40"))
    picked, columns = read(DataSpec(path, burn="10", columns="2,0", select="12:60"))
    assert columns == ("2", "0")
    assert np.array_equal(picked, chain[10:].reshape(-1, 3)[12:60, [2, 0]])
    assert np.array_equal(read(DataSpec(chain, burn="10"))[0], chain[10:].reshape(-1, 3))
    with pytest.raises(ValueError, match="thin must be a whole number of at least 1"):
        DataSpec(path, thin="0")


def test_chosen_rows_and_columns(file: Callable[..., str]) -> None:
    def fill(f: h5py.File) -> None:
        f["train"], f["test"] = X, X[:60]
        f["train"].attrs["columns"] = f["test"].attrs["columns"] = np.array([b"mass", b"phi", b"n"])

    path = file(fill)
    spec = DataSpec(path, columns="n,mass", select="100:400")
    with open_splits(spec) as splits:
        assert splits.train.source.n_rows == 300
        assert np.array_equal(splits.train.source.read(0, 300), X[100:400][:, [2, 0]])
        assert splits.test is not None
        assert splits.test.source.n_rows == 60  # --select is about the training rows
        assert splits.test.source.info.columns == ("n", "mass")
    assert open_source(spec, "test").n_rows == 60
    assert open_source(DataSpec(path + ":/test", select=":10"), "test").n_rows == 10
    for text, words in (("100:900", "not within its 500 rows"), ("500:", "not within")):
        with pytest.raises(DataError, match=words):
            open_source(DataSpec(path, select=text))
    for text in ("5", "9:3", "a:b", "-5:"):
        with pytest.raises(ValueError, match="not a range of rows"):
            row_range(text)
    with pytest.raises(DataError, match=r"no column 'charge'.*mass, phi, n"):
        open_source(DataSpec(path, columns="mass,charge"))
    context = open_source(DataSpec(path, columns="mass,n", context="phi"))
    assert context.context is not None
    assert np.array_equal(context.context[:, 0], X[:, 1])
    assert context.info.columns == ("mass", "n")


def test_fingerprints_say_what_is_used(file: Callable[..., str]) -> None:
    path = file(lambda f: f.create_dataset("train", data=X))
    specs = [DataSpec(path), DataSpec(path, columns="0,1"), DataSpec(path, columns="1,0"), DataSpec(path, select="1:")]
    assert len({open_source(spec).fingerprint() for spec in specs}) == 4
    assert open_source(DataSpec(path, select="0:500")).fingerprint() == open_source(path).fingerprint()


def test_columns_are_matched_by_name(tmp_path: Path) -> None:
    """Scores of a file with the columns in another order, and more of them; one line where one is missing."""

    def write(name: str, columns: dict[str, np.ndarray]) -> str:
        with h5py.File(tmp_path / name, "w") as f:
            f["data"] = np.stack(list(columns.values()), axis=1)
            f["data"].attrs["columns"] = np.array([column.encode() for column in columns])
        return str(tmp_path / name)

    mass, phi, n = X.T
    trained = write("a.h5", {"mass": mass, "phi": phi + mass, "n": n})
    flow = nicecp.NICE(3, (8,), seed=1)
    nicecp.fit(flow, trained, epochs=1)
    checkpoint = str(tmp_path / "flow.h5")
    flow.save(checkpoint)
    other = write("b.h5", {"n": n, "extra": n**2, "phi": phi + mass, "mass": mass})
    assert score(checkpoint, other).evaluation.mean == pytest.approx(score(checkpoint, trained).evaluation.mean)
    with pytest.raises(DataError, match=r"'phi'.*it has mass, n, theta"):
        score(checkpoint, write("c.h5", {"mass": mass, "n": n, "theta": phi}))
