"""nicecp's own side of the comparison: the trainer's step as it is, and where its time goes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nicecp
from benchmarks.cases import BETA1, BETA2, EPSILON, SEED, Case
from benchmarks.machine import versions
from benchmarks.peers import pieces
from nicecp.kernels.backend import Purpose, Slot
from nicecp.optimizers import AdaM
from nicecp.preprocessing import Dequantize, Standardize
from nicecp.profile import profile_step
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer


def make_trainer(case: Case, device: str, threads: int, precision: str = "full") -> Trainer:
    """The trainer of a case with its data, initial weights and optimiser, on a device."""
    data = case.data()
    d = case.features
    flow = nicecp.NICE(
        d, case.hidden, case.couplings, "logistic", case.dtype, SEED,
        preprocessing=(Dequantize() if case.image8 else Standardize(np.zeros(d), np.ones(d)),),
        precision=precision, device=device, threads=threads,
    )  # fmt: skip
    named: dict[str, NDArray[Any]] = {"scaling/log_scale": np.zeros(d)}
    for k, layers in enumerate(case.weights()):
        for j, (weight, bias) in enumerate(layers):
            named[f"couplings/{k}/layers/{j}/weight"] = weight
            named[f"couplings/{k}/layers/{j}/bias"] = bias
    flow.set_parameters(named)
    split = Split.contiguous(ArraySource(data), 0, len(data), Purpose.TRAIN_NOISE)
    optimizer = AdaM(rate=case.rate, momentum=BETA1, beta2=1.0 - BETA2, epsilon=EPSILON)
    return Trainer(flow, split, None, TrainConfig(batch_size=case.batch, optimizer=optimizer, seed=SEED))


class Ours:
    """A contestant (benchmarks/peers.py)."""

    def __init__(self, case: Case, threads: int) -> None:
        self.case, self.threads = case, threads
        self.trainer = make_trainer(case, "cpu", threads)
        self._passes: dict[int, Any] = {}  # by number of rows: a workspace and the recorded pass

    def first_steps(self, steps: int) -> dict[str, Any]:
        """The first steps of all: losses, and the rows, seed and epoch that others need to repeat them."""
        window = next(iter(self.trainer.reader.epoch(1)))
        losses = []
        with self.trainer.backend.computing():
            for _ in range(steps):
                self.trainer.step()
                losses.append(float(self.trainer.state[Slot.LOSS]))
        rows = window.rows[: steps * self.case.batch]
        return {"losses": losses, "rows": rows.tolist(), "seed": SEED, "epoch": 1}

    def shuffle(self, epoch: int) -> None:
        """Every epoch has its own order."""

    def valid(self, x: NDArray[Any]) -> float:
        """Mean log-density of rows as the flow sees them: by the flow that is being trained."""
        total, backend = 0.0, self.trainer.backend
        for part in pieces(x):
            if len(part) not in self._passes:
                ws = self.trainer.network.workspace(len(part), keep=False)
                forward = partial(self.trainer.network.forward, ws, self.trainer.views)
                self._passes[len(part)] = ws, backend.record(forward)
            ws, run = self._passes[len(part)]
            ws.x[0][...], ws.x[1][...] = part[:, 0::2], part[:, 1::2]
            with backend.computing():
                run()
            total += float(ws.logp.sum())
        return total / len(x)

    def gate(self, batches: Sequence[NDArray[Any]]) -> list[float]:
        raise RuntimeError("nicecp's own first steps are what the others are checked against")

    def run(self, steps: int) -> float:
        step = self.trainer.step
        with self.trainer.backend.computing():
            start = perf_counter()
            for _ in range(steps):
                step()
            seconds = perf_counter() - start
        if not np.isfinite(self.trainer.state[Slot.LOSS]):
            raise FloatingPointError("the loss is not finite")
        return seconds

    def breakdown(self, steps: int) -> dict[str, float]:
        """Seconds per step of every part on its own and of all together: threads do different parts side by side."""
        pace = self.run(1)
        return {part.name: part.seconds for part in profile_step(self.trainer, steps * pace)}

    def about(self) -> dict[str, Any]:
        return {"threads": self.threads, "nicecp": nicecp.__version__, **versions("numpy", "numba")}
