"""Odd and hostile data files, made on demand: each with what is to become of it.

A case writes into a folder and returns the name to open; beside it stands "" where the data are to be accepted, else a
part of the one line that refuses them.
"""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from nicecp.flow import NICE

Case = Callable[[Path], Any]
TABLE = np.random.default_rng(1).normal(size=(60, 3))
ACCEPTED = ""


def hdf5(build: Callable[[h5py.File], object], dataset: str = "", **options: Any) -> Case:
    """A file of h5py's making."""

    def make(folder: Path) -> str:
        with h5py.File(folder / "x.h5", "w", **options) as file:
            build(file)
        return f"{folder / 'x.h5'}{dataset}"

    return make


def holding(value: Any, **options: Any) -> Case:
    """A file with one dataset, ``train``."""
    return hdf5(lambda file: file.create_dataset("train", data=value, **options))


def raw(data: bytes | Callable[[bytes], bytes], name: str = "x.h5") -> Case:
    """These bytes, or what a function makes of the bytes of a good file."""

    def make(folder: Path) -> str:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data(good()))
        return str(folder / name)

    return make


def good(**options: Any) -> bytes:
    """The bytes of a file that is fine."""
    with h5py.File("good", "w", driver="core", backing_store=False, **options) as file:
        file["train"] = np.random.default_rng(0).normal(size=(500, 3))
        file.flush()
        return bytes(file.id.get_file_image())


def chunk(data: bytes, mask: int = 0, **options: Any) -> Case:
    """A dataset of one chunk of 8 x 512 float64 whose stored bytes are these."""

    def build(file: h5py.File) -> None:
        dataset = file.create_dataset("train", (8, 512), "f8", chunks=(8, 512), **options)
        dataset.id.write_direct_chunk((0, 0), data, mask)

    return hdf5(build)


def filtered(*filters: tuple[int, int, tuple[int, ...]], written: bool = True) -> Case:
    """A dataset with these filters (code, flags, values)."""

    def build(file: h5py.File) -> None:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((8, 4))
        for code, flags, values in filters:
            creation.set_filter(code, flags, values)
        space = h5py.h5s.create_simple((8, 4))
        dataset = h5py.Dataset(h5py.h5d.create(file.id, b"train", h5py.h5t.NATIVE_DOUBLE, space, creation))
        if written:
            dataset[...] = np.arange(32.0).reshape(8, 4)

    return hdf5(build)


def typed(kind: Any, shape: tuple[int, ...] = (8, 4)) -> Case:
    """A dataset of a low-level HDF5 type, with storage."""

    def build(file: h5py.File) -> None:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        h5py.h5d.create(file.id, b"train", kind, h5py.h5s.create_simple(shape), creation)

    return hdf5(build)


def attribute(name: str, value: Any) -> Case:
    def build(file: h5py.File) -> None:
        file["train"] = TABLE
        file["train"].attrs[name] = value

    return hdf5(build)


def at(place: tuple[int, int], value: float, dtype: str = "f8") -> Case:
    """A table with one odd number in it."""
    table = TABLE.astype(dtype)
    table[place] = value
    return holding(table)


# --- what is no regular file, or none of HDF5 ------------------------------------------------------------------------


def _socket(folder: Path) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path is short
        try:
            listener.bind("x.h5")
        finally:
            os.chdir(here)
    return str(folder / "x.h5")


def _linked(target: str) -> Case:
    def make(folder: Path) -> str:
        (folder / "x.h5").symlink_to(target)
        return str(folder / "x.h5")

    return make


def _fifo(folder: Path) -> str:
    os.mkfifo(folder / "x.h5")
    return str(folder / "x.h5")


def _zip(folder: Path) -> str:
    with zipfile.ZipFile(folder / "x.h5", "w") as file:
        file.writestr("train", "1,2,3")
    return str(folder / "x.h5")


def _sparse(folder: Path) -> str:
    with (folder / "x.h5").open("wb") as file:
        file.truncate(1 << 40)
    return str(folder / "x.h5")


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/nicecp-a-pickle-was-loaded",)


def _checkpoint(folder: Path) -> str:
    NICE(3, (4,), 3).save(folder / "x.h5")
    return str(folder / "x.h5")


