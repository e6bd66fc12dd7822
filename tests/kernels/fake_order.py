"""What comes before what on the stand-in's streams: vector clocks, and an error for work that meets in no order.

Every launch says which memory it reads and writes. Two launches that touch the same bytes, one of them writing, must be
ordered: by being on one stream, by an event, or by the host, which waited for the one before it launched the other.
Memory that is given back goes to what its stream launches next, so that giving back counts as writing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

Span = tuple[int, int]  # first byte and end
Clock = dict[int, int]  # stream -> launches of it that came before


class Race(AssertionError):
    """Work that would be right or wrong by chance."""


@dataclass
class Access:
    """Launches' reads and writes; a launch on ``stream`` is number ``at`` there."""

    reads: set[Span] = field(default_factory=set)
    writes: set[Span] = field(default_factory=set)


def span_of(address: int, size: int) -> Span:
    return address, address + size


def meet(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _join(clock: Clock, other: Clock) -> None:
    for stream, at in other.items():
        clock[stream] = max(clock.get(stream, 0), at)


class Order:
    """Of the launches of a device, or of those inside a graph."""

    def __init__(self) -> None:
        self._clocks: dict[int, Clock] = {}
        self._host: Clock = {}
        # Of each span the last launch on each stream that read or wrote it: it is behind the earlier ones.
        self._last: dict[tuple[Span, bool], dict[int, tuple[int, str]]] = {}

    def clock(self, stream: int) -> Clock:
        return self._clocks.setdefault(stream, {})

    def launched(self, stream: int, what: str, access: Access) -> None:
        """Race where it meets something that it may overtake, or that may overtake it."""
        clock = self.clock(stream)
        _join(clock, self._host)
        self._check(clock, what, access.reads, writing=False)
        self._check(clock, what, access.writes, writing=True)
        clock[stream] = at = clock.get(stream, 0) + 1
        for spans, writing in ((access.reads, False), (access.writes, True)):
            for span in spans:
                self._last.setdefault((span, writing), {})[stream] = at, what

    def _check(self, clock: Clock, what: str, spans: Iterable[Span], writing: bool) -> None:
        for span in spans:
            for (other, written), streams in self._last.items():
                if (writing or written) and meet(span, other):
                    for stream, (at, name) in streams.items():
                        if clock.get(stream, 0) < at:
                            raise Race(f"{what} and {name} touch the same memory, and nothing says which comes first")

    def recorded(self, stream: int) -> Clock:
        """An event's."""
        _join(self.clock(stream), self._host)
        return dict(self.clock(stream))

    def waits(self, stream: int, event: Clock) -> None:
        _join(self.clock(stream), event)

    def host_waits(self, event: Clock) -> None:
        _join(self._host, event)

    def given_back(self, span: Span, clock: Clock) -> None:
        """Memory, and the clock of the stream that had allocated it."""
        self._check(clock, "what is allocated next", [span], writing=True)
        for key in [key for key in self._last if meet(key[0], span)]:
            del self._last[key]

    def touched(self) -> Access:
        """All of it, as one launch."""
        spans: tuple[set[Span], set[Span]] = set(), set()
        for span, writing in self._last:
            spans[writing].add(span)
        return Access(*spans)
