"""A flow's log-density of one point as a short program: what to do with which weights, for compiled code to do.

A program is an int64 array: a header, then rows of PointField.SIZE numbers. Values on their way live in one scratch
array of float64; rows name places in it by their index, and weights by their address. So one compiled function serves
flows of every shape, and other weights need no other code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class PointOp:
    """What a row does: its numbers, then its arrays.  z is what stands at ``place`` of the scratch array."""

    STANDARDIZE = 1  # place, n; shift, scale: z = (z - shift) / scale
    SHIFT = 2  # place, n; shift: z = z - shift
    CHECK = 3  # place, n: the point is infinitely far away if a z is not finite, or not so for float32 weights
    GATHER = 4  # place, n, from; index: z[c] = from[index[c]]
    CONTEXT = 5  # place, n, m: the context, behind the m numbers that stand there
    DENSE = 6  # place, inputs, from, outputs, relu, wide; w, b: of the flow's dtype, or float64 if wide
    COUPLE = 7  # place, n, m, Law; of a spline, the address of its function
    PRIOR = 8  # place, n, place for h, prior; s, of the flow's dtype
    COLUMN = 9  # place of one number, its ColumnKind; table (and addresses of functions): adds log dz/dx
    PERMUTE = 10  # place, n, from, rest, m; index: z[c] = from[index[c]], or rest[index[c] - m] if that is not below m


class Law:
    """Coupling laws."""

    ADDITIVE = 0
    MULTIPLICATIVE = 1
    AFFINE = 2
    SPLINE = 3


class ColumnKind:
    """Transforms of a single column (kernels/_numba_transforms.py)."""

    LOG = 1
    LOGIT = 2
    ANGLE = 3
    STUDENT = 4
    QUANTILE = 5
    MARGIN = 6  # the logit of nicecp.preprocessing.MarginLogit


class PointField:
    """The header, and columns of a row."""

    CORE = 0  # address of the compiled function: double core(program, x, line, context, line)
    ROWS = 1
    SCRATCH = 2  # numbers
    FEATURES = 3
    CONTEXT = 4
    LOG_DET = 5  # nats, the bits of a float64: of the steps whose Jacobian is constant
    HEADER = 8

    OP = 0
    NUMBERS = 1
    ARRAYS = 7
    SIZE = 10


class Program:
    """Rows in order, on their way to ``PointModel.program``; arrays are kept alive by whoever holds that."""

    def __init__(self, features: int, context: int, dtype: Any) -> None:
        self.features, self.context, self.dtype = features, context, np.dtype(dtype)
        self.rows: list[list[int]] = []
        self.arrays: list[NDArray[Any]] = []
        self.log_det = 0.0  # nats
        self.transforms = False  # whether there are COLUMN rows
        self.scratch = 0
        self.x = self.place(features)  # the point is put there

    def place(self, size: int) -> int:
        """Room for so many numbers in the scratch array, on a cache line."""
        start = self.scratch
        self.scratch += -(-size // 8) * 8
        return start

    def add(self, op: int, *numbers: int, arrays: tuple[NDArray[Any], ...] = ()) -> None:
        """A row. Raises ValueError for an array that compiled code would misread."""
        for array in arrays:
            if not array.flags.c_contiguous:
                raise ValueError("kernels work on C-contiguous arrays")
        self.transforms |= op == PointOp.COLUMN
        row = [op, *(int(number) for number in numbers)]
        row += [0] * (PointField.ARRAYS - len(row)) + [array.ctypes.data for array in arrays]
        self.rows.append(row + [0] * (PointField.SIZE - len(row)))
        self.arrays += arrays

    def finish(self, core: int) -> NDArray[np.int64]:
        """(words,) int64.  core : address of the compiled function that carries it out."""
        head = np.zeros(PointField.HEADER, np.int64)
        head[PointField.CORE] = core
        head[PointField.ROWS], head[PointField.SCRATCH] = len(self.rows), self.scratch
        head[PointField.FEATURES], head[PointField.CONTEXT] = self.features, self.context
        head[PointField.LOG_DET :][:1] = np.array([self.log_det]).view(np.int64)
        return np.concatenate([head, np.array(self.rows, np.int64).ravel()])


class PointModel:
    """A finished program and the arrays that it points to; compiled code may hold its address."""

    def __init__(self, program: Program, core: int) -> None:
        self.arrays = program.arrays
        self.features, self.context = program.features, program.context
        self.program = program.finish(core)
