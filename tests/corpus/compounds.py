"""Odd and hostile compound tables and groups of columns; see tests.corpus.data for the form of a case.

A case returns the name to open, or a DataSpec where columns are chosen.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from nicecp.data_spec import DataSpec
from tests.corpus.data import ACCEPTED, Case, hdf5

T = h5py.h5t
DOUBLE = T.NATIVE_DOUBLE
FIELDS = [("alpha", "f8"), ("gamma", "f8")]
N = 120
NUMBERS = np.random.default_rng(2).normal(size=(N, 2))


def chosen(make: Case, columns: str = "alpha,gamma", place: str = "") -> Case:
    """The same file, with these columns of it."""
    return lambda folder: DataSpec(make(folder) + place, columns=columns)


def _filled(more: list[Any], file: h5py.File) -> np.ndarray:
    """alpha and gamma are NUMBERS; something of every kind that HDF5 has is in the other fields."""
    table = np.zeros(N, np.dtype(FIELDS + more))
    table["alpha"], table["gamma"] = NUMBERS.T

    def fill(part: np.ndarray) -> None:
        for name in part.dtype.names or ():
            kind = part.dtype[name]
            if kind.names:
                fill(part[name])
            elif h5py.check_string_dtype(kind.base) is not None and kind.base.kind == "O":
                part[name][...] = b"a text of another length"
            elif kind.base.kind == "O":
                for i in np.ndindex(part[name].shape):
                    part[name][i] = file.ref if h5py.check_ref_dtype(kind.base) else np.arange(3, dtype="i4")

    fill(table)
    return table


def table(*more: Any, **options: Any) -> Case:
    """A compound dataset ``train`` with two fields of numbers, and these."""
    return hdf5(lambda file: file.create_dataset("train", data=_filled(list(more), file), **options))


def placed(size: int, *members: tuple[bytes, int, Any], rows: bytes = b"") -> Case:
    """A compound dataset of members (name, offset, type of HDF5) in rows of so many bytes, which may be given."""

    def build(file: h5py.File) -> None:
        kind = T.create(T.COMPOUND, size)
        for name, offset, member in members:
            kind.insert(name, offset, member)
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((N,))
        dataset = h5py.h5d.create(file.id, b"train", kind, h5py.h5s.create_simple((N,)), creation)
        dataset.write_direct_chunk((0,), rows or NUMBERS.repeat(size // 8, axis=1).tobytes()[: N * size])

    return hdf5(build)


def patched(make: Case, edit: Callable[[bytearray], object]) -> Case:
    """The file of a case, its bytes changed."""

    def changed(folder: Path) -> Any:
        spec = make(folder)
        path = folder / "x.h5"
        data = bytearray(path.read_bytes())
        edit(data)
        path.write_bytes(data)
        return spec

    return changed


def heaps(edit: Callable[[bytearray, int, int], object]) -> Callable[[bytearray], None]:
    """Changes every heap in which HDF5 keeps what is of varying length: data, where it begins, how long it is."""

    def change(data: bytearray) -> None:
        at, count = data.find(b"GCOL"), 0
        while at >= 0:
            size = int.from_bytes(data[at + 8 : at + 16], "little")
            edit(data, at, size)
            at, count = data.find(b"GCOL", at + size), count + 1
        assert count

    return change


def _fill_heap(value: int) -> Callable[[bytearray, int, int], None]:
    def edit(data: bytearray, at: int, size: int) -> None:
        data[at : at + size] = bytes([value]) * size

    return edit


def _no_length(data: bytearray, at: int, size: int) -> None:
    data[at + 24 : at + 32] = bytes(8)


def _message(name: bytes, offset: int, value: bytes) -> Callable[[bytearray], None]:
    """Bytes beside a member's name in the datatype message."""

    def edit(data: bytearray) -> None:
        at = data.find(name + b"\0")
        assert at > 0
        data[at + offset : at + offset + len(value)] = value

    return edit


def _nested(depth: int) -> Any:
    kind: Any = np.dtype([("z", "i2")])
    for _ in range(depth):
        kind = np.dtype([("n", kind)])
    return ("deep", kind)


def _committed(file: h5py.File) -> None:
    file["kind"] = np.dtype([*FIELDS, ("inner", [("q", "f4")])])
    dataset = file.create_dataset("train", (N,), file["kind"])
    dataset[...] = _filled([("inner", [("q", "f4")])], file)


def _many_fields(count: int) -> Case:
    names = [(f"{i:x}", "i1") for i in range(count)]
    rows = np.random.default_rng(0).integers(-9, 9, (20, count), np.int8)
    data = rows.view(np.dtype(names))[:, 0]
    return hdf5(lambda file: file.create_dataset("train", data=data), libver="latest")


def _short(more: list[Any], data: bytes) -> Case:
    def build(file: h5py.File) -> None:
        kind = np.dtype(FIELDS + more)
        dataset = file.create_dataset("train", (N,), kind, chunks=(N,), compression="gzip")
        dataset.id.write_direct_chunk((0,), zlib.compress(data))

    return hdf5(build)


