"""How long a log-density takes, for one row, a few and a thousand, and samples: nicecp against others, one thread.

D = 8, four additive couplings of 4-64-64-4, logistic prior. Every contestant lives in a process of its own, its values
are checked against the others' first (log-densities of the same rows; of drawn rows the mean log-density), then short
bursts of calls alternate between them; medians, and ratios within a round. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.cases import CASES
from benchmarks.machine import describe
from benchmarks.records import Records, ratio
from benchmarks.scorers import DRAW, NAMES, NEEDS, ONE_ROW
from benchmarks.train_cpu import Worker

AGREE = {"float64": 1e-12, "float32": 2e-5}  # relative, of log-densities; float32 sums differ in their order
BURST = 0.03  # seconds of calls at a time
REST = 0.02
DRAWN, MOMENTS = 20_000, 0.25  # rows drawn for the check, and by how much their moments may differ (deviations: 2 to 5)


def compare(
    names: list[str], dtype: str, sizes: list[int], drawn: list[int], rounds: int, log: tuple[Records, Records]
) -> None:
    """Values first, then times of every size."""
    case = dataclasses.replace(CASES["small"], dtype=dtype, rows=max([*sizes, 50]))
    workers: list[Worker] = []
    try:
        for name in names:
            workers.append(Worker(name, case, 1, script="scorers.py", title=NAMES[name]))
            print(f"  {NAMES[name]}: {workers[-1].ask('about')}", flush=True)
        agree(workers, dtype)
        scores, samples = log
        for rows in sizes:
            able = [worker for worker in workers if rows == 1 or worker.name not in ONE_ROW]
            show(times(able, rows, rounds), f"log_prob, {rows:,} row{'s' * (rows > 1)}, {dtype}, one thread", scores)
        for rows in drawn:
            able = [worker for worker in workers if worker.name in DRAW]
            found = times(able, rows, rounds, "time_drawing")
            show(found, f"sampling, {rows:,} rows, {dtype}, one thread", samples)
    finally:
        for worker in workers:
            worker.close()


def agree(workers: list[Worker], dtype: str) -> None:
    """The same log-densities; and samples from the same distribution, by their mean log-density under the first one."""
    values = {worker.name: np.array(worker.ask("score", rows=50)) for worker in workers}
    reference = values[workers[0].name]
    for name, found in values.items():
        off = np.abs(found - reference).max() / np.abs(reference).max()
        if not off <= AGREE[dtype]:
            raise SystemExit(f"{NAMES[name]} and {workers[0].title} differ by {off:.1e} of their values")
    print(f"  the same values, to {AGREE[dtype]:g}: the first one {reference[0]:.6f}", flush=True)
    moments = {}
    for worker in workers:
        if worker.name in DRAW:
            x = np.array(worker.ask("draw", rows=DRAWN))
            order = np.r_[0:8:2, 1:8:2]  # normflows keeps the halves apart
            x = x[:, np.argsort(order)] if worker.name == "normflows" else x
            moments[worker.name] = np.concatenate([x.mean(0), (x[:, :-1] * x[:, 1:]).mean(0), np.abs(x).mean(0)])
    for name, found in moments.items():
        off = np.abs(found - next(iter(moments.values()))).max()
        if not off < MOMENTS:
            raise SystemExit(f"samples of {NAMES[name]} have other moments, by {off:.2f}")


def times(workers: list[Worker], rows: int, rounds: int, what: str = "time") -> dict[str, list[float]]:
    """Seconds per call of every contestant in every round; who goes first changes from round to round."""
    calls = {w.name: max(3, int(BURST / w.ask(what, rows=rows, calls=20))) for w in workers}
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for turn in range(rounds):
        first = turn % len(workers)
        for worker in workers[first:] + workers[:first]:
            time.sleep(REST)
            seconds[worker.name].append(worker.ask(what, rows=rows, calls=calls[worker.name]))
    return seconds


def show(seconds: dict[str, list[float]], group: str, records: Records) -> None:
    """One size as plain text: microseconds a call, and how many times nicecp's that is."""
    print(f"\n{group}: {'us a call':>{49 - len(group)}} {'smallest':>10} {'nicecp / it':>12}")
    for name, values in seconds.items():
        over = ratio(seconds["nicecp"], values)["median"] if "nicecp" in seconds else float("nan")
        print(f"  {NAMES[name]:36} {1e6 * median(values):12.2f} {1e6 * min(values):10.2f} {over:12.2f}", flush=True)
        records.values(group, NAMES[name], "us a call", [1e6 * value for value in values])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "float64", "both"], default="both")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 1000])
    parser.add_argument("--rounds", type=int, default=25, help="times every contestant has its turn (default: 25)")
    parser.add_argument("--contestants", default=",".join(NAMES), help=f"comma-separated, of {', '.join(NAMES)}")
    parser.add_argument("--draw", type=int, nargs="*", default=[1000], help="samples (default: 1000 rows)")
    parser.add_argument("--json", type=Path, help="write all numbers here, as JSON lines")
    parser.add_argument("--sampling-json", type=Path, help="and those of samples here")
    parser.add_argument("--quick", action="store_true", help="two rounds: does it work at all?")
    options = parser.parse_args()
    asked = options.contestants.split(",")
    if unknown := set(asked) - set(NAMES):
        parser.error(f"unknown contestants: {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}")
    print(describe())
    absent = [name for name in asked if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    if absent:
        print(f"not installed, so left out: {', '.join(NAMES[name] for name in absent)}")
    names = [name for name in NAMES if name in asked and name not in absent]
    log = Records(options.json, "log_prob"), Records(options.sampling_json, "sampling")
    for name in absent:
        log[0].absent("", NAMES[name])
    for dtype in ("float64", "float32") if options.dtype == "both" else (options.dtype,):
        compare(names, dtype, options.rows, options.draw, 2 if options.quick else options.rounds, log)


if __name__ == "__main__":
    main()
