"""The pool of threads behind the kernels: every slice is done before the call returns, whatever happens."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from nicecp.kernels.pool import SlicePool


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("start", "stop", "grain"), [(0, 10, 3), (5, 6, 4), (16, 80, 16), (7, 7, 2), (3, 100, 1)])
def test_slices_cover_the_range_once(threads: int, start: int, stop: int, grain: int) -> None:
    slices: list[tuple[int, int]] = []
    SlicePool(threads).run(lambda a, b: slices.append((a, b)), start, stop, grain)
    slices.sort()
    assert [a for a, _ in slices] == [start, *(b for _, b in slices[:-1])]
    assert slices[-1][1] == stop
    assert len(slices) <= threads
    assert all((a - start) % grain == 0 for a, _ in slices)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_waits_for_the_other_slices(failing: int) -> None:
    """Buffers that a slice still writes to must not go back to a caller who handles the error."""
    pool, done, callers = SlicePool(3), set(), set()

    def work(start: int, stop: int) -> None:
        callers.add(threading.get_ident())
        if start == failing:
            raise ArithmeticError(f"slice {start}")
        time.sleep(0.1)
        done.add(start)

    with pytest.raises(ArithmeticError, match=f"slice {failing}"):
        pool.run(work, 0, 3, 1)
    assert done == {0, 1, 2} - {failing}
    assert threading.get_ident() in callers
    failing = -1  # and the pool goes on working
    pool.run(work, 0, 3, 1)
    assert done == {0, 1, 2}


def test_several_callers_at_once() -> None:
    pool, totals = SlicePool(2), [0] * 4

    def call(number: int) -> None:
        parts: list[Any] = []
        for _ in range(50):
            pool.run(lambda a, b: parts.append(b - a), 0, 10, 1)
        totals[number] = sum(parts)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert totals == [500] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_workers_of_its_own() -> None:
    """Waiting for the parent's would take for ever."""
    pool = SlicePool(2)
    pool.run(lambda a, b: None, 0, 10, 1)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            parts: list[int] = []
            pool.run(lambda a, b: parts.append(b - a), 0, 10, 1)
            os._exit(0 if sum(parts) == 10 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
