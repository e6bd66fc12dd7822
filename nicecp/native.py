"""One point in microseconds: a flow's log-density as a function for compiled code, in Numba, C, C++ or Fortran.

The weights are data of one compiled function that serves every flow and is cached on disk (kernels/point.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.borders import refuse_overflow
from nicecp.kernels.backend import ALIGNMENT, PRIORS
from nicecp.kernels.point import PointModel, PointOp, Program
from nicecp.params import Layout, Views
from nicecp.preprocessing import Standardize, Step, Triangular, Zca
from nicecp.spec import LAWS, ModelSpec

FloatArray = NDArray[np.float64]

_LAWS = {law: number for number, law in enumerate(LAWS)}  # as PointOp.COUPLE counts them


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


# A step of preprocessing at a place of the scratch array -> the place of its result.
_STEPS: dict[str, Callable[[Program, int, Any], int]] = {
    "dequantize": lambda program, at, step: at,
    "standardize": _standardize,
    "zca": _zca,
    "triangular": _triangular,
}


def has_compiled_form(spec: ModelSpec, steps: Sequence[Step]) -> bool:
    """Whether point_program takes them: couplings, networks and steps that are written in Python alone have none."""
    return not spec.registered and all(step.kind in _STEPS for step in steps)


def point_program(spec: ModelSpec, views: Views, steps: Sequence[Step]) -> Program:
    """The log-density of a flow with the weights that these views show whenever it is carried out.

    Raises ValueError for a step of preprocessing, a coupling or a network that has no compiled form.
    """
    if spec.registered:
        names = ", ".join(repr(name) for name in spec.registered)
        raise ValueError(f"{names} are written in Python and have no compiled form: use log_prob")
    parts, context = spec.part_sizes, spec.n_context
    program = Program(spec.n_features, context, spec.dtype)
    at = program.x
    for step in steps:
        if step.kind not in _STEPS:
            raise ValueError(f"preprocessing step {step.kind!r} has no compiled form: use log_prob")
        at = _STEPS[step.kind](program, at, step)
        program.log_det += step.log_det
    program.add(PointOp.CHECK, at, spec.n_features)
    halves, order = [program.place(size + context) for size in parts], spec.column_order
    for place, size, index in zip(halves, parts, (order[: parts[0]], order[parts[0] :]), strict=True):
        program.add(PointOp.GATHER, place, size, at, arrays=(index,))
        if context:  # every network reads it behind the part that it conditions on
            program.add(PointOp.CONTEXT, place + size, context)
    widest = max(max(spec.layer_sizes(k)[1:]) for k in range(len(spec.couplings)))
    turns = [program.place(max(widest, *parts)) for _ in range(2)]
    for coupling, layers in zip(spec.couplings, views.couplings, strict=True):
        source = halves[coupling.conditions_on]
        for j, (weight, bias) in enumerate(layers):
            numbers = (turns[j % 2], weight.shape[0], source, weight.shape[1], j < len(layers) - 1, False)
            program.add(PointOp.DENSE, *numbers, arrays=(weight, bias))
            source = turns[j % 2]
        changed = coupling.transforms
        program.add(PointOp.COUPLE, halves[changed], parts[changed], source, _LAWS[coupling.law])
    for place, size, log_scale in zip(halves, parts, views.scaling, strict=True):
        program.add(PointOp.PRIOR, place, size, turns[0], PRIORS[spec.prior], arrays=(log_scale,))
    return program


class Snapshot(PointModel):
    """The log-density of a flow with the weights that it had: later training does not reach it."""

    def __init__(self, spec: ModelSpec, flat: NDArray[Any], steps: Sequence[Step]) -> None:
        from nicecp.kernels._numba_point import core_address

        self._made_of = spec, aligned_copy(flat), tuple(steps)
        super().__init__(point_program(spec, Layout(spec).views(self._made_of[1]), steps), core_address(spec.dtype))

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
    """A flow's log-density at a few points, with the weights that it has at the moment."""

    def __init__(self, spec: ModelSpec, views: Views, steps: Sequence[Step]) -> None:
        from nicecp.kernels._numba_point import core_address, score_rows

        self._model = PointModel(point_program(spec, views, steps), core_address(spec.dtype))
        self._score_rows: Any = score_rows
        self._context = np.empty((0, 0))

    def log_prob(self, rows: NDArray[Any], floor: float | None) -> FloatArray:
        """rows : (n, d) -> (n,) in nats; FloatingPointError for a finite row without a finite log-density."""
        out = np.empty(len(rows))
        self._score_rows(out, self._model.program, np.ascontiguousarray(rows, np.float64), self._context)
        failed = out == np.inf
        if failed.any():
            refuse_overflow(failed, "log_prob")
        return out if floor is None else np.maximum(out, floor)


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
