"""nicecp's own step on any device, and what bounds it: the device's copies and products, measured by our own calls."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import nicecp
from benchmarks.cases import SEED, Case
from benchmarks.machine import versions
from benchmarks.ours import make_trainer
from nicecp.kernels.backend import Backend, Slot

AHEAD = 200  # steps between looks at the device: the host must not run away from it


class GpuOurs:
    """A contestant (benchmarks/peers.py): the trainer's steps as `nicecp train` runs them."""

    def __init__(self, case: Case, device: str, tf32: bool) -> None:
        self.case = case
        self.trainer = make_trainer(case, device, 1, "tf32" if tf32 and device == "cuda" else "full")
        self.backend = self.trainer.backend

    def first_steps(self, steps: int) -> dict[str, Any]:
        """Losses of the first steps of all, and what others need to repeat them."""
        window, losses = next(iter(self.trainer.reader.epoch(1))), []
        steps = min(steps, window.n_batches)  # of few rows there are fewer
        for _ in range(steps):
            self.trainer.step()
            losses.append(float(self.backend.copy_out(self.trainer.state)[Slot.LOSS]))
        return {"losses": losses, "rows": window.rows[: steps * self.case.batch].tolist(), "seed": SEED, "epoch": 1}

    def run(self, steps: int) -> float:
        trainer, backend = self.trainer, self.backend
        with backend.computing():
            backend.synchronize()
            start = perf_counter()
            for done in range(steps):
                trainer.step()
                if done % AHEAD == AHEAD - 1:
                    backend.synchronize()
            backend.synchronize()
            seconds = perf_counter() - start
        if not np.isfinite(backend.copy_out(trainer.state)[Slot.LOSS]):
            raise FloatingPointError("the loss is not finite")
        return seconds

    def replay(self, steps: int) -> float:
        """Seconds of so many replays of the recorded step alone, without the trainer around it."""
        trainer, backend = self.trainer, self.backend
        recorded = next(iter(trainer._steps.values()))
        with backend.computing():
            seconds = []
            for _ in range(max(1, steps // trainer.reader.n_batches)):
                trainer._set(CURSOR=0.0, SKIP=0.0)
                count = min(steps, trainer.reader.n_batches)
                backend.synchronize()
                start = perf_counter()
                for _ in range(count):
                    recorded()
                backend.synchronize()
                seconds.append((perf_counter() - start) / count)
        return median(seconds)

    def about(self) -> dict[str, Any]:
        name = getattr(getattr(self.backend, "driver", None), "name", "CPU")
        return {"device": name, "nicecp": nicecp.__version__, **versions("numpy", "cupy-cuda13x", "cupy-cuda12x")}


def seconds_of(backend: Backend, call: Callable[[], None], repeat: int, rounds: int) -> float:
    """Median seconds of one call among ``repeat`` recorded ones: launches cost what they cost in a training step."""

    def several() -> None:
        for _ in range(repeat):
            call()

    with backend.computing():
        recorded = backend.record(several)
        recorded()
        taken = []
        for _ in range(rounds):
            backend.synchronize()
            start = perf_counter()
            recorded()
            backend.synchronize()
            taken.append((perf_counter() - start) / repeat)
    return median(taken)


def ceilings(backend: Backend, quick: bool) -> dict[str, float]:
    """Bytes a second of a large copy (read and written), and operations a second of a large float32 product."""
    size, side = (2**20, 512) if quick else (2**28, 8192)
    rng = np.random.default_rng(SEED)
    a, b = (backend.alloc((size // 1024, 1024), np.float32) for _ in range(2))
    copy = seconds_of(backend, lambda: backend.copy_columns(a, 0, b, 0, 1024), 5, 5)
    x, y, out = (backend.alloc((side, side), np.float32) for _ in range(3))
    for array in (x, y):  # zeros can be faster than numbers are
        backend.copy_in(array, rng.standard_normal((side, side), np.float32))
    product = seconds_of(backend, lambda: backend.matmul(out, x, y), 2, 5)
    return {"bytes_per_second": 8.0 * size / copy, "flops_per_second": 2.0 * side**3 / product}


def traffic(case: Case) -> float:
    """Bytes of device memory that a step cannot do without: ten for each byte of the parameters.

    Weights are read by the forward pass, by the input gradient and by the update, which writes them; gradients are
    written and read, both moments read and written. Activations stay in the cache.
    """
    parameters = sum(w.size + b.size for layers in case.weights() for w, b in layers)
    return 10.0 * np.dtype(case.dtype).itemsize * parameters
