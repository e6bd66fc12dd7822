"""Tables as HDF5 files hold them beside a 2-D dataset: compound tables, and groups of 1-D columns.

The checks are those of nicecp.hdf5_data, of every column that is used: integers or floats of at most 8 bytes, hard
links, internal, written whole, behind filters that are read. Fields and members that are not used may be anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from nicecp import probe
from nicecp.errors import DataError, about_file
from nicecp.hdf5_chunks import Chunks, Unusable
from nicecp.hdf5_data import HDF5Source, element_kind, member, stored_whole, type_kind
from nicecp.hdf5_open import HDF5_ERRORS, damage_reported, one_line, open_hdf5, plugins_off
from nicecp.record_bytes import RecordBytes, lies_elsewhere, stored_size
from nicecp.records import DataInfo
from nicecp.sources import check_finite, check_range, check_size, fingerprint

MAX_COLUMNS = 4096  # of a group
MAX_FIELDS = 2048  # of a compound table: HDF5 compares each name with all others whenever it opens or reads one
MAX_ROW_BYTES = 2**20  # of a compound table
_BLOCK = 2**22  # numbers of a compound table that are read at a time


def compound_fields(dataset: h5py.Dataset) -> dict[str, np.dtype[Any] | None] | None:
    """Name -> dtype that a field is read as (None for what is no number); None unless this is a 1-D compound table.

    Unusable for a row or a number of fields beyond the limits.
    """
    kind = dataset.id.get_type()
    if kind.get_class() != h5py.h5t.COMPOUND or dataset.shape is None or len(dataset.shape) != 1:
        return None
    count = kind.get_nmembers()
    if count > MAX_FIELDS or kind.get_size() > MAX_ROW_BYTES:
        problem = f"its rows have {count} fields in {kind.get_size()} bytes"
        raise Unusable(problem, f"store at most {MAX_FIELDS} fields in {MAX_ROW_BYTES >> 20} MiB a row")
    fields: dict[str, np.dtype[Any] | None] = {}
    for number in range(count):
        name = kind.get_member_name(number)
        text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)
        if text in fields:
            raise Unusable(f"two of its fields are called {text!r}", "write the table with different names")
        raw = type_kind(kind.get_member_type(number))[0]
        fields[text] = None if raw is None else np.dtype(np.float32 if raw == np.float32 else np.float64)
    return fields


def column_names(group: h5py.Group) -> list[str]:
    """The 1-D numeric datasets of a group that can be columns of one table, in order of name: [] unless there are at
    least two, all as long as one another. Members that are links, groups or of other kinds do not count."""
    lengths = _one_dimensional(group)
    return list(lengths) if len(lengths) > 1 and len(set(lengths.values())) == 1 else []


def _one_dimensional(group: h5py.Group) -> dict[str, int]:
    """The 1-D numeric datasets among the first MAX_COLUMNS members of a group, and how long they are."""
    lengths: dict[str, int] = {}
    for number, name in enumerate(group):
        if number >= MAX_COLUMNS:
            break
        if isinstance(name, bytes):
            continue
        try:
            found = member(group, name)
            if not isinstance(found, h5py.Dataset) or found.shape is None or len(found.shape) != 1:
                continue
            if element_kind(found)[0] is None:
                continue
        except (Unusable, *HDF5_ERRORS):
            continue
        lengths[name] = int(found.shape[0])
    return lengths


def columns_below(path: str | os.PathLike[str], name: str) -> list[str]:
    """Paths of the 1-D numeric datasets of the group that ``name`` is in a file, of any length; [] if it is none."""
    try:
        with open_hdf5(os.fspath(path), name) as file, damage_reported(os.fspath(path)):
            found = at(file, name)
            members = _one_dimensional(found) if isinstance(found, h5py.Group) else {}
    except (DataError, Unusable):
        return []
    return [f"{name.rstrip('/')}/{member}" for member in members]


def open_table(path: str | os.PathLike[str], name: str, columns: Sequence[str] | None = None) -> Any:
    """A source for what ``name`` is in a file: a dataset of rank 2 or more, a compound table, or a group of columns.

    columns : the fields of a compound table or the members of a group that are wanted, in this order; None for all.
        Of other datasets columns are chosen by nicecp.rows. Raises DataError.
    """
    shown = f"{os.fspath(path)}:/{name.strip('/')}"
    with open_hdf5(os.fspath(path), name) as file, damage_reported(shown):
        try:
            found = at(file, name)
            group = isinstance(found, h5py.Group)
            fields = compound_fields(found) if isinstance(found, h5py.Dataset) else None
            known = _one_dimensional(found) if isinstance(found, h5py.Group) else {}
            members = column_names(found) if isinstance(found, h5py.Group) and columns is None else []
        except Unusable as error:
            raise DataError(about_file(shown, *error.args)) from None
    if group:
        wanted = members if columns is None else columns
        seen = [column for column in wanted if column in known]  # by the child; not what lies in groups below
        probe.remember(os.fspath(path), [f"{name.rstrip('/')}/{column}" for column in seen])
        return ColumnsSource(path, name, wanted)
    return HDF5Source(path, name) if fields is None else CompoundSource(path, name, columns)


def at(file: h5py.File, name: str) -> h5py.Group | h5py.Dataset:
    """What a path names, through hard links; Unusable if there is no such thing."""
    found: h5py.Group | h5py.Dataset | None = file
    for part in (part for part in name.split("/") if part not in ("", ".")):
        found = member(found, part) if isinstance(found, h5py.Group) else None
        if found is None:
            raise Unusable("no such dataset", "check the name with nicecp info")
    assert found is not None
    return found


class _Table:
    """What both kinds share: rows of numbers with names, never 8-bit images."""

    name: str
    n_rows: int
    info: DataInfo
    dtype: np.dtype[Any]
    context: NDArray[np.float64] | None = None
    context_names: tuple[str, ...] | None = None
    weight: NDArray[np.float64] | None = None
    is_image8 = False

    @property
    def n_features(self) -> int:
        return len(self.info.columns or ())

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop-1 : (stop - start, d), a new array."""
        check_range(start, stop, self.n_rows)
        out = np.empty((stop - start, self.n_features), self.dtype)
        self._fill(out, start)
        check_finite(out, start, self.name, self.info.columns)
        return out

    def _fill(self, out: NDArray[Any], start: int) -> None:
        raise AssertionError  # each kind's own

    def fingerprint(self) -> str:
        return fingerprint(self.read, self.n_rows, self.n_features, self.dtype)


