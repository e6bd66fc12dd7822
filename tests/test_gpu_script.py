"""benchmarks/gpu.sh: a part that hangs or fails is reported, and the parts after it still run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks are not in the wheel")

# In place of Python: what is asked of it hangs, with a child that outlives it, or fails, or is done.
STAND_IN = """#!/bin/sh
case "$*" in
*doctor*) setsid sleep 60 & trap "" TERM; sleep 60; sleep 60 ;;
*gpu_kernels*) echo "no kernels today" >&2; exit 7 ;;
*gpu_steps*) echo "steps ran" ;;
*gpu_report*) exec {python} "$@" ;;
esac
"""


@pytest.mark.slow  # 8 s: what hangs is killed 5 s after it was asked to end
def test_what_hangs_or_fails_does_not_stop_the_rest(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stand_in), "BUDGET": "2"}
    began = time.monotonic()
    command = [str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert time.monotonic() - began < 40
    assert done.returncode == 1
    lines = (tmp_path / "out" / "parts.txt").read_text().splitlines()
    parts = {line.split("\t")[0]: line.split("\t")[1] for line in lines}
    assert parts == {"doctor": "137", "tests": "skip", "memcheck": "skip", "racecheck": "skip", "kernels": "7",
                     "steps": "0"}  # fmt: skip
    report = (tmp_path / "out" / "report.txt").read_text()
    assert "killed: it took too long" in report
    assert "failed (exit code 7)" in report
    assert "no kernels today" in done.stdout


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("gpu.sh", ["--data"], "gpu.sh: --data needs a value; see gpu.sh --help"),
        ("gpu.sh", ["--data", "nofile"], "gpu.sh: --data nofile: there is no such file"),
        ("gpu.sh", ["--device", "gpu"], "gpu.sh: --device is cuda or cpu, not gpu"),
        ("reproduce.sh", ["mnist", "--data", "nofile"], "reproduce.sh: error: --data nofile: there is no such file"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    tmp_path: Path, script: str, words: list[str], message: str
) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(SCRIPT.with_name(script)), *words]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == message
    assert list(tmp_path.iterdir()) == []
