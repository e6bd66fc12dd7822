"""Standard streams that are closed or full, and signals at any moment: one line, the right code, the run saved."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp import outcome as outcome_module
from nicecp import run as run_module
from nicecp.checkpoint import load_run
from nicecp.cli.main import main
from nicecp.cli.stops import Terminated

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--hidden", "8", "--couplings", "3", "--epochs", "2", "--threads", "1"]
TRAIN = ["train", "--data", "table.h5", *SMALL]
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with h5py.File("table.h5", "w") as file:
        file["train"] = np.random.default_rng(0).normal(size=(240, 4))
    return tmp_path


def shell(words: list[str], redirection: str) -> subprocess.CompletedProcess[str]:
    command = f"{shlex.join([sys.executable, '-m', 'nicecp', *words])} {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=300)


def epochs_saved() -> int:
    record = load_run("run.h5")[1]
    assert record is not None
    return record.epoch


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_training_with_closed_streams(folder: Path, redirection: str) -> None:
    done = shell(TRAIN, redirection)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert epochs_saved() == 2


@pytest.mark.parametrize("words", [["info", "table.h5"], []])
def test_showing_with_a_closed_output(folder: Path, words: list[str]) -> None:
    done = shell(words, ">&-")
    assert done.returncode == 2
    assert re.fullmatch(r"nicecp: error: standard output is closed.*\n", done.stderr)


@FULL
def test_training_with_a_full_output(folder: Path) -> None:
    done = shell([*TRAIN, "--json"], ">/dev/full")
    assert done.returncode == 2
    assert re.fullmatch(r"nicecp: warning: standard output cannot be written \(No space.*'run\.h5'.*\n", done.stderr)
    assert epochs_saved() == 2


@FULL
@pytest.mark.parametrize("words", [["info", "table.h5"], ["--help"], ["--version"]], ids=" ".join)
def test_a_full_output_is_named(folder: Path, words: list[str]) -> None:
    done = shell(words, ">/dev/full")
    assert done.returncode == 2
    assert re.fullmatch(r"nicecp: error: standard output cannot be written \(No space.*\); write it .*\n", done.stderr)


@FULL
def test_the_exit_code_survives_a_full_error_output(folder: Path) -> None:
    assert shell(["train", "--bogus"], "2>/dev/full").returncode == 2


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["click", "numpy", "numba", "nicecp.run"])
@pytest.mark.parametrize(("number", "words"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped by SIGTERM")])
def test_a_signal_while_modules_are_loaded(folder: Path, module: str, number: int, words: str) -> None:
    """The signal comes when the import of a module begins: at each stage of the start one line, no traceback."""
    code = (
        "import importlib.abc, os, sys\n"
        "class Now(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), {int(number)})\n"
        "from nicecp.cli.main import main\n"
        "sys.meta_path.insert(0, Now())\n"
        f"sys.exit(main({TRAIN!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 128 + number
    assert re.fullmatch(rf"nicecp: error: {words}.*nothing was saved\n", done.stderr)
    assert sorted(os.listdir()) == ["table.h5"]


def test_sigterm_before_the_first_step(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In the process: while the data are read."""

    def terminate(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)  # the handler runs before this is over

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run_module, "open_splits", terminate)
    assert main(TRAIN) == 143
    assert capsys.readouterr().err == "nicecp: error: stopped by SIGTERM before the first step; nothing was saved\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated(signal.SIGTERM), 143)])
def test_a_signal_during_the_last_evaluation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, stop: BaseException, code: int
) -> None:
    def evaluate(*_: object) -> None:
        raise stop

    monkeypatch.setattr(outcome_module, "evaluate", evaluate)
    assert main(TRAIN) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "it is finished and saved in 'run.h5'" in err
    assert epochs_saved() == 2
