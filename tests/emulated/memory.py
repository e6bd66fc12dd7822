"""Device memory of the emulation: arrays that end at an unreadable page."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nicecp.kernels.backend import ALIGNMENT
from tests.emulated.build import EmulationError

_marks = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Memory(np.ndarray[Any, Any]):
    """An array in guarded memory; its views and slices know the bytes between its end and the unreadable page.

    An array begins on an ALIGNMENT boundary, so up to ALIGNMENT - 1 bytes behind it can be touched without a fault:
    they are NaN, of a kind that arithmetic changes and other arrays do not have, and ``check`` sees it.
    """

    behind: tuple[NDArray[np.uint8], bytes] | None = None  # the bytes, and what they should be

    def __array_finalize__(self, source: Any) -> None:
        self.behind = getattr(source, "behind", None)

    def check(self, kernel: str) -> None:
        """EmulationError if somebody wrote behind the end."""
        if self.behind is None:
            return
        found, expected = self.behind
        if found.tobytes() != expected:
            found[:] = np.frombuffer(expected, np.uint8)
            raise EmulationError(f"{kernel}: memory behind an array was written")


def _fill(room: int) -> NDArray[np.uint8]:
    """Signalling NaN as float32 (even words) and as float64 (their pairs), another one for every array."""
    mark = next(_marks) % 65535 + 1
    return np.tile(np.array([0x7F810000 | mark, 0x7FF10000 | mark], np.uint32), room // 8).view(np.uint8)


def guarded(shape: int | Sequence[int], dtype: DTypeLike) -> Memory:
    """Zeros of this shape."""
    item, page = np.dtype(dtype), mmap.PAGESIZE
    size = int(np.prod(shape, dtype=np.int64)) * item.itemsize
    room = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
    pages = -(-room // page) * page
    buffer = mmap.mmap(-1, pages + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    for offset in (0, page + pages):
        if _libc.mprotect(base + offset, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = page + pages - room
    whole = np.frombuffer(buffer, np.uint8, room, start)
    whole[size:] = _fill(room)[size:]
    array = whole[:size].view(item).reshape(shape).view(Memory)
    array.behind = whole[size:], whole[size:].tobytes()
    return array
