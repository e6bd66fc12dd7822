"""What launchers tell their processes, and processes that cannot meet."""

from __future__ import annotations

from typing import Any

import pytest

from nicecp import parallel
from nicecp.errors import ParallelError
from nicecp.parallel import ALONE


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (1, 0)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, (4, 3)),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, (2, 0)),
        ({"SLURM_STEP_NUM_TASKS": "8", "PMIX_RANK": "7"}, (8, 7)),
        ({"SLURM_STEP_NUM_TASKS": "8"}, (1, 0)),  # a batch script, not started by srun
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, (1, 0)),
        ({"PMI_SIZE": "x", "PMI_RANK": "0"}, (1, 0)),
    ],
)
def test_launchers(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert parallel.launched(environment) == expected


class NoMpi:
    """mpi4py.MPI as it is where only one process is known to the library."""

    class COMM_WORLD:
        size = 1


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            ModuleNotFoundError("No module named 'mpi4py'"),
            "^4 processes were launched, but mpi4py is not installed",
        ),
        (RuntimeError("cannot load MPI library"), "finds no MPI library .cannot load"),
        (NoMpi, "mpi4py's MPI knows of 1: install mpi4py for the MPI that launches"),
    ],
)
def test_processes_that_cannot_meet_say_so(monkeypatch: pytest.MonkeyPatch, found: Any, says: str) -> None:
    def load(name: str) -> Any:
        assert name == "mpi4py.MPI"
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("PMI_RANK", "2")
    monkeypatch.setattr(parallel.importlib, "import_module", load)
    with pytest.raises(ParallelError, match=says):
        parallel.world()
    monkeypatch.delenv("PMI_SIZE")
    assert parallel.world() is ALONE
