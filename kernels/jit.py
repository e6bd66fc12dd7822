"""One way to compile a kernel with Numba: serial, without the GIL, cached on disk where that is possible.

No ``parallel=True``: with GNU OpenMP a forked child that meets a parallel kernel hangs, with workqueue two threads that
call one abort the process. Several threads replay one tape of calls instead (kernels/tape.py).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import sigutils
from numba.core.ccallback import CFunc

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger("nicecp")

# Reassociation and contraction let loops vectorise; NaN and infinity keep their meaning (no "nnan", no "ninf").
REASSOCIATE = {"reassoc", "contract", "nsz"}


@cache
def sources_digest() -> str:
    """A short hash of every kernel source file."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def kernel(function: F) -> F:
    """Compile at the first call; a cache folder that cannot be written costs the cache, nothing else.

    Numba's cache looks at the function's own file alone, not at the functions and constants that it takes from others:
    a name with the hash of all of them in it is a new entry whenever one changes.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": REASSOCIATE, "error_model": "numpy"}
    try:
        function.__qualname__ = f"{function.__qualname__}_{sources_digest()}"
        compiled: F = numba.njit(function, cache=True, **options)
        _forgive_full_disks(compiled)
    except (RuntimeError, OSError) as error:  # "cannot cache function: no locator available"; sources not readable
        logger.debug("compiling %s without a cache: %s", function.__name__, error)
        compiled = numba.njit(function, **options)
    return compiled


def c_function(signature: Any, function: Callable[..., Any], cached: bool = True) -> Any:
    """A function with C's calling convention at ``.address``, compiled now; ``cached`` : or taken from the disk."""
    options: dict[str, Any] = {"nogil": True, "fastmath": REASSOCIATE, "error_model": "numpy"}
    function.__qualname__ = f"{function.__qualname__}_{sources_digest()}"
    arguments, result = sigutils.normalize_signature(signature)
    compiled = CFunc(function, (arguments, result), locals={}, options=options)
    try:
        if cached:
            compiled.enable_caching()
            _forgive_full_disks(compiled)
    except (RuntimeError, OSError) as error:
        logger.debug("compiling %s without a cache: %s", function.__name__, error)
    compiled.compile()
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
    """A device function of other kernels; LLVM inlines it.

    It keeps its own rounding rules: nothing is reassociated, so error-free transformations in it stay what they are.
    """
    compiled: F = numba.njit(function, nogil=True, fastmath={"contract"}, error_model="numpy")
    return compiled
