"""A point's log-density as a function of other people's compiled code: a Numba dispatcher, and C functions.

A model's address in compiled code is that of this process. Numba calls this a dynamic global, and keeps code that
contains one, in whatever function, out of its caches on disk: another process never finds a stale address there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba import float64, int32, types
from numba.core.errors import TypingError
from numba.core.imputils import lower_constant
from numba.core.registry import CPUDispatcher
from numba.extending import intrinsic, models, register_model, typeof_impl

from nicecp.kernels._numba_native import call_point
from nicecp.kernels.jit import c_function, inlined
from nicecp.kernels.point import PointModel

FAILED = "a finite point has no finite log-density: the flow overflows there"


class _ModelType(types.Opaque):
    """Numba's type of a PointModel."""


_model_type = _ModelType("nicecp.PointModel")
register_model(_ModelType)(models.OpaqueModel)


@typeof_impl.register(PointModel)
def _typeof_model(value: PointModel, c: Any) -> Any:
    return _model_type


@lower_constant(_ModelType)  # type: ignore[untyped-decorator]
def _constant_model(context: Any, builder: Any, kind: Any, value: PointModel) -> Any:
    return context.add_dynamic_addr(builder, value.program.ctypes.data, info="nicecp.PointModel")


@intrinsic
def _program_of(typingctx, model):  # type: ignore[no-untyped-def]
    """The address of a model's program."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ptrtoint(arguments[0], context.get_value_type(types.int64))

    return types.int64(model), codegen


@intrinsic
def _address(typingctx, x):  # type: ignore[no-untyped-def]
    """Of a vector's first number; other arrays are refused when the call is compiled."""
    if not (isinstance(x, types.Array) and x.ndim == 1 and x.dtype == types.float64):
        raise TypingError(f"log_prob takes 1-D arrays of float64, not {x}")

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(x)(context, builder, arguments[0]).data
        return builder.ptrtoint(data, context.get_value_type(types.int64))

    return types.int64(x), codegen


class PointFunction(CPUDispatcher):
    """A Numba dispatcher of one model's log-density.

    Code that calls it has the model's address in it; Numba keeps a callee, and this the model, for as long as any
    function that was compiled with it. Pickled, it is model and floor.
    """

    def __init__(self, py_func: Any, model: PointModel, floor: float, make: Callable[..., Any]) -> None:
        super().__init__(py_func, targetoptions={"nopython": True, "nogil": True, "error_model": "numpy"})
        self._model, self._floor, self._make = model, floor, make

    def __reduce__(self) -> tuple[Any, ...]:
        return self._make, (self._model, self._floor)


def point_function(model: PointModel, floor: float) -> PointFunction:
    """log_prob(x), or log_prob(x, context) for a model with a context, of 1-D float64 arrays, to call or to compile in.

    Raises ValueError where x or context has another length than the model's, FloatingPointError where a finite point
    has no finite log-density, Numba's TypingError for other arrays. Nothing is below the floor.
    """
    d, k = model.features, model.context
    says_d, says_k = f"x must have length {d}, that of the flow's features", f"the context must have length {k}"

    def log_prob(x):  # type: ignore[no-untyped-def]
        if x.shape[0] != d:
            raise ValueError(says_d)
        value = call_point(_program_of(model), _address(x), x.strides[0], 0, 0)
        if value == math.inf:
            raise FloatingPointError(FAILED)
        return floor if value < floor else value

    def conditional(x, context):  # type: ignore[no-untyped-def]
        if x.shape[0] != d:
            raise ValueError(says_d)
        if context.shape[0] != k:
            raise ValueError(says_k)
        value = call_point(_program_of(model), _address(x), x.strides[0], _address(context), context.strides[0])
        if value == math.inf:
            raise FloatingPointError(FAILED)
        return floor if value < floor else value

    conditional.__name__ = "log_prob"
    return PointFunction(log_prob if k == 0 else conditional, model, floor, point_function)


def c_functions(model: PointModel, floor: float, exponentiate: bool) -> tuple[Any, Any]:
    """double f(int n, double *x) and double f(const double *x, void *unused); x holds the point, then the context.

    NaN where n is not the number of these, and where a finite point has no finite log-density: C has no exceptions.
    """
    d, k = model.features, model.context
    size, behind = d + k, 8 * d

    @inlined
    def value_at(x):  # type: ignore[no-untyped-def]
        value = call_point(_program_of(model), x, 8, x + behind, 8)
        if value == math.inf:
            return math.nan
        value = floor if value < floor else value
        return math.exp(value) if exponentiate else value

    def counted(n, x):  # type: ignore[no-untyped-def]
        return value_at(x) if n == size else math.nan

    def plain(x, unused):  # type: ignore[no-untyped-def]
        return value_at(x)

    # An address travels like a 64-bit integer in the calling conventions of every 64-bit system that Numba knows.
    return (
        c_function(float64(int32, types.int64), counted, cached=False),
        c_function(float64(types.int64, types.int64), plain, cached=False),
    )
