"""Numba kernels that move columns: context and weights of rows to where they are needed, features to other halves."""

from __future__ import annotations

from nicecp.kernels.jit import kernel


@kernel
def gather(out, source, index):  # type: ignore[no-untyped-def]
    """out : (n, k) = source : (m, k) at the rows index : (n,), cast to out's dtype; 0 where the index is negative.

    index may be shorter: what is missing counts as negative.
    """
    for i in range(out.shape[0]):
        at = index[i] if i < index.shape[0] else -1
        if at < 0:
            out[i] = 0.0
            continue
        for c in range(out.shape[1]):
            out[i, c] = source[at, c]


@kernel
def copy_columns(out, out_start, x, x_start, count):  # type: ignore[no-untyped-def]
    """Columns out_start, ... of out : (n, ·) = ``count`` columns of x : (n, ·) from x_start on."""
    for i in range(out.shape[0]):
        for c in range(count):
            out[i, out_start + c] = x[i, x_start + c]


@kernel
def permute(y0, y1, x0, x1, index):  # type: ignore[no-untyped-def]
    """y0 : (n, d0), y1 : (n, d1), column c of both = column index[c] of x0 : (n, d0) and x1 : (n, d1)."""
    d0 = x0.shape[1]
    for i in range(x0.shape[0]):
        for c in range(index.shape[0]):
            at = index[c]
            value = x0[i, at] if at < d0 else x1[i, at - d0]
            if c < d0:
                y0[i, c] = value
            else:
                y1[i, c - d0] = value
