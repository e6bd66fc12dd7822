"""The paper's MNIST number: rows of a table, each a run of up to 1500 epochs, in chunks that go on from one another.

Called again and again with the same folder until it says that it is finished; then the folder holds results.json,
results.txt, and of the best row by validation its curve, samples and inpainted images.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.machine import describe
from nicecp.kernels import detect

PAPER, BEST_FOUND = 1980.50, 1933.89  # nats per image: the paper's, and the best reproduction found published
SPARE = 30.0  # seconds at a chunk's end in which nothing new is begun
SAVE = 25.0  # of them, until a run that was told to stop must have saved


@dataclass(frozen=True)
class Row:
    """A run. options : of `nicecp train`, beside the data, the device and the epochs."""

    name: str
    about: str
    options: tuple[str, ...]


# From epoch 50 on (12,500 updates) the paper's rate of 1e-3 makes the validation hover: rates that fall are the rest.
ROWS = (
    Row("text", "the paper's text: AdaM at a constant rate", ("--preset", "mnist", "--seed", "0")),
    Row("text-tf32", "the same with TF32 products", ("--preset", "mnist", "--seed", "0", "--precision", "tf32")),
    Row("decay", "rate falling to 1e-5 within 230,000 updates", ("--preset", "mnist", "--seed", "0",
        "--rate-decay", "1.00002", "--rate-floor", "1e-5")),
    Row("slow-decay", "rate falling to 4e-6 over all updates", ("--preset", "mnist", "--seed", "0",
        "--rate-decay", "1.000015", "--rate-floor", "1e-6")),
    Row("average", "the paper's text, a moving average over some 20 epochs", ("--preset", "mnist", "--seed", "0",
        "--weight-average", "ema:0.95")),
    Row("decay-average", "as decay, with that average", ("--preset", "mnist", "--seed", "0",
        "--rate-decay", "1.00002", "--rate-floor", "1e-5", "--weight-average", "ema:0.95")),
    Row("code", "the published file: RMSProp, rate divided by 1.0005", ("--preset", "mnist-code", "--seed", "0")),
    Row("text-seed-1", "the paper's text, another seed", ("--preset", "mnist", "--seed", "1")),
    Row("decay-seed-1", "as decay, another seed", ("--preset", "mnist", "--seed", "1",
        "--rate-decay", "1.00002", "--rate-floor", "1e-5")),
)  # fmt: skip


class Reproduction:
    """All rows, in one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out = Path(options.out)
        self.end = time.monotonic() + 60.0 * options.minutes - SPARE
        self.out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def nicecp(self, *arguments: str, limit: float | None = None) -> tuple[int, str]:
        """Run a command -> exit code and standard output. At the limit it gets the signal that makes it save."""
        command = [sys.executable, "-m", "nicecp", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                out, _ = process.communicate(timeout=SAVE)
            except subprocess.TimeoutExpired:  # what it saved five minutes ago or less is there
                process.kill()
                out, _ = process.communicate()
        return process.returncode, out

    def train(self, row: Row) -> bool:
        """Go on with a row for as long as there is time -> whether it is over; then its numbers are written, or that it
        failed: the others go on, and it is tried again when its file NAME.failed is removed."""
        done, file, failed = (self.out / f"{row.name}{suffix}" for suffix in (".json", ".h5", ".failed"))
        if done.exists() or failed.exists():
            return True
        machine = ("--device", self.options.device, "--json", "--checkpoint-every", "5min")
        if file.with_suffix(".state.h5").exists():
            arguments = ("train", "--resume", str(file), *machine)
        else:
            arguments = ("train", "--data", self.options.data, "--out", str(file), *row.options, *machine)
            arguments += ("--epochs", str(self.options.epochs), *self._small())
        began = time.monotonic()
        code, out = self.nicecp(*arguments, limit=max(1.0, self.left()))
        seconds = self._seconds(row, time.monotonic() - began)
        events = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        end = next((event for event in events if event.get("event") == "end"), {})
        if not end.get("finished"):
            if code not in (0, 128 + signal.SIGTERM, -signal.SIGKILL):
                failed.write_text(f"exit code {code}\n")
                print(f"{row.name}: failed with exit code {code}, see its messages above", flush=True)
                return True
            print(f"{row.name}: {end.get('epochs', 0)} epochs so far, {seconds / 60:.1f} min", flush=True)
            return False
        names = ("epochs", "best_epoch", "best_average", "train", "valid", "test", "round_trip_error")
        keep = {name: end[name] for name in names}
        command = f"nicecp train --data mnist.h5 {' '.join(row.options)} --epochs {self.options.epochs}"
        result = {"row": row.name, "about": row.about, "command": command, "minutes": seconds / 60, **keep}
        done.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{row.name}: test {result['test']['mean']:.2f} nats", flush=True)
        return True

    def _small(self) -> tuple[str, ...]:
        return ("--hidden", "1x16", "--couplings", "3") if self.options.quick else ()

    def _seconds(self, row: Row, more: float) -> float:
        """Of all chunks of a row so far: kept in a file beside it."""
        path = self.out / f"{row.name}.seconds"
        total = more + (float(path.read_text()) if path.exists() else 0.0)
        path.write_text(f"{total}\n")
        return total

    # --- the end ------------------------------------------------------------------------------------------------------

    def report(self, rows: tuple[Row, ...]) -> str:
        """results.json and results.txt of the rows that are finished -> the text."""
        found: list[dict[str, Any]] = [
            json.loads((self.out / f"{row.name}.json").read_text())
            for row in rows
            if (self.out / f"{row.name}.json").exists()
        ]
        facts = {"machine": describe(), "device": self.options.device, "epochs": self.options.epochs, "rows": found}
        (self.out / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
        lines = [f"{'row':14} {'test, nats':>20} {'valid':>9} {'best epoch':>11} {'minutes':>8}  what"]
        for row in found:
            test = f"{row['test']['mean']:.2f} +- {row['test']['standard_error']:.1f}"
            valid = "-" if row["valid"] is None else f"{row['valid']['mean']:.2f}"
            lines.append(
                f"{row['row']:14} {test:>20} {valid:>9} {row['best_epoch']:11d} {row['minutes']:8.1f}  {row['about']}"
            )
        lines += [f"{row.name:14} failed" for row in rows if (self.out / f"{row.name}.failed").exists()]
        lines.append(f"{'the paper':14} {PAPER:14.2f}")
        lines.append(f"{'best found':14} {BEST_FOUND:14.2f}       published reproduction, 70 epochs")
        if found:
            best = max(row["test"]["mean"] for row in found)
            lines.append(f"{PAPER} nats: {'reached' if best >= PAPER else 'not reached'}, the best row has {best:.2f}")
        text = "\n".join(lines)
        (self.out / "results.txt").write_text(text + "\n")
        return text

    def pictures(self, rows: tuple[Row, ...]) -> bool:
        """Curve, samples and inpainting of the row with the best validation; what exists already stays -> whether there
        was time for all of them."""

        rows = tuple(row for row in rows if (self.out / f"{row.name}.json").exists())
        if not rows:
            return True

        def valid(row: Row) -> float:
            found = json.loads((self.out / f"{row.name}.json").read_text())
            return float((found["valid"] or found["train"])["mean"])

        model, machine = str(self.out / f"{max(rows, key=valid).name}.h5"), ("--device", self.options.device)
        steps, images = ("3", "2") if self.options.quick else ("3000", "10")
        tasks = {
            "samples.png": ("sample", model, "-n", "100", "--seed", "1", *machine),
            "curve.png": ("plot", "curve", model),
            "inpainting.png": ("inpaint", model, "--data", self.options.data, "--mask", "all", "-n", images,
                               "--chains", "1", "--gradient-scale", "0.01", "--iterations", steps, *machine),
        }  # fmt: skip
        for name, arguments in tasks.items():
            if not (self.out / name).exists():
                if self.left() <= 0:
                    return False
                code, _ = self.nicecp(*arguments, "--out", str(self.out / name), limit=self.left())
                if code and self.left() <= 0:
                    return False
                print(f"{name}: {'written' if code == 0 else 'not written, see the message above'}", flush=True)
        return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="reproduce.sh", description=__doc__)
    parser.add_argument("what", choices=["mnist"])
    parser.add_argument("--data", required=True, help="HDF5 file with datasets train and test")
    parser.add_argument(
        "--out", default="reproduce-mnist", help="folder of runs and results (default: reproduce-mnist)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call; call it again to go on (default: 9)")
    parser.add_argument("--epochs", type=int, default=1500)
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS), help="which, and in which order")
    parser.add_argument("--quick", action="store_true", help="two epochs of a tiny model: does it work?")
    options = parser.parse_args()
    if options.quick:
        options.epochs = 2
    known = {row.name: row for row in ROWS}
    unknown = sorted(set(options.rows.split(",")) - known.keys())
    if unknown:
        parser.error(f"unknown rows {', '.join(unknown)}; there are {', '.join(known)}")
    rows = tuple(known[name] for name in options.rows.split(","))
    if options.device == "cpu":
        rows = tuple(row for row in rows if "tf32" not in row.options)
    if not Path(options.data).is_file():  # before a row is begun: a row that fails is not tried again
        parser.error(f"--data {options.data}: there is no such file")
    if options.device == "cuda" and (missing := detect.problem()):
        parser.error(f"--device cuda: {missing}")
    work = Reproduction(options)
    finished = True
    for row in rows:
        finished = work.left() > 0 and work.train(row)
        if not finished:
            break
    print(work.report(rows))
    finished = finished and work.pictures(rows)
    if not finished:
        print("not finished: the same command goes on from here")
        return 3
    print(f"finished: all is in {work.out}")
    return int(any((work.out / f"{row.name}.failed").exists() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
