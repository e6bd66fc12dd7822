"""Numbers that overflow: one clear line, and no warnings of NumPy on standard error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from nicecp.cli.main import main
from nicecp.cli.training import evaluation_text
from nicecp.evaluate import Evaluation

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--hidden", "8", "--couplings", "3", "--epochs", "3", "--threads", "1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with h5py.File("table.h5", "w") as file:
        file["train"] = rng.normal(size=(600, 4))
    with h5py.File("images.h5", "w") as file:
        file["train"] = rng.integers(0, 256, (600, 3, 4), dtype=np.uint8)
    with h5py.File("far.h5", "w") as file:
        rows = rng.normal(size=(30, 4))
        rows[3] = 1e300
        file["test"] = rows
    return tmp_path


@pytest.mark.parametrize(
    ("data", "rate", "said"), [("table.h5", "1e5", "at its bound"), ("images.h5", "1e6", "went back")]
)
@pytest.mark.slow
def test_training_that_overflows(folder: Path, data: str, rate: str, said: str) -> None:
    """In a process of its own, where NumPy's warnings would be shown: it ends, and says in words what happened."""
    command = [sys.executable, "-m", "nicecp", "train", "--data", data, "--lr", rate, *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    lines = done.stderr.splitlines()
    assert done.returncode == (2 if "nicecp: error: " in done.stderr else 0)
    assert all(line.startswith("nicecp: warning: epoch ") for line in lines[: -1 if done.returncode else None])
    assert said in done.stderr


def test_rows_far_away_have_a_short_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "table.h5", "--transform", "none", *SMALL]) == 0
    capsys.readouterr()
    assert main(["evaluate", "run.h5", "--data", "far.h5"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    first = captured.out.splitlines()[0]
    assert first.startswith("-")
    assert "e+2" in first
    assert first.endswith(" nats per row (30 rows)")
    assert len(first) < 50


def test_minus_infinity_is_printed() -> None:
    text = evaluation_text(Evaluation(3, -np.inf, np.nan, -np.inf, None))
    assert text == "-inf nats per row (3 rows)"
