"""What Numba does not offer by itself: arrays at an address, SciPy's BLAS by its address, a barrier between threads.

Addresses are arguments of compiled code and not constants in it, so that the code can be cached on disk.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import get_cython_function_address, intrinsic

from nicecp.kernels.jit import inlined

_SPINS = 20_000  # looks at the barrier, some 0.1 ms, before the CPU is offered to others
_yield = types.ExternalFunction("sched_yield", types.intc())


# Names under which NumPy's BLAS may export its Fortran interface: wheels (64-bit integers), other builds of OpenBLAS,
# system libraries and MKL.
_NAMES = ("scipy_{}_64_", "{}_64_", "scipy_{}_", "{}_")


@cache
def gemm_address(dtype: Any) -> int:
    """Address of sgemm or dgemm of NumPy's own BLAS where its library exports it, else of SciPy's.

    The one that np.matmul uses is loaded already, its number of threads is the one that people set, and wheels carry a
    newer OpenBLAS in NumPy than in SciPy: products of 200 rows are a third faster (0.3.31 against 0.3.30, AVX-512).
    """
    name = {"float32": "sgemm", "float64": "dgemm"}[np.dtype(dtype).name]
    return numpy_blas(name) or scipy_blas(name)


def numpy_blas(name: str) -> int:
    """Address of a BLAS function in what NumPy is linked with; 0 where it is not to be found."""
    try:
        from numpy._core import _multiarray_umath

        library = ctypes.CDLL(_multiarray_umath.__file__)  # finds symbols of the libraries that it depends on, too
    except (ImportError, OSError):
        return 0
    for pattern in _NAMES:
        function = getattr(library, pattern.format(name), None)
        if function is not None:
            return int(ctypes.cast(function, ctypes.c_void_p).value or 0)
    return 0


def scipy_blas(name: str) -> int:
    """Address of a BLAS function by SciPy's documented way, which is always there."""
    return int(get_cython_function_address("scipy.linalg.cython_blas", name))


@intrinsic
def pointer(typingctx, address, like):  # type: ignore[no-untyped-def]
    """int64 address -> a pointer to numbers of like's type, for numba.carray."""
    kind = types.CPointer(like)

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.int64, like), codegen


@intrinsic
def item_size(typingctx, like):  # type: ignore[no-untyped-def]
    """Bytes of a number of like's type."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return context.get_constant(types.int64, context.get_abi_sizeof(context.get_value_type(like)))

    return types.int64(like), codegen


@intrinsic
def _blas_gemm(typingctx, gemm, one, ta, tb, m, n, k, a, lda, b, ldb, c, ldc):  # type: ignore[no-untyped-def]
    """C = op(A) op(B), column-major: BLAS takes every argument by its address.

    Integers are stored in 64 bits: a BLAS with 32-bit ones reads the low half of a little-endian number.
    """

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        gemm, one, ta, tb, m, n, k, a, lda, b, ldb, c, ldc = arguments
        real, word, char = one.type, ir.IntType(64), ir.IntType(8)

        def stored(value, kind):  # type: ignore[no-untyped-def]
            slot = cgutils.alloca_once(builder, kind)
            builder.store(value if value.type == kind else builder.trunc(value, kind), slot)
            return slot

        def at(address):  # type: ignore[no-untyped-def]
            return builder.inttoptr(address, real.as_pointer())

        values = [
            stored(ta, char), stored(tb, char), stored(m, word), stored(n, word), stored(k, word), stored(one, real),
            at(a), stored(lda, word), at(b), stored(ldb, word), stored(ir.Constant(real, 0.0), real), at(c),
            stored(ldc, word),
        ]  # fmt: skip
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(gemm, kind.as_pointer()), values)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(whole, one, *[whole] * 11), codegen


@inlined
def gemm_rows(gemm, one, c, ldc, a, lda, transpose_a, b, ldb, transpose_b, rows, columns, inner):  # type: ignore[no-untyped-def]
    """C : (rows, columns) = op(A) @ op(B), all row-major at addresses a, b, c, lines lda, ldb, ldc numbers apart.

    op(A) : (rows, inner), op(B) : (inner, columns). To BLAS, which counts by columns, a row-major matrix is its
    transpose: C.T = op(B).T @ op(A).T.
    """
    no, yes = 78, 84  # "N", "T"
    if rows > 0 and columns > 0:
        _blas_gemm(
            gemm, one, yes if transpose_b else no, yes if transpose_a else no, columns, rows, inner, b, ldb, a, lda, c,
            ldc,
        )  # fmt: skip


@intrinsic
def _atomic_add(typingctx, address, value):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        where = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", where, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _atomic_load(typingctx, address):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        where = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(where, "seq_cst", 8)

    return types.int64(types.int64), codegen


@inlined
def arrive(sync, count):  # type: ignore[no-untyped-def]
    """Wait until all threads' arrivals make ``count``; False if the others were called off (Crew.abort).

    sync : address of two int64, 64 bytes apart: arrivals so far, and 1 once nobody more will come.
    """
    _atomic_add(sync, 1)
    spins = 0
    while _atomic_load(sync) < count:
        if _atomic_load(sync + 64) != 0:
            return False
        spins += 1
        if spins > _SPINS:
            _yield()
    return True


@intrinsic
def number_at(typingctx, address, like):  # type: ignore[no-untyped-def]
    """The number of like's type at an address."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind = context.get_value_type(like)
        return builder.load(builder.inttoptr(arguments[0], kind.as_pointer()))

    return like(types.int64, like), codegen


@intrinsic
def put_at(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Write a number to an address."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        where = builder.inttoptr(arguments[0], arguments[1].type.as_pointer())
        builder.store(arguments[1], where)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def call_special(typingctx, function, *numbers):  # type: ignore[no-untyped-def]
    """One of SciPy's compiled special functions by its address: double f(double, ..., int), the last for Cython."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        double, whole = ir.DoubleType(), ir.IntType(32)
        values = cgutils.unpack_tuple(builder, arguments[1])
        kind = ir.FunctionType(double, [*[double] * len(values), whole])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [*values, ir.Constant(whole, 0)])

    return types.float64(types.int64, types.StarArgTuple.from_types(numbers)), codegen


@intrinsic
def call_point(typingctx, program, x, line, context, context_line):  # type: ignore[no-untyped-def]
    """The compiled function that a point's program names in its first word (kernels/point.py), called with these."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.DoubleType(), [word] * 5)
        core = builder.load(builder.inttoptr(arguments[0], word.as_pointer()))
        return builder.call(builder.inttoptr(core, kind.as_pointer()), arguments)

    whole = types.int64
    return types.float64(whole, whole, whole, whole, whole), codegen


@intrinsic
def call_block(typingctx, core, *arguments):  # type: ignore[no-untyped-def]
    """void f(int64, ...) at an address."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        values = cgutils.unpack_tuple(builder, arguments[1])
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(values))
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, types.StarArgTuple.from_types(arguments)), codegen
