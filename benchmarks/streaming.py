"""Data larger than memory: peak resident memory and rows a second as a file grows, and beside the same rows in memory.

A file of so many MiB is generated, and ones of 4 and 16 times as many rows; each is trained on for an epoch and scored
by `nicecp train` and `nicecp evaluate` with the same --memory-limit, in processes of their own. For the rate, epochs of
steps on the file (a thread reads ahead, two windows in memory) alternate with ones on the same rows from memory.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import h5py
import numpy as np

from benchmarks.machine import describe
from benchmarks.records import Records
from nicecp.flow import NICE
from nicecp.hdf5_data import HDF5Source
from nicecp.kernels.backend import Purpose
from nicecp.sources import ArraySource
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer

FEATURES, CHUNK = 512, 1024  # columns, rows of a chunk of the file
MIB = 2**20
MODEL = [
    *("--preset", "tabular", "--transform", "none", "--batch-size", "256", "--epochs", "1", "--hidden", "2x64"),
    *("--couplings", "4", "--valid-fraction", "0.01", "--dtype", "float32"),
]
COMMAND = """
import sys
from benchmarks.machine import peak_memory
from nicecp.cli.main import main
code = main(sys.argv[1:])
print("peak", peak_memory())
sys.exit(code)
"""


def generate(path: Path, mib: int, compression: str | None) -> int:
    """A table of about so many MiB of float32, written chunk by chunk -> its rows."""
    rows = max(2, mib * MIB // (4 * FEATURES) // CHUNK) * CHUNK
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_dataset(
            "train", (rows, FEATURES), np.float32, chunks=(CHUNK, FEATURES), compression=compression
        )
        for start in range(0, rows, CHUNK):
            data[start : start + CHUNK] = rng.standard_normal((CHUNK, FEATURES), np.float32)
    return rows


def run(words: list[str]) -> dict[str, Any]:
    """Peak memory (MiB) and output of a command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    command = [sys.executable, "-c", COMMAND, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    peak = int(done.stdout.rpartition("peak ")[2]) / MIB
    rates = [int(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) rows/s", done.stdout)]
    return {"peak": peak, "seconds": time.perf_counter() - began, "rates": rates}


def trainer_on(source: Any, window: int) -> Trainer:
    split = Split.contiguous(source, 0, source.n_rows, Purpose.TRAIN_NOISE)
    flow = NICE(FEATURES, (256, 256), 4, dtype="float32", init="he", threads=1)
    assert flow.backend is not None
    return Trainer(flow, split, None, TrainConfig(batch_size=256, window=window))


def rates(path: Path, rows: int, rounds: int) -> dict[str, list[float]]:
    """Rows a second of whole epochs from the file and from memory, alternating."""
    with HDF5Source(path, "train") as source:
        held = ArraySource(source.read(0, rows))
        trainers = {"file": trainer_on(source, rows // 8), "memory": trainer_on(held, rows)}
        found: dict[str, list[float]] = {name: [] for name in trainers}
        for trainer in trainers.values():
            trainer.step()
        for _ in range(rounds):
            for name, trainer in trainers.items():
                steps = trainer.reader.n_batches
                with trainer.backend.computing():
                    began = time.perf_counter()
                    for _ in range(steps):
                        trainer.step()
                    found[name].append(256 * steps / (time.perf_counter() - began))
        for trainer in trainers.values():
            trainer.reader.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="of the smallest file (default: 256)")
    parser.add_argument("--limit", default="512MiB", help="--memory-limit of all runs (default: 512MiB)")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--compression", choices=["gzip", "lzf"], help="of the files (default: none)")
    parser.add_argument("--rounds", type=int, default=7, help="epochs each of file and memory (default: 7)")
    parser.add_argument("--folder", type=Path, help="where the files go for a while (default: the system's)")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    print(describe())
    records = Records(options.json, "streaming")
    what = "epochs of steps, 4 couplings of 2x256, batch 256, float32, one thread"
    group = f"nicecp train and evaluate with --memory-limit {options.limit}, {FEATURES} columns of float32"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path, out = Path(folder) / "rows.h5", Path(folder) / "run.h5"
        bound = ["--memory-limit", options.limit, "--threads", "1", "--data", str(path)]
        for factor in options.factors:
            rows = generate(path, factor * options.mib, options.compression)
            if factor == options.factors[0] and options.rounds:
                found = rates(path, rows, options.rounds)
                ratio = median(a / b for a, b in zip(found["file"], found["memory"], strict=True))
                for name, values in found.items():
                    where = "file, two windows in memory" if name == "file" else "all rows in memory"
                    records.values(what, where, "rows/s", values, base=name == "memory")
                medians = ", ".join(f"{name} {median(values):,.0f}" for name, values in found.items())
                print(f"rows/s: {medians}, ratio {ratio:.3f}", flush=True)
            if factor == options.factors[0]:  # compiles, which takes memory of its own
                run(["train", *bound, "--out", str(out), "--overwrite", *MODEL])
            train = run(["train", *bound, "--out", str(out), "--overwrite", *MODEL])
            evaluate = run(["evaluate", str(out), *bound])
            size = path.stat().st_size / MIB
            who = f"{size:,.0f} MiB, {rows:,} rows"
            records.values(group, who, "train: peak MiB", [train["peak"]])
            records.values(group, who, "train: rows/s", [train["rates"][-1]])
            records.values(group, who, "evaluate: peak MiB", [evaluate["peak"]])
            records.values(group, who, "evaluate: s in all", [evaluate["seconds"]])
            print(
                f"{size:7.0f} MiB, {rows:9,} rows: train {train['peak']:.0f} MiB, {train['rates'][-1]:,} rows/s, "
                f"{train['seconds']:.0f} s in all; evaluate {evaluate['peak']:.0f} MiB, {evaluate['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
