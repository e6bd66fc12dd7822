"""Device memory of the emulation: arrays that end at an unreadable page."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nicecp.kernels.backend import ALIGNMENT
from tests.emulated.build import EmulationError

_FILL = b"\xff"  # NaN as a floating-point number
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Memory(np.ndarray[Any, Any]):
    """An array in guarded memory; its views and slices know the bytes between its end and the unreadable page.

    An array begins on an ALIGNMENT boundary, so up to ALIGNMENT - 1 bytes behind it can be touched without a fault:
    they are NaN, and ``check`` sees when they no longer are.
    """

    behind: NDArray[np.uint8] | None = None

    def __array_finalize__(self, source: Any) -> None:
        self.behind = getattr(source, "behind", None)

    def check(self, kernel: str) -> None:
        """EmulationError if somebody wrote behind the end."""
        if self.behind is not None and self.behind.tobytes().strip(_FILL):
            self.behind[:] = _FILL[0]
            raise EmulationError(f"{kernel}: memory behind an array was written")


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
    whole[size:] = _FILL[0]
    array = whole[:size].view(item).reshape(shape).view(Memory)
    array.behind = whole[size:]
    return array
