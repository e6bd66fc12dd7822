"""Signals as exceptions: what they are called in a message, and the exit code."""

from __future__ import annotations

import signal

INTERRUPTED = 130


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, where nothing else handles them: files being written are removed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def describe_stop(stop: KeyboardInterrupt) -> tuple[str, int]:
    """What a signal is called in a message, and the exit code."""
    if isinstance(stop, Terminated):
        return f"stopped by {signal.Signals(stop.number).name}", 128 + stop.number
    return "interrupted", INTERRUPTED
