"""What tests of the tests share: backends with one operation replaced, and mistakes to replace it with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from nicecp.kernels.backend import Backend

Change = Callable[..., Any]

SPOIL: dict[str, Callable[[Any], Any]] = {
    "zeroed": lambda a: a * 0,
    "scaled": lambda a: a * 1.01,
    "negated": lambda a: -a,
}


class Mutant:
    """A backend with some operations replaced by change(original, *args), which works on the arrays itself.

    So nothing is recorded: every step is carried out call by call.
    """

    def __init__(self, backend: Backend, **changes: Change) -> None:
        self._backend = backend
        for name, change in changes.items():
            setattr(self, name, partial(change, getattr(backend, name)))

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        return step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def refuses(gate: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(AssertionError):
        gate(*args, **options)


def without_log_det(
    original: Change, logp: Any, h0: Any, h1: Any, x0: Any, x1: Any, s0: Any, s1: Any, *rest: Any
) -> None:
    original(logp, h0, h1, x0, x1, s0, s1, *rest)
    logp -= s0.sum() + s1.sum()


def without_log_det_gradient(original: Change, dx0: Any, dx1: Any, ds0: Any, ds1: Any, dlogp: Any, *rest: Any) -> None:
    original(dx0, dx1, ds0, ds1, dlogp, *rest)
    for ds in (ds0, ds1):
        if ds is not None:
            ds -= dlogp.sum()


def without_mask(original: Change, *args: Any) -> None:
    original(*(False if isinstance(arg, bool) else arg for arg in args))  # relu is the one switch


def always_adds(original: Change, y: Any, x: Any, m: Any, sign: int) -> None:
    original(y, x, m, 1)
