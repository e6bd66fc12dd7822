"""Page-locked host memory: what the GPU copies from and to by itself, without the host waiting for each part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

BLOCK = 4 * 2**20  # bytes: PCIe is at full speed from about one MiB
BLOCKS = 2  # the host fills or empties one while the GPU copies the other
STAGED = BLOCK * BLOCKS  # bytes of a driver's Staging


def pinned(cupy: Any, shape: int | Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """(shape) uninitialised host array in page-locked memory, which lives as long as the array."""
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    item = np.dtype(dtype)
    count = int(np.prod(dims, dtype=np.int64))
    memory = cupy.cuda.alloc_pinned_memory(max(1, count * item.itemsize))
    return np.frombuffer(memory, item, count).reshape(dims)


class Staging:
    """Copies of any size through two page-locked blocks, in the order of a stream."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._blocks: list[NDArray[np.uint8]] = []
        self._events: list[Any] = [None] * BLOCKS
        self._next = 0

    def _turn(self) -> tuple[int, NDArray[np.uint8]]:
        """The block whose turn it is, once the copy that last used it is over."""
        while len(self._blocks) < BLOCKS:
            self._blocks.append(pinned(self._cupy, BLOCK, np.uint8))
        at = self._next
        self._next = (at + 1) % BLOCKS
        if self._events[at] is not None:
            self._events[at].synchronize()
            self._events[at] = None
        return at, self._blocks[at]

    def _copy(self, dst: int, src: int, size: int, kind: int, stream: Any, at: int) -> None:
        self._cupy.cuda.runtime.memcpyAsync(dst, src, size, kind, stream.ptr)
        event = self._events[at] = self._cupy.cuda.Event(disable_timing=True)
        stream.record(event)

    def to_device(self, address: int, src: NDArray[Any], stream: Any) -> None:
        """Launch a copy of a C-contiguous host array to an address; src may be changed at once."""
        kind = self._cupy.cuda.runtime.memcpyHostToDevice
        raw = src.reshape(-1).view(np.uint8)
        for start, stop in _parts(raw.size):
            at, block = self._turn()
            block[: stop - start] = raw[start:stop]
            self._copy(address + start, block.ctypes.data, stop - start, kind, stream, at)

    def to_host(self, dst: NDArray[Any], address: int, stream: Any) -> None:
        """Copy from an address into a C-contiguous host array, and wait for it."""
        kind = self._cupy.cuda.runtime.memcpyDeviceToHost
        raw = dst.reshape(-1).view(np.uint8)
        before: tuple[int, int, int] | None = None
        for start, stop in _parts(raw.size):
            at, block = self._turn()
            self._copy(block.ctypes.data, address + start, stop - start, kind, stream, at)
            self._take(raw, before)
            before = at, start, stop
        self._take(raw, before)

    def _take(self, raw: NDArray[np.uint8], part: tuple[int, int, int] | None) -> None:
        if part is not None:
            at, start, stop = part
            self._events[at].synchronize()
            self._events[at] = None
            raw[start:stop] = self._blocks[at][: stop - start]


def _parts(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, BLOCK):
        yield start, min(start + BLOCK, size)
