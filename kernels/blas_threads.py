"""How many threads BLAS uses, while we compute and no longer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _BlasThreads:
    """BLAS has one number of threads for the process: the first call in saves it, the last one out restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._controller: Any = None
        self._saved: Any = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    @contextmanager
    def limit(self, threads: int) -> Iterator[None]:
        with self._lock:
            if self._controller is None:
                from threadpoolctl import ThreadpoolController

                self._controller = ThreadpoolController()
            limiter = self._controller.limit(limits=threads, user_api="blas")
            if self._inside == 0:
                self._saved = limiter
            self._inside += 1
            era = self._lock
        try:
            yield
        finally:
            with self._lock:
                if self._lock is era:  # else a fork came between, and this is the child: it has restored them
                    self._inside -= 1
                    if self._inside == 0:
                        self._saved.restore_original_limits()

    def _after_fork(self) -> None:
        """The threads that were inside, and perhaps held the lock, stayed in the parent."""
        self._lock = threading.Lock()
        if self._inside:
            self._inside = 0
            self._saved.restore_original_limits()


blas_threads = _BlasThreads()
