"""Registered laws and networks inside a recorded step: Python functions between the kernels (Backend.host)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.kernels.backend import Array, Backend
from nicecp.registry import CouplingLaw, CouplingNetwork

Arrays = Mapping[str, Array]


def _locked(array: Array) -> NDArray[Any]:
    """A read-only view: a function that changed its arguments would change the flow."""
    view: NDArray[Any] = array.view()
    view.setflags(write=False)
    return view


def _locked_all(arrays: Arrays) -> dict[str, NDArray[Any]]:
    return {name: _locked(array) for name, array in arrays.items()}


def _put(target: Array, value: Any, what: str) -> None:
    """A result into its array; ValueError for another shape, since broadcasting would hide a mistake."""
    if np.shape(value) != target.shape:
        raise ValueError(f"{what} has shape {np.shape(value)}, expected {target.shape}")
    target[...] = value


def _put_gradients(targets: Arrays | None, values: Any, what: str) -> None:
    if targets is None:
        return
    if set(values) != set(targets):
        odd = sorted(set(values) ^ set(targets))
        raise ValueError(f"{what}: gradients by {', '.join(map(str, odd))} are missing or not of a parameter")
    for name, target in targets.items():
        _put(target, values[name], f"{what}: gradient by {name}")


def network_forward(
    backend: Backend, network: CouplingNetwork, name: str, m: Array, saved: list[Any], x: Array, own: Arrays
) -> None:
    """x : (n, fan_in) -> m : (n, fan_out); ``saved`` receives what backward needs.  Pair: network_backward."""
    given, parameters, what = _locked(x), _locked_all(own), f"network {name!r}"

    def run() -> None:
        out, kept = network.forward(given, parameters)
        _put(m, out, f"{what}: forward's m")
        saved[:] = [kept]

    backend.host(run, (x, *own.values()), (m,))


def network_backward(
    backend: Backend,
    network: CouplingNetwork,
    name: str,
    dx: Array | None,
    grads: Arrays | None,
    dm: Array,
    saved: list[Any],
    own: Arrays,
) -> None:
    """dm : (n, fan_out) -> dx : (n, fan_in) and the gradients by the network's parameters; both may be None."""
    given, parameters, what = _locked(dm), _locked_all(own), f"network {name!r}"

    def run() -> None:
        by_x, gradients = network.backward(given, saved[0], parameters)
        if dx is not None:
            _put(dx, by_x, f"{what}: backward's dx")
        _put_gradients(grads, gradients, what)

    written = (*(() if dx is None else (dx,)), *(() if grads is None else grads.values()))
    backend.host(run, (dm, *own.values()), written)


def law_forward(
    backend: Backend,
    law: CouplingLaw,
    name: str,
    y: Array,
    log_det: Array,
    x: Array,
    m: Array,
    own: Arrays,
    sign: int,
    first: bool,
) -> None:
    """x -> y for sign 1, the law's inverse for -1; y may be x. log_det : (n,) = (first) or +=.  Pair: law_backward."""
    given, read, parameters = _locked(x), _locked(m), _locked_all(own)
    function, what = (law.forward, "forward") if sign == 1 else (law.inverse, "inverse")

    def run() -> None:
        out, by_row = function(given, read, parameters)
        if np.shape(by_row) not in ((), log_det.shape):
            shape = np.shape(by_row)
            raise ValueError(f"coupling {name!r}: {what}'s log_det has shape {shape}, expected {log_det.shape}")
        _put(y, out, f"coupling {name!r}: {what}'s result")
        if first:
            log_det[...] = by_row
        else:
            np.add(log_det, by_row, out=log_det)

    backend.host(run, (x, m, *own.values(), *(() if first else (log_det,))), (y, log_det))


def law_backward(
    backend: Backend,
    law: CouplingLaw,
    name: str,
    dx: Array,
    dm: Array,
    grads: Arrays | None,
    dy: Array,
    dlog_det: Array,
    x: Array,
    m: Array,
    own: Arrays,
) -> None:
    """dy, dlog_det -> dx, dm and the gradients by the law's parameters (None: not wanted); dx may be dy."""
    up, down, given, read, parameters = _locked(dy), _locked(dlog_det), _locked(x), _locked(m), _locked_all(own)

    def run() -> None:
        by_x, by_m, gradients = law.backward(up, down, given, read, parameters)
        _put(dm, by_m, f"coupling {name!r}: backward's dm")
        _put(dx, by_x, f"coupling {name!r}: backward's dx")
        _put_gradients(grads, gradients, f"coupling {name!r}")

    written = (dx, dm, *(() if grads is None else grads.values()))
    backend.host(run, (dy, dlog_det, x, m, *own.values()), written)
