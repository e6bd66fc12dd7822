"""Vector code that Numba does not write by itself: dense layers for one row, and for a block of rows.

For one row its outputs are side by side in registers, for a block of rows the rows.

LLVM cuts a vector of any width into what the machine has, and keeps sums in registers where its own vectorisation of a
loop would load and store them at every step.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nicecp.kernels._numba_native import item_size
from nicecp.kernels.jit import inlined

_SUMS = 128  # numbers that are summed at once: sixteen AVX-512 registers, which hide a multiplication's latency
_CONTRACT = ("contract",)


def _tile(width: int) -> Any:
    """The code for ``width`` outputs of a layer; sums of _SUMS / width inputs alternate and are added at the end."""
    several = max(1, min(8, _SUMS // width))

    @intrinsic
    def tile(typingctx, y, x, w, b, inputs, line, relu, like):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            y, x, w, b, inputs, line, relu, like = arguments
            real, double, word = like.type, ir.DoubleType(), ir.IntType(64)
            size = context.get_abi_sizeof(real)
            vector = ir.VectorType(double, width)
            zero = ir.Constant(vector, [0.0] * width)

            def numbers(address, kind):  # type: ignore[no-untyped-def]
                """A vector of numbers at an address, as float64."""
                where = builder.inttoptr(address, ir.VectorType(kind, width).as_pointer())
                found = builder.load(where, align=context.get_abi_sizeof(kind))
                return found if kind == double else builder.fpext(found, vector)

            def spread(number):  # type: ignore[no-untyped-def]
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
                first = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
                return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), first)

            def add_product(total, k):  # type: ignore[no-untyped-def]
                place = builder.add(x, builder.mul(k, ir.Constant(word, 8)))
                number = builder.load(builder.inttoptr(place, double.as_pointer()))
                at = builder.add(w, builder.mul(builder.mul(k, line), ir.Constant(word, size)))
                product = builder.fmul(spread(number), numbers(at, real), flags=_CONTRACT)
                builder.store(builder.fadd(builder.load(total), product, flags=_CONTRACT), total)

            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(several)]
            for total in totals:
                builder.store(zero, total)
            whole = builder.sub(inputs, builder.srem(inputs, ir.Constant(word, several)))
            with cgutils.for_range_slice(builder, ir.Constant(word, 0), whole, ir.Constant(word, several), word) as (
                k,
                _,
            ):
                for number, total in enumerate(totals):
                    add_product(total, builder.add(k, ir.Constant(word, number)))
            if several > 1:
                with cgutils.for_range_slice(builder, whole, inputs, ir.Constant(word, 1), word) as (k, _):
                    add_product(totals[0], k)
            sums = [builder.load(total) for total in totals]
            while len(sums) > 1:
                sums = [builder.fadd(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
            result = builder.fadd(sums[0], numbers(b, real))
            below = builder.fcmp_ordered("<", result, zero)  # not so for NaN, which stays
            bounded = builder.select(below, zero, result)
            result = builder.select(relu, bounded, result)
            where = builder.inttoptr(y, vector.as_pointer())
            builder.store(result, where, align=8)
            return context.get_dummy_value()

        whole = types.int64
        return types.void(whole, whole, whole, whole, whole, whole, types.boolean, like), codegen

    return tile


_tile_64, _tile_16, _tile_4, _tile_1 = (_tile(width) for width in (64, 16, 4, 1))


@inlined
def dense_row(y, x, w, b, inputs, outputs, relu, like):  # type: ignore[no-untyped-def]
    """y : (outputs,) = x : (inputs,) @ w : (inputs, outputs) + b : (outputs,), then max(y, 0) if relu; NaN stays NaN.

    y, x : addresses of float64; w, b : addresses of numbers of like's type. Sums are of float64, in a fixed order.
    """
    size = item_size(like)
    c = 0
    while outputs - c >= 64:
        _tile_64(y + 8 * c, x, w + size * c, b + size * c, inputs, outputs, relu, like)
        c += 64
    while outputs - c >= 16:
        _tile_16(y + 8 * c, x, w + size * c, b + size * c, inputs, outputs, relu, like)
        c += 16
    while outputs - c >= 4:
        _tile_4(y + 8 * c, x, w + size * c, b + size * c, inputs, outputs, relu, like)
        c += 4
    while outputs - c >= 1:
        _tile_1(y + 8 * c, x, w + size * c, b + size * c, inputs, outputs, relu, like)
        c += 1


# --- a block of rows --------------------------------------------------------------------------------------------------

BLOCK_BYTES = 128  # of one feature of a block of rows: two AVX-512 registers; 16 rows of float64, 32 of float32


def _block_tile(width: int) -> Any:
    """The code for ``width`` outputs of a layer for a block of rows, each feature a vector over the rows."""

    @intrinsic
    def tile(typingctx, y, x, w, b, inputs, line, relu, like):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            y, x, w, b, inputs, line, relu, like = arguments
            real, word = like.type, ir.IntType(64)
            size = context.get_abi_sizeof(real)
            rows = BLOCK_BYTES // size
            vector = ir.VectorType(real, rows)
            zero = ir.Constant(vector, [0.0] * rows)
            undefined = ir.Constant(vector, ir.Undefined)
            first = ir.Constant(ir.VectorType(ir.IntType(32), rows), [0] * rows)

            def spread(address):  # type: ignore[no-untyped-def]
                number = builder.load(builder.inttoptr(address, real.as_pointer()))
                one = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
                return builder.shuffle_vector(one, undefined, first)

            def beyond(address, count):  # type: ignore[no-untyped-def]
                return builder.add(address, ir.Constant(word, count))

            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(width)]
            for t, total in enumerate(totals):
                builder.store(spread(beyond(b, t * size)), total)
            stride = builder.mul(line, ir.Constant(word, size))
            with cgutils.for_range(builder, inputs, intp=word) as loop:
                place = builder.add(x, builder.mul(loop.index, ir.Constant(word, BLOCK_BYTES)))
                values = builder.load(builder.inttoptr(place, vector.as_pointer()), align=8)
                at = builder.add(w, builder.mul(loop.index, stride))
                for t, total in enumerate(totals):
                    product = builder.fmul(values, spread(beyond(at, t * size)), flags=_CONTRACT)
                    builder.store(builder.fadd(builder.load(total), product, flags=_CONTRACT), total)
            for t, total in enumerate(totals):
                result = builder.load(total)
                below = builder.fcmp_ordered("<", result, zero)  # not so for NaN, which stays
                result = builder.select(relu, builder.select(below, zero, result), result)
                where = builder.inttoptr(beyond(y, t * BLOCK_BYTES), vector.as_pointer())
                builder.store(result, where, align=8)
            return context.get_dummy_value()

        whole = types.int64
        return types.void(whole, whole, whole, whole, whole, whole, types.boolean, like), codegen

    return tile


_block_8, _block_4, _block_1 = (_block_tile(width) for width in (8, 4, 1))


@inlined
def dense_block(y, x, w, b, inputs, outputs, relu, like):  # type: ignore[no-untyped-def]
    """The same for a block of rows: y, x : addresses of BLOCK_BYTES of numbers of like's type for every feature."""
    size = item_size(like)
    c = 0
    while outputs - c >= 8:
        _block_8(y + BLOCK_BYTES * c, x, w + size * c, b + size * c, inputs, outputs, relu, like)
        c += 8
    while outputs - c >= 4:
        _block_4(y + BLOCK_BYTES * c, x, w + size * c, b + size * c, inputs, outputs, relu, like)
        c += 4
    while outputs - c >= 1:
        _block_1(y + BLOCK_BYTES * c, x, w + size * c, b + size * c, inputs, outputs, relu, like)
        c += 1