TEXT, LIST = ("text", h5py.string_dtype()), ("list", h5py.vlen_dtype("i4"))
INSIDE, PAIR = ("inside", [("k", "i2"), ("list", h5py.vlen_dtype("i4"))]), ("pair", h5py.vlen_dtype("i4"), (2,))
LINK = ("link", h5py.ref_dtype)
_ODD_FLOAT = T.IEEE_F64LE.copy()
_ODD_FLOAT.set_fields(63, 51, 12, 0, 51)
_PART = T.STD_I32LE.copy()
_PART.set_precision(20)
_OTHERS: dict[str, Any] = {
    "a nested compound": ("other", [("x", "f8"), ("y", [("z", "i2")])]),
    "an array": ("other", "f8", (3, 2)),
    "an enumeration": ("other", h5py.enum_dtype({"A": 1, "B": 2}, "i1")),
    "true and false": ("other", "?"),
    "opaque bytes": ("other", "V7"),
    "complex numbers": ("other", "c16"),
    "numbers of 16 bytes": ("other", "g"),
    "text": ("other", "S500"),
    "text of varying length": TEXT,
    "a list": LIST,
    "a list within": INSIDE,
    "an array of lists": PAIR,
    "a reference": LINK,
}
_STORED: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunks": {"chunks": (50,)},
    "gzip": {"chunks": (50,), "compression": "gzip", "shuffle": True},
    "growing": {"chunks": (50,), "maxshape": (None,)},
}
ELSEWHERE = table(TEXT, LIST, INSIDE, PAIR, LINK)

