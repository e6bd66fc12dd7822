"""What every device does beside the kernel contract: its array library, arrays of others, uploads in the background.

The defaults are those of a device that computes in the host's memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array: TypeAlias = Any

_PIECE = 2**24  # numbers that are looked at by one call


def _nothing() -> None:
    """There is nothing to wait for."""


@dataclass(frozen=True)
class Upload:
    """ready(): calls from now on see the data. done(): waits, on the host, until the source is free."""

    ready: Callable[[], None]
    done: Callable[[], None]


class DeviceArrays(ABC):
    """A part of Backend."""

    @abstractmethod
    def alloc(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array: ...

    @abstractmethod
    def copy_in(self, dst: Array, src: NDArray[Any]) -> None: ...

    @abstractmethod
    def synchronize(self) -> None: ...

    def assign(self, dst: Array, src: Array) -> None:
        """dst = src, device arrays of one shape and dtype, in the order of the calls."""
        with self.arithmetic():
            dst[...] = src

    @property
    def xp(self) -> Any:
        """The array library whose arrays these are: NumPy, or CuPy. Use it inside ``arithmetic`` alone."""
        return np

    def arithmetic(self) -> AbstractContextManager[None]:
        """What the array library itself computes inside stands in the order of the calls."""
        return nullcontext()

    def is_finite(self, array: Array) -> bool:
        """Whether all numbers are; waits for the device. Looks at pieces, so that it needs little memory."""
        flat = array.reshape(-1)
        with self.arithmetic():
            return all(
                bool(self.xp.isfinite(flat[start : start + _PIECE]).all()) for start in range(0, flat.size, _PIECE)
            )

    def owns(self, x: object) -> bool:
        """Whether x is an array in this device's own memory, which the host cannot read."""
        return False

    def borrow(self, x: Any) -> Array:
        """The array that ``owns`` said yes to, as one of ours, in the order of the calls; nothing is copied."""
        raise ValueError("this device computes in the host's memory")

    def result(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        """An uninitialised array that a caller will get, once ``hand_over`` was called."""
        return self.alloc(shape, dtype)

    def hand_over(self) -> None:
        """What the caller launches from now on, on a stream of his own, comes after all our calls."""
        self.synchronize()

    def pinned(self, shape: int | Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialised host array that ``upload`` is fastest from."""
        return np.empty(shape, dtype)

    def upload(self, dst: Array, src: NDArray[Any]) -> Upload:
        """Begin dst = src (``pinned``), of one shape and dtype, behind all calls so far and beside those that follow.

        Before dst is read, ``ready()`` of what is returned; before src is changed, ``done()``, from any thread.
        """
        self.copy_in(dst, src)
        return Upload(_nothing, _nothing)
