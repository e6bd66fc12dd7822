"""The example in C: a Metropolis loop that calls a flow through its function pointer."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shlex.split(os.environ.get("CC", "cc"))[0]


def run(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, str(ROOT / "examples" / "c_metropolis.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C compiler: {COMPILER!r} is not there")
@pytest.mark.slow
def test_a_chain_in_c_has_the_moments_of_the_flow() -> None:
    """The program compares them itself and fails where they differ."""
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("standard errors") == 6
    accepted = float(done.stdout.split("accepted ")[1].split("%")[0])
    assert 20 < accepted < 80


def test_a_missing_compiler_is_named() -> None:
    done = run(CC="no-such-compiler -O2")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "no C compiler: 'no-such-compiler' is not there; install one, or name it in CC"
    ]
