"""Couplings and networks of a user's own, written in NumPy and registered under names (docs/extending.md).

The paper allows any function as the m of a coupling, and any invertible law (section 3.2). What is registered runs on
the CPU, called from inside the recorded step; its parameters live with all others in the flow's buffer, optimiser and
checkpoints. A checkpoint holds names and numbers alone: to load one, register the same names first.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]  # float32 or float64, the flow's
Named = Mapping[str, Values]
Shapes = Mapping[str, tuple[int, ...]]

BUILT_IN_LAWS = ("additive", "multiplicative", "affine", "spline")
MLP = "mlp"  # the built-in network: dense ReLU layers, the last one linear
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class _Registered:
    """What laws and networks share."""

    def initial(self, name: str, uniform: NDArray[np.float64]) -> NDArray[Any]:
        """A fresh parameter from numbers uniform in [0, 1), of its shape.

        By default -0.01 to 0.01 for arrays of two dimensions or more, as the paper's weights, and 0 for others.
        """
        return 0.02 * uniform - 0.01 if uniform.ndim >= 2 else np.zeros(uniform.shape)


class CouplingLaw(_Registered, ABC):
    """y = g(x; m): what a coupling does to the part that it changes, row by row, given its network's output.

    Legend: n rows, k features changed; x, y : (n, k), m : (n, outputs * k), log_det : (n,) in nats, or one number.
    Arguments are read-only and of the flow's dtype; results are cast to it. ``parameters`` are those of ``shapes``.
    """

    outputs: ClassVar[int] = 1  # numbers of m for each feature

    def shapes(self, k: int) -> Shapes:
        """Names and shapes of the law's own parameters, for k features; none by default."""
        return {}

    @abstractmethod
    def forward(self, x: Values, m: Values, parameters: Named) -> tuple[Values, Any]:
        """-> y, log abs det dy/dx."""

    @abstractmethod
    def inverse(self, y: Values, m: Values, parameters: Named) -> tuple[Values, Any]:
        """The inverse of forward -> x, log abs det dx/dy."""

    @abstractmethod
    def backward(
        self, dy: Values, dlog_det: NDArray[np.float64], x: Values, m: Values, parameters: Named
    ) -> tuple[Values, Values, Named]:
        """dy : (n, k), dlog_det : (n,), the loss's gradients by forward's results -> dx, dm, and by each parameter."""

    def kinks(self, x: Values, m: Values, parameters: Named) -> Values | None:
        """(n, any) numbers that change their sign where forward is not smooth, for gradient checks; None: nowhere."""
        return None


class CouplingNetwork(_Registered, ABC):
    """m(x): what a coupling reads from the part that it leaves as it is, any function of each row.

    Legend: n rows; x : (n, fan_in), m : (n, fan_out). Arguments are read-only and of the flow's dtype; results are cast
    to it. ``parameters`` are those of ``shapes``.
    """

    @abstractmethod
    def shapes(self, fan_in: int, fan_out: int, hidden: tuple[int, ...]) -> Shapes:
        """Names and shapes of the parameters. hidden : the coupling's hidden sizes, to be used as one likes."""

    @abstractmethod
    def forward(self, x: Values, parameters: Named) -> tuple[Values, Any]:
        """-> m, and whatever backward needs of this pass."""

    @abstractmethod
    def backward(self, dm: Values, saved: Any, parameters: Named) -> tuple[Values, Named]:
        """dm : (n, fan_out), the loss's gradient by m -> that by x : (n, fan_in), and by each parameter."""

    def kinks(self, x: Values, parameters: Named) -> Values | None:
        """(n, any) numbers that change their sign where forward is not smooth, for gradient checks; None: nowhere."""
        return None


_laws: dict[str, CouplingLaw] = {}
_networks: dict[str, CouplingNetwork] = {}


def register_coupling(name: str, kind: type[CouplingLaw]) -> None:
    """Make a law known as ``coupling=name``, in this process.

    name : lower-case letters, digits, - and _, from a letter on
    kind : a subclass of CouplingLaw whose objects are made without arguments

    Raises ValueError for a name that is built in, taken by another class, or not one; TypeError for another kind.
    """
    _register(name, kind, CouplingLaw, _laws, (*BUILT_IN_LAWS, MLP))
    outputs = _laws[name].outputs
    if not isinstance(outputs, int) or outputs < 1:
        del _laws[name]
        raise ValueError(f"coupling {name!r}: outputs must be a whole number of at least 1, got {outputs!r}")


def register_network(name: str, kind: type[CouplingNetwork]) -> None:
    """Make a network known as ``network=name``, in this process; kind : a subclass of CouplingNetwork.

    Raises as register_coupling.
    """
    _register(name, kind, CouplingNetwork, _networks, (*BUILT_IN_LAWS, MLP))


def _register(name: str, kind: Any, base: type, known: dict[str, Any], built_in: tuple[str, ...]) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: lower-case letters, digits, - and _, from a letter on, at most 64")
    if name in built_in:
        raise ValueError(f"{name!r} is built in: choose another name")
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise TypeError(f"{name!r}: expected a subclass of nicecp.{base.__name__}, got {kind!r}")
    before = type(known[name]) if name in known else None
    # A notebook's cell that is run again makes the class anew.
    if before is not None and (before.__module__, before.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"{name!r} is registered already, as {before.__module__}.{before.__qualname__}")
    known[name] = kind()


def is_law(name: str) -> bool:
    """Whether a law of this name is built in or registered."""
    return name in BUILT_IN_LAWS or name in _laws


def is_network(name: str) -> bool:
    """Whether a network of this name is built in or registered."""
    return name == MLP or name in _networks


def law_named(name: str) -> CouplingLaw:
    """The registered law; ValueError that names it if there is none."""
    if name not in _laws:
        known = ", ".join((*BUILT_IN_LAWS, *sorted(_laws)))
        remedy = f"nicecp.register_coupling({name!r}, ...) makes it known"
        raise ValueError(f"unknown coupling law {name!r}: expected one of {known}; {remedy}")
    return _laws[name]


def network_named(name: str) -> CouplingNetwork:
    """The registered network; ValueError that names it if there is none."""
    if name not in _networks:
        known = ", ".join((MLP, *sorted(_networks)))
        remedy = f"nicecp.register_network({name!r}, ...) makes it known"
        raise ValueError(f"unknown network {name!r}: expected one of {known}; {remedy}")
    return _networks[name]


def checked_shapes(owner: str, kind: Any, *sizes: Any) -> dict[str, tuple[int, ...]]:
    """What ``shapes`` of a law or network gives for these sizes; ValueError if it fails, or for odd names or shapes."""
    try:
        given = {name: tuple(int(length) for length in shape) for name, shape in dict(kind.shapes(*sizes)).items()}
    except Exception as error:  # a user's own code
        shown = ", ".join(str(size) for size in sizes)
        raise ValueError(
            f"{owner} has no parameters for the sizes {shown} ({type(error).__name__}: {error})"
        ) from error
    for name, shape in given.items():
        if not isinstance(name, str) or not _PARAMETER.fullmatch(name):
            raise ValueError(f"{owner}: {name!r} is no name of a parameter: letters, digits and _")
        if not shape or min(shape) < 1:
            raise ValueError(f"{owner}: parameter {name!r} must have lengths of at least 1, got shape {shape}")
    return given
