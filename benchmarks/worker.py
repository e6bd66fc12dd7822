"""One contestant in a process of its own: reads JSON commands from standard input, a line each, and answers each.

It is blocked on its pipe while others run. Started by train_cpu.py; standard output carries answers only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.cases import Case
from benchmarks.machine import cpus

NAMES = {
    "nicecp": "nicecp",
    "products": "bare matrix products",
    "torch": "PyTorch eager, fused Adam",
    "torch-compile": "PyTorch torch.compile, fused Adam",
    "jax": "JAX jit",
    "jax-scan": "JAX jit, lax.scan",
    "nflows": "nflows",
    "normflows": "normflows",
    "zuko": "zuko",
}
NEEDS = {
    "torch": "torch", "torch-compile": "torch", "jax": "jax", "jax-scan": "jax", "nflows": "nflows",
    "normflows": "normflows", "zuko": "zuko",
}  # fmt: skip


def make(name: str, case: Case, threads: int) -> Any:
    """The contestant of that name; its software is imported here, after the CPUs and thread counts are set."""
    from benchmarks.peers import Jax, Products, Torch, TorchLibrary

    if name == "nicecp":
        from benchmarks.ours import Ours

        return Ours(case, threads)
    if name == "products":
        return Products(case, threads)
    if NEEDS[name] == "torch":
        return Torch(case, threads, compiled=name == "torch-compile")
    if name in ("nflows", "normflows", "zuko"):
        return TorchLibrary(case, threads, name)
    return Jax(case, threads, scan=name == "jax-scan")


def answer(contestant: Any, case: Case, command: dict[str, Any]) -> Any:
    """Do what one command says."""
    import numpy as np

    what = command["do"]
    if what == "run":
        return contestant.run(command["steps"])
    if what in ("first_steps", "breakdown"):
        return getattr(contestant, what)(command["steps"])
    if what == "shuffle":
        return contestant.shuffle(command["epoch"])
    if what == "valid":
        return contestant.valid(case.held_out(command["epoch"]))
    if what == "gate":
        data = case.data()
        rows = np.array(command["rows"]).reshape(-1, case.batch)
        return contestant.gate([case.batch_of(data, batch, command["seed"], command["epoch"]) for batch in rows])
    return contestant.about()


def main() -> None:
    name, threads, case = sys.argv[1], int(sys.argv[2]), Case(**json.loads(sys.argv[3]))
    case = dataclasses.replace(case, hidden=tuple(case.hidden))
    if hasattr(os, "sched_setaffinity"):  # every contestant gets the same CPUs, whatever it thinks of thread counts
        os.sched_setaffinity(0, cpus()[:threads])
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    contestant = make(name, case, threads)
    for line in sys.stdin:
        print(json.dumps(answer(contestant, case, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