COMPOUNDS: dict[str, tuple[Case, str]] = {
    **{f"compound beside {what}": (chosen(table(kind)), ACCEPTED) for what, kind in _OTHERS.items()},
    **{f"compound with {what}": (table(kind), "holds no numbers") for what, kind in _OTHERS.items()},
    **{
        f"compound with all of varying length, {how}": (chosen(table(TEXT, LIST, INSIDE, PAIR, LINK, **o)), ACCEPTED)
        for how, o in _STORED.items()
    },
    "compound with text, lzf": (chosen(table(TEXT, chunks=(50,), compression="lzf")), "filters other than shuffle"),
    "compound with text, checksum": (chosen(table(TEXT, chunks=(50,), fletcher32=True)), "filters other than shuffle"),
    "compound, lzf and checksum": (table(chunks=(50,), compression="lzf", fletcher32=True), ACCEPTED),
    **{
        f"compound whose heap is {what}": (chosen(patched(ELSEWHERE, heaps(edit))), ACCEPTED)
        for what, edit in {"ones": _fill_heap(255), "zeros": _fill_heap(0), "without lengths": _no_length}.items()
    },
    "compound out of order": (placed(24, (b"gamma", 16, DOUBLE), (b"alpha", 0, DOUBLE)), ACCEPTED),
    "compound with gaps": (placed(800, (b"gamma", 88, DOUBLE), (b"alpha", 8, DOUBLE)), ACCEPTED),
    "compound of big-endian and short numbers": (
        placed(16, (b"a", 0, T.STD_I16BE), (b"b", 2, T.STD_U8LE), (b"c", 4, T.IEEE_F32LE), (b"d", 8, T.IEEE_F64LE)),
        ACCEPTED,
    ),
    "compound of numbers of 20 bits": (placed(16, (b"alpha", 0, _PART), (b"gamma", 8, DOUBLE)), ACCEPTED),
    "compound of 20 bits beside a list": (
        chosen(placed(32, (b"alpha", 0, _PART), (b"gamma", 8, DOUBLE), (b"list", 16, T.vlen_create(DOUBLE)))),
        "of an unusual form",
    ),
    "compound whose fields overlap": (
        patched(placed(16, (b"alphaxx", 0, DOUBLE), (b"gammaxx", 8, DOUBLE)), _message(b"gammaxx", 8, b"\4\0\0\0")),
        "cannot be opened",
    ),
    "compound whose field lies outside": (
        patched(placed(16, (b"alphaxx", 0, DOUBLE), (b"gammaxx", 8, DOUBLE)), _message(b"gammaxx", 8, b"\xff\xff\0\0")),
        "cannot be opened",
    ),
    "compound with two fields of one name": (
        patched(placed(16, (b"alphaxx", 0, DOUBLE), (b"gammaxx", 8, DOUBLE)), _message(b"gammaxx", 0, b"alphaxx")),
        "cannot be opened|two of its fields",
    ),
    "compound of no fields": (
        patched(placed(16, (b"alphaxx", 0, DOUBLE), (b"gammaxx", 8, DOUBLE)), _message(b"alphaxx", -7, b"\0\0")),
        "cannot be opened",
    ),
    "compound of 65,535 fields": (
        patched(placed(16, (b"alphaxx", 0, DOUBLE), (b"gammaxx", 8, DOUBLE)), _message(b"alphaxx", -7, b"\xff\xff")),
        "cannot be opened",
    ),
    "compound of rows of 4 GB": (
        patched(
            placed(16, (b"alphaxx", 0, DOUBLE), (b"gammaxx", 8, DOUBLE)),
            _message(b"alphaxx", -4, struct.pack("<I", 2**32 - 1)),
        ),
        "cannot be opened",
    ),
    "compound of rows of 2 MiB": (
        hdf5(
            lambda file: file.create_dataset(
                "train",
                (3,),
                np.dtype({"names": ["a", "b"], "formats": ["f8"] * 2, "offsets": [0, 2**20], "itemsize": 2**21}),
                chunks=(1,),
            )
        ),
        "2 fields in 2097152 bytes",
    ),
    "compound of 1,500 fields": (_many_fields(1500), ACCEPTED),
    "compound of 3,400 fields": (_many_fields(3400), "3400 fields"),
    "compound of odd names": (
        hdf5(lambda file: file.update({"train": np.zeros(9, [("a\nb", "S3"), ("\x1b[31m", "f8"), ("\u202eü", "f8")])})),
        r"field 'a\nb' holds no numbers",
    ),
    "compound of a name of 60,000 letters": (
        hdf5(lambda file: file.update({"train": np.zeros(9, [("a" * 60_000, "S3"), ("b", "f8"), ("c", "f8")])})),
        "field 'aaaa",
    ),
    "compound of names that are no text": (placed(16, (b"\xff\xfe", 0, DOUBLE), (b"b", 8, DOUBLE)), ACCEPTED),
    **{
        f"compound nested {depth} deep": (chosen(table(_nested(depth))), ACCEPTED if depth < 30 else "nested too deep")
        for depth in (5, 100)
    },
    "compound of a committed type": (chosen(hdf5(_committed)), ACCEPTED),
    "compound of one number": (
        hdf5(lambda file: file.create_dataset("train", data=np.zeros((), FIELDS))),
        "a compound type",
    ),
    "compound without a value": (hdf5(lambda file: file.update({"train": h5py.Empty(np.dtype(FIELDS))})), "a compound"),
    "compound of no rows": (hdf5(lambda file: file.update({"train": np.zeros(0, FIELDS)})), "no rows"),
    "compound in two axes": (hdf5(lambda file: file.update({"train": np.zeros((4, 3), FIELDS)})), "a compound type"),
    "compound of one field": (hdf5(lambda file: file.update({"train": np.zeros(9, FIELDS[:1])})), "one column"),
    "compound never written": (
        hdf5(lambda file: file.create_dataset("train", (9,), np.dtype(FIELDS))),
        "never written",
    ),
    "compound with text never written": (
        chosen(hdf5(lambda file: file.create_dataset("train", (9,), np.dtype([*FIELDS, TEXT])))),
        "never written",
    ),
    "compound chunk of too little": (_short([], bytes(100)), "unpacks to 100 bytes instead of 1920"),
    "compound chunk with text of too little": (chosen(_short([TEXT], bytes(100))), "unpacks to 100 bytes instead of"),
    "compound chunk with text of too much": (chosen(_short([TEXT], bytes(N * 32 + 1))), "bytes instead of 3840"),
}


def _columns(file: h5py.File) -> None:
    file["g/alpha"], file["g/gamma"], file["g/other"] = NUMBERS[:, 0], NUMBERS[:, 1], np.zeros(N, "S3")


def _cycle(file: h5py.File) -> None:
    _columns(file)
    file["g/up"], file["g/here"], file["g/alpha2"] = file["/"], file["g"], file["g/alpha"]


def _crowd(file: h5py.File) -> None:
    _columns(file)
    for i in range(5_000):
        file[f"g/x{i}"] = h5py.SoftLink("/nowhere")


GROUPS: dict[str, tuple[Case, str]] = {
    "group of columns": (chosen(hdf5(_columns), place=":/g"), ACCEPTED),
    "group of columns with links to itself": (chosen(hdf5(_cycle), place=":/g"), ACCEPTED),
    "group of columns through its parent": (chosen(hdf5(_cycle), "up/g/alpha,here/gamma", ":/g"), ACCEPTED),
    "group of columns by two dots": (chosen(hdf5(_columns), "../g/alpha,gamma", ":/g"), "no such dataset"),
    "group of columns with text": (chosen(hdf5(_columns), "alpha,other", ":/g"), "it holds strings"),
    "group of 5,000 soft links": (chosen(hdf5(_crowd, libver="latest"), place=":/g"), ACCEPTED),
    "group reached in 200 rounds": (chosen(hdf5(_cycle), place=":" + "/g/up" * 200 + "/g"), ACCEPTED),
}
CASES = COMPOUNDS | GROUPS
