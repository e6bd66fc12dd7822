"""Training steps on a GPU: nicecp beside PyTorch and JAX, on the same resident rows with the same batch and precision.

Each contestant has a process of its own. Before it is timed, its losses from the same weights on the same batches with
the same noise must agree with nicecp's. Compilation (up to the end of the first chunk) is measured apart.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.cases import CASES, Case
from benchmarks.machine import describe

NAMES = {
    "nicecp": "nicecp, one graph",
    "torch-graph": "PyTorch, whole step in one CUDA graph",
    "jax-scan": "JAX jit, lax.scan, donated state",
    "torch-eager": "PyTorch eager, fused Adam",
    "torch-compile": "PyTorch torch.compile, max-autotune",
}
NEEDS = {"torch-eager": "torch", "torch-compile": "torch", "torch-graph": "torch", "jax-scan": "jax"}
SLOW = ("torch-compile",)  # to compile: after all others, with three times as long
TOLERANCE = {"float32": (1e-4, 2e-3), "tf32": (2e-2, 0.1)}  # of the losses: relative, and of what they change by


def worker(name: str, case: Case, device: str, precision: str, steps: int, rounds: int, gate: dict[str, Any]) -> None:
    """Check, compile, time; one line of JSON at the end."""
    tf32 = precision == "tf32"
    began = time.perf_counter()
    contestant: Any
    if name == "nicecp":
        from benchmarks.gpu_ours import GpuOurs

        contestant = GpuOurs(case, device, tf32)
        gate = contestant.first_steps(case.gate_steps)
        losses = gate["losses"]
    else:
        from benchmarks.gpu_peers import GpuJax, GpuTorch

        if name == "jax-scan":
            contestant = GpuJax(case, device, tf32)
        else:
            contestant = GpuTorch(case, device, name.removeprefix("torch-"), tf32)
        data, rows = case.data(), np.array(gate["rows"]).reshape(-1, case.batch)
        losses = contestant.gate([case.batch_of(data, batch, gate["seed"], gate["epoch"]) for batch in rows])
    prepared = time.perf_counter() - began
    began = time.perf_counter()
    contestant.run(steps)
    compiling = time.perf_counter() - began
    seconds = [contestant.run(steps) / steps for _ in range(rounds)]
    result = {"losses": losses, "prepare": prepared, "first_chunk": compiling, "seconds": seconds}
    if name == "nicecp":
        result |= {"gate": gate, "replay": contestant.replay(steps)}
    print(json.dumps(result | {"about": contestant.about()}))


def ask(name: str, case: Case, options: argparse.Namespace, precision: str, gate: dict[str, Any]) -> dict[str, Any]:
    """What a contestant's process says; {"failed": why} where it ends badly or takes too long."""
    task = [name, dataclasses.asdict(case), options.device, precision, options.steps, options.rounds, gate]
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    # Files and not pipes, and a group of its own: compilers that it starts may outlive it, and hold a pipe open.
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        given.write(json.dumps(task))
        given.seek(0)
        process = subprocess.Popen(command, stdin=given, stdout=out, stderr=err, start_new_session=True)
        limit = options.timeout * (3 if name in SLOW else 1)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {limit:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().strip().splitlines())
    try:
        said: dict[str, Any] = json.loads(texts[0][-1])
    except (IndexError, ValueError):
        return {"failed": (texts[1] or [f"exit code {process.returncode}"])[-1][:300]}
    return said


def agree(losses: list[float], reference: list[float], precision: str) -> bool:
    """Whether a contestant does nicecp's work: its losses, and what they fall by in these steps."""
    if len(losses) != len(reference):
        return False
    relative, of_change = TOLERANCE[precision]
    change = max(reference) - min(reference)
    worst = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
    return worst <= min(relative * max(abs(reference[0]), 1.0), of_change * change + 1e-6 * abs(reference[0]))


def compare(
    case: Case,
    options: argparse.Namespace,
    precision: str,
    names: list[str],
    results: dict[str, Any],
    keep: Callable[[], None],
    gate: dict[str, Any],
) -> None:
    """One precision: every contestant's numbers, or why it has none, into ``results``, kept as they come.

    gate : nicecp's first steps, which are put in when nicecp has made them; without them nobody else runs.
    """
    for name in names:
        if name != "nicecp" and not gate:
            return
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            results[name] = {"failed": f"{NEEDS[name]} is not installed"}
        elif name == "torch-graph" and options.device == "cpu":
            results[name] = {"failed": "needs a GPU"}
        else:
            results[name] = ask(name, case, options, precision, gate)
        found = results[name]
        if name == "nicecp":
            gate.update(found.pop("gate", {}))
        elif "losses" in found and not agree(found["losses"], gate["losses"], precision):
            found["failed"] = f"its losses {found['losses']} are not nicecp's {gate['losses']}: it does other work"
        if "failed" in found:
            print(f"  {NAMES[name]}: {found['failed']}", flush=True)
        else:
            step = median(found["seconds"])
            print(f"  {NAMES[name]}: {1e3 * step:.3f} ms a step, {case.batch / step:,.0f} rows/s", flush=True)
        keep()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="", help="HDF5 file with a dataset train of 784 bytes a row; drawn without it"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precisions", default="float32,tf32")
    parser.add_argument("--contestants", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--steps", type=int, default=500, help="in a chunk (default: 500)")
    parser.add_argument("--rounds", type=int, default=5, help="chunks that are timed (default: 5)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=90.0,
        help="seconds for one contestant, three times as long where it compiles (default: 90)",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small model and a few steps: does it work?")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # the limit of gpu.sh: contestants end with this process
    options = arguments()
    if options.worker:
        name, case, *rest = json.loads(sys.stdin.read())
        worker(name, Case(**{**case, "hidden": tuple(case["hidden"])}), *rest)
        return
    case = dataclasses.replace(CASES["mnist"], file=options.data)
    if options.quick:
        case = dataclasses.replace(case, hidden=(32,), rows=20 * case.batch, gate_steps=5)
        options.steps, options.rounds = 3, 1
    case = dataclasses.replace(case, rows=len(case.data()))  # a file may have fewer
    names = [name for name in NAMES if name in options.contestants.split(",")]
    from benchmarks.gpu_ours import ceilings, traffic
    from nicecp.kernels import get_backend, with_precision

    report: dict[str, Any] = {"machine": describe(), "device": options.device, "case": dataclasses.asdict(case)}
    report |= {"flops": case.flops, "bytes": traffic(case), "results": {}, "ceilings": {}}
    for precision in options.precisions.split(","):
        backend = get_backend(options.device, 1)
        if precision == "tf32" and options.device == "cuda":
            backend = with_precision(backend, "tf32")
        bound = ceilings(backend, options.quick)
        bound["floor"] = max(case.flops / bound["flops_per_second"], traffic(case) / bound["bytes_per_second"])
        report["ceilings"][precision] = bound
        print(f"{precision}: floor {1e3 * bound['floor']:.3f} ms a step", flush=True)

    def keep() -> None:
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    gates: dict[str, dict[str, Any]] = {}
    for slow in (False, True):
        some = [name for name in names if (name in SLOW) == slow]
        for precision in options.precisions.split(",") if some else ():
            print(precision, flush=True)
            results = report["results"].setdefault(precision, {})
            compare(case, options, precision, some, results, keep, gates.setdefault(precision, {}))


if __name__ == "__main__":
    main()
