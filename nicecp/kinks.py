"""A flow's networks in plain NumPy, for checks: where their ReLUs have their kinks, and parameters clear of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nicecp.coupling import apply_law, own_of
from nicecp.records import Parameters
from nicecp.registry import MLP, law_named, network_named
from nicecp.spec import LAWS, ModelSpec
from nicecp.spline import coupling_spline

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def rms(values: Floats) -> float:
    return float(np.sqrt((values**2).mean()))


def hidden_layers(spec: ModelSpec, parameters: Parameters, z: Floats) -> Iterator[tuple[str, Floats]]:
    """Every hidden layer's name and values before the ReLU : (n, h); of splines and registered ones their kinks.

    z : (n, d + k), the rows in the flow's input space and, if it has one, their scaled context behind them
    """
    features, context = z[:, : spec.n_features], z[:, spec.n_features :]
    parts = [features[:, columns] for columns in spec.columns]
    for k, coupling in enumerate(spec.couplings):
        index = spec.permutations[k]
        if index is not None:
            parts = np.hsplit(np.hstack(parts)[:, index], [spec.part_sizes[0]])
        own = own_of({name: parameters[f"couplings/{k}/{name}"] for name in spec.own_shapes(k)})
        y, layers = np.hstack([parts[coupling.conditions_on], context]), len(spec.dense_layers(k))
        for j in range(layers):
            name = f"couplings/{k}/layers/{j}"
            weight, bias = parameters[f"{name}/weight"], parameters[f"{name}/bias"]
            product = y @ weight
            y = product + bias
            if j < layers - 1:
                yield name, y
                y = np.maximum(product + bias, 0)  # again: the reader may have written the bias
        if coupling.network != MLP:
            network = network_named(coupling.network)
            yield from _kinks(f"couplings/{k}/network", network.kinks(y, own.network))
            y = np.asarray(network.forward(y, own.network)[0])
        changed = parts[coupling.transforms]
        if coupling.law == "spline":  # across a knot the second derivative jumps
            yield from _kinks(f"couplings/{k}/law", coupling_spline(changed, y)[1])
        if coupling.law not in LAWS:
            yield from _kinks(f"couplings/{k}/law", law_named(coupling.law).kinks(changed, y, own.law))
        parts[coupling.transforms] = apply_law(coupling.law, changed, y, own.law)


def _kinks(name: str, values: Floats | None) -> Iterator[tuple[str, Floats]]:
    if values is not None and np.size(values):
        yield name, np.asarray(values).reshape(len(values), -1)


def units_on(spec: ModelSpec, parameters: Parameters, z: Floats) -> Bools:
    """(n, all hidden units): which ReLUs are on."""
    layers = [y > 0 for _, y in hidden_layers(spec, parameters, z)]
    return np.concatenate([*layers, np.ones((len(z), 1), bool)], axis=1)


def margins(spec: ModelSpec, parameters: Parameters, z: Floats) -> Floats:
    """(n,): distance of each row's nearest unit from its kink, relative to its layer; 0 exactly is 0 in any dtype."""
    margin = np.full(len(z), np.inf)
    for _, y in hidden_layers(spec, parameters, z):
        distance = np.abs(y) / max(rms(y), np.finfo(float).tiny)
        margin = np.minimum(margin, np.where(y == 0, np.inf, distance).min(axis=1))
    return margin


def drawn_parameters(spec: ModelSpec, z: Floats, rng: np.random.Generator) -> Parameters:
    """Parameters for which every array has a gradient that differences can see and a ReLU mask matters.

    Weights as He et al. 2015 (2 / fan_in), the last layer's smaller so that the Jacobian is well conditioned. Biases
    put every second unit of each layer on and the others off in the first row, all clear of the kink.
    """
    parameters: Parameters = {}
    for name, shape in spec.parameter_shapes().items():
        dense = name.endswith("/weight") and "/layers/" in name
        size = np.sqrt((2 if dense else 0.5) / shape[0]) if len(shape) > 1 else 0.1 if "/layers/" in name else 0.4
        parameters[name] = rng.standard_normal(shape) * size
    for k in range(len(spec.couplings)):
        if spec.dense_layers(k):
            parameters[f"couplings/{k}/layers/{len(spec.dense_layers(k)) - 1}/weight"] *= 0.5
    parameters["scaling/log_scale"] = rng.uniform(0.1, 0.5, spec.n_features)
    for name, y in hidden_layers(spec, parameters, z[:1]):
        if "/layers/" not in name:
            continue
        sign = np.where(np.arange(y.shape[1]) % 2 == 0, 1, -1)
        target = sign * (0.3 + np.abs(rng.standard_normal(y.shape[1])))
        parameters[f"{name}/bias"] += target - y[0]
    return parameters
