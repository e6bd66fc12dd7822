"""Memory and time of a training step against depth and against batch, for every way of keeping activations.

Memory: buffers of the step as the library counts them, and by how much the peak resident memory of a fresh process
grows from before the model is made until steps have been taken (parameters, gradients and moments among it). Time:
processes alternate, medians of the ratios round by round. PyTorch, where it is installed: eager with fused Adam, and
with torch.utils.checkpoint around every coupling, additive couplings only.
Gradients: norm of the difference from those of stored activations, relative, in a flow whose networks' outputs are
``gain`` times as large as their inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import itertools

import numpy as np

from benchmarks.machine import cpus, describe, peak_memory
from benchmarks.records import Records
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
TORCH = {"torch": "PyTorch eager, fused Adam", "torch-checkpoint": "PyTorch, checkpointed couplings"}


def spec_of(couplings: int, law: str = "additive", dtype: str = "float32") -> ModelSpec:
    return ModelSpec(FEATURES, alternating(HIDDEN, couplings, law), "gaussian", dtype)


def trainer_of(couplings: int, batch: int, law: str, kind: str) -> Trainer:
    flow = NICE.from_spec(spec_of(couplings, law), init="he", backend=get_backend("cpu", 1))
    data = np.random.default_rng(0).normal(size=(4 * batch, FEATURES)).astype(np.float32)
    split = Split.contiguous(ArraySource(data), 0, len(data), Purpose.TRAIN_NOISE)
    return Trainer(flow, split, None, TrainConfig(batch_size=batch, activations=kind))


def torch_step(couplings: int, batch: int, kind: str) -> Any:
    """A function that makes a step of the same flow in PyTorch."""
    import torch
    from torch.utils.checkpoint import checkpoint

    torch.set_num_threads(1)
    half, nets = FEATURES // 2, []
    for _ in range(couplings):
        sizes = (half, *HIDDEN, half)
        layers: list[Any] = []
        for i, o in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
        nets.append(torch.nn.Sequential(*layers[:-1]))
    model, scale = torch.nn.ModuleList(nets), torch.zeros(FEATURES, requires_grad=True)
    optimizer = torch.optim.Adam([*model.parameters(), scale], lr=1e-3, betas=(0.9, 0.99), eps=1e-4, fused=True)
    x = torch.randn(batch, FEATURES)

    def step() -> None:
        parts = [x[:, 0::2], x[:, 1::2]]
        for k, net in enumerate(model):
            y = parts[k % 2]
            m = checkpoint(net, y, use_reentrant=False) if kind == "torch-checkpoint" else net(y)
            parts[1 - k % 2] = parts[1 - k % 2] + m
        h = torch.cat(parts, 1) * scale.exp()
        loss = 0.5 * h.square().sum(1).mean() - scale.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def serve(couplings: int, batch: int, law: str, kind: str) -> None:
    """A process of its own: its memory, then seconds of so many steps for every number that it is given."""
    if kind in TORCH:
        torch_step(2, 8, kind)()
        before = peak_memory()
        answer(torch_step(couplings, batch, kind), before)
        return
    trainer_of(2, 8, law, kind).step()  # compiled code, BLAS's buffers
    before = peak_memory()
    trainer = trainer_of(couplings, batch, law, kind)
    with trainer.backend.computing():
        answer(trainer.step, before)


def answer(step: Any, before: int) -> None:
    for _ in range(2):
        step()
    print((peak_memory() - before) / MIB, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
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


def measure(couplings: int, batch: int, law: str, rounds: int, records: Records) -> None:
    """One row of the table: every kind's buffers, grown memory, and time with its ratio to "store"."""
    kinds = [*ACTIVATIONS]
    if law == "additive" and importlib.util.find_spec("torch") is not None:
        kinds += TORCH
    workers = {kind: Worker(couplings, batch, law, kind) for kind in kinds}
    try:
        steps = max(1, round(0.3 / workers["store"].time(2)))
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(rounds):
            for i in range(len(kinds)):
                kind = kinds[(turn + i) % len(kinds)]
                seconds[kind].append(workers[kind].time(steps))
    finally:
        for worker in workers.values():
            worker.close()
    group, cells = f"{couplings} couplings, batch {batch}", []
    for kind, worker in workers.items():
        who = TORCH.get(kind, f"nicecp, {kind}")
        records.values(group, who, "ms a step", [1e3 * value for value in seconds[kind]], base=kind == "store")
        cell = f"{who}: grows by {worker.memory:.1f} MiB"
        if kind not in TORCH:
            buffers = workspace_bytes(spec_of(couplings, law), batch, True, kind) / MIB
            records.values(group, who, "buffers of a step, MiB", [buffers])
            cell += f", buffers {buffers:.1f} MiB"
        records.values(group, who, "resident memory grows by, MiB", [worker.memory])
        ratio = median(a / b for a, b in zip(seconds[kind], seconds["store"], strict=True))
        cells.append(f"  {cell}, {1e3 * median(seconds[kind]):.1f} ms, {ratio:.2f} times store")
    print("\n".join([group, *cells]), flush=True)


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
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus()[:1])
    records = Records(options.json, "depth")
    rows = [(couplings, options.batch) for couplings in options.couplings]
    rows += [(options.couplings[-1], batch) for batch in (50, 800)]
    if options.quick:
        rows = [(2, 20), (6, 20)]
    print(f"D = {FEATURES}, hidden {HIDDEN}, float32, {options.law}, one thread")
    for couplings, batch in rows:
        measure(couplings, batch, options.law, 2 if options.quick else options.rounds, records)
    for dtype in ("float32", "float64"):
        for couplings in (4, 16, 64):
            for gain in (0.5, 1.0) if options.quick else (0.3, 0.5, 0.7, 1.0):
                inputs, gradients = gradient_error(couplings, gain, options.law, dtype)
                who = f"{couplings} couplings, gain {gain}"
                group = f"what recompute loses, {dtype}"
                print(f"{dtype} {who}: inputs {inputs:.1e}, gradients {gradients:.1e}")
                records.values(group, who, "of the inputs, relative", [inputs])
                records.values(group, who, "of the gradients, relative", [gradients])


if __name__ == "__main__":
    main()
