"""Training steps on a CPU: nicecp against PyTorch, JAX and the bare matrix products of the same step.

Every contestant lives in a process of its own, is checked against the others (losses from the same weights on the same
batches with the same noise) and warmed up; then short chunks of steps alternate between them, one at a time, since a
machine's speed drifts by more than what is to be seen. Ratios are taken within a round. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.cases import CASES, Case
from benchmarks.machine import cpus, describe
from benchmarks.records import Records, ratio
from benchmarks.worker import NAMES, NEEDS

DEFAULT = ("nicecp", "products", "torch", "jax", "jax-scan")
TITLES = {
    "mnist": "MNIST model, 392-1000x5-392, batch 200",
    "small": "small table, D = 8, 4-64-64-4, batch 256",
    "digits": "digits, 392-256x3-392, batch 200",
}
TOLERANCE = {"float32": 1e-4, "float64": 1e-8}  # relative, of the losses in the gate
PROGRESS = 2e-3  # and of what the losses change by in these steps, since that is what the optimiser did
REST = 0.05  # seconds between chunks: BLAS and OpenMP threads of the last one stop spinning


class Worker:
    """A contestant's process."""

    def __init__(
        self, name: str, case: Case, threads: int, script: str = "worker.py", title: str | None = None
    ) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / script), name, str(threads)]
        arguments = [*command, json.dumps(dataclasses.asdict(case))]
        self.name, self.title = name, title or NAMES[name]
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": what, **arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.title} stopped: see its messages above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def check(workers: list[Worker], case: Case) -> dict[str, list[float]]:
    """Losses of every contestant from the same weights on the same rows with the same noise; they must agree."""
    losses: dict[str, list[float]] = {}
    count = case.gate_steps * case.batch
    given: dict[str, Any] = {"rows": [row % case.rows for row in range(count)], "seed": 1, "epoch": 1}
    for worker in workers:  # nicecp comes first: the others get the batches that its own shuffling chose
        if worker.name == "nicecp":
            own = worker.ask("first_steps", steps=case.gate_steps)
            losses[worker.name] = own.pop("losses")
            given = own
        elif worker.name != "products":
            losses[worker.name] = worker.ask("gate", **given)
    for name, values in losses.items():
        first, reference = next(iter(losses.items()))
        allowed = min(TOLERANCE[case.dtype] * abs(reference[0]), PROGRESS * (max(reference) - min(reference)))
        worst = max(abs(a - b) for a, b in zip(values, reference, strict=True))
        if not worst <= allowed:
            raise SystemExit(f"{NAMES[name]} and {NAMES[first]} differ by {worst:.1e} nats: {values} {reference}")
    return losses


