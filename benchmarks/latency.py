"""How long a log-density takes, for one row, a few and a thousand: nicecp against JAX, PyTorch and NumPy, one thread.

D = 8, four additive couplings of 4-64-64-4, logistic prior. Every contestant lives in a process of its own, its values
are checked against the others' first, then short bursts of calls alternate between them; medians, and ratios within a
round. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.cases import CASES
from benchmarks.machine import describe
from benchmarks.scorers import NAMES, NEEDS, ONE_ROW
from benchmarks.train_cpu import Worker, ratio

AGREE = {"float64": 1e-12, "float32": 2e-5}  # relative, of log-densities; float32 sums differ in their order
BURST = 0.03  # seconds of calls at a time
REST = 0.02


def compare(names: list[str], dtype: str, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Values first, then times of every size."""
    case = dataclasses.replace(CASES["small"], dtype=dtype, rows=max(sizes))
    workers: list[Worker] = []
    results = []
    try:
        for name in names:
            workers.append(Worker(name, case, 1, script="scorers.py", title=NAMES[name]))
            print(f"  {NAMES[name]}: {workers[-1].ask('about')}", flush=True)
        values = {worker.name: np.array(worker.ask("score", rows=50)) for worker in workers}
        reference = values[names[0]]
        for name, found in values.items():
            off = np.abs(found - reference).max() / np.abs(reference).max()
            if not off <= AGREE[dtype]:
                raise SystemExit(f"{NAMES[name]} and {NAMES[names[0]]} differ by {off:.1e} of their values")
        print(f"  the same values, to {AGREE[dtype]:g}: the first one {reference[0]:.6f}", flush=True)
        for rows in sizes:
            able = [worker for worker in workers if rows == 1 or worker.name not in ONE_ROW]
            results.append({"dtype": dtype, "rows": rows, "seconds": times(able, rows, rounds)})
            print(table(results[-1]), flush=True)
    finally:
        for worker in workers:
            worker.close()
    return results


def times(workers: list[Worker], rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per call of every contestant in every round; who goes first changes from round to round."""
    calls = {w.name: max(3, int(BURST / w.ask("time", rows=rows, calls=20))) for w in workers}
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for turn in range(rounds):
        first = turn % len(workers)
        for worker in workers[first:] + workers[:first]:
            time.sleep(REST)
            seconds[worker.name].append(worker.ask("time", rows=rows, calls=calls[worker.name]))
    return seconds


def table(result: dict[str, Any]) -> str:
    """One size as plain text: microseconds a call, and how many times log_prob's that is."""
    seconds = result["seconds"]
    lines = [f"\n{result['rows']} row(s), {result['dtype']}: {'us a call':>33} {'smallest':>10} {'it / log_prob':>14}"]
    for name, values in seconds.items():
        over = ratio(values, seconds["nicecp"])["median"] if "nicecp" in seconds else float("nan")
        lines.append(f"  {NAMES[name]:40} {1e6 * median(values):12.2f} {1e6 * min(values):10.2f} {over:14.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "float64", "both"], default="both")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 1000])
    parser.add_argument("--rounds", type=int, default=25, help="times every contestant has its turn (default: 25)")
    parser.add_argument("--contestants", default=",".join(NAMES), help=f"comma-separated, of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--quick", action="store_true", help="two rounds: does it work at all?")
    options = parser.parse_args()
    asked = options.contestants.split(",")
    if unknown := set(asked) - set(NAMES):
        parser.error(f"unknown contestants: {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}")
    machine = describe()
    print(machine)
    absent = [name for name in asked if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    if absent:
        print(f"not installed, so left out: {', '.join(NAMES[name] for name in absent)}")
    names = [name for name in NAMES if name in asked and name not in absent]
    results = []
    for dtype in ("float64", "float32") if options.dtype == "both" else (options.dtype,):
        results += compare(names, dtype, options.rows, 2 if options.quick else options.rounds)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
