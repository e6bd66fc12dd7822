"""A command's part among the processes that a launcher (mpirun, srun) has started."""

from __future__ import annotations

from nicecp.cli.console import silence
from nicecp.parallel import Communicator, world


def join() -> Communicator:
    """The communicator of all processes; those other than rank 0 print nothing from here on but their own errors."""
    communicator = world()
    if communicator.rank > 0:
        silence()
    return communicator
