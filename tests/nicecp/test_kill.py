"""SIGKILL at random moments of a run that saves all the time, and mutated files (longer: tests/kill.py, mutate.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kill import kill_and_resume
from tests.mutate import run

KILLS = int(os.environ.get("NICECP_KILLS", "20"))


@pytest.mark.slow
def test_killed_runs_lose_nothing_that_was_saved(tmp_path: Path) -> None:
    result = kill_and_resume(tmp_path, KILLS, seed=7)
    assert result.kills == KILLS
    assert result.resumed >= KILLS - 3
    assert result.steps > KILLS


@pytest.mark.parametrize("kind", ["data", "checkpoint"])
@pytest.mark.slow
def test_mutated_files_are_refused_or_read(kind: str) -> None:
    """The first cases of one seed; those that hang HDF5 are refused in the ordinary way (tests/mutate.py)."""
    said: list[str] = []
    counts = run(kind, 60.0, 3, limit=250, say=said.append)
    assert counts["mistake"] == counts["got through"] == 0, said
    assert counts["refused"] >= 50, counts
    assert counts["accepted"] >= 20, counts
