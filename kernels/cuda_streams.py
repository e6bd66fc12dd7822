"""Streams and graphs of the driver on CuPy: side streams forked and joined by events, also while they are captured.

All streams are our own, and the legacy stream does not synchronise with them. A side stream becomes part of a capture
when it waits for an event of the stream that captures, and must be joined to that one before the capture ends. An event
that was recorded in a capture is good for that capture alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LANES = 2  # side streams: one bound by arithmetic, one by memory (kernels/cuda_calls.py)
UPLOADS = -1


@dataclass(eq=False)
class Token:
    """A side block, or an upload (lane UPLOADS); ``event`` is recorded at its end."""

    lane: int = UPLOADS
    event: Any = None


class Streams:
    """main: what is launched in order; sides: beside it; copy: uploads. current: the one that launches go to."""

    def __init__(self, cupy: Any, lanes: int = LANES) -> None:
        self._cupy = cupy
        self.main, self.copy, *self.sides = (cupy.cuda.Stream(non_blocking=True) for _ in range(2 + lanes))
        self.current = self.main
        self.capturing = False
        self._open: dict[int, Token] = {}  # each lane's last block, until the main stream has waited for it
        self._held: list[Any] = []  # events of the running capture

    @property
    def computing(self) -> list[Any]:
        """Those on which kernels and products run, maybe at the same time."""
        return [self.main, *self.sides]

    def mark(self, stream: Any) -> Any:
        """An event behind all that was launched on a stream."""
        event = self._cupy.cuda.Event(disable_timing=True)
        stream.record(event)
        if self.capturing:
            self._held.append(event)
        return event

    @contextlib.contextmanager
    def side(self, lane: int = 0, after: Sequence[Token] = ()) -> Iterator[Token]:
        """See kernels.cuda_driver.Lanes."""
        if self.current is not self.main:
            raise RuntimeError("side blocks are not nested")
        if not 0 <= lane < len(self.sides):
            raise ValueError(f"there are {len(self.sides)} lanes, and no number {lane}")
        stream = self.sides[lane]
        for event in (self.mark(self.main), *(token.event for token in after)):
            stream.wait_event(event)
        token = Token(lane)
        self.current = stream
        try:
            yield token
        finally:
            self.current = self.main
            token.event = self.mark(stream)
            self._open[lane] = token

    def wait(self, token: Token) -> None:
        """The main stream goes on after a side block, or an upload."""
        if self.current is not self.main:
            raise RuntimeError("a side block waits for others where it begins")
        self.main.wait_event(token.event)
        if self._open.get(token.lane) is token:
            del self._open[token.lane]

    def join(self) -> None:
        """The main stream goes on after all side blocks: a lane's last one is behind its others."""
        for token in list(self._open.values()):
            self.wait(token)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """A graph of what ``step`` launches, and of nothing else: a runnable that launches it on the main stream."""
        if self.capturing:
            raise RuntimeError("a step is being captured already")
        self.join()
        graph = self._captured(step)
        graph.upload(self.main)

        def replay(keep: object = (step, self._held)) -> None:
            self.join()
            graph.launch(self.main)

        self._held = []
        return replay

    def _captured(self, step: Callable[[], None]) -> Any:
        self.main.begin_capture()
        self.capturing = True
        try:
            step()
            self.join()
        except BaseException:
            self._open.clear()
            with contextlib.suppress(Exception):  # what was captured is incomplete, and ends here in any case
                self.main.end_capture()
            raise
        finally:
            self.capturing = False
        return self.main.end_capture()
