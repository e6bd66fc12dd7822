"""Ranks without MPI: threads of one process that sum each other's arrays, for tests of what ranks do together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nicecp.parallel import Pending

TIMEOUT = 300.0  # seconds until ranks that wait for one that has failed give up; more than compiling takes anywhere


class Meeting:
    """Where the ranks of one crew meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT)
        self.slots: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What every rank brought, by rank."""
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class Member:
    """One rank (nicecp.parallel.Communicator). Sums are carried out when somebody waits for them, in order."""

    on_device = captures = False

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self.rank, self.size = meeting, rank, meeting.size
        self.sums: list[int] = []  # elements of every sum begun, in order
        self.polls = 0
        self.prompt = False  # sums are done when they are looked at

    def sum(self, array: Any) -> None:
        self.begin_sum(array).wait()

    def begin_sum(self, out: Any, part: Any = None) -> Pending:
        assert out.flags.c_contiguous
        self.sums.append(out.size)
        return _Sum(self, out, out if part is None else part)

    def total(self, array: Any) -> Any:
        parts = self._meeting.exchange(self.rank, np.array(array))
        result = parts[0]
        for part in parts[1:]:
            result = result + part
        return result

    def from_first(self, compute: Callable[[], Any]) -> Any:
        value = None
        if self.rank == 0:
            try:
                value = True, compute()
            except Exception as error:
                value = False, error
        good, result = self._meeting.exchange(self.rank, value)[0]
        if not good:
            raise result
        return result

    def gather(self, rows: Any) -> Any:
        parts = self._meeting.exchange(self.rank, rows)
        return np.concatenate(parts) if self.rank == 0 else None

    def here(self, value: Any) -> list[Any]:
        return self._meeting.exchange(self.rank, value)

    def threads(self) -> int:
        return 1

    def describe(self) -> str:
        return f"{self.size} threads"


class _Sum:
    def __init__(self, member: Member, out: Any, part: Any) -> None:
        self._member, self._out, self._part, self._begun = member, out, part, np.array(part)

    def poll(self) -> bool:
        self._member.polls += 1
        if self._member.prompt:
            self.wait()
        return self._member.prompt

    def wait(self) -> None:
        assert self._part.tobytes() == self._begun.tobytes(), "changed while it was being summed"
        self._out[...] = self._member.total(self._part)


def together(size: int, work: Callable[[Member], Any]) -> list[Any]:
    """work(rank) in so many threads at once -> what each returned, by rank; the first one's error is raised."""
    meeting = Meeting(size)

    def run(rank: int) -> Any:
        try:
            return work(Member(meeting, rank))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
