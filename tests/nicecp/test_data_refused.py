"""Data files that cannot be used: what is refused, and in which words."""

from __future__ import annotations

import fcntl
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import probe
from nicecp.data import check_finite, column_stats, open_source, open_splits
from nicecp.errors import DataError
from nicecp.store import Tree, write_tree
from tests.data_files import LABELS, TABLE, maker, refused


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    return maker(tmp_path)


# --- bad files ------------------------------------------------------------------------------------------


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    refused(tmp_path / "nope.h5", "nope.h5", "no such file")
    refused(str(tmp_path / "nope.h5") + ":/train", "nope.h5'", "no such file")
    refused("s3://bucket/x.h5", "no such file", "download it first")
    refused(tmp_path, "is a folder")
    refused("a\0b", "cannot be opened")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")
    refused("/dev/null", "not a regular file")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "cannot be opened")
    refused(str(tmp_path / "odd\nname.h5"), "odd\\nname.h5")


def test_files_that_are_not_hdf5(tmp_path: Path, make: Callable[..., str]) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    refused(tmp_path / "x.csv", "not an HDF5 file", "nicecp data csv")
    (tmp_path / "empty.h5").write_bytes(b"")
    refused(tmp_path / "empty.h5", "it is empty")
    whole = Path(make(train=np.random.default_rng(0).normal(size=(5000, 3)))).read_bytes()
    for size in (9, 100, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.h5").write_bytes(whole[:size])
        message = refused(tmp_path / "cut.h5")
        assert "truncated" in message or "damaged" in message
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.h5", "the file is truncated")
    (tmp_path / "late.h5").write_bytes(b"\0" * 512 + whole)  # with a user block, which is allowed
    assert open_source(tmp_path / "late.h5").n_rows == 5000


def test_a_checkpoint_is_not_data(tmp_path: Path) -> None:
    write_tree(tmp_path / "run.h5", Tree({"/": {}}, {"/weight": np.zeros((3, 4))}))
    refused(tmp_path / "run.h5", "it is a nicecp checkpoint")


def test_a_file_that_is_being_written(make: Callable[..., str]) -> None:
    path = make(train=TABLE)
    with open(path, "rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        refused(path, "another program is writing it")
    assert open_source(path).n_rows == 60


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (np.array([[b"a", b"b"]]), "strings"),
        (np.array([["a", "b"]], dtype=h5py.string_dtype()), "strings"),
        (np.zeros((4, 3), complex), "complex numbers"),
        (np.zeros((4, 3), [("x", "f4"), ("n", "i4")]), "a compound type"),
        (np.zeros((4, 3), bool), "true/false"),
        (np.zeros((4, 3), np.longdouble), "numbers of 16 bytes"),
        (np.zeros((4, 3), "V5"), "opaque"),
        (np.zeros((0, 3)), "no rows"),
        (np.zeros((4, 0)), "no columns"),
        (np.zeros((4, 1)), "one column"),
        (1.0, "expected rows of columns"),
        (h5py.Empty("f8"), "expected rows of columns"),
    ],
)
@pytest.mark.parametrize("name", ["train", "foo"])
def test_unusable_datasets(make: Callable[..., str], value: Any, problem: str, name: str) -> None:
    path = make(**{name: value})
    refused(f"{path}:/{name}", f"{path}:/{name}", problem)
    refused(path, path)


def test_files_without_any_usable_dataset(make: Callable[..., str]) -> None:
    refused(make(), "it holds no datasets")
    refused(make(train=LABELS), "no usable dataset", "'/train' int64 (60,)")
    refused(make(a=LABELS, b=np.array([[b"x"]])), "'/a' int64 (60,)", "'/b' strings (1, 1)")
    refused(make(train=LABELS) + ":/train", "expected rows of columns, found shape (60,)")


def test_what_is_not_in_the_file_itself_is_not_followed(tmp_path: Path, make: Callable[..., str]) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["train"] = TABLE
    path = make(real__data=TABLE)
    with h5py.File(path, "a") as file:
        file["train"] = h5py.SoftLink("/real/data")
        file["away"] = h5py.ExternalLink("other.h5", "/train")
        file["g"] = h5py.ExternalLink("other.h5", "/")
        layout = h5py.VirtualLayout((60, 3), np.float32)
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "train", (60, 3))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("outside", (2, 2), "f8", external=[("raw.bin", 0, 32)])
    for name in ("train", "away", "g", "g/train"):
        refused(f"{path}:/{name}", "soft or external link")
    refused(f"{path}:/virtual", "virtual dataset")
    refused(f"{path}:/outside", "external storage")
    refused(path, "soft or external link")
    assert open_source(path + ":/real").name.endswith(":/real/data")


