"""Forks while another thread compiles: a child has none of the parent's other threads, but their locks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, threading, time
import numpy as np
import nicecp

flow = nicecp.NICE(8, (30,), 3, threads=2)
x = np.random.default_rng(0).normal(size=(50, 8))
stop = threading.Event()

def busy():  # compiles first: the cache is empty
    while not stop.is_set():
        flow.log_prob(x[:1])

callers = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
for caller in callers:
    caller.start()
for _ in range(20):
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        flow.log_prob(x)
        os._exit(0)
    deadline = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            raise SystemExit("the child hangs")
        time.sleep(0.01)
stop.set()
for caller in callers:
    caller.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks in the middle of things")
def test_a_child_forked_while_a_thread_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
