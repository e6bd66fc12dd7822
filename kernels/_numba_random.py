"""Numba kernels that draw random numbers: loading batches and fills.  Philox4x32-10, Salmon et al. 2011.

The counter is (column block, row low, epoch, purpose << 24 | row high); see kernels/backend.py.
"""

from __future__ import annotations

import math

import numpy as np

from nicecp.kernels.jit import inlined, kernel

_MASK = np.uint64(0xFFFFFFFF)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_32, _24, _16, _6 = np.uint64(32), np.uint64(24), np.uint64(16), np.uint64(6)
_HALF_WORD = np.uint64(0xFFFF)
_TWO26 = 2.0**26
_UNIT52 = 2.0**-52
_UNIT24 = 2.0**-24
_UNIT16 = 2.0**-16


@inlined
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Four counter words and two key words, as uint64 below 2^32 -> four words."""
    for _ in range(10):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _32) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + _W0) & _MASK
        k1 = (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@inlined
def _key(seed):  # type: ignore[no-untyped-def]
    """The two key words of a 64-bit seed, low word first."""
    return np.uint64(seed) & _MASK, np.uint64(seed) >> _32


@inlined
def _row_words(row, purpose):  # type: ignore[no-untyped-def]
    """The second and the fourth counter word of a row of the file."""
    number = np.uint64(row)
    return number & _MASK, (np.uint64(purpose) << _24) | (number >> _32)


@inlined
def _is_padding(x0, x1, weight, i, at):  # type: ignore[no-untyped-def]
    """Whether row i of a batch, row ``at`` of the data, is none: then zeros of weight 0, else its weight is 1."""
    weight[i] = 0.0 if at < 0 else 1.0
    if at < 0:
        x0[i] = 0.0
        x1[i] = 0.0
    return at < 0


@inlined
def _uniform52(a, b):  # type: ignore[no-untyped-def]
    """Two words -> a float64 in (0, 1), never 0 or 1: 52 bits and a half."""
    return ((a >> _6) * _TWO26 + (b >> _6) + 0.5) * _UNIT52


@kernel
def load_bytes(x0, x1, weight, data, index, rows, shift, scale, epoch, seed, purpose):  # type: ignore[no-untyped-def]
    """data : (m, d) uint8 -> x0 : (n, d0), x1 : (n, d1), dequantized; weight : (n,)."""
    n = x0.shape[0]
    d = data.shape[1]
    k0, k1 = _key(seed)
    c2 = np.uint64(epoch)
    for i in range(n):
        at = index[i]
        if _is_padding(x0, x1, weight, i, at):
            continue
        c1, c3 = _row_words(rows[i], purpose)
        for block in range((d + 7) // 8):
            w0, w1, w2, w3 = _philox(np.uint64(block), c1, c2, c3, k0, k1)
            words = (w0, w1, w2, w3)
            first = block * 8
            for j in range(4):
                even = first + 2 * j
                if even < d:
                    value = np.int64(data[at, even]) * 65536 + np.int64(words[j] & _HALF_WORD)
                    x0[i, even // 2] = shift[even] + scale[even] * (value * _UNIT24)
                if even + 1 < d:
                    value = np.int64(data[at, even + 1]) * 65536 + np.int64(words[j] >> _16)
                    x1[i, even // 2] = shift[even + 1] + scale[even + 1] * (value * _UNIT24)


@kernel
def load_floats(x0, x1, weight, data, index, shift, scale):  # type: ignore[no-untyped-def]
    """data : (m, d) float -> x0 : (n, d0), x1 : (n, d1), standardised in float64; weight : (n,)."""
    n = x0.shape[0]
    for i in range(n):
        at = index[i]
        if _is_padding(x0, x1, weight, i, at):
            continue
        for c in range(x0.shape[1]):
            x0[i, c] = (data[at, 2 * c] - shift[2 * c]) * scale[2 * c]
        for c in range(x1.shape[1]):
            x1[i, c] = (data[at, 2 * c + 1] - shift[2 * c + 1]) * scale[2 * c + 1]


@kernel
def load_bytes_ordered(x0, x1, weight, data, index, rows, place, shift, scale, epoch, seed, purpose):  # type: ignore[no-untyped-def]
    """As load_bytes, for any partition: column c of data goes to column place[c] of x0 and x1 side by side."""
    n, d0 = x0.shape
    d = data.shape[1]
    k0, k1 = _key(seed)
    c2 = np.uint64(epoch)
    for i in range(n):
        at = index[i]
        if _is_padding(x0, x1, weight, i, at):
            continue
        c1, c3 = _row_words(rows[i], purpose)
        for block in range((d + 7) // 8):
            words = _philox(np.uint64(block), c1, c2, c3, k0, k1)
            for c in range(block * 8, min(block * 8 + 8, d)):
                word = words[c % 8 // 2]
                bits = (word >> _16) if c % 2 else (word & _HALF_WORD)
                value = np.int64(data[at, c]) * 65536 + np.int64(bits)
                x = shift[c] + scale[c] * (value * _UNIT24)
                to = place[c]
                if to < d0:
                    x0[i, to] = x
                else:
                    x1[i, to - d0] = x


@kernel
def load_floats_ordered(x0, x1, weight, data, index, order, shift, scale):  # type: ignore[no-untyped-def]
    """As load_floats, for any partition: x0 gets the columns order[:d0], x1 the others."""
    n, d0 = x0.shape
    for i in range(n):
        at = index[i]
        if _is_padding(x0, x1, weight, i, at):
            continue
        for c in range(d0):
            x0[i, c] = (data[at, order[c]] - shift[order[c]]) * scale[order[c]]
        for c in range(x1.shape[1]):
            source = order[d0 + c]
            x1[i, c] = (data[at, source] - shift[source]) * scale[source]


@kernel
def fill_uniform(out, seed, purpose, epoch, first_row):  # type: ignore[no-untyped-def]
    """out : (n, k) = 16 bits * 2^-16."""
    n, k = out.shape
    k0, k1 = _key(seed)
    for i in range(n):
        c1, c3 = _row_words(first_row + i, purpose)
        for block in range((k + 7) // 8):
            words = _philox(np.uint64(block), c1, np.uint64(epoch), c3, k0, k1)
            for j in range(4):
                c = block * 8 + 2 * j
                if c < k:
                    out[i, c] = (words[j] & _HALF_WORD) * _UNIT16
                if c + 1 < k:
                    out[i, c + 1] = (words[j] >> _16) * _UNIT16


@kernel
def fill_normal(out, seed, purpose, epoch, first_row):  # type: ignore[no-untyped-def]
    """out : (n, k) standard normal, Box-Muller in float64."""
    n, k = out.shape
    k0, k1 = _key(seed)
    for i in range(n):
        c1, c3 = _row_words(first_row + i, purpose)
        for block in range((k + 1) // 2):
            a, b, c, d = _philox(np.uint64(block), c1, np.uint64(epoch), c3, k0, k1)
            radius = math.sqrt(-2.0 * math.log(_uniform52(a, b)))
            angle = 2.0 * math.pi * _uniform52(c, d)
            out[i, 2 * block] = radius * math.cos(angle)
            if 2 * block + 1 < k:
                out[i, 2 * block + 1] = radius * math.sin(angle)


@kernel
def fill_logistic(out, seed, purpose, epoch, first_row):  # type: ignore[no-untyped-def]
    """out : (n, k) standard logistic, log(u / (1 - u)) in float64."""
    n, k = out.shape
    k0, k1 = _key(seed)
    for i in range(n):
        c1, c3 = _row_words(first_row + i, purpose)
        for block in range((k + 1) // 2):
            a, b, c, d = _philox(np.uint64(block), c1, np.uint64(epoch), c3, k0, k1)
            u = _uniform52(a, b)
            out[i, 2 * block] = math.log(u / (1.0 - u))
            if 2 * block + 1 < k:
                v = _uniform52(c, d)
                out[i, 2 * block + 1] = math.log(v / (1.0 - v))
