"""Where every parameter lives in the flat buffer.

One buffer, every view on a 256-byte boundary, grouped by coupling: an optimiser step, a communication bucket and a
checkpoint are each a range of it. Gradients and moments have the same layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nicecp.kernels.backend import ALIGNMENT, Array, Backend, Purpose
from nicecp.records import Parameters
from nicecp.spec import ModelSpec


@dataclass(frozen=True)
class Range:
    """Elements [offset, offset + size) of the flat buffer."""

    offset: int
    size: int


@dataclass(frozen=True)
class Views:
    """Views into one flat buffer: couplings[k][j] = (weight (fan_in, fan_out), bias (fan_out,)); scaling."""

    couplings: list[list[tuple[Array, Array]]]
    scaling: tuple[Array, Array]


class Layout:
    """Offsets of every parameter for one architecture."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        unit = ALIGNMENT // np.dtype(spec.dtype).itemsize
        self._shapes: list[tuple[int, tuple[int, ...]]] = []
        self.layers: list[list[Range]] = []  # one range per dense layer: weight and bias
        self.couplings: list[Range] = []
        position = 0

        def place(*shape: int) -> None:
            nonlocal position
            self._shapes.append((position, shape))
            position += -(-int(np.prod(shape)) // unit) * unit

        for k in range(len(spec.couplings)):
            sizes, first, layers = spec.layer_sizes(k), position, []
            for fan_in, fan_out in pairwise(sizes):
                start = position
                place(fan_in, fan_out)
                place(fan_out)
                layers.append(Range(start, position - start))
            self.layers.append(layers)
            self.couplings.append(Range(first, position - first))
        first = position
        for size in spec.part_sizes:
            place(size)
        self.scaling = Range(first, position - first)
        self.size = position

    def views(self, flat: Array) -> Views:
        """flat : (size,) -> views that share its memory."""
        arrays = [flat[start : start + int(np.prod(shape))].reshape(shape) for start, shape in self._shapes]
        couplings, at = [], 0
        for layers in self.layers:
            couplings.append([(arrays[at + 2 * j], arrays[at + 2 * j + 1]) for j in range(len(layers))])
            at += 2 * len(layers)
        return Views(couplings, (arrays[at], arrays[at + 1]))

    def to_host(self, backend: Backend, flat: Array) -> Parameters:
        """Named host copies, as ModelSpec.parameter_shapes: the log-scale in data order."""
        views = self.views(backend.copy_out(flat))
        named: Parameters = {}
        for k, layers in enumerate(views.couplings):
            for j, (weight, bias) in enumerate(layers):
                named[f"couplings/{k}/layers/{j}/weight"] = weight
                named[f"couplings/{k}/layers/{j}/bias"] = bias
        log_scale = np.empty(self.spec.n_features, self.spec.dtype)
        for columns, part in zip(self.spec.columns, views.scaling, strict=True):
            log_scale[columns] = part
        named["scaling/log_scale"] = log_scale
        return named

    def from_host(self, backend: Backend, flat: Array, named: Parameters) -> None:
        """The inverse of to_host, cast to the flow's dtype.

        Raises
        ------
        ValueError
            A name is missing or unknown, or a shape is not the architecture's.
        """
        shapes = self.spec.parameter_shapes()
        if named.keys() != shapes.keys():
            odd = sorted(named.keys() ^ shapes.keys())
            raise ValueError(f"parameters do not fit the architecture: {', '.join(odd[:3])} missing or unknown")
        for name, shape in shapes.items():
            if np.shape(named[name]) != shape:
                raise ValueError(f"parameter {name}: expected shape {shape}, got {np.shape(named[name])}")
        views = self.views(flat)
        for k, layers in enumerate(views.couplings):
            for j, (weight, bias) in enumerate(layers):
                backend.copy_in(weight, named[f"couplings/{k}/layers/{j}/weight"])
                backend.copy_in(bias, named[f"couplings/{k}/layers/{j}/bias"])
        for columns, log_scale in zip(self.spec.columns, views.scaling, strict=True):
            backend.copy_in(log_scale, named["scaling/log_scale"][columns])


def initial_parameters(backend: Backend, spec: ModelSpec, seed: int, init: str) -> Parameters:
    """Named initial values in the flow's dtype; biases and log-scale are 0.

    init "paper": every weight uniform in [-0.01, 0.01), as in the authors' configuration files. init "he": weights of
    hidden layers uniform in +-sqrt(6 / fan_in) (He et al. 2015), which small networks on tables train from faster; the
    last layer of each network as "paper", so that a fresh flow is close to the identity either way. Drawn in float64,
    so that flows of both dtypes start from the same values up to rounding.
    """
    if init not in ("paper", "he"):
        raise ValueError(f"unknown init {init!r}: expected 'paper' or 'he'")
    named: Parameters = {name: np.zeros(shape, spec.dtype) for name, shape in spec.parameter_shapes().items()}
    number = 0
    for k, coupling in enumerate(spec.couplings):
        for j in range(len(coupling.hidden) + 1):
            weight = named[f"couplings/{k}/layers/{j}/weight"]
            hidden = init == "he" and j < len(coupling.hidden)
            bound = float(np.sqrt(6.0 / weight.shape[0])) if hidden else 0.01
            draw = backend.alloc(weight.shape, np.float64)
            backend.fill_uniform(draw, seed, Purpose.INIT, number)
            uniform = backend.copy_out(draw)
            uniform *= 2.0 * bound
            uniform -= bound
            weight[...] = uniform
            number += 1
    return named
