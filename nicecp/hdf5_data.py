"""HDF5 files that somebody else made: opened read-only, checked before one element is read, then read in blocks.

A dataset is used only if it is reached through hard links, lies in the file itself (not virtual, not external), was
written completely, and holds integers or floats of at most 8 bytes, unfiltered or behind one of FILTERS.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from nicecp.errors import DataError, about_file
from nicecp.hdf5_chunks import Chunks, Unusable, filters_of
from nicecp.hdf5_open import HDF5_ERRORS, damage_reported, one_line, open_hdf5, plugins_off
from nicecp.records import DataInfo
from nicecp.sources import as_image_shape, check_finite, check_range, check_size, fingerprint

MAX_OBJECTS = 10_000  # links looked at when a file is searched
MAX_DEPTH = 32
_CACHE_BYTES = 2**26  # at most this much of decompressed chunks is kept
_CLASSES = {
    h5py.h5t.STRING: "strings",
    h5py.h5t.COMPOUND: "a compound type",
    h5py.h5t.ENUM: "true/false or enumerated values",
    h5py.h5t.VLEN: "rows of varying length",
    h5py.h5t.OPAQUE: "opaque bytes",
    h5py.h5t.REFERENCE: "references",
    h5py.h5t.BITFIELD: "bit fields",
    h5py.h5t.ARRAY: "arrays as elements",
    h5py.h5t.TIME: "times",
    getattr(h5py.h5t, "COMPLEX", 11): "complex numbers",
}
_REMEDIES = {
    "strings": "store numbers (text as numeric codes)",
    "complex numbers": "store real and imaginary parts as columns",
    "a compound type": "store the fields as columns of one dataset",
    "true/false or enumerated values": "store them as integers",
}


@dataclass(frozen=True)
class Layout:
    """What a dataset holds: its shape, the dtype it is read as (before int8 becomes uint8), its chunks' length."""

    shape: tuple[int, ...]
    raw: np.dtype[Any]
    row_bytes: int  # of the chunks that one row crosses
    chunks: Chunks | None  # None for contiguous storage


@dataclass(frozen=True)
class Entry:
    """A dataset met while searching a file; ``problem`` is empty for one that can be used."""

    path: str
    label: str
    rank: int
    problem: str

    def __str__(self) -> str:
        return f"{self.path!r} {self.label}"


def _child(group: h5py.Group, name: str | bytes) -> h5py.Group | h5py.Dataset | None:
    """The member of a group if it is a hard link to a group or dataset, else None. Opens nothing behind other links."""
    encoded = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    try:  # not by h5py's groups, which take twice as long: a file may have thousands of members
        if group.id.links.get_info(encoded).type != h5py.h5l.TYPE_HARD:
            return None
        opened = h5py.h5o.open(group.id, encoded)
    except HDF5_ERRORS:
        return None
    if isinstance(opened, h5py.h5g.GroupID):
        return h5py.Group(opened)
    return h5py.Dataset(opened) if isinstance(opened, h5py.h5d.DatasetID) else None


def element_kind(dataset: h5py.Dataset) -> tuple[np.dtype[Any] | None, str]:
    """(the dtype to read, its name) for integers and floats of at most 8 bytes, else (None, what it is)."""
    kind = dataset.id.get_type()
    number = kind.get_class()
    # h5py writes complex numbers as two fields; to make a dtype of thousands takes a second
    many = number == h5py.h5t.COMPOUND and kind.get_nmembers() != 2
    if number not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT) and not many:
        with contextlib.suppress(*HDF5_ERRORS):
            if dataset.dtype.kind == "c":
                return None, "complex numbers"
    return type_kind(kind)


def type_kind(kind: Any) -> tuple[np.dtype[Any] | None, str]:
    """element_kind, of a type of HDF5."""
    number = kind.get_class()
    if number not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT):
        return None, _CLASSES.get(number, "no numbers")
    size = kind.get_size()
    if size > 8:
        return None, f"numbers of {size} bytes"
    if number == h5py.h5t.FLOAT:
        return np.dtype(np.float32 if size == 4 else np.float64), f"float{8 * size}"
    signed = kind.get_sign() == h5py.h5t.SGN_2
    label = f"{'int' if signed else 'uint'}{8 * size}"
    return np.dtype((np.int8 if signed else np.uint8) if size == 1 else np.float64), label