def _wanted(known: Sequence[str], columns: Sequence[str] | None, shown: str) -> tuple[str, ...]:
    """The names that are asked for, or all; DataError for one that is not there, or twice."""
    if columns is None:
        return tuple(known)
    names, used = set(known), set[str]()
    for column in columns:
        if column not in names:
            raise DataError(about_file(shown, f"no column {column!r}", f"it has {', '.join(known[:20])}"))
        if column in used:
            raise DataError(about_file(shown, f"column {column!r} is named twice", "name it once"))
        used.add(column)
    return tuple(columns)


class CompoundSource(_Table):
    """A 1-D dataset of compound type as a source: its fields, or those asked for, are the columns.

    float32 if all fields are, else float64. Fields that are not used may be of any type. DataError as HDF5Source.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str,
        columns: Sequence[str] | None = None,
        numbers_only: bool = False,
    ) -> None:
        """numbers_only : all fields that hold numbers, instead of ``columns``."""
        self.name = f"{os.fspath(path)}:/{name.strip('/')}"
        self._file = open_hdf5(os.fspath(path), name)
        try:
            with damage_reported(self.name):
                self._open(name, columns, numbers_only)
        except Unusable as error:
            self.close()
            raise DataError(about_file(self.name, *error.args)) from None
        except BaseException:
            self.close()
            raise

    def _open(self, name: str, columns: Sequence[str] | None, numbers_only: bool) -> None:
        found = at(self._file, name)
        fields = compound_fields(found) if isinstance(found, h5py.Dataset) else None
        if fields is None:
            raise Unusable("it is no compound table", "check the name with nicecp info")
        if numbers_only:
            columns = [field for field, kind in fields.items() if kind is not None]
        names = _wanted(list(fields), columns, self.name)
        numbers = [field for field in names if fields[field] is not None]
        if len(numbers) < len(names):
            odd = next(field for field in names if fields[field] is None)
            known = ",".join(field for field, kind in fields.items() if kind is not None)
            raise Unusable(f"field {odd!r} holds no numbers of at most 8 bytes", f"choose others: --columns {known}")
        single = all(fields[field] == np.float32 for field in names)
        self.dtype = np.dtype(np.float32 if single else np.float64)
        self._dataset, self.n_rows = found, int(found.shape[0])
        check_size(self.name, self.n_rows, len(names))
        elsewhere = lies_elsewhere(found.id.get_type())
        stored_whole(found, stored_size(found.id.get_type()) if elsewhere else 0)
        self._chunks: Chunks | None = None
        self._bytes: RecordBytes | None = None
        if elsewhere:
            encoded = [field.encode("utf-8", "surrogateescape") for field in names]
            self._bytes = RecordBytes(found.id, self.n_rows, found.chunks, encoded)
        elif found.chunks is not None:
            # Read with HDF5's conversion by names: the direct way of Chunks is for plain numbers.
            self._chunks = Chunks(found.id, found.shape, found.chunks, self.dtype)
        self._memory = None if elsewhere else _memory_type(names, self.dtype)
        self.info = DataInfo(None, names)

    def _fill(self, out: NDArray[Any], start: int) -> None:
        step = max(1, _BLOCK // self.n_features)
        if self._bytes is not None:
            step = max(1, _BLOCK // self._bytes.row_bytes)
        try:
            with plugins_off():
                for first in range(0, len(out), step):
                    last = min(first + step, len(out))
                    if self._chunks is not None:
                        self._chunks.verify(start + first, start + last)
                    if self._bytes is not None:
                        self._bytes.read(out[first:last], self._file, start + first)
                        continue
                    block = out[first:last]  # rows of one dtype lie in memory as records of it do
                    space, place = h5py.h5s.create_simple((last - first,)), self._dataset.id.get_space()
                    place.select_hyperslab((start + first,), (last - first,))
                    self._dataset.id.read(space, place, block, self._memory)
        except Unusable as error:
            raise DataError(about_file(self.name, *error.args)) from None
        except HDF5_ERRORS as error:
            problem = f"rows {start} to {start + len(out) - 1} cannot be read ({one_line(error)})"
            raise DataError(about_file(self.name, problem, "copy or download the file again")) from None

    def close(self) -> None:
        self._file.close()


def _memory_type(names: Sequence[str], dtype: np.dtype[Any]) -> Any:
    """Records of these fields, one after the other, as they are to lie in memory."""
    memory = h5py.h5t.create(h5py.h5t.COMPOUND, len(names) * dtype.itemsize)
    for number, name in enumerate(names):
        memory.insert(name.encode("utf-8", "surrogateescape"), number * dtype.itemsize, h5py.h5t.py_create(dtype))
    return memory


class ColumnsSource(_Table):
    """The 1-D datasets of a group, or those asked for, as the columns of one table; all must be equally long."""

    def __init__(self, path: str | os.PathLike[str], group: str, columns: Sequence[str]) -> None:
        self.name = f"{os.fspath(path)}:/{group.strip('/')}"
        if not columns:
            problem = "it is a group without 1-D columns of one length"
            raise DataError(about_file(self.name, problem, "name its columns with --columns, or name a dataset"))
        if len(columns) > MAX_COLUMNS:
            raise DataError(about_file(self.name, f"{len(columns)} columns are asked for", f"at most {MAX_COLUMNS}"))
        _wanted(list(dict.fromkeys(columns)), columns, self.name)
        self._sources: list[HDF5Source] = []
        try:
            for column in columns:
                self._sources.append(HDF5Source(path, f"{group.rstrip('/')}/{column}", beside=True))
        except BaseException:
            self.close()
            raise
        self.n_rows = self._sources[0].n_rows
        self.info = DataInfo(None, tuple(columns))
        single = all(source.dtype == np.float32 for source in self._sources)
        self.dtype = np.dtype(np.float32 if single else np.float64)
        for column, source in zip(columns, self._sources, strict=True):
            if source.n_features != 1 or source.n_rows != self.n_rows:
                self.close()
                shape = f"{source.n_rows} rows of {source.n_features}"
                problem = f"column {column!r} has {shape}, {columns[0]!r} has {self.n_rows} of 1"
                raise DataError(about_file(self.name, problem, "choose columns of one length (--columns)"))
        check_size(self.name, self.n_rows, len(columns))

    def _fill(self, out: NDArray[Any], start: int) -> None:
        for i, source in enumerate(self._sources):
            out[:, i] = source.read(start, start + len(out))[:, 0]

    def close(self) -> None:
        for source in self._sources:
            source.close()
