"""nicecp's own side of the comparison: the trainer's step as it is, and where its time goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nicecp
from benchmarks.cases import BETA1, BETA2, EPSILON, RATE, SEED, Case
from benchmarks.machine import versions
from nicecp.kernels.backend import Purpose, Slot
from nicecp.optimizers import AdaM
from nicecp.preprocessing import Dequantize, Standardize
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer

PARTS = {  # method of the backend -> part of the step; inner calls are taken out of outer ones
    "load_batch": "loading",
    "dense_forward": "bias and ReLU",
    "dense_backward": "bias and ReLU",
    "couple": "couplings",
    "scale_prior_forward": "prior and loss",
    "scale_prior_backward": "prior and loss",
    "loss": "prior and loss",
    "update": "update",
}


class Ours:
    """A contestant (benchmarks/peers.py)."""

    def __init__(self, case: Case, threads: int) -> None:
        self.case, self.threads = case, threads
        data = case.data()
        d = case.features
        flow = nicecp.NICE(
            d, case.hidden, case.couplings, "logistic", case.dtype, SEED,
            preprocessing=(Dequantize() if case.image8 else Standardize(np.zeros(d), np.ones(d)),),
            device="cpu", threads=threads,
        )  # fmt: skip
        named: dict[str, NDArray[Any]] = {"scaling/log_scale": np.zeros(d)}
        for k, layers in enumerate(case.weights()):
            for j, (weight, bias) in enumerate(layers):
                named[f"couplings/{k}/layers/{j}/weight"] = weight
                named[f"couplings/{k}/layers/{j}/bias"] = bias
        flow.set_parameters(named)
        split = Split.contiguous(ArraySource(data), 0, len(data), Purpose.TRAIN_NOISE)
        optimizer = AdaM(rate=RATE, momentum=BETA1, beta2=1.0 - BETA2, epsilon=EPSILON)
        self.trainer = Trainer(flow, split, None, TrainConfig(batch_size=case.batch, optimizer=optimizer, seed=SEED))

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
        """Seconds per step of every part, by a clock around each call; the rest is Python and reading windows."""
        clock = Clock()
        backend, matmul = self.trainer.backend, np.matmul
        for method, part in PARTS.items():
            setattr(backend, method, clock.around(getattr(backend, method), part))
        np.matmul = clock.around(matmul, "matrix products")  # type: ignore[assignment]
        try:
            total = self.run(steps)
        finally:
            np.matmul = matmul
            for method in PARTS:
                delattr(backend, method)
        parts = {name: seconds / steps for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1])}
        return parts | {"rest": total / steps - sum(parts.values())}

    def about(self) -> dict[str, Any]:
        return {"threads": self.threads, "nicecp": nicecp.__version__, **versions("numpy", "numba")}


class Clock:
    """Seconds by part, each without what inner calls account for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = 0.0  # seconds accounted for by calls inside the running one

    def around(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self._inner = self._inner, 0.0
            start = perf_counter()
            result = function(*args, **kwargs)
            elapsed = perf_counter() - start
            self.seconds[part] += elapsed - self._inner
            self._inner = before + elapsed
            return result

        return timed
