"""How long a user waits: `import nicecp`, `nicecp --help`, and the first step of `nicecp train --data demo`.

The first step is timed twice from the start of the process: with an empty Numba cache (everything is compiled) and with
the cache that such a run left. Every number is the median of fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.machine import describe

IMPORT = """
import resource, sys, time
start = time.perf_counter()
import nicecp
scale = 2**20 if sys.platform == "darwin" else 2**10
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale)
"""
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
    parser.add_argument("--rounds", type=int, default=7, help="fresh processes per number (default: 7)")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--quick", action="store_true", help="one round: does it work at all?")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds

    machine = describe()
    print(machine)
    run(COMMAND, "--help")  # byte code is compiled, files are in the page cache
    imports = [tuple(map(float, run(IMPORT)[1].split())) for _ in range(rounds)]
    results: dict[str, Any] = {
        "bare python": [run("pass")[0] for _ in range(rounds)],
        "import nicecp": [seconds for seconds, _ in imports],
        "nicecp --help": [run(COMMAND, "--help")[0] for _ in range(rounds)],
        "train, first step, empty cache": [],
        "train, first step, warm cache": [],
    }
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            results["train, first step, empty cache"].append(first_step(Path(cache)))
            results["train, first step, warm cache"].append(first_step(Path(cache)))
    for name, seconds in results.items():
        print(f"{name:32} {median(seconds):7.3f} s   ({min(seconds):.3f} to {max(seconds):.3f})")
    print(f"{'import nicecp, memory':32} {median(size for _, size in imports):7.1f} MiB resident")
    if options.json:
        memory = [size for _, size in imports]
        document = {"machine": machine, "seconds": results, "import_mib": memory}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
