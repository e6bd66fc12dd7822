"""Our own small crew of threads: each calls one function that releases the GIL; rebuilt after fork.

A forked child has none of its parent's threads: the crew there starts anew instead of waiting for ever for workers that
do not exist.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

_SPIN = 1000  # looks, each some 0.1 ms at the most: the next step comes before, and waking a sleeping CPU takes longer
Work = Callable[[int, int], Any]  # called with the thread's number and the number of threads

_inside = threading.local()  # .work is True in a thread that is doing a crew's work
_crews: weakref.WeakSet[Crew] = weakref.WeakSet()


def _get(queue: SimpleQueue[Any]) -> Any:
    """The next item, awake for a while."""
    for _ in range(_SPIN):
        try:
            return queue.get_nowait()
        except Empty:
            time.sleep(0)  # lets go of the GIL
    return queue.get()


class _Worker:
    """A thread that does pieces of work in order and reports when it is asked to.

    Every hand-over is one call that no signal handler can break in two, so that an interrupt at any moment leaves
    nobody waiting for work that was never given.
    """

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        self._reports: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _serve(self) -> None:
        error: BaseException | None = None
        while True:
            task = _get(self._tasks)
            if task is None:
                return
            if isinstance(task, tuple):
                try:
                    _do(*task)
                except BaseException as raised:
                    error = raised
            else:
                self._reports.put((task, error))
                error = None

    def begin(self, work: Work, me: int, crew: int) -> None:
        self._tasks.put((work, me, crew))

    def end(self) -> BaseException | None:
        """Wait until all work given so far is done; what it raised, if anything."""
        ticket = object()
        self._tasks.put(ticket)
        while True:
            found, error = _get(self._reports)
            if found is ticket:  # an older one's owner was interrupted while it waited
                return error  # type: ignore[no-any-return]

    def dismiss(self) -> None:
        """No more work will come: the thread ends."""
        self._tasks.put(None)


class Crew:
    """Runs ``work(me, crew)`` in several threads at once, the calling one among them."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._workers: list[_Worker] = []
        self._free = threading.Lock()
        weakref.finalize(self, _dismiss, self._workers)
        _crews.add(self)

    def run(self, work: Work, threads: int, abort: Callable[[], None]) -> None:
        """Call work(0, k) .. work(k - 1, k), k = min(threads, own threads); work(0, 1) where the others are busy.

        ``abort`` is called where one of them raises, or an interrupt comes before all have begun: those that wait for
        each other must then stop waiting. Returns, or raises what one of them raised, when all have ended.
        """
        count = 1 if getattr(_inside, "work", False) else min(self.threads, threads)
        if count <= 1 or not self._free.acquire(blocking=False):
            work(0, 1)
            return
        try:
            while len(self._workers) < count - 1:
                self._workers.append(_Worker(f"nicecp-{len(self._workers) + 1}"))
            busy, done = self._workers[: count - 1], False

            def guarded(me: int, crew: int) -> None:
                try:
                    work(me, crew)
                except BaseException:
                    abort()
                    raise

            try:
                for me, worker in enumerate(busy, start=1):
                    worker.begin(guarded, me, count)
                _do(work, 0, count)
                done = True
            finally:  # whatever happens here, nobody writes to the arrays after we have left
                if not done:
                    abort()
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


def _do(work: Work, me: int, crew: int) -> None:
    _inside.work = True
    try:
        work(me, crew)
    finally:
        _inside.work = False


def _dismiss(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.dismiss()


def _after_fork() -> None:
    _inside.work = False
    for crew in _crews:
        crew.forget_workers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
