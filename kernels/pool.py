"""Our own small thread pool for slices of a kernel: fixed slices, fixed order, rebuilt after fork.

Kernels release the GIL, so plain threads do. A forked child has none of its parent's threads: the pool there starts
anew instead of waiting for ever for workers that do not exist.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

_pools: weakref.WeakSet[SlicePool] = weakref.WeakSet()


class SlicePool:
    """Runs ``function(start, stop)`` over equal slices of a range, one of them in the calling thread."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._executor: ThreadPoolExecutor | None = None
        _pools.add(self)

    def run(self, function: Callable[[int, int], Any], start: int, stop: int, grain: int) -> None:
        """Slices start at multiples of ``grain`` from ``start``; the split depends on the arguments alone."""
        units = -(-(stop - start) // grain)
        parts = min(self.threads, units)
        if parts <= 1:
            function(start, stop)
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.threads - 1, thread_name_prefix="nicecp")
        edges = [min(start + units * part // parts * grain, stop) for part in range(parts + 1)]
        waiting = [self._executor.submit(function, edges[part], edges[part + 1]) for part in range(1, parts)]
        try:
            function(edges[0], edges[1])
        finally:
            wait(waiting)  # whatever happens here, nobody writes to the arrays after we have left
        for future in waiting:
            future.result()

    def forget_workers(self) -> None:
        """After a fork: the workers stayed in the parent."""
        self._executor = None


def _after_fork() -> None:
    for pool in _pools:
        pool.forget_workers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
