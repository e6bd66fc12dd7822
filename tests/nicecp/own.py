"""Laws and networks that a user might write, for the tests of what is registered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import nicecp
from nicecp import NICE, CouplingLaw, CouplingNetwork, registry


class Shift(CouplingLaw):
    """y = x + scale * tanh(m): preserves volume, and one number of its own for each feature."""

    def shapes(self, k: int) -> dict[str, tuple[int, ...]]:
        return {"scale": (k,)}

    def initial(self, name: str, uniform: Any) -> Any:
        return 0.5 + 0.1 * uniform

    def forward(self, x: Any, m: Any, parameters: Any) -> Any:
        return x + parameters["scale"] * np.tanh(m), 0.0

    def inverse(self, y: Any, m: Any, parameters: Any) -> Any:
        return y - parameters["scale"] * np.tanh(m), 0.0

    def backward(self, dy: Any, dlog_det: Any, x: Any, m: Any, parameters: Any) -> Any:
        t = np.tanh(m)
        return dy, dy * parameters["scale"] * (1 - t**2), {"scale": (dy * t).sum(axis=0)}


class Stretch(CouplingLaw):
    """y = x exp(a) + b, a = tanh(u): a law with a log-determinant and no parameters."""

    outputs = 2

    def forward(self, x: Any, m: Any, parameters: Any) -> Any:
        a, b = np.tanh(m[:, ::2]), m[:, 1::2]
        return x * np.exp(a) + b, a.sum(axis=1)

    def inverse(self, y: Any, m: Any, parameters: Any) -> Any:
        a, b = np.tanh(m[:, ::2]), m[:, 1::2]
        return (y - b) * np.exp(-a), -a.sum(axis=1)

    def backward(self, dy: Any, dlog_det: Any, x: Any, m: Any, parameters: Any) -> Any:
        a, dm = np.tanh(m[:, ::2]), np.empty_like(m)
        dx = dy * np.exp(a)
        dm[:, ::2], dm[:, 1::2] = (dx * x + dlog_det[:, None]) * (1 - a**2), dy
        return dx, dm, {}


class Ramp(CouplingNetwork):
    """ReLU of a linear map, and another one: it has kinks, and says so."""

    def shapes(self, fan_in: int, fan_out: int, hidden: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"W": (fan_in, hidden[0]), "U": (hidden[0], fan_out)}

    def initial(self, name: str, uniform: Any) -> Any:
        return (2 * uniform - 1) * (0.8 if name == "W" else 0.3)

    def forward(self, x: Any, parameters: Any) -> Any:
        h = np.maximum(x @ parameters["W"], 0)
        return h @ parameters["U"], (x, h)

    def backward(self, dm: Any, saved: Any, parameters: Any) -> Any:
        x, h = saved
        dh = np.where(h > 0, dm @ parameters["U"].T, 0)
        return dh @ parameters["W"].T, {"W": x.T @ dh, "U": h.T @ dm}

    def kinks(self, x: Any, parameters: Any) -> Any:
        return x @ parameters["W"]


class Constant(CouplingNetwork):
    """m does not depend on x: dx is 0."""

    def shapes(self, fan_in: int, fan_out: int, hidden: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"c": (fan_out,)}

    def forward(self, x: Any, parameters: Any) -> Any:
        return np.tile(parameters["c"], (len(x), 1)), x.shape

    def backward(self, dm: Any, saved: Any, parameters: Any) -> Any:
        return np.zeros(saved), {"c": dm.sum(axis=0)}


def registered() -> Iterator[None]:
    """A fixture: the four are registered for one test."""
    laws, networks = dict(registry._laws), dict(registry._networks)
    nicecp.register_coupling("shift", Shift)
    nicecp.register_coupling("stretch", Stretch)
    nicecp.register_network("ramp", Ramp)
    nicecp.register_network("constant", Constant)
    yield
    for now, before in ((registry._laws, laws), (registry._networks, networks)):
        now.clear()
        now.update(before)  # type: ignore[arg-type]


COMBINATIONS = [
    ("shift", "mlp"),
    ("stretch", "mlp"),
    ("additive", "ramp"),
    ("affine", "ramp"),
    ("stretch", "ramp"),
    ("shift", "constant"),
    (("stretch", "additive", "shift", "affine"), "ramp"),
]
EACH = pytest.mark.parametrize(("law", "network"), COMBINATIONS)


def rows(n: int = 5, d: int = 5, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(n, d))


def make(law: Any, network: str, **given: Any) -> NICE:
    made = {"n_features": 5, "hidden": (6,), "n_couplings": 4, "init": "he", "seed": 3, "threads": 1, **given}
    return NICE(**made, coupling=law, network=network)
