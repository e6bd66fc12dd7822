"""The network inside a coupling: dense ReLU layers and a linear output layer (Dinh et al. 2015, section 5.1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nicecp.kernels.backend import Array, Backend

LayerReady = Callable[[int, int, int | None], None]
Layers = list[tuple[Array, Array]]  # (weight (fan_in, fan_out), bias (fan_out,)) of each layer


def mlp_forward(backend: Backend, ys: list[Array], x: Array, layers: Layers, linear: int | None = None) -> None:
    """x : (n, fan_in) -> ys[j] : (n, fan_out of layer j); layer ``linear``, the last one, is.  Pair: mlp_backward."""
    last = len(layers) - 1 if linear is None else linear
    for j, (weight, bias) in enumerate(layers):
        backend.dense_forward(ys[j], x, weight, bias, j < last)
        x = ys[j]


def mlp_backward(
    backend: Backend,
    dx: Array | None,
    grads: Layers | None,
    dys: list[Array],
    ys: list[Array],
    x: Array,
    layers: Layers,
    ready: LayerReady | None = None,
) -> None:
    """dys[-1] : (n, fan_out), the loss's gradient by the output -> dx : (n, fan_in) and the gradients of every layer.

    dys[j] for hidden layers is scratch of ys[j]'s shape; dys[-1] is left as it is. dx and grads may be None.
    ready(j, start, stop) is called as soon as the gradients of elements start..stop-1 of layer j's weight are complete
    and these elements are no longer needed; ready(j, size of the weight, None) when the bias's are. See
    Backend.dense_backward.
    """
    last = len(layers) - 1
    for j in range(last, -1, -1):
        below = dx if j == 0 else dys[j - 1]
        dw, db = grads[j] if grads is not None else (None, None)
        weight = layers[j][0]
        o = weight.shape[1]
        rows = None if ready is None else partial(_rows_ready, ready, j, o)
        backend.dense_backward(below, dw, db, dys[j], ys[j], x if j == 0 else ys[j - 1], weight, j < last, rows)
        if ready is not None:
            ready(j, weight.size, None)


def _rows_ready(ready: LayerReady, j: int, o: int, start: int, stop: int) -> None:
    ready(j, start * o, stop * o)