def examine(dataset: h5py.Dataset, least_rank: int = 2) -> Layout:
    """Everything that must hold before a dataset is read; Unusable(problem, remedy) otherwise."""
    raw, label = element_kind(dataset)
    if raw is None:
        raise Unusable(f"it holds {label}", _REMEDIES.get(label, "store integers or floats of at most 8 bytes"))
    shape = dataset.shape
    if shape is None or len(shape) < least_rank:
        found = "nothing" if shape is None else f"shape {shape}"
        raise Unusable(f"expected rows of columns, found {found}", "store one sample per row, shape (rows, columns)")
    stored_whole(dataset)
    if 0 in shape or dataset.chunks is None:
        return Layout(shape, raw, 1, None)
    chunks = Chunks(dataset.id, shape, dataset.chunks, raw)
    across = [-(-size // length) for size, length in zip(shape[1:], dataset.chunks[1:], strict=True)]
    return Layout(shape, raw, chunks.bytes * math.prod(across), chunks)


def stored_whole(dataset: h5py.Dataset, row_bytes: int = 0) -> None:
    """Unusable unless a dataset's numbers are in the file itself, behind filters that are read, and, where they are
    contiguous, all there.

    row_bytes : of a value in the file; 0 where it is as long as HDF5 says of its type
    """
    if dataset.is_virtual:
        raise Unusable("it is a virtual dataset", "copy the numbers into this file")
    if dataset.external:
        raise Unusable("its numbers lie in other files (external storage)", "copy the numbers into this file")
    filters_of(dataset.id)
    if 0 in dataset.shape or dataset.chunks is not None:
        return
    size = math.prod(dataset.shape) * (row_bytes or dataset.id.get_type().get_size())
    stored = dataset.id.get_storage_size()
    if stored == 0:  # HDF5 would hand out fill values
        raise Unusable("its numbers were never written", "write the file again")
    if stored != size:
        raise Unusable(f"it is stored in {stored} bytes, not {size}", "copy or download the file again")


def entry(path: str, dataset: h5py.Dataset) -> Entry:
    """How a dataset is listed in messages."""
    try:
        raw, label = element_kind(dataset)
        shape = dataset.shape or ()
        if len(shape) == 1 and dataset.id.get_type().get_class() == h5py.h5t.COMPOUND:
            return Entry(path, f"compound table {shape}", 2, "")  # nicecp.table_files
        problem = "" if raw is not None and len(shape) >= 2 else "not numeric" if raw is None else "rank below 2"
        return Entry(path, f"{label} {shape}", len(shape), problem)
    except HDF5_ERRORS as error:
        return Entry(path, "unreadable", 0, one_line(error))


def search(group: h5py.Group, path: str) -> Iterator[Entry]:
    """All datasets below a group, in order of name, through hard links, each object once."""
    seen: set[tuple[int, int]] = set()
    budget = MAX_OBJECTS

    def walk(group: h5py.Group, path: str, depth: int) -> Iterator[Entry]:
        nonlocal budget
        for name in group:
            budget -= 1
            if budget < 0:
                return
            member = _child(group, name)
            if member is None:
                continue
            info = h5py.h5o.get_info(member.id)
            if (info.fileno, info.addr) in seen:
                continue
            seen.add((info.fileno, info.addr))
            shown = name.decode(errors="replace") if isinstance(name, bytes) else name
            where = f"{path}/{shown}"
            if isinstance(member, h5py.Dataset):
                yield entry(where, member)
            elif depth < MAX_DEPTH:
                yield from walk(member, where, depth + 1)

    yield from walk(group, path.rstrip("/"), 0)


def member(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset | None:
    """A member by name; None if there is none; Unusable if it is a soft or external link or cannot be opened."""
    encoded = name.encode("utf-8", "surrogateescape")
    if not group.id.links.exists(encoded):
        return None
    if group.id.links.get_info(encoded).type != h5py.h5l.TYPE_HARD:
        raise Unusable("it is a soft or external link", "copy the dataset to this place in the file")
    found = _child(group, name)
    if found is None:
        raise Unusable("it cannot be opened", "copy or download the file again")
    return found


class UnreadableAttribute(DataError):
    """An attribute that would be used is there, and HDF5 cannot read it."""


class HDF5Source:
    """A dataset of an HDF5 file as a source; see ``sources.Source``.

    uint8, float32 and float64 are read as they are, int8 becomes uint8 by adding 128, other integers and float16 become
    float64. Rank > 2 is flattened. Memory: the rows asked for and at most 64 MiB of chunks. DataError names the file.

    beside : what belongs to the rows of other data: one number for each row, or one column, will do
    """

    context: NDArray[np.float64] | None = None
    context_names: tuple[str, ...] | None = None
    weight: NDArray[np.float64] | None = None

    def __init__(self, path: str | os.PathLike[str], dataset: str, beside: bool = False) -> None:
        self._path, self._beside = os.fspath(path), beside
        self.name = f"{self._path}:/{dataset.strip('/')}"
        self._file = open_hdf5(self._path, dataset)
        try:
            with damage_reported(self.name):
                self._open(dataset)
        except Unusable as error:
            self.close()
            raise DataError(about_file(self.name, *error.args)) from None
        except BaseException:
            self.close()
            raise

    def _open(self, dataset: str) -> None:
        found: h5py.Group | h5py.Dataset | None = self._file
        parent = self._file
        last = ""
        for part in (part for part in dataset.split("/") if part not in ("", ".")):
            if not isinstance(found, h5py.Group):
                found = None
                break
            parent, last = found, part
            found = member(parent, part)
        if not isinstance(found, h5py.Dataset):
            raise Unusable("no such dataset", "check the name with nicecp info")
        layout = examine(found, 1 if self._beside else 2)
        # one row of chunks stays decompressed, so that reading on does not inflate it again
        access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
        most = max(_CACHE_BYTES, 0 if layout.chunks is None else layout.chunks.bytes)
        access.set_chunk_cache(12421, min(max(layout.row_bytes, 2**20), most), 0.75)
        handle = h5py.h5d.open(parent.id, last.encode("utf-8", "surrogateescape"), access)
        self._dataset = h5py.Dataset(handle)
        self._layout = layout
        n_features = 1
        for size in layout.shape[1:]:
            n_features *= size
        check_size(self.name, layout.shape[0], n_features, 1 if self._beside else 2)
        self.n_rows, self.n_features = layout.shape[0], n_features
        self.dtype: np.dtype[Any] = np.dtype(np.uint8) if layout.raw == np.int8 else layout.raw
        holders = (self._dataset, self._file)
        flat = len(layout.shape) <= 2
        shape = _image_shape(holders, n_features) if flat else as_image_shape(layout.shape[1:], n_features)
        columns, units = (_names(holders, key, n_features) for key in ("columns", "units"))
        self.info = DataInfo(shape, columns, units)

    @property
    def is_image8(self) -> bool:
        return self.dtype == np.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dataset."""
        return self._layout.shape

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop-1 : (stop - start, d), a new array."""
        check_range(start, stop, self.n_rows)
        out = np.empty((stop - start, *self._layout.shape[1:]), self._layout.raw)
        if stop > start:
            try:
                with plugins_off():
                    chunks = self._layout.chunks
                    if chunks is not None and chunks.direct:
                        chunks.read(out, start, stop)
                    else:
                        if chunks is not None:
                            chunks.verify(start, stop)
                        self._dataset.read_direct(out, np.s_[start:stop])
            except Unusable as error:
                raise DataError(about_file(self.name, *error.args)) from None
            except HDF5_ERRORS as error:
                problem = f"rows {start} to {stop - 1} cannot be read ({one_line(error)})"
                raise DataError(about_file(self.name, problem, "copy or download the file again")) from None
        block = out.reshape(stop - start, self.n_features)
        if block.dtype == np.int8:
            block = np.bitwise_xor(block.view(np.uint8), np.uint8(128), out=block.view(np.uint8))
        if not self.is_image8:
            check_finite(block, start, self.name, self.info.columns)
        return block

    def fingerprint(self) -> str:
        return fingerprint(self.read, self.n_rows, self.n_features, self.dtype)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> HDF5Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _attribute(holder: Any, key: str, kinds: Sequence[int], size: int) -> Any:
    """The value of a one-dimensional attribute of at most ``size`` elements of an expected class, else None.

    Raises UnreadableAttribute: one that HDF5 gives up on may have cost gigabytes first, so that nobody is to try again.
    """
    try:
        if not h5py.h5a.exists(holder.id, key.encode()):
            return None
        attribute = h5py.h5a.open(holder.id, key.encode())
        shape = attribute.shape
        if attribute.get_type().get_class() not in kinds or len(shape) != 1 or not 0 < shape[0] <= size:
            return None
        return holder.attrs[key]
    except (*HDF5_ERRORS, MemoryError) as error:
        problem = f"its attribute {key!r} cannot be read ({one_line(error)})"
        raise UnreadableAttribute(about_file(holder.file.filename, problem, "copy or download it again")) from None


def _image_shape(holders: Sequence[Any], n_features: int) -> tuple[int, ...] | None:
    for holder in holders:
        value = _attribute(holder, "image_shape", (h5py.h5t.INTEGER,), 8)
        shape = None if value is None else as_image_shape([int(size) for size in value], n_features)
        if shape is not None:
            return shape
    return None


def _names(holders: Sequence[Any], key: str, n_features: int) -> tuple[str, ...] | None:
    """One text per column, from the dataset or the file; None if there is none that fits."""
    for holder in holders:
        value = _attribute(holder, key, (h5py.h5t.STRING,), n_features)
        if value is not None and len(value) == n_features:
            texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in value]
            return tuple(text.strip("\0 ") for text in texts)
    return None
