"""Signals that ask a run to stop: the first is obeyed, and what follows cannot spoil the saving."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

logger = logging.getLogger("nicecp")

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE = 2.0  # seconds from the second interrupt to the first that gives up
WAIT = "saving; please wait (an interrupt in more than 2 seconds gives up what is not saved)"


@contextlib.contextmanager
def stopping(stop: Callable[[int], None]) -> Iterator[None]:
    """Call ``stop`` with the number of the first signal, for as long as the context lasts.

    Later ones are ignored, so that two quick Ctrl-C cannot lose what the first one is about to save: the second SIGINT
    logs one line, and only one that comes more than PATIENCE seconds after that raises KeyboardInterrupt. Signals that
    were ignored stay ignored (nohup, shells' background jobs); outside the main thread none is handled.
    """
    stopped = False
    asked: float | None = None  # when the second interrupt came

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopped, asked
        if not stopped:
            stopped = True
            stop(number)
        elif number == signal.SIGINT and asked is None:
            asked = time.monotonic()
            with contextlib.suppress(RuntimeError):  # the signal came in the middle of writing another line
                logger.warning(WAIT)
        elif number == signal.SIGINT and asked is not None and time.monotonic() - asked > PATIENCE:
            raise KeyboardInterrupt

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
