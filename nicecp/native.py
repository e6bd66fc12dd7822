"""One point in microseconds: a flow's log-density as a function for compiled code, in Numba, C, C++ or Fortran.

The weights are data of one compiled function that serves every flow and is cached on disk (kernels/point.py).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.borders import refuse_overflow
from nicecp.context import Context
from nicecp.kernels.backend import ALIGNMENT, PRIORS
from nicecp.kernels.point import ColumnKind, Law, PointModel, PointOp, Program
from nicecp.params import Layout, Views
from nicecp.preprocessing import MarginLogit, Standardize, Step, Triangular, Zca
from nicecp.spec import LAWS, ModelSpec
from nicecp.transforms import ColumnStep, Quantile, Student

FloatArray = NDArray[np.float64]

LEAST = 8  # rows from which blocks are faster than one row after the other, measured for 4-64-64-4
PART = 4096  # rows
SMALL = 2**16  # weights that stay in the second-level cache, so that blocks are faster than BLAS however many rows
FEW = 2**19  # weights to multiply with, of all rows together, up to which larger flows' rows need no BLAS

_LAWS = {law: int(getattr(Law, law.upper())) for law in LAWS}


def _dense(program: Program, at: int, matrix: FloatArray, bias: FloatArray) -> int:
    """z = x @ matrix + bias in float64, at a new place."""
    d = len(bias)
    place = program.place(d)
    arrays = (np.ascontiguousarray(matrix), np.ascontiguousarray(bias))
    program.add(PointOp.DENSE, place, d, at, d, False, True, arrays=arrays)
    return place


def _standardize(program: Program, at: int, step: Standardize) -> int:
    program.add(PointOp.STANDARDIZE, at, len(step.mean), arrays=(step.mean, step.std))
    return at


def _zca(program: Program, at: int, step: Zca) -> int:
    program.add(PointOp.SHIFT, at, len(step.mean), arrays=(step.mean,))
    unit = np.eye(len(step.mean))
    return _dense(program, at, step.backward(unit, unit), np.zeros(len(step.mean)))  # the matrix is symmetric


def _triangular(program: Program, at: int, step: Triangular) -> int:
    return _dense(program, at, step.lower.T, step.bias)


def _columns(kind: int, *names: str) -> Callable[[Program, int, Any], int]:
    """A transform whose columns have one number each of these names."""

    def add(program: Program, at: int, step: ColumnStep) -> int:
        for j, column in enumerate(step.columns):
            table = np.array([getattr(step, name)[j] for name in names])
            program.add(PointOp.COLUMN, at + int(column), kind, arrays=(table,))
        return at

    return add


def _student(program: Program, at: int, step: Student) -> int:
    from nicecp.kernels._numba_transforms import special_functions

    numbers = (step.freedom, step.location, step.scale, step.log_norm, step.log_tail)
    for column, table in zip(step.columns, np.stack(numbers, axis=1), strict=True):
        program.add(PointOp.COLUMN, at + int(column), ColumnKind.STUDENT, arrays=(table, special_functions()))
    return at


def _spline_functions() -> NDArray[np.int64]:
    from nicecp.kernels._numba_spline import tile_function

    return np.array([tile_function("values")], np.int64)


def _quantile(program: Program, at: int, step: Quantile) -> int:
    for column, knots in zip(step.columns, step.splines, strict=True):
        table = np.concatenate([[len(knots.x)], knots.tail, knots.x, knots.z, knots.slope])
        program.add(PointOp.COLUMN, at + int(column), ColumnKind.QUANTILE, arrays=(table,))
    return at


def _margin_logit(program: Program, at: int, step: MarginLogit) -> int:
    tables = np.stack([step.low, 1 / (step.high - step.low), np.full(len(step.low), step.margin)], axis=1)
    for column, table in enumerate(tables):
        program.add(PointOp.COLUMN, at + column, ColumnKind.MARGIN, arrays=(table,))
    return at


def _unchanged(program: Program, at: int, step: Step) -> int:
    return at


# A step of preprocessing at a place of the scratch array -> the place of its result.
_STEPS: dict[str, Callable[[Program, int, Any], int]] = {
    "dequantize": _unchanged,
    "recorded": _unchanged,
    "standardize": _standardize,
    "zca": _zca,
    "triangular": _triangular,
    "log": _columns(ColumnKind.LOG, "low"),
    "logit": _columns(ColumnKind.LOGIT, "low", "high"),
    "angle": _columns(ColumnKind.ANGLE, "cut", "period"),
    "student": _student,
    "quantile": _quantile,
    "margin-logit": _margin_logit,
}


def rows_without_blas(spec: ModelSpec, steps: Sequence[Step]) -> int:
    """Up to how many rows at a time ``Points`` is the faster way to score; 0 where something has no compiled form.

    Couplings, networks and steps that are written in Python alone have none.
    """
    if spec.registered or not all(step.kind in _STEPS for step in steps):
        return 0
    weights = spec.n_parameters
    return sys.maxsize if weights <= SMALL else FEW // weights


def point_program(spec: ModelSpec, views: Views, steps: Sequence[Step], context: Context | None = None) -> Program:
    """The log-density of a flow with the weights that these views show whenever it is carried out.

    context : its scale; None where the program is given a context as networks see it.

    Raises ValueError for a step of preprocessing, a coupling or a network that has no compiled form.
    """
    if spec.registered:
        names = ", ".join(repr(name) for name in spec.registered)
        raise ValueError(f"{names} are written in Python and have no compiled form: use log_prob")
    parts, k = spec.part_sizes, spec.n_context
    program = Program(spec.n_features, k, spec.dtype)
    at = program.x
    for step in steps:
        if step.kind not in _STEPS:
            raise ValueError(f"preprocessing step {step.kind!r} has no compiled form: use log_prob")
        at = _STEPS[step.kind](program, at, step)
        program.log_det += step.log_det
    program.add(PointOp.CHECK, at, spec.n_features)

    def places() -> list[int]:
        """Of the two halves, with the context behind each: every network reads it after the part it conditions on."""
        made = [program.place(size + k) for size in parts]
        for place, size in zip(made, parts, strict=True):
            if k:
                program.add(PointOp.CONTEXT, place, k, size)
            if context is not None:
                program.add(PointOp.STANDARDIZE, place + size, k, arrays=(context.mean, context.std))
        return made

    halves, order = places(), spec.column_order
    for place, picked in zip(halves, (order[: parts[0]], order[parts[0] :]), strict=True):
        program.add(PointOp.GATHER, place, len(picked), at, arrays=(picked,))
    spare = places() if any(index is not None for index in spec.permutations) else []
    widest = max(max(spec.layer_sizes(k)[1:]) for k in range(len(spec.couplings)))
    turns = [program.place(max(widest, *parts)) for _ in range(2)]
    for coupling, layers, index in zip(spec.couplings, views.couplings, spec.permutations, strict=True):
        if index is not None:
            halves, spare = spare, halves
            for place, picked in zip(halves, np.split(index, [parts[0]]), strict=True):
                program.add(PointOp.PERMUTE, place, len(picked), *spare, parts[0], arrays=(picked,))
        source = halves[coupling.conditions_on]
        for j, (weight, bias) in enumerate(layers):
            numbers = (turns[j % 2], weight.shape[0], source, weight.shape[1], j < len(layers) - 1, False)
            program.add(PointOp.DENSE, *numbers, arrays=(weight, bias))
            source = turns[j % 2]
        changed = coupling.transforms
        functions = (_spline_functions(),) if coupling.law == "spline" else ()
        program.add(PointOp.COUPLE, halves[changed], parts[changed], source, _LAWS[coupling.law], arrays=functions)
    for place, size, log_scale in zip(halves, parts, views.scaling, strict=True):
        program.add(PointOp.PRIOR, place, size, turns[0], PRIORS[spec.prior], arrays=(log_scale,))
    return program


class Snapshot(PointModel):
    """The log-density of a flow with the weights that it had: later training does not reach it."""

    def __init__(
        self, spec: ModelSpec, flat: NDArray[Any], steps: Sequence[Step], context: Context | None = None
    ) -> None:
        from nicecp.kernels._numba_point import core_address

        self._made_of = spec, aligned_copy(flat), tuple(steps), context
        program = point_program(spec, Layout(spec).views(self._made_of[1]), steps, context)
        super().__init__(program, core_address(spec.dtype, program.transforms))

    def __reduce__(self) -> tuple[Any, ...]:
        return Snapshot, self._made_of


def aligned_copy(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that begins on a boundary of ALIGNMENT bytes: vectors of weights then lie within cache lines."""
    raw = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Points:
    """A flow's log-density at rows, with the weights that it has at the moment: a few one by one, more in blocks.

    Rows that are scored one by one are so in float64, blocks in the flow's dtype.
    """

    def __init__(self, spec: ModelSpec, views: Views, steps: Sequence[Step]) -> None:
        from nicecp.kernels._numba_point import core_address, score_rows

        program = point_program(spec, views, steps)
        self._kind = spec.dtype, program.transforms
        self._model = PointModel(program, core_address(*self._kind))
        self._score_rows: Any = score_rows
        self._none = np.empty((0, 0))

    def log_prob(self, rows: NDArray[Any], context: NDArray[Any] | None, floor: float | None) -> FloatArray:
        """rows : (n, d), context : (n, k) or (1, k) as networks see it -> (n,) in nats.

        Raises FloatingPointError for a finite row without a finite log-density.
        """
        n = len(rows)
        out, given, at = np.empty(n), self._none, slice(n)
        for start in range(0, n, PART):
            if n > PART:  # whatever must be copied is so in parts
                at = slice(start, min(start + PART, n))
            if context is not None:
                given = np.ascontiguousarray(context[at] if len(context) > 1 else context, np.float64)
            part = np.ascontiguousarray(rows[at], np.float64)
            if n < LEAST:
                self._score_rows(out, self._model.program, part, given)
            else:
                self._in_blocks(out[at], part, given)
        failed = out == np.inf
        if failed.any():
            refuse_overflow(failed, "log_prob")
        return out if floor is None else np.maximum(out, floor)

    def _in_blocks(self, out: FloatArray, rows: FloatArray, context: FloatArray) -> None:
        from nicecp.kernels._numba_block import block_address, score_blocks

        score: Any = score_blocks
        score(out, block_address(*self._kind), self._model.program, rows, context)


