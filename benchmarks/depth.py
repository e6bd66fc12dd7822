"""Memory and time of a training step against depth and against batch, for every way of keeping activations.

Memory: buffers of the step as the library counts them, and by how much the peak resident memory of a fresh process that
takes steps lies above that of one that recomputes. Time: processes alternate, medians of the ratios round by round.
Gradients: norm of the difference from those of stored activations, relative, in a flow whose networks' outputs are
``gain`` times as large as their inputs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np

from benchmarks.machine import describe, peak_memory
from nicecp.flow import NICE
from nicecp.kernels import get_backend
from nicecp.kernels.backend import Purpose
from nicecp.network import ACTIVATIONS
from nicecp.reconstruction import reconstruction_error, workspace_bytes
from nicecp.sources import ArraySource
from nicecp.spec import ModelSpec, alternating
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer

FEATURES, HIDDEN = 256, (256, 256, 256)
MIB = 2.0**20


def spec_of(couplings: int, law: str = "additive", dtype: str = "float32") -> ModelSpec:
    return ModelSpec(FEATURES, alternating(HIDDEN, couplings, law), "gaussian", dtype)


def trainer_of(couplings: int, batch: int, law: str, kind: str) -> Trainer:
    flow = NICE.from_spec(spec_of(couplings, law), init="he", backend=get_backend("cpu", 1))
    data = np.random.default_rng(0).normal(size=(4 * batch, FEATURES)).astype(np.float32)
    split = Split.contiguous(ArraySource(data), 0, len(data), Purpose.TRAIN_NOISE)
    return Trainer(flow, split, None, TrainConfig(batch_size=batch, activations=kind))


def serve(couplings: int, batch: int, law: str, kind: str) -> None:
    """A process of its own: its memory, then seconds of so many steps for every number that it is given."""
    trainer_of(4, 8, law, kind).step()  # compiled code, BLAS's buffers
    before = peak_memory()
    trainer = trainer_of(couplings, batch, law, kind)
    with trainer.backend.computing():
        for _ in range(2):
            trainer.step()
        print((peak_memory() - before) / MIB, flush=True)
        for line in sys.stdin:
            began = time.perf_counter()
            for _ in range(int(line)):
                trainer.step()
            print((time.perf_counter() - began) / int(line), flush=True)


class Worker:
    def __init__(self, *what: Any) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps(what)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.memory = float(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def time(self, steps: int) -> float:
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        return float(self._read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(couplings: int, batch: int, law: str, rounds: int) -> dict[str, Any]:
    """One row of the table: every kind's buffers, grown memory, and time with its ratio to "store"."""
    workers = {kind: Worker(couplings, batch, law, kind) for kind in ACTIVATIONS}
    try:
        pace = workers["store"].time(2)
        steps = max(1, round(0.3 / pace))
        seconds: dict[str, list[float]] = {kind: [] for kind in ACTIVATIONS}
        for turn in range(rounds):
            for i in range(len(ACTIVATIONS)):
                kind = ACTIVATIONS[(turn + i) % len(ACTIVATIONS)]
                seconds[kind].append(workers[kind].time(steps))
    finally:
        for worker in workers.values():
            worker.close()
    row: dict[str, Any] = {"couplings": couplings, "batch": batch, "law": law}
    for kind, worker in workers.items():
        row[kind] = {
            "buffers": workspace_bytes(spec_of(couplings, law), batch, True, kind) / MIB,
            "beyond": worker.memory - workers["recompute"].memory,
            "ms": 1e3 * median(seconds[kind]),
            "ratio": median(a / b for a, b in zip(seconds[kind], seconds["store"], strict=True)),
        }
    return row


def gradient_error(couplings: int, gain: float, law: str, dtype: str) -> tuple[float, float]:
    """(error of the reconstructed inputs, error of the gradients), relative."""
    spec, rng = ModelSpec(64, alternating((64, 64), couplings, law), "gaussian", dtype), np.random.default_rng(0)
    named = {}
    for name, shape in spec.parameter_shapes().items():
        size = gain if name.endswith("layers/2/weight") else np.sqrt(2.0)
        named[name] = size / np.sqrt(shape[0]) * rng.standard_normal(shape) * name.endswith("weight")
    flow = NICE.from_spec(spec, named, backend=get_backend("cpu", 1))
    network, x, found = flow.network, rng.standard_normal((200, 64)), []
    views = network.layout.views(flow.flat)
    with np.errstate(all="ignore"):
        for kind in ("store", "recompute"):
            ws, flat = network.workspace(200, True, kind), np.zeros_like(flow.flat)
            ws.x[0][...], ws.x[1][...], ws.dlogp[...] = x[:, 0::2], x[:, 1::2], -1 / 200
            network.forward(ws, views)
            network.backward(ws, views, network.layout.views(flat), want_dx=False)
            found.append(flat.astype(float))
        ws = network.workspace(200, True, "recompute")
        ws.x[0][...], ws.x[1][...] = x[:, 0::2], x[:, 1::2]
        error = reconstruction_error(network, ws, views)
        return error, float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each process (default: 7)")
    parser.add_argument("--couplings", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--law", default="additive", choices=["additive", "multiplicative", "affine"])
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--quick", action="store_true", help="two small rows: does it work at all?")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*json.loads(options.serve))
        return
    print(describe())
    rows = [(couplings, options.batch) for couplings in options.couplings]
    rows += [(options.couplings[-1], batch) for batch in (50, 800)]
    if options.quick:
        rows = [(2, 20), (6, 20)]
    print(f"D = {FEATURES}, hidden {HIDDEN}, float32, {options.law}, one thread; MiB of buffers (resident beyond)")
    results = []
    for couplings, batch in rows:
        row = measure(couplings, batch, options.law, 2 if options.quick else options.rounds)
        results.append(row)
        cells = [
            f"{kind} {cell['buffers']:.1f} ({cell['beyond']:.1f}) {cell['ms']:.1f} ms {cell['ratio']:.2f}"
            for kind, cell in row.items()
            if isinstance(cell, dict)
        ]
        print(f"{couplings} couplings, batch {batch}: " + "; ".join(cells), flush=True)
    errors = []
    for dtype in ("float32", "float64"):
        for couplings in (4, 16, 64):
            for gain in (0.5, 1.0) if options.quick else (0.3, 0.5, 0.7, 1.0):
                errors.append((dtype, couplings, gain, *gradient_error(couplings, gain, options.law, dtype)))
                print("{} {} couplings, gain {}: inputs {:.1e}, gradients {:.1e}".format(*errors[-1]))
    if options.json:
        document = {"machine": describe(), "rows": results, "errors": errors}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
