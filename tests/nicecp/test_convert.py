"""Converters: the numbers arrive, bad cells and files are named, and nothing half-written is left."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from nicecp import convert
from nicecp.convert import csv_to_hdf5, idx_to_hdf5, write_demo
from nicecp.csv_text import text_blocks
from nicecp.data import open_source, open_splits
from nicecp.errors import DataError, OutputError


def converted(tmp_path: Path, text: str | bytes, **options: object) -> tuple[list[list[float]], tuple[str, ...] | None]:
    """The numbers and column names that a text becomes, read back as training reads them."""
    source, target = tmp_path / "x.csv", tmp_path / "x.h5"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = csv_to_hdf5(source, target, overwrite=True, **options)  # type: ignore[arg-type]
    data = open_source(target)
    values = data.read(0, data.n_rows)
    data.close()
    assert values.dtype == np.float64
    assert result.shapes == {"train": values.shape}
    assert data.info.columns == result.columns
    return values.tolist(), result.columns


def refused(tmp_path: Path, text: str | bytes, *parts: str, **options: object) -> None:
    """The error of converting a text is one line with these parts, and leaves no output."""
    with pytest.raises(DataError) as caught:
        converted(tmp_path, text, **options)
    assert str(caught.value).isprintable()
    for part in ("x.csv", *parts):
        assert part in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.csv"]


# --- text tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a,b,c\n1,2.5,-3e2\n4,5,6\n",
        "a;b;c\n1;2.5;-3e2\n4;5;6",
        "a\tb\tc\r\n1\t2.5\t-3e2\r\n4\t5\t6\r\n",
        "  a b   c\n 1  2.5 -3e2\n\n4\t5 6\n\n",
        "# made by hand\n# a b c\n1 2.5 -3e2\n# in between\n4 5 6\n",
        '\ufeff"a","b","c"\n"1","2.5","-3e2"\n4,5,6\n',
        "a, b, c\r1, 2.5, -3e2\r4, 5, 6\r",
    ],
)
def test_separators_headers_and_line_ends(tmp_path: Path, text: str) -> None:
    assert converted(tmp_path, text) == ([[1, 2.5, -300], [4, 5, 6]], ("a", "b", "c"))
    assert converted(tmp_path, gzip.compress(text.encode())) == ([[1, 2.5, -300], [4, 5, 6]], ("a", "b", "c"))


def test_tables_without_names(tmp_path: Path) -> None:
    assert converted(tmp_path, "1,2\n3,4\n") == ([[1, 2], [3, 4]], None)
    assert converted(tmp_path, "1,2\n3,4\n", header=True) == ([[3, 4]], ("1", "2"))
    assert converted(tmp_path, "# 5 columns of this\n1,2\n3,4\n") == ([[1, 2], [3, 4]], None)
    assert converted(tmp_path, "1 2\n3 4\n", delimiter=" ") == ([[1, 2], [3, 4]], None)
    assert converted(tmp_path, 'größe,"x, y"\n3,4\n') == ([[3, 4]], ("größe", "x, y"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b\n1,2\n3,x\n", ["line 3, column 2 ('b') is 'x', not a number"]),
        ("1,2\n3,\n", ["line 2, column 2 is empty"]),
        ("1,2\n\n# note\n3,nan\n", ["line 4, column 2 is 'nan', not finite"]),
        ("1,2\n-inf,4\n", ["line 2, column 1 is '-inf', not finite"]),
        ("1,2\n1e999,4\n", ["line 2, column 1 is '1e999', not finite"]),
        ("1,2\n3,1_000\n", ["line 2, column 2 is '1_000', not a number"]),
        ("1,NA\n3,4\n", ["line 1, column 2 is 'NA'", "header"]),
        ("a;b\n1,5;2\n", ["line 2, column 1 ('a') is '1,5'", "decimal points"]),
        ("1,2\n3,4,5\n", ["line 2 has 3 cells where 2 are expected"]),
        ("a b\n1 2\n3\n", ["line 3 has 1 cells where 2 are expected"]),
        ("a\n1\n2\n", ["one column"]),
        ("a,b\n", ["no rows"]),
        ("\n\n", ["no rows"]),
        ("", ["it is empty"]),
        (b"a,b\n1,2\n\xff,3\n", ["line 3 is not UTF-8"]),
        ("a,b\n1,2\n".encode("utf-16"), ["not a text table"]),
        (gzip.compress(b"a,b\n" + b"1,2\n" * 99, mtime=0)[:-9], ["gzip data are truncated"]),
        ("1,2\n3," + "y" * 300 + "\n", ["line 2, column 2", "yyy...'"]),
    ],
)
def test_bad_cells_are_named(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    refused(tmp_path, text, *parts)


def test_bad_lines_far_into_a_file_have_the_right_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "BLOCK_BYTES", 1000)
    lines = ["a,b"] + [f"{i},{i / 7!r}" for i in range(3000)]
    values, _ = converted(tmp_path, "\r\n".join(lines))
    np.testing.assert_array_equal(values, [[i, i / 7] for i in range(3000)])
    (tmp_path / "x.h5").unlink()
    lines[2345] = "1,oops"
    refused(tmp_path, "\n".join(lines), "line 2346, column 2 ('b') is 'oops'")
    lines[2345] = "1,2\xe4"
    refused(tmp_path, "\n".join(lines).encode("latin1"), "line 2346 is not UTF-8")


def test_lines_that_never_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nicecp.csv_text.MAX_LINE", 5000)
    (tmp_path / "x").write_text("1,2\n" + "1" * 20_000)
    with open(tmp_path / "x", "rb") as stream, pytest.raises(DataError, match="line 2 is longer"):
        list(text_blocks("x", stream, 1000))


def test_wide_tables_keep_their_names(tmp_path: Path) -> None:
    names = tuple(f"column number {i}" for i in range(5000))  # more than the 64 KiB of old HDF5 attributes
    values, columns = converted(tmp_path, ",".join(names) + "\n" + ",".join(["0.5"] * 5000) + "\n")
    assert columns == names
    assert values == [[0.5] * 5000]


def test_memory_does_not_grow_with_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_IN_MEMORY", 2**16)
    monkeypatch.setattr(convert, "BLOCK_BYTES", 2**16)
    peaks = []
    for n in (10_000, 80_000):
        (tmp_path / "x.csv").write_text("1.25,3.5,0.125,7\n" * n)
        tracemalloc.start()
        csv_to_hdf5(tmp_path / "x.csv", tmp_path / f"{n}.h5")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        with open_splits(tmp_path / f"{n}.h5", valid_fraction=0) as splits:
            assert len(splits.train) == n
    assert peaks[1] < 1.5 * peaks[0]


# --- outputs ---------------------------------------------------------------------------------------------------


def test_outputs_are_not_overwritten_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2\n3,4\n")
    target = tmp_path / "x.h5"
    target.write_bytes(b"precious")
    with pytest.raises(OutputError, match="already exists"):
        csv_to_hdf5(tmp_path / "x.csv", target)
    with pytest.raises(OutputError, match="already exists"):
        write_demo(target)
    (tmp_path / "bad.csv").write_text("1,2\n3,x\n")
    with pytest.raises(DataError, match="line 2"):
        csv_to_hdf5(tmp_path / "bad.csv", target, overwrite=True)
    with pytest.raises(OutputError, match="it is one of the inputs"):
        csv_to_hdf5(tmp_path / "x.csv", tmp_path / "." / "x.csv", overwrite=True)
    assert target.read_bytes() == b"precious"
    csv_to_hdf5(tmp_path / "x.csv", target, overwrite=True)
    assert open_source(target).n_rows == 2
    with pytest.raises(OutputError, match=r"its folder cannot be written.*make the folder"):
        csv_to_hdf5(tmp_path / "x.csv", tmp_path / "no" / "x.h5")
    (tmp_path / "dir").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        csv_to_hdf5(tmp_path / "x.csv", tmp_path / "dir", overwrite=True)
    with pytest.raises(DataError, match="no such file"):
        csv_to_hdf5(tmp_path / "nope.csv", tmp_path / "y.h5")
    with pytest.raises(ValueError, match="delimiter"):
        csv_to_hdf5(tmp_path / "x.csv", tmp_path / "y.h5", delimiter="|")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv", "dir", "x.csv", "x.h5"]


@pytest.mark.parametrize("in_memory", [1, 2**26])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, in_memory: int) -> None:
    (tmp_path / "x.csv").write_text("1.25,3.5,0.125,7\n" * 40_000)
    (tmp_path / "x.h5").write_bytes(b"precious")
    script = f"""