def measure(workers: list[Worker], case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of every contestant in every round; who goes first changes from round to round."""
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for turn in range(rounds):
        first = turn % len(workers)
        for worker in workers[first:] + workers[:first]:
            time.sleep(REST)
            seconds[worker.name].append(worker.ask("run", steps=case.chunk) / case.chunk)
    return seconds


def table(case: Case, result: dict[str, Any]) -> str:
    """The result as plain text."""
    lines = [f"{'':34} {'ms a step':>10} {'steps/s':>9} {'rows/s':>10} {'GFLOP/s':>8} {'nicecp / it':>12} (quartiles)"]
    for name, values in result["seconds"].items():
        step = median(values)
        spread = result["ratios"].get(name)
        times = f"{spread['median']:12.3f} ({spread['low']:.3f} to {spread['high']:.3f})" if spread else ""
        rates = f"{1.0 / step:9.1f} {case.batch / step:10.0f} {case.flops / step / 1e9:8.1f}"
        lines.append(f"{NAMES[name]:34} {1e3 * step:10.3f} {rates} {times}")
    return "\n".join(lines)


def compare(case: Case, names: list[str], threads: int, rounds: int, records: Records, label: str = "") -> None:
    """Check, warm up, measure, and report one case with one number of threads."""
    workers: list[Worker] = []
    abouts: dict[str, Any] = {}
    try:
        for name in names:
            workers.append(Worker(name, case, threads))
            abouts[name] = workers[-1].ask("about")  # one starts up at a time
            print(f"  {NAMES[name]}: {abouts[name]}", flush=True)
        losses = check(workers, case)
        if losses:
            last = {name: round(values[-1], 6) for name, values in losses.items()}
            print(f"  same work: losses agree over {case.gate_steps} steps, the last ones {last}", flush=True)
        for worker in workers:
            worker.ask("run", steps=case.chunk)  # scan compiles for this length; caches fill
        seconds = measure(workers, case, rounds)
        parts = next(
            (w.ask("breakdown", steps=4 * case.chunk) for w in workers if w.name == "nicecp" and not label), None
        )
    finally:
        for worker in workers:
            worker.close()
    ratios = {
        name: ratio(seconds["nicecp"], values)
        for name, values in seconds.items()
        if "nicecp" in seconds and name != "nicecp"
    }
    print(table(case, {"seconds": seconds, "ratios": ratios}), flush=True)
    group = f"{TITLES[case.name]}, {case.dtype}, {threads} thread{'s' * (threads > 1)}"
    group += f", {label}" if label else ""
    for name, values in seconds.items():
        records.values(group, NAMES[name], "ms a step", [1e3 * value for value in values], versions=abouts[name])
    if losses:
        steps = f"{case.gate_steps} steps from the same weights on the same rows and noise"
        records.note(group, f"Losses after {steps} agree: {losses[names[0]][-1]:.6f} ({len(losses)} contestants).")
    if parts:
        for name, value in parts.items():
            records.values(f"Breakdown of nicecp's step: {group}", name, "ms", [1e3 * value])
        print(
            "  nicecp's step, parts on their own: " + ", ".join(f"{name} {1e3 * s:.3f} ms" for name, s in parts.items())
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all", help="which flow (default: all)")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (default: all; small: 1 and all)")
    parser.add_argument("--rounds", type=int, default=25, help="times every contestant has its turn (default: 25)")
    parser.add_argument("--contestants", default=",".join(DEFAULT), help=f"comma-separated, of {', '.join(NAMES)}")
    parser.add_argument("--label", default="", help="for the name of the comparison; then without a breakdown")
    parser.add_argument("--json", type=Path, help="write all numbers here, as JSON lines")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it work at all?")
    options = parser.parse_args()
    unknown = set(options.contestants.split(",")) - set(NAMES)
    if unknown:
        parser.error(f"unknown contestants: {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}")
    return options


def main() -> None:
    options = arguments()
    machine = describe()
    print(machine)
    names = [name for name in NAMES if name in options.contestants.split(",")]
    absent = [name for name in names if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    if absent:
        print(f"not installed, so left out: {', '.join(NAMES[name] for name in absent)}")
    names = [name for name in names if name not in absent]
    records = Records(options.json, "steps")
    for name in absent:
        records.absent("", NAMES[name])
    for case in [CASES["mnist"], CASES["small"]] if options.case == "all" else [CASES[options.case]]:
        case = dataclasses.replace(case, dtype=options.dtype)
        everything = len(cpus())
        threads = options.threads or (sorted({1, everything}) if case.name == "small" else [everything])
        if options.quick:
            case = dataclasses.replace(case, rows=20 * case.batch, chunk=1 if case.image8 else 10, gate_steps=2)
            threads = threads[:1]
        for count in threads:
            size = f"{case.flops / 1e9:.3g} GFLOP a step"
            print(f"\n{case.name}: {case.dtype}, batch {case.batch}, {count} thread(s), {size}")
            rounds = 2 if options.quick else options.rounds
            compare(case, names, count, rounds, records, options.label)


if __name__ == "__main__":
    main()
