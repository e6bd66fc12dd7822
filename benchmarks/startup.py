"""How long a user waits: imports, `nicecp --help`, the first step of training, the first log-density; and disk space.

The first step is timed twice from the start of the process: with an empty Numba cache (everything is compiled) and with
the cache that such a run left. The first log-density is that of one row of the small flow of latency.py, from the start
of the process. Every number is the median of fresh processes; who goes first changes from round to round.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.machine import describe
from benchmarks.records import Records
from benchmarks.scorers import NAMES, NEEDS

PEERS = {
    "torch": "PyTorch",
    "jax": "JAX",
    "nflows": "nflows",
    "normflows": "normflows",
    "zuko": "zuko",
    "sklearn": "scikit-learn",
}
IMPORT = """
import sys, time
from benchmarks.machine import peak_memory
before, start = peak_memory(), time.perf_counter()
import {module}
print(time.perf_counter() - start, (peak_memory() - before) / 2**20)
"""
FIRST_LOG_PROB = """
import sys
from dataclasses import replace
from benchmarks.cases import CASES
from benchmarks.scorers import make
case = replace(CASES["small"], rows=50)
print(float(make("{name}", case).score(case.data()[:1])[0]))
"""
FIRST = ("nicecp", "torch", "jax", "nflows", "normflows", "zuko")
COMMAND = "from nicecp.cli.main import main; main()"
# Leaves right after the first training step: what came before it is what the user waited for.
FIRST_STEP = """
import os
from nicecp.train import Trainer
step = Trainer._next_batch
def first_step(self):
    step(self)
    os.write(1, b"first step\\n")
    os._exit(0)
Trainer._next_batch = first_step
from nicecp.cli.main import main
main()
"""


def run(code: str, *arguments: str, cache: Path | None = None, folder: Path = ROOT) -> tuple[float, str]:
    """Wall seconds and output of `python -c code arguments` in a fresh process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"NUMBA_CACHE_DIR": str(cache)} if cache else {})
    command = [sys.executable, "-c", code, *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments) or 'import nicecp'} failed:\n{done.stderr}")
    return seconds, done.stdout


def first_step(cache: Path) -> float:
    """Seconds from the start of the process to the end of its first training step."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, output = run(
            FIRST_STEP, "train", "--data", "demo", "--out", "run.h5", cache=cache, folder=Path(folder)
        )
    assert "first step" in output, "no step was made"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes per number (default: 5)")
    parser.add_argument("--json", type=Path, help="write all numbers here, as JSON lines")
    parser.add_argument("--quick", action="store_true", help="one round, nicecp alone: does it work at all?")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    print(describe())
    records = Records(options.json, "startup")
    peers = {} if options.quick else PEERS
    absent = [name for name in peers if importlib.util.find_spec(name) is None]
    for name in absent:
        records.absent("", PEERS[name])
    present = {"nicecp": "nicecp", **{name: title for name, title in peers.items() if name not in absent}}

    run(COMMAND, "--help")  # byte code is compiled, files are in the page cache
    imports = in_turn(
        rounds,
        {title: IMPORT.format(module={"nflows": "nflows.flows"}.get(name, name)) for name, title in present.items()},
    )
    for title, found in imports.items():
        numbers = [tuple(map(float, output.split())) for _, output in found]
        record(records, "import", title, "s", [seconds for seconds, _ in numbers])
        record(records, "import", title, "MiB resident", [size for _, size in numbers])
    with tempfile.TemporaryDirectory() as cache:
        codes = {NAMES[name]: FIRST_LOG_PROB.format(name=name) for name in FIRST
                 if name == "nicecp" or (name in present and NEEDS[name] in present)}  # fmt: skip
        cold = [run(codes[NAMES["nicecp"]], cache=Path(cache))[0]]
        for title, found in in_turn(rounds, codes, Path(cache)).items():
            record(records, "first log-density", title, "s", [seconds for seconds, _ in found])
        record(records, "first log-density", "nicecp, log_prob, empty Numba cache", "s", cold)
    commands = in_turn(
        rounds, {"bare python": "pass", "nicecp --help": COMMAND}, arguments={"nicecp --help": ["--help"]}
    )
    for title, found in commands.items():
        record(records, "command line", title, "s", [seconds for seconds, _ in found])
    steps: dict[str, list[float]] = {"empty": [], "warm": []}
    for _ in range(min(rounds, 3)):
        with tempfile.TemporaryDirectory() as cache:
            steps["empty"].append(first_step(Path(cache)))
            steps["warm"].append(first_step(Path(cache)))
    for which, values in steps.items():
        record(records, "command line", f"nicecp train --data demo, first step, {which} Numba cache", "s", values)
    if importlib.util.find_spec("packaging") is not None:
        from benchmarks.sizes import installed_bytes

        for name, title in present.items():
            size = installed_bytes("scikit-learn" if name == "sklearn" else name)
            record(records, "installed, with all that is required", title, "MB", [size / 1e6])


def in_turn(
    rounds: int, codes: dict[str, str], cache: Path | None = None, arguments: dict[str, list[str]] | None = None
) -> dict[str, list[tuple[float, str]]]:
    """(seconds, output) of fresh processes, round by round."""
    found: dict[str, list[tuple[float, str]]] = {title: [] for title in codes}
    for turn in range(rounds):
        titles = list(codes)
        turn %= len(titles)
        for title in titles[turn:] + titles[:turn]:
            found[title].append(run(codes[title], *(arguments or {}).get(title, []), cache=cache))
    return found


def record(records: Records, group: str, who: str, what: str, values: list[float]) -> None:
    print(f"{group}: {who:60} {median(values):9.3f} {what}   ({min(values):.3f} to {max(values):.3f})", flush=True)
    records.values(group, who, what, values)


if __name__ == "__main__":
    main()