import resource, signal
from nicecp import convert
from nicecp.errors import OutputError
convert._IN_MEMORY = {in_memory}
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    convert.csv_to_hdf5({str(tmp_path / "x.csv")!r}, {str(tmp_path / "x.h5")!r}, overwrite=True)
except OutputError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "x.h5': cannot be written (" in done.stdout
    assert "File too large" in done.stdout
    assert done.stderr == ""
    assert (tmp_path / "x.h5").read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.csv", "x.h5"]


# --- the demo as a file --------------------------------------------------------------------------------------------


def test_the_demo_file_holds_the_demo(tmp_path: Path) -> None:
    result = write_demo(tmp_path / "demo.h5")
    assert result.shapes["train"] == (12_000, 784)
    with open_splits(tmp_path / "demo.h5") as file, open_splits("demo") as drawn:
        assert file.train.source.info == drawn.train.source.info
        assert file.train.source.fingerprint() == drawn.train.source.fingerprint()
        assert file.valid is not None
        assert drawn.valid is not None
        np.testing.assert_array_equal(file.valid.load()[1], drawn.valid.load()[1])
        assert file.test is not None
        assert drawn.test is not None
        np.testing.assert_array_equal(file.test.load()[0], drawn.test.load()[0])
    with h5py.File(tmp_path / "demo.h5") as raw:
        assert sorted(np.unique(raw["train_labels"][:])) == list(range(10))
        assert len(raw["test_labels"]) == 2_000


