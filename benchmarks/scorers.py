"""Who scores rows: log-densities of one small flow by nicecp, JAX, PyTorch and NumPy, each in a process of its own.

A contestant has ``score(x)``, x : (n, d) -> log-densities (n,), and ``caller(x)``, a function without arguments that is
timed: it finds x where the contestant likes to have it and returns when the numbers are there. Started by latency.py
with a name and a case; reads JSON commands, answers each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.cases import SEED, Case
from benchmarks.machine import cpus, versions

NAMES = {
    "inside": "nicecp, njit_log_prob inside @njit",
    "point": "nicecp, njit_log_prob from Python",
    "nicecp": "nicecp, log_prob",
    "jax": "JAX jit",
    "torch-trace": "PyTorch torch.jit.trace",
    "torch": "PyTorch eager",
    "numpy": "NumPy",
}
NEEDS = {"jax": "jax", "torch": "torch", "torch-trace": "torch"}
ONE_ROW = ("inside", "point")  # score one row at a time

Call = Callable[[], Any]


def log_prob(case: Case, library: Any, softplus: Any, weights: Any, x: Any) -> Any:
    """x : (n, d) -> (n,) in the words that NumPy, JAX and PyTorch have in common; scales are 0."""
    parts = [x[:, 0::2], x[:, 1::2]]
    for k, layers in enumerate(weights):
        y = parts[k % 2]
        for weight, bias in layers[:-1]:
            y = library.relu(y @ weight + bias) if hasattr(library, "relu") else library.maximum(y @ weight + bias, 0)
        weight, bias = layers[-1]
        parts[1 - k % 2] = parts[1 - k % 2] + (y @ weight + bias)
    return -sum((h + 2.0 * softplus(-h)).sum(1) for h in parts)


class Nicecp:
    """The flow itself; point: its Numba function from Python; inside: called by a compiled loop over many rows."""

    def __init__(self, case: Case, way: str) -> None:
        import numba
        import numpy as np

        import nicecp

        self.way = way
        self.flow = nicecp.NICE(
            case.features, case.hidden, case.couplings, "logistic", case.dtype, SEED, device="cpu", threads=1
        )
        named: dict[str, Any] = {"scaling/log_scale": np.zeros(case.features)}
        for k, layers in enumerate(case.weights()):
            for j, (weight, bias) in enumerate(layers):
                named[f"couplings/{k}/layers/{j}/weight"] = weight
                named[f"couplings/{k}/layers/{j}/bias"] = bias
        self.flow.set_parameters(named)
        if way != "nicecp":
            function = self.point = self.flow.njit_log_prob()

            @numba.njit  # type: ignore[untyped-decorator]
            def loop(x: Any) -> float:
                total = 0.0
                for i in range(x.shape[0]):
                    total += function(x[i])
                return total

            self.loop = loop

    def score(self, x: Any) -> Any:
        if self.way == "nicecp":
            return self.flow.log_prob(x)
        return [self.point(row) if self.way == "point" else self.loop(row[None]) for row in x.astype("float64")]

    def caller(self, x: Any) -> Call:
        if self.way == "nicecp":
            given, flow = x[0] if len(x) == 1 else x, self.flow
            return lambda: flow.log_prob(given)
        row, point = x[0].astype("float64"), self.point
        return lambda: point(row)

    def seconds(self, x: Any, calls: int) -> float:
        if self.way != "inside":
            return timed(self.caller(x), calls)
        many = x[:1].astype("float64").repeat(max(1, calls // PIECES), axis=0)
        return timed(lambda: self.loop(many), PIECES) / len(many)

    def about(self) -> dict[str, Any]:
        import nicecp

        return {"nicecp": nicecp.__version__, **versions("numpy", "numba")}


PIECES = 15  # of a burst: their median leaves out those in which the system gave the CPU to somebody else


def timed(call: Call, calls: int) -> float:
    """Seconds per call, the median over pieces of a burst."""
    call()
    each, seconds = max(1, calls // PIECES), []
    for _ in range(min(calls, PIECES)):
        start = perf_counter()
        for _ in range(each):
            call()
        seconds.append((perf_counter() - start) / each)
    return median(seconds)


class Peer:
    """Something that scores batches in one call."""

    score: Callable[[Any], Any]
    packages: tuple[str, ...]

    def caller(self, x: Any) -> Call: ...  # type: ignore[empty-body]

    def seconds(self, x: Any, calls: int) -> float:
        return timed(self.caller(x), calls)

    def about(self) -> dict[str, Any]:
        return versions(*self.packages)


class Numpy(Peer):
    packages = ("numpy",)

    def __init__(self, case: Case) -> None:
        import numpy as np

        weights = case.weights()
        self.score = lambda x: log_prob(case, np, lambda a: np.logaddexp(a, 0), weights, x)

    def caller(self, x: Any) -> Call:
        return lambda: self.score(x)


class Jax(Peer):
    packages = ("jax", "jaxlib")

    def __init__(self, case: Case) -> None:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
        jax.config.update("jax_enable_x64", case.dtype == "float64")
        weights = jax.tree.map(jax.numpy.asarray, case.weights())  # frozen into the compiled function
        self.put = jax.numpy.asarray
        self.score = jax.jit(lambda x: log_prob(case, jax.numpy, jax.nn.softplus, weights, x))

    def caller(self, x: Any) -> Call:
        resident = self.put(x)
        return lambda: self.score(resident).block_until_ready()


class Torch(Peer):
    packages = ("torch",)

    def __init__(self, case: Case, traced: bool) -> None:
        import torch

        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        torch.set_float32_matmul_precision("highest")
        weights = [[tuple(map(torch.from_numpy, layer)) for layer in layers] for layers in case.weights()]

        def score(x: Any) -> Any:
            return log_prob(case, torch, torch.nn.functional.softplus, weights, x)

        self.put, self.traced, self.trace = torch.from_numpy, traced, torch.jit.trace
        self.plain = score
        self.score = lambda x: score(torch.from_numpy(x)).numpy()

    def caller(self, x: Any) -> Call:
        resident = self.put(x)
        function = self.trace(self.plain, (resident,)) if self.traced else self.plain
        for _ in range(20):  # a trace is optimised in its first calls
            function(resident)
        return lambda: function(resident)


def make(name: str, case: Case) -> Any:
    """The contestant of that name; its software is imported here."""
    if name in ("inside", "point", "nicecp"):
        return Nicecp(case, name)
    if name == "numpy":
        return Numpy(case)
    return Jax(case) if name == "jax" else Torch(case, traced=name == "torch-trace")


def main() -> None:
    import numpy as np

    name, case = sys.argv[1], Case(**json.loads(sys.argv[3]))
    case = dataclasses.replace(case, hidden=tuple(case.hidden))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus()[:1])
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contestant, data = make(name, case), case.data()
    for line in sys.stdin:
        command = json.loads(line)
        what, x = command["do"], data[: command.get("rows", 1)]
        if what == "score":
            found: Any = np.asarray(contestant.score(x), np.float64).tolist()
        elif what == "time":
            found = contestant.seconds(np.ascontiguousarray(x), command["calls"])
        else:
            found = contestant.about()
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
