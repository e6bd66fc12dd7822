"""Who scores and draws rows: one small flow by nicecp, JAX, PyTorch and libraries on it, each in a process of its own.

A contestant has ``score(x)``, x : (n, d) -> log-densities (n,), ``draw(n)`` -> (n, d) samples, and ``caller(x)`` and
``drawer(n)``, functions without arguments that are timed: they find x where the contestant likes to have it and return
when the numbers are there. Started by latency.py with a name and a case; reads JSON commands, answers each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from functools import partial
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
    "torch-compile": "PyTorch torch.compile",
    "torch": "PyTorch eager",
    "nflows": "nflows",
    "normflows": "normflows",
    "zuko": "zuko",
    "numpy": "NumPy",
}
NEEDS = {
    "jax": "jax", "torch": "torch", "torch-trace": "torch", "torch-compile": "torch", "nflows": "nflows",
    "normflows": "normflows", "zuko": "zuko",
}  # fmt: skip
DRAW = ("nicecp", "jax", "torch", "nflows", "normflows", "zuko", "numpy")
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


def rows_of(case: Case, library: Any, weights: Any, u: Any, empty: Any) -> Any:
    """u : (n, d) uniform -> (n, d) samples: the prior's quantiles, and the couplings backwards; empty(a): to fill."""
    h = library.log(u) - library.log1p(-u)
    parts = [h[:, 0::2], h[:, 1::2]]
    for k in reversed(range(len(weights))):
        y = parts[k % 2]
        for weight, bias in weights[k][:-1]:
            y = library.relu(y @ weight + bias) if hasattr(library, "relu") else library.maximum(y @ weight + bias, 0)
        weight, bias = weights[k][-1]
        parts[1 - k % 2] = parts[1 - k % 2] - (y @ weight + bias)
    return empty(parts)


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

    def draw(self, n: int) -> Any:
        return self.flow.sample(n, rng=3)

    def drawer(self, n: int) -> Call:
        flow = self.flow
        return lambda: flow.sample(n)

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
    draw: Callable[[int], Any]
    packages: tuple[str, ...]

    def caller(self, x: Any) -> Call: ...  # type: ignore[empty-body]

    def drawer(self, n: int) -> Call:
        return lambda: self.draw(n)

    def seconds(self, x: Any, calls: int) -> float:
        return timed(self.caller(x), calls)

    def about(self) -> dict[str, Any]:
        return versions(*self.packages)


def interleaved(library: Any) -> Callable[[Any], Any]:
    """(n, d) of two halves."""
    return lambda parts: library.stack(parts, 2).reshape(len(parts[0]), -1)


class Numpy(Peer):
    packages = ("numpy",)

    def __init__(self, case: Case) -> None:
        import numpy as np

        weights = case.weights()
        self.score = lambda x: log_prob(case, np, lambda a: np.logaddexp(a, 0), weights, x)
        random, size = np.random.default_rng(SEED), case.features
        self.draw = lambda n: rows_of(
            case, np, weights, 1.0 - random.random((n, size), case.dtype), interleaved(np)
        )  # fmt: skip

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
        jax.config.update("jax_default_prng_impl", "rbg")
        self.key, smallest = jax.random.key(SEED), 1e-7

        @partial(jax.jit, static_argnums=1)
        def draw(key: Any, n: int) -> Any:
            key, mine = jax.random.split(key)
            u = jax.random.uniform(mine, (n, case.features), case.dtype, smallest, 1.0)
            return key, rows_of(case, jax.numpy, weights, u, interleaved(jax.numpy))

        self.draw_with = draw

    def draw(self, n: int) -> Any:
        self.key, x = self.draw_with(self.key, n)
        return x.block_until_ready()

    def caller(self, x: Any) -> Call:
        resident = self.put(x)
        return lambda: self.score(resident).block_until_ready()


class Torch(Peer):
    packages = ("torch",)

    def __init__(self, case: Case, way: str) -> None:
        import torch

        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        torch.set_float32_matmul_precision("highest")
        weights = [[tuple(map(torch.from_numpy, layer)) for layer in layers] for layers in case.weights()]

        def score(x: Any) -> Any:
            return log_prob(case, torch, torch.nn.functional.softplus, weights, x)

        self.torch, self.put, self.way, self.plain = torch, torch.from_numpy, way, score
        self.score = lambda x: self.plain(self.put(x)).numpy()
        stack, dtype = interleaved(torch), getattr(torch, case.dtype)
        self.draw = lambda n: rows_of(
            case, torch, weights, torch.rand(n, case.features, dtype=dtype).clamp(min=1e-7), stack
        )  # fmt: skip

    def caller(self, x: Any) -> Call:
        resident, function = self.put(x), self.plain
        if self.way == "torch-trace":
            function = self.torch.jit.trace(self.plain, (resident,))
        elif self.way == "torch-compile":
            self.torch.compiler.reset()
            function = self.torch.compile(self.plain, dynamic=False)
        for _ in range(20):  # a trace is optimised in its first calls
            function(resident)
        return lambda: function(resident)


class Library(Torch):
    """A library on PyTorch (benchmarks/libraries.py)."""

    def __init__(self, case: Case, way: str) -> None:
        super().__init__(case, way)
        from benchmarks.libraries import build, columns

        self.packages = ("torch", way)
        model = build(way, case)
        self.put = lambda x: self.torch.from_numpy(columns(way, x))
        self.plain, self.draw = model.log_prob, model.sample


def make(name: str, case: Case) -> Any:
    """The contestant of that name; its software is imported here."""
    if name in ("inside", "point", "nicecp"):
        return Nicecp(case, name)
    if name == "numpy":
        return Numpy(case)
    if name == "jax":
        return Jax(case)
    return Torch(case, name) if name.startswith("torch") else Library(case, name)


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
        elif what == "time_drawing":
            found = timed(contestant.drawer(command["rows"]), command["calls"])
        elif what == "draw":
            found = np.asarray(contestant.draw(command["rows"])).tolist()
        else:
            found = contestant.about()
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
