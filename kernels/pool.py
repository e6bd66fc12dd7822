"""Our own small thread pool for slices of a kernel: fixed slices, fixed order, rebuilt after fork.

Kernels release the GIL, so plain threads do. Handing over a slice takes two locks, a few microseconds, since a training
step does it a hundred times. A forked child has none of its parent's threads: the pool there starts anew instead of
waiting for ever for workers that do not exist.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

_SPIN = 1000  # times, some 0.5 ms: more than the time between the slices of a training step
Slice = Callable[[int, int], Any]

_inside = threading.local()  # .slice is True in a thread that is working on a slice
_pools: weakref.WeakSet[SlicePool] = weakref.WeakSet()


def _wait_for(lock: threading.Lock) -> None:
    """Acquire, awake for a while: the next slice comes within that time, and to wake a sleeping CPU takes longer."""
    for _ in range(_SPIN):
        if lock.acquire(blocking=False):
            return
        time.sleep(0)  # lets go of the GIL
    lock.acquire()


class _Worker:
    """A thread that does one slice at a time: ``begin``, then ``end``."""

    def __init__(self, name: str) -> None:
        self._go, self._done = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._done.acquire()
        self._task: tuple[Slice, int, int] | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _serve(self) -> None:
        while True:
            _wait_for(self._go)
            if self._task is None:
                return
            try:
                _slice(*self._task)
            except BaseException as error:
                self._error = error
            self._task = None
            self._done.release()

    def begin(self, function: Slice, start: int, stop: int) -> None:
        self._task = function, start, stop
        self._go.release()

    def end(self) -> BaseException | None:
        """Wait for the slice; what it raised, if anything."""
        _wait_for(self._done)
        error, self._error = self._error, None
        return error

    def dismiss(self) -> None:
        """No more slices will come: the thread ends."""
        self._go.release()


class SlicePool:
    """Runs ``function(start, stop)`` over equal slices of a range, one of them in the calling thread."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._workers: list[_Worker] = []
        self._free = threading.Lock()
        weakref.finalize(self, _dismiss, self._workers)
        _pools.add(self)

    def run(self, function: Slice, start: int, stop: int, grain: int) -> None:
        """Slices start at multiples of ``grain`` from ``start``; the split depends on the arguments alone.

        Within a slice of another call all of it runs at once; while another thread has the workers, the slices run one
        after the other in this one. Returns, or raises what a slice raised, when all slices have ended.
        """
        units = -(-(stop - start) // grain)
        parts = 1 if getattr(_inside, "slice", False) else min(self.threads, units)
        if parts <= 1:
            function(start, stop)
            return
        edges = [min(start + units * part // parts * grain, stop) for part in range(parts + 1)]
        if not self._free.acquire(blocking=False):
            for part in range(parts):
                _slice(function, edges[part], edges[part + 1])
            return
        try:
            while len(self._workers) < parts - 1:
                self._workers.append(_Worker(f"nicecp-{len(self._workers) + 1}"))
            busy = self._workers[: parts - 1]
            for part, worker in enumerate(busy, start=1):
                worker.begin(function, edges[part], edges[part + 1])
            try:
                _slice(function, edges[0], edges[1])
            finally:  # whatever happens here, nobody writes to the arrays after we have left
                errors = [worker.end() for worker in busy]
            for error in errors:
                if error is not None:
                    raise error
        finally:
            self._free.release()

    def forget_workers(self) -> None:
        """After a fork: the workers, and whoever held the lock, stayed in the parent."""
        self._workers.clear()
        self._free = threading.Lock()


def _slice(function: Slice, start: int, stop: int) -> None:
    _inside.slice = True
    try:
        function(start, stop)
    finally:
        _inside.slice = False


def _dismiss(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.dismiss()


def _after_fork() -> None:
    _inside.slice = False
    for pool in _pools:
        pool.forget_workers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
