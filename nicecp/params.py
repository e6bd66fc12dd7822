"""Where every parameter lives in the flat buffer.

One buffer, every view on a 256-byte boundary, grouped by coupling: an optimiser step, a communication bucket and a
checkpoint are each a range of it. Gradients and moments have the same layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nicecp.kernels.backend import ALIGNMENT, Array, Backend, Purpose
from nicecp.records import Parameters
from nicecp.registry import law_named, network_named
from nicecp.spec import ModelSpec


@dataclass(frozen=True)
class Range:
    """Elements [offset, offset + size) of the flat buffer."""

    offset: int
    size: int


@dataclass(frozen=True)
class Views:
    """Views into one flat buffer: couplings[k][j] = (weight (fan_in, fan_out), bias (fan_out,)); scaling.

    own[k] : parameters of coupling k's registered network and law, as ModelSpec.own_shapes names them
    """

    couplings: list[list[tuple[Array, Array]]]
    scaling: tuple[Array, Array]
    own: list[dict[str, Array]]


class Layout:
    """Offsets of every parameter for one architecture."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        unit = ALIGNMENT // np.dtype(spec.dtype).itemsize
        self._shapes: list[tuple[int, tuple[int, ...]]] = []
        self.layers: list[list[Range]] = []  # one range per dense layer: weight and bias
        self.own: list[Range] = []  # what a registered network and law have
        self.couplings: list[Range] = []
        position = 0

        def place(*shape: int) -> None:
            nonlocal position
            self._shapes.append((position, shape))
            position += -(-int(np.prod(shape)) // unit) * unit

        for k in range(len(spec.couplings)):
            first, layers = position, []
            for fan_in, fan_out in spec.dense_layers(k):
                start = position
                place(fan_in, fan_out)
                place(fan_out)
                layers.append(Range(start, position - start))
            self.layers.append(layers)
            start = position
            for shape in spec.own_shapes(k).values():
                place(*shape)
            self.own.append(Range(start, position - start))
            self.couplings.append(Range(first, position - first))
        first = position
        for size in spec.part_sizes:
            place(size)
        self.scaling = Range(first, position - first)
        self.size = position

    def views(self, flat: Array) -> Views:
        """flat : (size,) -> views that share its memory."""
        arrays = [flat[start : start + int(np.prod(shape))].reshape(shape) for start, shape in self._shapes]
        couplings, own, at = [], [], 0
        for k, layers in enumerate(self.layers):
            couplings.append([(arrays[at + 2 * j], arrays[at + 2 * j + 1]) for j in range(len(layers))])
            at += 2 * len(layers)
            names = list(self.spec.own_shapes(k))
            own.append(dict(zip(names, arrays[at : at + len(names)], strict=True)))
            at += len(names)
        return Views(couplings, (arrays[at], arrays[at + 1]), own)

    def to_host(self, backend: Backend, flat: Array) -> Parameters:
        """Named host copies, as ModelSpec.parameter_shapes: the log-scale in data order."""
        views = self.views(backend.copy_out(flat))
        named: Parameters = {}
        for k, layers in enumerate(views.couplings):
            for j, (weight, bias) in enumerate(layers):
                named[f"couplings/{k}/layers/{j}/weight"] = weight
                named[f"couplings/{k}/layers/{j}/bias"] = bias
            named |= {f"couplings/{k}/{name}": array for name, array in views.own[k].items()}
        log_scale = np.empty(self.spec.n_features, self.spec.dtype)
        for columns, part in zip(self.spec.latent_columns, views.scaling, strict=True):
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
            for name, array in views.own[k].items():
                backend.copy_in(array, named[f"couplings/{k}/{name}"])
        for columns, log_scale in zip(self.spec.latent_columns, views.scaling, strict=True):
            backend.copy_in(log_scale, named["scaling/log_scale"][columns])


INITS = ("paper", "he", "table")
# log s where s x, x standard normal, has the greatest mean log-density under the prior.
NORMAL_SCALE = {"gaussian": 0.0, "logistic": 0.559}


def initial_parameters(backend: Backend, spec: ModelSpec, seed: int, init: str) -> Parameters:
    """Named initial values in the flow's dtype; biases are 0, and so are log-scales unless init is "table".

    init "paper": every weight uniform in [-0.01, 0.01), as in the authors' configuration files. init "he": weights of
    hidden layers uniform in +-sqrt(6 / fan_in) (He et al. 2015), which small networks on tables train from faster; the
    last layer of each network as "paper", so that a fresh flow is close to the identity either way. init "table": the
    weights of "he", and the scale by which standard normal columns are likeliest under the prior. Drawn in float64, so
    that flows of both dtypes start from the same values up to rounding.
    """
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}: expected {', '.join(map(repr, INITS[:-1]))} or {INITS[-1]!r}")
    named: Parameters = {name: np.zeros(shape, spec.dtype) for name, shape in spec.parameter_shapes().items()}
    number = 0

    def uniform(shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Numbers in [0, 1) that depend on the seed and on how many arrays were drawn before."""
        nonlocal number
        draw = backend.alloc((shape[0], math.prod(shape[1:])), np.float64)
        backend.fill_uniform(draw, seed, Purpose.INIT, number)
        number += 1
        return backend.copy_out(draw).reshape(shape)

    for k, coupling in enumerate(spec.couplings):
        layers = len(spec.dense_layers(k))
        for j in range(layers):
            weight = named[f"couplings/{k}/layers/{j}/weight"]
            hidden = init != "paper" and j < layers - 1
            bound = float(np.sqrt(6.0 / weight.shape[0])) if hidden else 0.01
            drawn = uniform(weight.shape)
            drawn *= 2.0 * bound
            drawn -= bound
            weight[...] = drawn
        for name, shape in spec.own_shapes(k).items():
            owner, _, key = name.partition("/")
            maker = network_named(coupling.network) if owner == "network" else law_named(coupling.law)
            fresh = maker.initial(key, uniform(shape))
            if np.shape(fresh) != shape:
                raise ValueError(f"initial values of {name} have shape {np.shape(fresh)}, expected {shape}")
            named[f"couplings/{k}/{name}"][...] = fresh
    if init == "table":
        named["scaling/log_scale"][...] = NORMAL_SCALE[spec.prior]
    return named
