"""The crew of threads behind a tape: all have ended before the call returns, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from nicecp.kernels.pool import Crew

MEETING = 60.0  # seconds after which a thread that nobody meets gives up


class Meeting:
    """Threads that wait for each other, as at a barrier of a tape."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count)

    def wait(self) -> bool:
        try:
            self.barrier.wait(MEETING)
        except threading.BrokenBarrierError:
            return False
        return True

    def abort(self) -> None:
        self.barrier.abort()


@pytest.mark.parametrize("own", [1, 2, 3])
@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_everybody_is_there_at_once(own: int, wanted: int) -> None:
    count = min(own, wanted)
    meeting, seen = Meeting(count), []

    def work(me: int, crew: int) -> None:
        assert meeting.wait()
        seen.append((me, crew, threading.get_ident()))

    crew = Crew(own)
    for _ in range(3):
        seen.clear()
        crew.run(work, wanted, meeting.abort)
        assert sorted(me for me, _, _ in seen) == list(range(count))
        assert {size for _, size, _ in seen} == {count}
        assert len({thread for _, _, thread in seen}) == count
        assert (0, count, threading.get_ident()) in seen


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_ends_the_waiting_and_is_raised(failing: int) -> None:
    """The others stop, and they have stopped before the caller gets the error: buffers are free again then."""
    crew, meeting, ended = Crew(3), Meeting(3), []

    def work(me: int, crew: int) -> None:
        if me == failing:
            raise ArithmeticError(f"thread {me}")
        time.sleep(0.05)
        if not meeting.wait():
            time.sleep(0.05)
        ended.append(me)

    with pytest.raises(ArithmeticError, match=f"thread {failing}"):
        crew.run(work, 3, meeting.abort)
    assert sorted(ended) == sorted({0, 1, 2} - {failing})
    failing, meeting = -1, Meeting(3)  # and the crew goes on working
    ended.clear()
    crew.run(work, 3, meeting.abort)
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize("moment", ["before", "while waiting"])
def test_an_interrupt_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """KeyboardInterrupt when some have begun and others have not, and when the caller's own part is done already."""
    from nicecp.kernels import pool

    crew, meeting = Crew(3), Meeting(3)
    crew.run(lambda me, size: None, 3, lambda: None)  # the workers exist
    begin, get, caller = pool._Worker.begin, pool._get, threading.get_ident()
    interrupted: list[bool] = []

    def begin_or_not(self: pool._Worker, work: pool.Work, me: int, size: int) -> None:
        if me == 2:
            raise KeyboardInterrupt
        begin(self, work, me, size)

    def get_once(queue: object) -> object:
        if threading.get_ident() == caller and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return get(queue)  # type: ignore[arg-type]

    def begun(me: int, size: int) -> None:
        if moment == "before":
            meeting.wait()  # for those that never come
        time.sleep(0.05)

    with monkeypatch.context() as patch:
        if moment == "before":
            patch.setattr(pool._Worker, "begin", begin_or_not)
        else:
            patch.setattr(pool, "_get", get_once)
        with pytest.raises(KeyboardInterrupt):
            crew.run(begun, 3, meeting.abort)
    seen: list[int] = []
    again = Meeting(3)

    def work(me: int, size: int) -> None:
        assert again.wait()
        time.sleep(0.1 if me == 1 else 0.0)  # of whom an old report is left
        seen.append(me)

    crew.run(work, 3, again.abort)
    assert sorted(seen) == [0, 1, 2], "the call returned before all had ended"


def test_several_callers_at_once() -> None:
    """One has the workers; the others do all of their work themselves."""
    crew, totals = Crew(2), [0] * 4

    def call(number: int) -> None:
        parts: list[int] = []
        for _ in range(50):
            crew.run(lambda me, size: parts.append(10 // size), 2, lambda: None)
        totals[number] = sum(parts)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=300)
    assert totals == [500] * 4


def test_work_within_work_is_done_by_its_thread() -> None:
    crew, sizes = Crew(2), []

    def inner(me: int, size: int) -> None:
        sizes.append(size)

    crew.run(lambda me, size: crew.run(inner, 2, lambda: None), 2, lambda: None)
    assert sizes == [1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_workers_of_its_own() -> None:
    """Waiting for the parent's would take for ever."""
    crew, meeting = Crew(2), Meeting(2)
    crew.run(lambda me, size: meeting.wait(), 2, meeting.abort)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            parts: list[int] = []
            crew.run(lambda me, size: parts.append(size), 2, lambda: None)
            os._exit(0 if parts == [2, 2] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