SIGNATURE = b"\x89HDF\r\n\x1a\n"
NO_HDF5 = "it is not an HDF5 file"
FILES: dict[str, tuple[Case, str]] = {
    "missing": (lambda folder: str(folder / "x.h5"), "no such file"),
    "missing, with a dataset": (lambda folder: f"{folder / 'x.h5'}:/train", "no such file"),
    "folder": (lambda folder: str(folder), "it is a folder"),
    "fifo": (_fifo, "not a regular file"),
    "socket": (_socket, "cannot be opened"),
    "device": (_linked("/dev/zero"), "not a regular file"),
    "symbolic link to itself": (_linked("x.h5"), "cannot be opened"),
    "dangling link": (_linked("nowhere.h5"), "no such file"),
    "name with a zero byte": (lambda folder: "a\0b", "cannot be opened"),
    "name too long": (lambda folder: str(folder / ("x" * 300)), "cannot be opened"),
    "odd name": (raw(good(), "odd\n\t'name\".h5"), ACCEPTED),
    "empty": (raw(b""), "it is empty"),
    "text": (raw(b"1,2\n3,4\n"), NO_HDF5),
    "numpy": (raw(b"\x93NUMPY\x01\x00" + bytes(200)), NO_HDF5),
    "pickle": (raw(pickle.dumps(_Evil())), NO_HDF5),
    "zip": (_zip, NO_HDF5),
    "gzip of a good one": (raw(gzip.compress), NO_HDF5),
    "a terabyte of nothing": (_sparse, NO_HDF5),
    "checkpoint": (_checkpoint, "it is a nicecp checkpoint"),
    "checkpoint's magic alone": (raw(b"NICECP\r\n"), "it is a nicecp checkpoint"),
    "signature alone": (raw(SIGNATURE), "the file is"),
    "signature and zeros": (raw(SIGNATURE + bytes(5000)), "the file is damaged"),
    "signature and ones": (raw(SIGNATURE + b"\xff" * 5000), "the file is damaged"),
    "signature and noise": (raw(SIGNATURE + np.random.default_rng(0).bytes(5000)), "the file is damaged"),
    **{
        f"cut to {size}": (raw(lambda data, size=size: data[:size]), "the file is")  # type: ignore[misc]
        for size in (9, 40, 100, 600, 2000, 8000, -1)
    },
    "something behind": (raw(lambda data: data + b"x" * 999), ACCEPTED),
    "user block": (raw(lambda data: bytes(512) + data), ACCEPTED),
    "user block of 2048": (raw(lambda data: bytes(2048) + data), ACCEPTED),
    "signature at an odd place": (raw(lambda data: bytes(700) + data), NO_HDF5),
    "newest format": (raw(good(libver="latest")), ACCEPTED),
    "oldest format": (raw(good(libver="earliest")), ACCEPTED),
    "superblock of a version to come": (raw(lambda data: data[:8] + b"\x63" + data[9:]), "the file is damaged"),
    "root elsewhere": (raw(lambda data: data[:64] + struct.pack("<Q", 1 << 40) + data[72:]), "the file is damaged"),
}

# --- structure -------------------------------------------------------------------------------------------------------


