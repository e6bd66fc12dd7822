"""`nicecp train` as a process of its own: signals, exit codes, resuming to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nicecp.checkpoint import load_run, load_state
from nicecp.kernels.backend import Slot
from tests.nicecp.runs import LONG, model_bytes

ROOT = Path(__file__).resolve().parents[2]


def start(words: list[str], folder: Path, **given: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nicecp", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True, **given)


EPOCHS = ["--epochs", "40"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long run without interruption, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    with h5py.File(folder / "table.h5", "w") as file:
        file["train"] = np.random.default_rng(0).normal(size=(3000, 4))
    process = start(LONG + EPOCHS, folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("\nepoch ") == 40
    return folder


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["int", "term", "hup"]
)
@pytest.mark.slow
def test_interrupted_and_resumed(whole: Path, tmp_path: Path, number: int, code: int) -> None:
    (tmp_path / "table.h5").write_bytes((whole / "table.h5").read_bytes())
    process = start(LONG + EPOCHS, tmp_path)
    assert process.stdout is not None
    while "epoch 2/" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.05)  # somewhere within an epoch
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code
    assert err.count("\n") == 1
    assert "to go on: nicecp train --resume run.h5" in err
    record, state = load_state(tmp_path / "run.state.h5")[1:]
    assert 2 <= record.epoch < 40
    process = start(["train", "--resume", "run.h5"], tmp_path)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    steps = int(state.state[Slot.CURSOR])
    assert f"resumed after {record.epoch} epochs and {steps} step{'s' * (steps != 1)} of the next" in out
    assert model_bytes(tmp_path / "run.h5") == model_bytes(whole / "run.h5")
    process = start(["train", "--resume", "run.h5"], tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "is finished already (40 epochs)" in err


def test_losing_the_reader_does_not_stop_training(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "table.h5").write_bytes((whole / "table.h5").read_bytes())
    process = start([*LONG, "--epochs", "8"], tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(60) == 0
    assert load_run(tmp_path / "run.h5")[1].epoch == 8  # type: ignore[union-attr]
