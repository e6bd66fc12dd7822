"""Straight-line code on vectors of float64, written with Python's operators: what LLVM does not vectorise by itself.

A function of Rows and Vectors is called once, when Numba compiles what it is part of, and writes the instructions down;
loops in it are unrolled. LLVM cuts vectors of WIDTH numbers into what the machine has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WIDTH = 8  # numbers: one AVX-512 register
_CONTRACT = ("contract",)
_DOUBLE, _WORD, _BIT = ir.DoubleType(), ir.IntType(64), ir.IntType(1)
_VECTOR, _WORDS, _BITS = (ir.VectorType(kind, WIDTH) for kind in (_DOUBLE, _WORD, _BIT))
_LOG2E = 1.0 / math.log(2.0)
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # sum is log 2 to 86 bits (Cody & Waite)
_ROUND = 1.5 * 2.0**52  # added to a small number it leaves the nearest integer in the lowest bits


class Vector:
    """WIDTH numbers of float64 in the function that is being compiled."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def like(self, other: Vector | float) -> Vector:
        """A number, in every place."""
        if isinstance(other, Vector):
            return other
        return Vector(self.builder, ir.Constant(_VECTOR, [ir.Constant(_DOUBLE, float(other))] * WIDTH))

    def _with(self, name: str, a: Vector | float, b: Vector | float) -> Vector:
        operation = getattr(self.builder, name)
        return Vector(self.builder, operation(self.like(a).value, self.like(b).value, flags=_CONTRACT))

    def __add__(self, other: Number) -> Vector:
        return self._with("fadd", self, other)

    __radd__ = __add__

    def __sub__(self, other: Number) -> Vector:
        return self._with("fsub", self, other)

    def __rsub__(self, other: Number) -> Vector:
        return self._with("fsub", other, self)

    def __mul__(self, other: Number) -> Vector:
        return self._with("fmul", self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Number) -> Vector:
        return self._with("fdiv", self, other)

    def __rtruediv__(self, other: Number) -> Vector:
        return self._with("fdiv", other, self)

    def compare(self, sign: str, other: Number) -> Mask:
        """False wherever one of both is NaN."""
        return self.builder.fcmp_ordered(sign, self.value, self.like(other).value)

    def function(self, name: str) -> Vector:
        """One of LLVM's: fabs, sqrt."""
        kind = ir.FunctionType(_VECTOR, [_VECTOR])
        declared = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.v{WIDTH}f64")
        return Vector(self.builder, self.builder.call(declared, [self.value]))


Number: TypeAlias = "Vector | float"
Mask: TypeAlias = Any  # WIDTH bits


def where(mask: Mask, a: Vector, b: Number) -> Vector:
    return Vector(a.builder, a.builder.select(mask, a.value, a.like(b).value))


ALWAYS, NEVER = (ir.Constant(_BITS, [bit] * WIDTH) for bit in (1, 0))


def exp_minus(a: Vector) -> Vector:
    """exp(-a) for a >= 0, relative error below 4e-16; NaN stays NaN, 0 beyond 708.  As _numba_layers._exp_minus."""
    far = a.compare(">", 708.0)
    t = 0.0 - where(far, a.like(708.0), a)
    shifted = t * _LOG2E + _ROUND
    k = shifted - _ROUND
    r = (t - k * _LN2_HIGH) - k * _LN2_LOW
    p = a.like(1.0 / math.factorial(13))  # Taylor, |r| <= log(2) / 2: truncation below 5e-18
    for n in range(12, -1, -1):
        p = p * r + 1.0 / math.factorial(n)
    builder = a.builder

    def words(number: int) -> Any:
        return ir.Constant(_WORDS, [number] * WIDTH)

    exponent = builder.add(builder.bitcast(shifted.value, _WORDS), words(1023))
    power = Vector(builder, builder.bitcast(builder.shl(exponent, words(52)), _VECTOR))
    return where(far, a.like(0.0), p * power)


def log_1p(t: Vector) -> Vector:
    """log(1 + t) for 0 <= t <= 1, to rounding, as 2 atanh(t / (2 + t))."""
    q = t / (2.0 + t)
    s = q * q
    p = t.like(1.0 / 33.0)  # the next term is below 2e-17
    for n in range(31, 0, -2):
        p = p * s + 1.0 / n
    return 2.0 * q * p


class Rows:
    """Lines of an array of float64, each so many bytes behind the last one; WIDTH numbers of each."""

    def __init__(self, builder: Any, address: Any, line: Any) -> None:
        self._builder, self._address, self._line = builder, address, line

    def _at(self, row: int) -> Any:
        skipped = self._builder.mul(self._line, ir.Constant(_WORD, row))
        return self._builder.inttoptr(self._builder.add(self._address, skipped), _VECTOR.as_pointer())

    def __getitem__(self, row: int) -> Vector:
        return Vector(self._builder, self._builder.load(self._at(row), align=8))

    def __setitem__(self, row: int, values: Vector) -> None:
        self._builder.store(values.value, self._at(row), align=8)


def on_rows(function: Callable[[Rows], None]) -> Any:
    """A function of Rows as one for compiled code: (address, bytes from line to line)."""

    @intrinsic
    def compiled(typingctx, address, line):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            function(Rows(builder, *arguments))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return compiled