# --- idx -------------------------------------------------------------------------------------------------------------


def idx(path: Path, values: NDArray[np.generic], code: int = 0x08, cut: int | None = None, extra: bytes = b"") -> Path:
    data = struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim, *values.shape) + values.tobytes()
    data = data[:cut] + extra
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


IMAGES = np.random.default_rng(0).integers(0, 256, (50, 5, 4), np.uint8)


def test_the_four_files_of_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "BLOCK_BYTES", 77)
    files = [
        idx(tmp_path / "train-images-idx3-ubyte.gz", IMAGES[:40]),
        idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(40, dtype=np.uint8)),
        idx(tmp_path / "t10k-images-idx3-ubyte", IMAGES[40:]),
        idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(10, dtype=np.uint8)),
    ]
    by_name = idx_to_hdf5(files, tmp_path / "a.h5")
    by_folder = idx_to_hdf5(tmp_path, tmp_path / "b.h5")
    expected = {"train": (40, 20), "train_labels": (40,), "test": (10, 20), "test_labels": (10,)}
    assert by_name.shapes == by_folder.shapes == expected
    assert by_name.image_shape == (5, 4)
    for name in ("a.h5", "b.h5"):
        with open_splits(tmp_path / name, valid_fraction=0) as splits:
            assert splits.train.source.info.image_shape == (5, 4)
            np.testing.assert_array_equal(splits.train.load()[0], IMAGES[:40].reshape(40, 20))
            assert splits.test is not None
            np.testing.assert_array_equal(splits.test.load()[0], IMAGES[40:].reshape(10, 20))
        with h5py.File(tmp_path / name) as file:
            np.testing.assert_array_equal(file["train_labels"][:], np.arange(40))


def test_other_types_of_idx(tmp_path: Path) -> None:
    values = np.array([[1.5, -2, 3], [4, 5, 6]], ">f4")
    idx_to_hdf5(idx(tmp_path / "x.idx", values, 0x0D), tmp_path / "x.h5")
    source = open_source(tmp_path / "x.h5")
    assert source.dtype == np.float32
    np.testing.assert_array_equal(source.read(0, 2), values)


def test_bad_idx_files(tmp_path: Path) -> None:
    good = idx(tmp_path / "train-images-idx3-ubyte", IMAGES)
    labels = np.arange(50, dtype=np.uint8)

    def refuse(part: str, *files: Path) -> None:
        with pytest.raises(DataError) as caught:
            idx_to_hdf5(files, tmp_path / "out.h5")
        assert part in str(caught.value)
        assert str(caught.value).isprintable()
        assert not (tmp_path / "out.h5").exists()

    refuse("it ends after 49 of 50 rows", idx(tmp_path / "cut", IMAGES, cut=-1))
    refuse("truncated", idx(tmp_path / "cut", IMAGES, cut=9))
    refuse("not an idx file", idx(tmp_path / "cut", IMAGES, cut=3))
    refuse("longer than its header says", idx(tmp_path / "long", IMAGES, extra=b"x"))
    refuse("not an idx file", idx(tmp_path / "code", IMAGES, code=0x07))
    refuse("no rows", idx(tmp_path / "none", IMAGES[:0]))
    refuse("labels only", idx(tmp_path / "labels", labels))
    refuse("49 labels for 50 images", good, idx(tmp_path / "labels", labels[:49]))
    refuse("are both 'train'", good, idx(tmp_path / "again", IMAGES))
    refuse("its images are (10, 2)", good, idx(tmp_path / "test", IMAGES.reshape(50, 10, 2)))
    refuse("no such file", tmp_path / "nope")
    (tmp_path / "empty").mkdir()
    refuse("the folder has no idx files", tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    refuse("not a regular file", tmp_path / "pipe")
    with pytest.raises(ValueError, match="at least one"):
        idx_to_hdf5([], tmp_path / "out.h5")
