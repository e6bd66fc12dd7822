"""Arrays of MATLAB 5 files, read by SciPy after a look at what the file says of itself.

SciPy's reader follows nested cells until its stack ends, and unpacks what is packed to any size; so the kinds of the
wanted variables, their sizes and what packed parts unpack to are looked at first. The format: "MAT-File Format",
The MathWorks, version 5: a header of 128 bytes, then elements of a tag (type, bytes) and data.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.errors import DataError, about_file
from nicecp.hdf5_open import check_regular, one_line

_HEADER, _PACKED = 128, 15  # bytes of a file's header; the type of a packed element
_BLOCK = 2**20
FREE, RATIO = 8 * 2**20, 64  # bytes that any file may unpack to, and how many times its own size beyond that
_NUMBERS = frozenset(["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "single", "double"])


def read_matlab(path: str, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Name -> array of numbers; DataError for another format, damage, and missing, strange or much too large ones."""
    from scipy.io import loadmat, whosmat

    check_regular(path)
    _check_unpacked(path)
    try:
        known = {name: (shape, kind) for name, shape, kind in whosmat(path)}
        _check(path, {name: known[name] for name in names if name in known}, names)
        found = loadmat(path, variable_names=list(names))
    except NotImplementedError:
        remedy = "save it by MATLAB with -v7, or give the official file"
        raise DataError(about_file(path, "it is a MATLAB 7.3 file", remedy)) from None
    except DataError:
        raise
    except Exception as error:  # what the reader meets in a damaged file is of many kinds
        if isinstance(error, MemoryError):
            raise
        problem = f"it is no MATLAB 5 file, or damaged ({one_line(error)})"
        raise DataError(about_file(path, problem, "copy or download it again")) from None
    for name in names:
        array = found.get(name)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf" or array.shape != known[name][0]:
            raise DataError(
                about_file(path, f"its {name!r} is not the array of numbers that it says", "give the official file")
            )
    return {name: found[name] for name in names}


def _check(path: str, known: dict[str, tuple[Any, str]], names: tuple[str, ...]) -> None:
    """The variables are there, of numbers, and no larger than their bytes in the file can be."""
    missing = [name for name in names if name not in known]
    if missing or any(kind not in _NUMBERS for _, kind in known.values()):
        problem = f"it has no array of numbers {missing[0]!r}" if missing else "its arrays are not numbers"
        raise DataError(about_file(path, problem, "give the official file"))
    for name, (shape, _) in known.items():
        if min(shape, default=0) < 0 or math.prod(shape) > _limit(path):
            raise DataError(about_file(path, f"its {name!r} of {shape} cannot be in it", "copy or download it again"))


def _check_unpacked(path: str) -> None:
    """DataError where packed elements unpack to much more than the file's size; what else is wrong SciPy says."""
    left, size = _limit(path), os.path.getsize(path)
    with open(path, "rb") as file:
        header = file.read(_HEADER)
        order = ">" if header[126:128] == b"MI" else "<"
        while len(tag := file.read(8)) == 8:
            kind, length = struct.unpack(order + "II", tag)
            end = file.tell() + length
            if kind == _PACKED and end <= size:
                unpacker = zlib.decompressobj()
                while not unpacker.eof and (
                    data := unpacker.unconsumed_tail or file.read(min(_BLOCK, end - file.tell()))
                ):
                    try:
                        left -= len(unpacker.decompress(data, _BLOCK))
                    except zlib.error:
                        return
                    if left < 0:
                        problem = f"it unpacks to more than {_limit(path) >> 20} MiB, {RATIO} times its size and more"
                        raise DataError(about_file(path, problem, "give the official file"))
            file.seek(end)


def _limit(path: str) -> int:
    return FREE + RATIO * os.path.getsize(path)
