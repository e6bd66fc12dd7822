"""Calls of kernels on a CPU: arrays, the tape that a step is written on, and the threads that replay it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nicecp.kernels._numba_native import gemm_address
from nicecp.kernels._numba_tape import replay
from nicecp.kernels.backend import ALIGNMENT, Array, Backend
from nicecp.kernels.blas_threads import blas_threads
from nicecp.kernels.pool import Crew
from nicecp.kernels.tape import Range, Span, Tape, spans

_CREW_WORK = 2**25  # multiplications in several parts from which a tape is worth waking other threads


def available_threads() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Recording(threading.local):
    """What this thread is recording."""

    tape: Tape | None = None
    parts: tuple[Tape | Callable[[], None], ...] = ()  # what comes before the tape: other tapes, calls of the host
    owner: int | None = None  # the thread that updates are for
    later: tuple[Callable[[], None], ...] = ()  # put off until the next products are due


class NumbaCalls(Backend):
    """What all operations of NumbaBackend share."""

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.blas_threads = threads
        self.threads = threads if threads is not None else available_threads()
        self._parts = threads if threads is not None else 1  # of what is worth cutting
        self._crew = Crew(self._parts)
        self._recording = _Recording()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.blas_threads,)

    # --- arrays -----------------------------------------------------------------------------------

    def alloc(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        item = np.dtype(dtype)
        size = int(np.prod(dims, dtype=np.int64)) * item.itemsize
        raw = np.zeros(size + ALIGNMENT, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        return raw[offset : offset + size].view(item).reshape(dims)

    def asarray(self, host: NDArray[Any]) -> Array:
        return np.ascontiguousarray(host)

    def copy_in(self, dst: Array, src: NDArray[Any]) -> None:
        if dst.shape != src.shape:
            raise ValueError(f"cannot copy an array of shape {src.shape} into one of shape {dst.shape}")
        dst[...] = src

    def copy_out(self, src: Array) -> NDArray[Any]:
        return np.array(src)

    def computing(self) -> AbstractContextManager[None]:
        if self.blas_threads is None:
            return nullcontext()
        gemm_address(np.float64)  # loads the BLAS whose threads are limited
        return blas_threads.limit(1)

    # --- calls ------------------------------------------------------------------------------------

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        runs = [self.player(part) if isinstance(part, Tape) else part for part in self._written(step)]
        if len(runs) == 1:
            return runs[0]

        def in_turn() -> None:
            for run in runs:
                run()

        return in_turn

    def write_down(self, step: Callable[[], None]) -> Tape:
        """The calls of a step, not carried out; ValueError for a step that calls Python functions in between."""
        first, *others = self._written(step)
        if others or not isinstance(first, Tape):
            raise ValueError("a step with couplings or networks in Python is not one tape")
        return first

    def _written(self, step: Callable[[], None]) -> list[Tape | Callable[[], None]]:
        """A step as tapes and, between them, calls of the host."""
        recording = self._recording
        if recording.tape is not None:
            raise RuntimeError("a step is being recorded by this thread already")
        recording.tape = Tape()
        try:
            step()
            self._catch_up()
            return [*recording.parts, recording.tape]
        finally:
            recording.tape, recording.later, recording.parts = None, (), ()

    def host(self, function: Callable[[], None], reads: Sequence[Array], writes: Sequence[Array]) -> None:
        recording = self._recording
        if recording.tape is None:
            function()
            return
        self._catch_up()
        recording.parts = (*recording.parts, recording.tape, function)
        recording.tape = Tape()

    def synchronize(self) -> None:
        """Calls return when their work is done."""

    def _call(
        self,
        op: int,
        over: Range,
        real: Sequence[Array | None],
        other: Sequence[Array],
        numbers: Sequence[int],
        writes: Sequence[Array | Span | None],
        reads: Sequence[Array | Span | None],
        work: int = 0,
    ) -> None:
        """Put a call on the tape that is being recorded, or carry it out. writes, reads : arrays, or Spans of them."""
        recording = self._recording.tape
        tape = Tape() if recording is None else recording
        several = self._parts > 1 and recording is not None  # else nobody waits for anybody
        tape.add(op, over, real, other, numbers, spans(writes, several), spans(reads, several), work)
        if recording is None:
            self.player(tape)()

    def player(self, tape: Tape) -> Callable[[], None]:
        """A runnable that carries out the calls of a tape."""
        calls = tape.finish()
        one = np.float64(1) if tape.dtype is None else tape.dtype.type(1)
        gemm = gemm_address(one.dtype)
        threads = self._parts if tape.work >= _CREW_WORK else 1
        if threads == 1:

            def alone(keep: object = tape) -> None:
                replay(calls, 0, 1, 0, gemm, one)

            return alone
        sync = self.alloc(16, np.int64)
        address = sync.ctypes.data

        def work(me: int, crew: int) -> None:
            replay(calls, me, crew, address, gemm, one)

        def abort() -> None:
            sync[8] = 1

        def together(keep: object = tape) -> None:
            sync[:] = 0
            self._crew.run(work, threads, abort)

        return together

    def _cut(self, extent: int, work: int, least: int, grain: int) -> Range:
        """A range, in as many parts as there are threads where the work is worth it."""
        parts = min(self._parts, -(-extent // grain)) if work >= least else 1
        return Range(extent, grain, max(1, parts))

    def _catch_up(self) -> None:
        later, self._recording.later = self._recording.later, ()
        for call in later:
            call()