def test_links_in_a_circle_end(make: Callable[..., str]) -> None:
    path = make(a__b=TABLE)
    with h5py.File(path, "a") as file:
        file["a/up"] = file["/"]
        file["again"] = file["a/b"]  # the same dataset, which is still only one
    assert open_source(path).n_features == 3


def test_storage_that_cannot_be_trusted(tmp_path: Path) -> None:
    path = str(tmp_path / "x.h5")
    with h5py.File(path, "w") as file:
        file.create_dataset("never", (10, 3), "f8")
        part = file.create_dataset("part", (10, 3), "f8", chunks=(5, 3))
        part[:5] = 1
        file.create_dataset("scale", data=np.arange(30).reshape(10, 3), scaleoffset=0)
        file.create_dataset("huge", (2**20, 2**10), "f8", chunks=(2**17, 2**10))
        file.create_dataset("wide", (2, 2**25), "u1")
        zipped = file.create_dataset("zipped", data=np.ones((10, 3)), compression="gzip")
        offset = zipped.id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * 8)
    refused(path + ":/never", "never written")
    refused(path + ":/part", "only 1 of its 2 chunks were ever written")
    refused(path + ":/scale", "HDF5 filter 6")
    refused(path + ":/huge", "chunks of 1024 MiB are larger than 128 MiB")
    refused(path + ":/zipped", "chunk (0, 0) cannot be unpacked")


def test_flipped_bits_are_refused_or_harmless(
    make: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process alone, which is quick: none of these flips makes HDF5 hang (those that do: test_mutated.py)."""
    monkeypatch.setattr(probe, "_enabled", [False])
    whole = Path(make(train=TABLE, g__test=TABLE)).read_bytes()
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        (tmp_path / "flipped.h5").write_bytes(damaged)
        try:
            with open_splits(tmp_path / "flipped.h5") as splits:
                splits.train.load()
        except DataError as error:
            refusals.append(str(error))
    assert len(refusals) > 20  # most of the file is numbers and gaps
    assert all(message.isprintable() for message in refusals)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("in_file", [True, False])
def test_the_first_value_that_is_not_finite_is_named(tmp_path: Path, bad: float, in_file: bool) -> None:
    values = np.zeros((400_000, 2), np.float32)
    values[399_000, 1] = values[399_001, 0] = bad
    spec: Any = values
    if in_file:
        spec = tmp_path / "x.h5"
        with h5py.File(spec, "w") as file:
            file["train"] = values
            file["train"].attrs["columns"] = ["mass", "charge"]
    column = "column 1 ('charge')" if in_file else "column 1"
    refused(spec, f"row 399000, {column} is {bad}")
    with pytest.raises(DataError, match="row 399000, column 1"):
        open_source(spec).read(398_000, 399_500)
    with pytest.raises(DataError, match="row 399000, column 1"):
        column_stats(open_splits(spec, valid_fraction=0).train)
    assert len(open_source(spec).read(0, 399_000)) == 399_000


def test_reading_a_large_file_takes_the_memory_of_one_block(tmp_path: Path) -> None:
    peaks = []
    for n in (200_000, 800_000):
        with h5py.File(tmp_path / f"{n}.h5", "w") as file:
            file.create_dataset("train", data=np.random.default_rng(0).normal(size=(n, 8)), chunks=(3000, 8))
        with open_splits(tmp_path / f"{n}.h5") as splits:
            tracemalloc.start()
            column_stats(splits.train)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


# --- before training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["valid", "test"])
def test_bad_values_to_validate_or_test_on_are_found_at_once(make: Callable[..., str], role: str) -> None:
    rows = np.random.default_rng(0).normal(size=(3000, 4))
    bad = rows.copy()
    bad[2500, 2] = np.inf
    with open_splits(make(train=rows, **{role: bad})) as splits, pytest.raises(DataError, match=f"/{role}.*row 2500"):
        check_finite(splits)
    with open_splits(make(train=rows, **{role: rows})) as splits:
        check_finite(splits)


@pytest.mark.parametrize("name", ["test", "valid", "x_test"])
def test_the_only_dataset_plays_one_part(make: Callable[..., str], name: str) -> None:
    """As `nicecp data idx t10k-images...` makes it: trained on, and therefore not tested on."""
    with open_splits(make(**{name: np.random.default_rng(0).normal(size=(60, 4))})) as splits:
        assert splits.train.source.name.endswith(f":/{name}")
        assert splits.test is None
        assert splits.valid is not None
        assert (len(splits.train), len(splits.valid)) == (50, 10)
        assert splits.valid.source is splits.train.source
