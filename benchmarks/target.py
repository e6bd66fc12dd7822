"""Time to a given validation log-likelihood on MNIST: nicecp against PyTorch and JAX, epoch by epoch in turn.

    python benchmarks/target.py --data mnist.h5 --target 1000

The flow is the one of the preset demo (four additive couplings of 392-256x3-392, logistic prior, float32), from the
same weights, with the same Adam and batches of 200; noise and the order of rows are each one's own. Training is on all
but the last 10,000 images of ``train``, which validate after every epoch. Seconds are those of the steps and of the
validations, without start-up; who has reached the target waits.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import h5py

from benchmarks.cases import CASES
from benchmarks.machine import cpus, describe
from benchmarks.records import Records
from benchmarks.train_cpu import REST, Worker, check
from benchmarks.worker import NAMES, NEEDS

DEFAULT = ("nicecp", "torch", "jax", "jax-scan")
HELD_OUT = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="HDF5 file whose dataset train holds the images")
    parser.add_argument("--target", type=float, default=1000.0, help="nats per image (default: 1000)")
    parser.add_argument("--epochs", type=int, default=8, help="give up after so many (default: 8)")
    parser.add_argument("--rows", type=int, help="training images (default: all but the last 10,000)")
    parser.add_argument("--threads", type=int, default=len(cpus()))
    parser.add_argument("--contestants", default=",".join(DEFAULT), help=f"comma-separated, of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path, help="write all numbers here, as JSON lines")
    options = parser.parse_args()
    print(describe())
    with h5py.File(options.data) as file:
        rows = options.rows or len(file["train"]) - HELD_OUT
    case = dataclasses.replace(CASES["digits"], file=str(options.data.resolve()), rows=rows)
    names = [name for name in NAMES if name in options.contestants.split(",") and name != "products"]
    absent = [name for name in names if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    records = Records(options.json, "target")
    group = f"to {options.target:g} nats, MNIST, 392-256x3-392, batch 200, float32, {options.threads} thread(s)"
    for name in absent:
        records.absent(group, NAMES[name])
    workers: list[Worker] = []
    try:
        for name in names:
            if name not in absent:
                workers.append(Worker(name, case, options.threads))
                print(f"  {NAMES[name]}: {workers[-1].ask('about')}", flush=True)
        check(workers, case)
        for worker in workers:
            worker.ask("run", steps=1)  # compiled, as is the chunk of a scan below
            worker.ask("valid", epoch=0)
        curves: dict[str, list[tuple[float, float]]] = {worker.name: [] for worker in workers}
        for epoch in range(1, options.epochs + 1):
            running = [w for w in workers if not curves[w.name] or curves[w.name][-1][1] < options.target]
            turn = epoch % max(1, len(running))
            for worker in running[turn:] + running[:turn]:
                time.sleep(REST)
                curves[worker.name].append(one_epoch(worker, case.rows // case.batch, epoch))
                spent = sum(seconds for seconds, _ in curves[worker.name])
                value = curves[worker.name][-1][1]
                print(f"  epoch {epoch} {NAMES[worker.name]:34} {spent:7.1f} s {value:9.1f}", flush=True)
    finally:
        for worker in workers:
            worker.close()
    report(curves, options.target, group, records)


def one_epoch(worker: Worker, steps: int, epoch: int) -> tuple[float, float]:
    """(seconds of its steps and validation, validation log-likelihood)."""
    worker.ask("shuffle", epoch=epoch)
    began = time.perf_counter()
    worker.ask("run", steps=steps)
    value = worker.ask("valid", epoch=epoch)
    return time.perf_counter() - began, value


def report(curves: dict[str, Any], target: float, group: str, records: Records) -> None:
    for name, curve in curves.items():
        times = [sum(seconds for seconds, _ in curve[: epoch + 1]) for epoch in range(len(curve))]
        values = [value for _, value in curve]
        reached = next((epoch for epoch, value in enumerate(values) if value >= target), None)
        more = {"curve": [times, values]}
        if reached is None:
            records.note(group, f"{NAMES[name]} did not reach it: {values[-1]:.1f} after {len(values)} epochs.")
            print(f"{NAMES[name]:34} not reached: {values[-1]:.1f}")
            continue
        records.values(group, NAMES[name], "s", [times[reached]], **more)
        records.values(group, NAMES[name], "epochs", [reached + 1])
        records.values(group, NAMES[name], "s an epoch", [seconds for seconds, _ in curve])
        print(f"{NAMES[name]:34} {times[reached]:7.1f} s, {reached + 1} epochs, {values[reached]:.1f} nats")


if __name__ == "__main__":
    main()
