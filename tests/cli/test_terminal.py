"""`nicecp train` on a terminal of its own: the bar, the lines above it, Ctrl-C, a terminal that goes away."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from nicecp.checkpoint import load_run, load_state
from nicecp.cli.progress import layout
from nicecp.outcome import Progress
from tests.nicecp.runs import LONG

ROOT = Path(__file__).resolve().parents[2]
FOREVER = ["--epochs", "1000000"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with h5py.File("table.h5", "w") as file:
        file["train"] = np.random.default_rng(0).normal(size=(240, 4))
    return tmp_path


class Terminal:
    """The command on a terminal of its own; killed when the test is over."""

    def __init__(self, words: list[str], rows: int, columns: int) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(PYTHONPATH=str(ROOT), TERM="xterm")
            os.execv(sys.executable, [sys.executable, "-m", "nicecp", *words])
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.seen = b""
        self._timer = threading.Timer(60, os.kill, (self.pid, signal.SIGKILL))
        self._timer.start()

    def read_until(self, pattern: bytes | None) -> None:
        """To the first match, or to the end."""
        while pattern is None or not re.search(pattern, self.seen):
            try:
                piece = os.read(self.fd, 65536)
            except OSError:  # the other side has gone
                break
            self.seen += piece

    def exit_code(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self._timer.cancel()
        return os.waitstatus_to_exitcode(status)


def test_a_terminal_that_is_closed(folder: Path) -> None:
    """The shell's SIGHUP comes with a terminal that cannot be written any more: the run is saved all the same."""
    terminal = Terminal(LONG + FOREVER, 24, 100)
    terminal.read_until(rb"valid -\d")
    os.close(terminal.fd)
    assert terminal.exit_code() == 129
    assert load_state("run.state.h5")[1].epoch > 0


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (24, 110), (24, 60), (24, 40)])
def test_a_bar_on_a_terminal(folder: Path, rows: int, columns: int) -> None:
    """Bar, interrupt by the terminal's Ctrl-C, exit code; also on a terminal that does not know its size.

    The speed and the time left are there whatever the width, and the last epoch stays on the screen.
    """
    terminal = Terminal(LONG + FOREVER, rows, columns)
    terminal.read_until(rb"rows/s, .* left")
    terminal.read_until(rb"epoch [2-9]\d*/|\r[2-9]\d* ")  # a validation has been made
    os.write(terminal.fd, b"\x03")
    terminal.read_until(None)
    assert terminal.exit_code() == 130
    os.close(terminal.fd)
    text = terminal.seen.decode()
    shown = {
        0: r"epoch \d+/1000000 +\|.*\| valid -\S+ nats, ",
        110: r"epoch \d+/1000000 +\|.*\| train \S+ valid -\S+ nats, ",
        60: r"epoch \d+/1000000  ",
        40: r"\r\d+  ",
    }[columns]
    assert re.search(shown + r"[\d,]+ rows/s, .* left", text)
    assert "stopped by SIGINT" in text
    assert len(re.findall(r"epoch \d+/1000000  train \S+  valid \S+ nats", text)) == 1


def test_the_history_stays_above_the_bar(folder: Path) -> None:
    """Twenty lines of fifty epochs and the last; the numbers are those of the record."""
    terminal = Terminal([*LONG, "--epochs", "50"], 24, 110)
    terminal.read_until(None)
    assert terminal.exit_code() == 0
    os.close(terminal.fd)
    found = re.findall(r"epoch (\d+)/50  train (\S+)  valid (\S+) nats", terminal.seen.decode())
    assert [int(row[0]) for row in found] == [*range(3, 50, 3), 50]
    _, record = load_run("run.h5")
    assert record is not None
    for epoch, train, _ in found:
        assert float(train) == round(record.history[int(epoch) - 1].train_log_likelihood, 2)


@pytest.mark.parametrize("columns", range(30, 140, 7))
def test_the_line_of_the_bar_fits(columns: int) -> None:
    progress = Progress(12, 1500, 0.1, -1234.56, -1240.12, 123456.0, 3700.0)
    head, bar, text = layout(progress, columns)
    assert len(head) + (12 if bar else 2) + len(text) < columns or columns < 35
    assert text.endswith("123,456 rows/s, 1 h 01 min left")
    assert bar == (columns >= 78)
