"""Whether couplings can be inverted well enough to train without stored activations, and what a workspace takes.

With activations="recompute" the backward pass works on inputs that it makes from the output. Each coupling's rounding
errors are multiplied by what the couplings below do to them, so that deep flows of strong couplings lose the inputs
altogether; nothing in the loss would show it.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike

from nicecp.errors import TrainingError
from nicecp.kernels.backend import Array, Backend
from nicecp.network import Network, Workspace
from nicecp.parallel import ALONE, Communicator
from nicecp.params import Views
from nicecp.spec import ModelSpec

# Root mean square of the error over that of the inputs, of one batch. Gradients then agree with those of stored
# activations to about as much, and to 1e-2 where ReLUs change sides (docs/results.md: 2e-3 at 2.4e-4).
TOLERANCE = 1e-4


def reconstruction_error(network: Network, ws: Workspace, params: Views) -> float:
    """ws.x, a batch -> the root mean square of what is lost by going through all couplings and back, over that of x.

    ws.x holds the reconstruction afterwards. NaN or infinity where the flow overflows.
    """
    backend = network.backend
    loaded = [backend.copy_out(part).astype(np.float64) for part in ws.x]
    network.forward(ws, params)
    network.invert_couplings(ws, params)
    lost = size = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for part, again in zip(loaded, ws.x, strict=True):
            lost += float(np.square(backend.copy_out(again).astype(np.float64) - part).sum())
            size += float(np.square(part).sum())
    return math.sqrt(lost / size) if size > 0 else math.sqrt(lost)


def check_reconstruction(
    network: Network, ws: Workspace, params: Views, epoch: int, communicator: Communicator = ALONE
) -> float:
    """The largest error of the ranks' batches in ws.x; TrainingError that names the remedy if beyond TOLERANCE."""
    errors = np.zeros(communicator.size)
    errors[communicator.rank] = reconstruction_error(network, ws, params)
    communicator.sum(errors)
    error = float(errors.max())
    if not error <= TOLERANCE:
        problem = (
            f"epoch {epoch}: recomputing activations gives the inputs back to {error:.1e} of their size, "
            f"{TOLERANCE:.0e} is allowed, and gradients would be wrong"
        )
        raise TrainingError(f"{problem}; go on with --activations halves, which is exact at any depth")
    return error


class _Counting:
    """Stands in for a Backend: arrays of one number that look as large as they should."""

    def __init__(self) -> None:
        self.bytes = 0

    def alloc(self, shape: Any, dtype: DTypeLike) -> Array:
        array = np.broadcast_to(np.zeros((), dtype), shape)
        self.bytes += array.size * array.dtype.itemsize
        return array


def workspace_bytes(spec: ModelSpec, n: int, keep: bool, activations: str = "store") -> int:
    """Bytes of the buffers of a network.Workspace for n rows, without making them."""
    counting = _Counting()
    Workspace(cast(Backend, counting), spec, n, keep, activations)
    return counting.bytes