_kept: list[CFunction] = []  # a pointer that somebody holds somewhere must never dangle


class CFunction:
    """A log-density as C functions, compiled; code and weights stay until the process ends, since C holds addresses.

    address : of ``double f(int n, double *x)``, NaN unless n is d (plus the length of the context, which then stands
    behind the point); what SciPy's integrators call.
    point_address : of ``double f(const double *x, void *unused)``.

    Both may be called from any thread, without Python's lock. NaN where a finite point has no finite log-density.
    """

    def __init__(self, model: PointModel, floor: float, exponentiate: bool) -> None:
        from nicecp.kernels._numba_call import c_functions

        self._made_of = model, floor, exponentiate
        self._counted, self._plain = c_functions(model, floor, exponentiate)
        self.address, self.point_address = int(self._counted.address), int(self._plain.address)
        _kept.append(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return CFunction, self._made_of

    @property
    def ctypes(self) -> Any:
        """f(n, x) for ctypes: x is a pointer to doubles."""
        kind = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_int, ctypes.POINTER(ctypes.c_double))
        return kind(self.address)

    def low_level_callable(self) -> Any:
        """A scipy.LowLevelCallable of signature double (int, double *), for scipy.integrate."""
        from scipy import LowLevelCallable

        return LowLevelCallable(self.ctypes)
