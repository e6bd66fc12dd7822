"""The entry point: whatever a signal interrupts, the imports of the command line too, ends in one line and a code.

Only what Python has loaded anyway is imported here; the rest is nicecp.cli.app.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from nicecp.cli.stops import Terminated, describe_stop


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own by default) -> its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _terminating():
            silent = _open_streams()
            try:
                from nicecp.cli import app

                if silent and arguments[:1] in ([], ["evaluate"], ["info"]):
                    return app.fail("standard output is closed, and there would be nothing else to see of this")
                return app.run(arguments)
            except KeyboardInterrupt as stop:  # while importing
                return _interrupted(stop, arguments)
            finally:
                _settle(sys.stderr)
    except KeyboardInterrupt as stop:
        return _interrupted(stop, arguments)


def _interrupted(stop: KeyboardInterrupt, arguments: list[str]) -> int:
    """For what interrupts a command; `train` says itself what it has saved, once it has begun."""
    what, code = describe_stop(stop)
    console = sys.modules.get("nicecp.cli.console")
    if console is not None and console.is_silent():  # rank 0 says it, and its exit code is that of all
        return 0
    nothing = "; nothing was saved" if arguments[:1] == ["train"] else ""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"nicecp: error: {what}{nothing}\n")
        sys.stderr.flush()
    return code


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated, unless somebody handles or ignores them already."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_streams() -> bool:
    """Give a process whose standard streams are closed the null device instead -> whether nobody reads its output.

    Python has no sys.stdout then, and the next file opened would get its number.
    """
    silent = sys.stdout is None
    if silent or sys.stderr is None:
        while True:
            number = os.open(os.devnull, os.O_RDWR)
            if number > 2:
                os.close(number)
                break
        # closefd=False: the stream of a closed descriptor may be replaced by a caller who then opens it again
        sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    return silent


def _settle(stream: Any) -> None:
    """A stream that cannot be written must not change the exit code when Python flushes it at the end."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