def _virtual(source: str) -> Callable[[h5py.File], None]:
    def build(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((60, 3), "f8")
        layout[:] = h5py.VirtualSource(source, "train", (60, 3))
        file.create_virtual_dataset("train", layout)

    return build


def _cycle(file: h5py.File) -> None:
    file["a/b"] = TABLE
    file["a/up"] = file["/"]
    file["a/b2"] = file["a/b"]


def _many(file: h5py.File) -> None:
    for number in range(11_000):
        file.create_group(f"g{number}")
    file["train"] = TABLE


def _odd_names(file: h5py.File) -> None:
    space = h5py.h5s.create_simple((8, 4))
    dataset = h5py.Dataset(h5py.h5d.create(file.id, b"\xff\xfe\n", h5py.h5t.NATIVE_DOUBLE, space))
    dataset[...] = 1.5


def _hidden_behind(file: h5py.File) -> None:
    file["real/train"] = TABLE
    file["g"] = h5py.SoftLink("/real")


STRUCTURE: dict[str, tuple[Case, str]] = {
    "nothing in it": (hdf5(lambda file: None), "it holds no datasets"),
    "only groups": (hdf5(lambda file: file.create_group("a/b/c")), "it holds no datasets"),
    "only a type": (hdf5(lambda file: file.update({"train": np.dtype("f8")})), "cannot be opened"),
    "two that could be meant": (hdf5(lambda file: file.update({"a": TABLE, "b": TABLE})), "several datasets"),
    "circle of groups": (hdf5(_cycle), ACCEPTED),
    "groups 40 deep": (hdf5(lambda file: file.update({"/".join("g" * 40) + "/x": TABLE})), "it holds no datasets"),
    "11,000 groups": (hdf5(_many), ACCEPTED),
    "name that is no text": (hdf5(_odd_names), "no such dataset"),
    "soft link": (hdf5(lambda file: file.update({"a": TABLE, "train": h5py.SoftLink("/a")})), "soft or external link"),
    "dangling soft link": (hdf5(lambda file: file.update({"train": h5py.SoftLink("/a")})), "soft or external link"),
    "soft link to itself": (hdf5(lambda file: file.update({"train": h5py.SoftLink("/train")})), "soft or external"),
    "soft link on the way": (hdf5(_hidden_behind, ":/g/train"), "soft or external link"),
    "external link": (
        hdf5(lambda file: file.update({"train": h5py.ExternalLink("/etc/passwd", "/train")})),
        "soft or external link",
    ),
    "external link to a fifo": (hdf5(lambda file: file.update({"data": h5py.ExternalLink("/dev/tty", "/x")})), "link"),
    "virtual": (hdf5(_virtual("other.h5")), "virtual dataset"),
    "virtual, of itself": (hdf5(_virtual(".")), "virtual dataset"),
    "external storage": (
        hdf5(lambda file: file.create_dataset("train", (4, 4), "u1", external=[("/etc/passwd", 0, 16)])),
        "external storage",
    ),
    "not the one that was named": (hdf5(lambda file: file.update({"train": TABLE}), ":/trian"), "no dataset"),
    "dataset below a dataset": (hdf5(lambda file: file.update({"train": TABLE}), ":/train/x"), "no dataset"),
    "valid of another width": (hdf5(lambda file: file.update({"train": TABLE, "valid": TABLE[:, :2]})), "columns"),
    "test of another type": (
        hdf5(lambda file: file.update({"train": TABLE, "test": np.zeros((9, 3), np.uint8)})),
        "store both",
    ),
}

# --- attributes, types, shapes, numbers ------------------------------------------------------------------------------

_T = h5py.h5t
_BITS = {"a bit field": _T.STD_B8LE, "a time": _T.UNIX_D32LE if hasattr(_T, "UNIX_D32LE") else _T.STD_B16LE}
CONTENT: dict[str, tuple[Case, str]] = {
    "image_shape that does not fit": (attribute("image_shape", [5, 5]), ACCEPTED),
    "image_shape of other kinds": (attribute("image_shape", "28x28"), ACCEPTED),
    "image_shape negative": (attribute("image_shape", [-1, -3]), ACCEPTED),
    "image_shape huge": (attribute("image_shape", [2**62, 2**62]), ACCEPTED),
    "columns of variable length": (attribute("columns", ["a", "b", "c"]), ACCEPTED),
    "columns with line breaks": (attribute("columns", ["a\nb", "\x1b[31m", "c"]), ACCEPTED),
    "too few columns named": (attribute("columns", ["a"]), ACCEPTED),
    "columns that are numbers": (attribute("columns", [1, 2, 3]), ACCEPTED),
    "columns not UTF-8": (attribute("columns", np.array([b"\xff", b"b", b"c"])), ACCEPTED),
    "units empty": (attribute("units", h5py.Empty("f8")), ACCEPTED),
    "an attribute nobody needs": (attribute("note", "x" * 60_000), ACCEPTED),
    "strings": (holding(np.array([[b"a", b"b"]])), "it holds strings"),
    "strings of variable length": (holding([["a", "b"]]), "strings"),
    "complex": (holding(TABLE.astype(complex)), "complex numbers"),
    "compound": (holding(np.zeros((4, 3), [("x", "f4"), ("n", "i4")])), "a compound type"),
    "bool": (holding(TABLE > 0), "true/false"),
    "long double": (holding(TABLE.astype(np.longdouble)), "numbers of 16 bytes"),
    "opaque": (holding(np.zeros((4, 3), "V8")), "opaque"),
    "arrays as elements": (typed(_T.array_create(_T.NATIVE_DOUBLE, (2,))), "arrays as elements"),
    "rows of varying length": (typed(_T.vlen_create(_T.NATIVE_DOUBLE)), "rows of varying length"),
    "references": (typed(_T.STD_REF_OBJ), "references"),
    **{what: (typed(kind), "bit fields|times") for what, kind in _BITS.items()},
    **{
        f"numbers of type {dtype}": (holding((10 * TABLE).astype(dtype)), ACCEPTED)
        for dtype in ("i1", "i2", ">i4", "i8", "f2", ">f4", ">f8")
    },
    "8-byte counts": (holding(np.full((4, 3), 2**64 - 1, np.uint64)), ACCEPTED),
    "no rows": (holding(np.zeros((0, 3))), "no rows"),
    "no columns": (holding(np.zeros((4, 0))), "no columns"),
    "one column": (holding(np.zeros((4, 1))), "one column"),
    "one number": (holding(1.0), "found shape ()"),
    "no value": (holding(h5py.Empty("f8")), "found nothing"),
    "one row of labels": (holding(np.arange(5)), "no usable dataset"),
    "images": (holding(np.zeros((4, 5, 5, 3), np.uint8)), ACCEPTED),
    "rank 9": (holding(np.zeros((2,) * 9)), ACCEPTED),
    "too many columns": (hdf5(lambda file: file.create_dataset("train", (2, 2**25), "u1", fillvalue=1)), "never"),
    "NaN": (at((7, 1), np.nan), "row 7, column 1 is nan"),
    "infinity": (at((59, 2), np.inf), "row 59, column 2 is inf"),
    "minus infinity": (at((0, 0), -np.inf, "f4"), "row 0, column 0 is -inf"),
    "infinity of half precision": (at((3, 0), np.inf, "f2"), "row 3, column 0 is inf"),
    "the largest number": (at((3, 0), 1.7e308), ACCEPTED),
}

# --- storage ---------------------------------------------------------------------------------------------------------

_WANT = np.arange(8 * 512.0).tobytes()
_GZIP, _LZF = {"compression": "gzip"}, {"compression": "lzf"}
_OPTIONAL = h5py.h5z.FLAG_OPTIONAL
_D, _S, _F = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32


def _chunked(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Case:
    return hdf5(lambda file: file.create_dataset("train", shape, "f8", chunks=chunks))


def _repeated(shape: tuple[int, int], rows: int, dtype: str) -> Case:
    """Zeros, each chunk the same packed bytes: a small file of a large table."""

    def build(file: h5py.File) -> None:
        data = file.create_dataset("train", shape, dtype, chunks=(rows, shape[1]), compression="gzip")
        for row in range(0, shape[0], rows):
            data.id.write_direct_chunk((row, 0), zlib.compress(bytes(rows * shape[1] * data.dtype.itemsize)))

    return hdf5(build)


def _newest(**options: Any) -> Case:
    return hdf5(lambda file: file.create_dataset("train", data=TABLE, **options), libver="latest")


def _part(file: h5py.File) -> None:
    file.create_dataset("train", (10, 3), "f8", chunks=(5, 3))[:5] = 1


STORAGE: dict[str, tuple[Case, str]] = {
    "never written": (hdf5(lambda file: file.create_dataset("train", (10, 3), "f8")), "never written"),
    "never written, exabytes": (hdf5(lambda file: file.create_dataset("train", (2**50, 3), "f8")), "never written"),
    "chunks never written": (_chunked((10, 3), (5, 3)), "only 0 of its 2 chunks"),
    "a chunk missing": (hdf5(_part), "only 1 of its 2 chunks"),
    "chunk of 2 GB": (_chunked((2**20, 2**8), (2**20, 2**8)), "chunks of 2048 MiB are larger than 128 MiB"),
    "too many chunks": (_chunked((2**21, 2), (1, 2)), "it has 2097152 chunks, more than"),
    "chunk stored short": (chunk(b"x" * 64), "chunk (0, 0) is stored in 64 bytes"),
    "chunk stored long": (chunk(_WANT + b"x" * 64), "chunk (0, 0) is stored in 32832 bytes"),
    "shuffled chunk stored short": (chunk(b"x" * 64, shuffle=True), "is stored in 64 bytes"),
    "gzip, as it should be": (chunk(zlib.compress(_WANT), **_GZIP), ACCEPTED),
    "gzip that was skipped": (chunk(_WANT, 1, **_GZIP), ACCEPTED),
    "gzip that was skipped, short": (chunk(_WANT[:-8], 1, **_GZIP), "is stored in"),
    "gzip of too little": (chunk(zlib.compress(_WANT[:-8]), **_GZIP), "unpacks to 32760 bytes instead of 32768"),
    "gzip of nothing": (chunk(zlib.compress(b""), **_GZIP), "unpacks to 0 bytes"),
    "gzip of too much": (chunk(zlib.compress(_WANT + bytes(8)), **_GZIP), "unpacks to 32769 bytes"),
    "zeros by the gigabyte": (_repeated((2**18, 512), 2**13, "f8"), "1024 MiB are packed into 1"),
    "zeros by the row": (_repeated((2**25, 3), 2**20, "u1"), "96 MiB are packed into 0.09"),
    "gzip bomb": (chunk(zlib.compress(bytes(2**25), 9), **_GZIP), "unpacks to 32769|is stored in"),
    "gzip cut": (chunk(zlib.compress(_WANT)[:-900], **_GZIP), "unpacks to"),
    "gzip of noise": (chunk(b"\xff" * 99, **_GZIP), "cannot be unpacked"),
    "gzip and checksum, too little": (chunk(zlib.compress(b"1234"), **_GZIP, fletcher32=True), "unpacks to"),
    "wrong checksum": (chunk(_WANT + b"1234", fletcher32=True), "cannot be read"),
    "lzf of too little": (chunk(bytes([31]) + bytes(32), **_LZF), "unpacks to 32 bytes instead of 32768"),
    "lzf that breaks off": (chunk(bytes([255, 1]), **_LZF), "unpacks to 0 bytes"),
    "lzf of too much": (chunk(b"\0\0" + bytes([255, 255, 0]) * 200, **_LZF), "unpacks to 52801 bytes"),
    "lzf": (holding(TABLE, **_LZF, shuffle=True), ACCEPTED),
    "shuffle, gzip, checksum": (holding(TABLE, **_GZIP, shuffle=True, fletcher32=True), ACCEPTED),
    "many chunks across": (holding(np.zeros((40, 40), np.uint8), chunks=(7, 9), **_GZIP, shuffle=True), ACCEPTED),
    "scale and offset": (holding(np.arange(30).reshape(10, 3), scaleoffset=0), "HDF5 filter 6"),
    "n bits": (filtered((h5py.h5z.FILTER_NBIT, _OPTIONAL, ())), "HDF5 filter 5"),
    "a filter nobody has": (filtered((32_001, _OPTIONAL, (1,))), "HDF5 filter 32001"),
    "gzip twice": (filtered((_D, _OPTIONAL, (4,)), (_D, _OPTIONAL, (4,))), "more than once"),
    "six filters": (filtered(*[(_S, _OPTIONAL, ()), (_F, _OPTIONAL, ())] * 3), "6 filters, more than 4"),
    "compact": (typed(_T.NATIVE_DOUBLE), ACCEPTED),
    "growing, newest index": (_newest(maxshape=(None, None), chunks=(7, 2)), ACCEPTED),
    "growing one way, newest index": (_newest(maxshape=(None, 3), chunks=(7, 3)), ACCEPTED),
    "one chunk, newest index": (_newest(chunks=(60, 3), **_GZIP), ACCEPTED),
    "pages": (hdf5(lambda file: file.update({"train": TABLE}), fs_strategy="page"), ACCEPTED),
}

CASES = FILES | STRUCTURE | CONTENT | STORAGE
assert len(CASES) == len(FILES) + len(STRUCTURE) + len(CONTENT) + len(STORAGE)
