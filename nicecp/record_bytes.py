"""Rows of a compound table as they lie in the file, without HDF5's conversion.

h5py reads a compound type with parts of varying length or references, even where only other fields are asked for, with
all its fields: for each row HDF5 goes through the heap that holds such parts, where one changed byte makes it hang or
crash. The bytes of the row itself do no harm.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from nicecp.hdf5_chunks import Chunks, Unusable

_MAX_DEPTH = 32  # of types within types
_ELSEWHERE = 16  # length, address of a heap, place in it: in files whose addresses have 8 bytes
_REFERENCES = (8, 12)  # to objects and to regions, in memory as in files
_LETTERS = {h5py.h5t.INTEGER: "u", h5py.h5t.FLOAT: "f"}


def lies_elsewhere(kind: Any, depth: int = 0) -> bool:
    """Whether values of an HDF5 type hold, or hold within, something of varying length or a reference."""
    number = kind.get_class()
    if number in (h5py.h5t.VLEN, h5py.h5t.REFERENCE) or depth > _MAX_DEPTH:
        return True
    if number == h5py.h5t.STRING:
        return bool(kind.is_variable_str())
    if number == h5py.h5t.ARRAY:
        return lies_elsewhere(kind.get_super(), depth + 1)
    if number == h5py.h5t.COMPOUND:
        return any(lies_elsewhere(kind.get_member_type(i), depth + 1) for i in range(kind.get_nmembers()))
    return False


def stored_size(kind: Any, depth: int = 0) -> int:
    """Bytes of a value of an HDF5 type in a file, where parts of varying length are 16 bytes that say where they lie.

    HDF5 tells the size in memory, where these are pointers. Unusable for references of HDF5 1.12 and later.
    """
    number, size = kind.get_class(), int(kind.get_size())
    if number == h5py.h5t.VLEN or (number == h5py.h5t.STRING and kind.is_variable_str()):
        return _ELSEWHERE
    if number == h5py.h5t.REFERENCE and size not in _REFERENCES:
        raise Unusable("it holds references of a kind that is not read", "leave them out")
    if depth > _MAX_DEPTH:
        raise Unusable("its types are nested too deep", "store plain fields")
    if number == h5py.h5t.ARRAY:
        return int(math.prod(kind.get_array_dims())) * stored_size(kind.get_super(), depth + 1)
    if number == h5py.h5t.COMPOUND:
        members = [kind.get_member_type(i) for i in range(kind.get_nmembers())]
        return size + sum(stored_size(member, depth + 1) - int(member.get_size()) for member in members)
    return size


def _stored_offsets(kind: Any) -> list[int]:
    """Where the members of a compound type begin in a file."""
    count = kind.get_nmembers()
    offsets = [int(kind.get_member_offset(i)) for i in range(count)]
    longer, stored = 0, [0] * count
    for i in sorted(range(count), key=offsets.__getitem__):
        member = kind.get_member_type(i)
        stored[i] = offsets[i] + longer
        longer += stored_size(member) - int(member.get_size())
    return stored


def _as_numpy(kind: Any, name: str) -> np.dtype[Any]:
    """The dtype with the same bytes as a type of whole or floating-point numbers; Unusable if NumPy has none."""
    number = kind.get_class()
    letter = "i" if number == h5py.h5t.INTEGER and kind.get_sign() == h5py.h5t.SGN_2 else _LETTERS[number]
    for order in "<>":
        try:
            dtype = np.dtype(f"{order}{letter}{kind.get_size()}")
        except TypeError:
            break
        if h5py.h5t.py_create(dtype) == kind:
            return dtype
    raise Unusable(f"field {name!r} holds numbers of an unusual form", "store it as integers or floats")


class RecordBytes:
    """Some fields of the rows of a 1-D compound dataset.

    dataset : h5py.h5d.DatasetID; fields : their names, which hold numbers of at most 8 bytes. Raises Unusable.
    """

    def __init__(self, dataset: Any, n_rows: int, chunks: Sequence[int] | None, fields: Sequence[bytes]) -> None:
        self._dataset, kind = dataset, dataset.get_type()
        offsets, self.row_bytes = _stored_offsets(kind), stored_size(kind)
        members = [kind.get_member_index(field) for field in fields]
        self._dtype = np.dtype(
            {
                "names": [f"f{i}" for i in range(len(fields))],
                "formats": [
                    _as_numpy(kind.get_member_type(i), field.decode("utf-8", "replace"))
                    for i, field in zip(members, fields, strict=True)
                ],
                "offsets": [offsets[i] for i in members],
                "itemsize": self.row_bytes,
            }
        )
        self._chunks = None if chunks is None else Chunks(dataset, (n_rows,), chunks, self._dtype, as_stored=True)
        remedy = "store it contiguous or with gzip, or without text and lists of varying length"
        if self._chunks is not None and not self._chunks.direct:
            raise Unusable("it holds text, lists or references behind filters other than shuffle and gzip", remedy)
        if self._chunks is None and dataset.get_offset() is None:
            raise Unusable("it holds text, lists or references in compact storage", remedy)

    def read(self, out: NDArray[Any], file: h5py.File, start: int) -> None:
        """Rows from ``start`` on into out : (n, fields) of floats. Unusable for damaged chunks and missing bytes."""
        records = np.empty(len(out), self._dtype)
        if self._chunks is not None:
            self._chunks.read(records, start, start + len(out))
        else:
            data = memoryview(records.view(np.uint8))  # type: ignore[arg-type]
            at, done = self._dataset.get_offset() + start * self._dtype.itemsize, 0
            while done < len(data):
                count = os.preadv(file.id.get_vfd_handle(), [data[done:]], at + done)
                if not count:
                    raise Unusable("the file ends before its rows do", "copy or download the file again")
                done += count
        for i, name in enumerate(self._dtype.names or ()):
            out[:, i] = records[name]
