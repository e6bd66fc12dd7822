"""Several processes ("ranks") on one model: what they do together, for one that is alone and by MPI.

Every rank holds the whole model and a part of every batch; ``Communicator`` is all that training, scoring and sampling
know of each other's processes. Nothing here is imported by `import nicecp`, and MPI only where a launcher asks for it.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nicecp.errors import ParallelError

if TYPE_CHECKING:
    from nicecp.kernels.backend import Array

T = TypeVar("T")

# What launchers tell every process: (number of processes, its own number), by Open MPI, MPICH and Intel MPI, MVAPICH,
# and Slurm where it serves PMIx.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "PMIX_RANK"),
)
_PATIENCE = 1.0  # seconds that a failing rank gives the others to fail as well
_HEARD = 0.5  # seconds that a launcher is given to pass on what a rank has written before it ends all
_INSTALL = "pip install 'nicecp[mpi]'"
PIECE = 2**20  # bytes of a sum between ranks of one machine: more does not stay in their caches meanwhile


class Pending(Protocol):
    """A sum that is under way."""

    def poll(self) -> bool:
        """Whether it is done. Lets it come forward: most MPI libraries do nothing between calls."""

    def wait(self) -> None:
        """Return when it is done."""


class Communicator(Protocol):
    """What ranks can do together. Every rank makes the same calls in the same order, or all wait for ever.

    ``on_device``: sums work on a backend's own arrays too; else on NumPy arrays, and others are copied to and fro.
    ``captures``: and may be part of a step that a backend records. Sums give the same bits on all ranks.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def on_device(self) -> bool: ...
    @property
    def captures(self) -> bool: ...
    def sum(self, array: Array) -> None:
        """The sum over ranks in the place of each rank's array, C-contiguous."""

    def begin_sum(self, out: Array, part: Array | None = None) -> Pending:
        """out = the sum over ranks of each one's ``part`` (of out itself without one), without waiting.

        Both are left alone until it is done.
        """

    def from_first(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes, on all ranks; what it raises, all raise."""

    def gather(self, rows: Array) -> Array | None:
        """On rank 0 all ranks' rows one after the other, by rank; None elsewhere."""

    def here(self, value: T) -> list[T]:
        """What every rank on this machine brings, by rank."""

    def threads(self) -> int:
        """CPUs for each rank on this machine."""

    def describe(self) -> str:
        """'' for one that is alone, else such as '4 ranks, Open MPI 5.0'."""


class Alone:
    """One process."""

    rank, size, on_device, captures = 0, 1, False, False

    def sum(self, array: Array) -> None:
        """It is the sum already."""

    def begin_sum(self, out: Array, part: Array | None = None) -> Pending:
        if part is not None:
            out[...] = part
        return DONE

    def from_first(self, compute: Callable[[], T]) -> T:
        return compute()

    def gather(self, rows: Array) -> Array | None:
        return rows

    def here(self, value: T) -> list[T]:
        return [value]

    def threads(self) -> int:
        from nicecp.machine import default_threads

        return default_threads()

    def describe(self) -> str:
        return ""


class _Done:
    def poll(self) -> bool:
        return True

    def wait(self) -> None:
        """Done."""


DONE, ALONE = _Done(), Alone()


class Mpi:
    """The ranks of an mpi4py communicator, which is duplicated: others' messages do not meet ours."""

    on_device = captures = False

    def __init__(self, communicator: Any) -> None:
        from mpi4py import MPI

        self._mpi, self._comm = MPI, communicator.Dup()
        self._ends = communicator.Dup()  # for ranks that fail: on the other one collective calls may be open
        self.rank, self.size = int(self._comm.rank), int(self._comm.size)
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._one_machine = int(node.size) == self.size
        node.Free()

    def sum(self, array: Array) -> None:
        self.begin_sum(array).wait()

    def begin_sum(self, out: Array, part: Array | None = None) -> Pending:
        """Between ranks of one machine it is done at once, in pieces: their own cores carry it out, so that nothing
        could be hidden behind, and MPI's sums without waiting take several times as long there (docs/scaling.md)."""
        if self._one_machine:
            total = out.reshape(-1)
            if part is not None:
                total[...] = part.reshape(-1)
            step = max(1, PIECE // total.itemsize)
            for first in range(0, total.size, step):
                self._comm.Allreduce(self._mpi.IN_PLACE, total[first : first + step])
            return DONE
        return _Request(self._comm.Iallreduce(self._mpi.IN_PLACE if part is None else part, out))

    def from_first(self, compute: Callable[[], T]) -> T:
        result: tuple[bool, Any] = (True, None)
        if self.rank == 0:
            try:
                result = True, compute()
            except Exception as error:
                result = False, error
        good, value = self._comm.bcast(result)
        if not good:
            raise value
        return value  # type: ignore[no-any-return]

    def gather(self, rows: Array) -> Array | None:
        import numpy as np

        counts = self._comm.gather(len(rows))
        if self.rank != 0:
            self._comm.Send(np.ascontiguousarray(rows), dest=0)
            return None
        out = np.empty((sum(counts), *rows.shape[1:]), rows.dtype)
        edges = np.cumsum([0, *counts])
        out[: len(rows)] = rows
        for other in range(1, self.size):
            self._comm.Recv(out[edges[other] : edges[other + 1]], source=other)
        return out

    def here(self, value: T) -> list[T]:
        node = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        found: list[T] = node.allgather(value)
        node.Free()
        return found

    def threads(self) -> int:
        from nicecp.machine import default_threads

        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        sharing = sum(not own.isdisjoint(other) for other in self.here(own))
        return max(1, min(default_threads(), len(own) // max(1, sharing)))

    def describe(self) -> str:
        name, version = self._mpi.get_vendor()
        return f"{self.size} ranks, {name} {'.'.join(map(str, version))}"

    def all_arrive(self, seconds: float) -> bool:
        """Wait for all ranks to call this -> whether they have, in so many seconds."""
        request, until = self._ends.Ibarrier(), time.monotonic() + seconds
        while not request.Test():
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True

    def abort(self, code: int) -> None:
        """End all ranks with this exit code."""
        self._comm.Abort(code)


class _Request:
    def __init__(self, request: Any) -> None:
        self._request = request

    def poll(self) -> bool:
        return bool(self._request.Test())

    def wait(self) -> None:
        self._request.Wait()


# --- the processes of a launcher --------------------------------------------------------------------------------------

_world: Mpi | None = None


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(number of processes, number of this one) as a launcher says, or (1, 0)."""
    for size, rank in _LAUNCHERS:
        try:
            found = int(environment[size]), int(environment[rank])
        except (KeyError, ValueError):
            continue
        if found[0] > 1:
            return found
    return 1, 0


def world() -> Communicator:
    """The communicator of all processes that a launcher (mpirun, srun) has started, or of one that is alone.

    Raises ParallelError where a launcher has started several and they cannot find each other: each would do all of the
    work and they would replace each other's files.
    """
    global _world
    size, _ = launched()
    if size == 1:
        return ALONE
    if _world is None:
        try:
            mpi = importlib.import_module("mpi4py.MPI")
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            problem = "mpi4py is not installed" if missing else f"mpi4py finds no MPI library ({error})"
            raise ParallelError(f"{size} processes were launched, but {problem}: {_INSTALL}") from None
        except RuntimeError as error:
            raise ParallelError(f"{size} processes were launched, but mpi4py finds no MPI library ({error})") from None
        if mpi.COMM_WORLD.size != size:
            problem = f"{size} processes were launched, but mpi4py's MPI knows of {mpi.COMM_WORLD.size}"
            raise ParallelError(f"{problem}: install mpi4py for the MPI that launches")
        _world = Mpi(mpi.COMM_WORLD)
    return _world


def together() -> bool:
    """Whether the processes that a launcher has started have found each other."""
    return _world is not None


def failed_alike() -> bool:
    """Called by a process that is about to report a failure: whether all of a launcher's fail now, in the same way.

    Then rank 0 reports it for all, and they leave as they would alone. Else the others wait for this one, which must
    end them (``end_all``).
    """
    if _world is None:
        return launched()[0] > 1  # what they do before they meet is the same for all
    return _world.all_arrive(_PATIENCE)


def end_all(code: int) -> None:
    """End all ranks with this code, if there are others; a rank that just left would have them wait for ever."""
    if _world is not None:
        time.sleep(_HEARD)
        _world.abort(code)
