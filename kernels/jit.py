"""One way to compile a kernel with Numba: serial, without the GIL, cached on disk where that is possible.

No ``parallel=True``: with GNU OpenMP a forked child that meets a parallel kernel hangs, with workqueue two threads that
call one abort the process. Slices run on our own pool instead (kernels/pool.py). Numba's cache does not notice that a
called function in another file changed, so kernels that call each other live in one file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger("nicecp")

# Reassociation and contraction let loops vectorise; NaN and infinity keep their meaning (no "nnan", no "ninf").
REASSOCIATE = {"reassoc", "contract", "nsz"}


def kernel(function: F) -> F:
    """Compile at the first call; a cache folder that cannot be written costs the cache, nothing else."""
    options: dict[str, Any] = {"nogil": True, "fastmath": REASSOCIATE, "error_model": "numpy"}
    try:
        compiled: F = numba.njit(function, cache=True, **options)
        _forgive_full_disks(compiled)
    except RuntimeError as error:  # "cannot cache function: no locator available"
        logger.debug("compiling %s without a cache: %s", function.__name__, error)
        compiled = numba.njit(function, **options)
    return compiled


def _forgive_full_disks(compiled: Any) -> None:
    """Numba checks the cache folder when it decorates; a disk that is full when it saves would end the first call."""
    cache = compiled._cache
    save = cache.save_overload

    def save_if_possible(*arguments: Any) -> None:
        try:
            save(*arguments)
        except OSError as error:
            logger.debug("compiled code was not cached: %s", error)

    cache.save_overload = save_if_possible


def inlined(function: F) -> F:
    """A device function of the kernels in its own file; LLVM inlines it.

    It keeps its own rounding rules: nothing is reassociated, so error-free transformations in it stay what they are.
    """
    compiled: F = numba.njit(function, nogil=True, fastmath={"contract"}, error_model="numpy")
    return compiled
