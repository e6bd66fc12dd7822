"""A tape: calls of kernels written down once, with the addresses of their arrays, and replayed without Python.

A call's range (columns of a product, rows of a batch, elements of an update) is cut into ``parts`` slices, which depend
on shapes and the backend's threads alone, so results do too. Part p is carried out by thread p % crew, in the tape's
order; where a call needs what other threads' calls have written, or writes what they read, a barrier stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.kernels.backend import Array


class Op:
    """Numbers of the calls on a tape; kernels/_numba_tape.py carries them out."""

    BARRIER = 0
    LOAD_BYTES = 1
    LOAD_FLOATS = 2
    SPLIT = 3
    JOIN = 4
    MATMUL = 5
    DENSE_FORWARD = 6
    BIAS_RELU_BACKWARD = 7
    DENSE_BACKWARD = 8
    COUPLE = 9
    SCALE_PRIOR_FORWARD = 10
    SCALE_PRIOR_BACKWARD = 11
    SCALE_INVERSE = 12
    LOSS = 13
    UPDATE = 14
    ADVANCE = 15
    FACTOR_FORWARD = 16
    FACTOR_BACKWARD = 17
    ACCUMULATE = 18
    GATHER = 19
    COPY_COLUMNS = 20
    LOGIT_FORWARD = 21
    SPLINE_FORWARD = 22
    SPLINE_BACKWARD = 23
    PERMUTE = 24


class Field:
    """Columns of a row of the tape."""

    OP = 0
    FIRST = 1  # number of the first part
    PARTS = 2
    START = 3  # the range: [START, START + EXTENT), cut at multiples of GRAIN from START
    EXTENT = 4
    GRAIN = 5
    NUMBERS = 6  # sizes and switches
    ARRAYS = 14  # addresses
    SIZE = 26


@dataclass(frozen=True)
class Range:
    """The range of a call and its cut into parts; ``first`` is the number of the first part."""

    extent: int
    grain: int = 1
    parts: int = 1
    start: int = 0
    first: int = 0

    def edge(self, part: int) -> int:
        """Where part number ``part`` (from 0) begins; as in kernels/_numba_tape.py."""
        units = -(-self.extent // self.grain)
        return self.start + min(units * part // self.parts * self.grain, self.extent)


Span = tuple[int, int, int]  # first byte, end, and the part that touches it (ANY: several do)
ANY = -1


def span(array: Array, part: int = ANY) -> Span:
    """The bytes of a C-contiguous array."""
    address = array.ctypes.data
    return address, address + array.nbytes, part


def spans(touched: Sequence[Array | Span | None], several: bool) -> list[Span]:
    """Of all that a call touches; of nothing unless there are several threads."""
    if not several:
        return []
    return [one if isinstance(one, tuple) else span(one) for one in touched if one is not None]


@dataclass
class Tape:
    """Calls in order. ``arrays`` keeps alive what they point to."""

    rows: list[list[int]] = field(default_factory=list)
    arrays: list[Array] = field(default_factory=list)
    work: int = 0  # multiplications, about, of calls in several parts
    dtype: Any = None  # of all floating-point arrays but those that are always float64
    _written: list[Span] = field(default_factory=list)  # since the last barrier
    _read: list[Span] = field(default_factory=list)

    def add(
        self,
        op: int,
        over: Range,
        real: Sequence[Array | None],
        other: Sequence[Array],
        numbers: Sequence[int],
        writes: list[Span],
        reads: list[Span],
        work: int = 0,
    ) -> None:
        """A call. real : arrays of the tape's dtype, None for one that it does without; other : of types of their own.

        Raises
        ------
        ValueError
            An array is not C-contiguous, or not of the tape's dtype: compiled code would read past it.
        """
        arrays = [*real, *other]
        for array in arrays:
            if array is not None and not array.flags.c_contiguous:
                raise ValueError("kernels work on C-contiguous arrays")
        for array in real:
            self.dtype = array.dtype if self.dtype is None and array is not None else self.dtype
            if array is not None and array.dtype != self.dtype:
                raise ValueError(f"one tape has one dtype: {array.dtype} beside {self.dtype}")
        if _meet(writes, self._written) or _meet(writes, self._read) or _meet(reads, self._written):
            self.barrier()
        row = [op, over.first, over.parts, over.start, over.extent, over.grain, *(int(number) for number in numbers)]
        row += [0] * (Field.ARRAYS - len(row))
        row += [0 if array is None else array.ctypes.data for array in arrays]
        self.rows.append(row + [0] * (Field.SIZE - len(row)))
        self.arrays += arrays
        self._written += writes
        self._read += reads
        if over.parts > 1:
            self.work += work

    def barrier(self) -> None:
        """All threads wait for each other here."""
        if self._written or self._read:
            self.rows.append([Op.BARRIER] + [0] * (Field.SIZE - 1))
            self._written.clear()
            self._read.clear()

    def finish(self) -> NDArray[Any]:
        """(calls, Field.SIZE) int64."""
        return np.array(self.rows, np.int64).reshape(len(self.rows), Field.SIZE)


def _meet(some: list[Span], others: list[Span]) -> bool:
    """Whether calls of different threads touch the same bytes."""
    for start, stop, part in some:
        for other_start, other_stop, other_part in others:
            if start < other_stop and other_start < stop and (part == ANY or part != other_part):
                return True
    return False
