"""What a step costs by several ranks: a formula from the model's shape, its check on this machine, and predictions.

    python benchmarks/scaling.py check                     steps by one rank against the formula
    mpirun -n 2 python benchmarks/scaling.py ranks         sums of gradients and steps by several ranks
    python benchmarks/scaling.py predict                   the tables of docs/scaling.md

The formula is that of docs/scaling.md; ``Machine`` holds what it needs to know of a machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from math import ceil, log2
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np

from benchmarks.machine import describe
from benchmarks.records import Records
from nicecp.flow import NICE
from nicecp.kernels import get_backend
from nicecp.kernels.backend import Purpose
from nicecp.parallel import ALONE, Communicator, Mpi, launched
from nicecp.params import Layout
from nicecp.plan import flops_of
from nicecp.preprocessing import Dequantize, Standardize
from nicecp.ranks import buckets_of
from nicecp.sources import ArraySource
from nicecp.spec import ModelSpec, alternating
from nicecp.split import Split
from nicecp.train import TrainConfig, Trainer

MODELS = {
    "mnist": (ModelSpec(784, alternating((1000,) * 5, 4), dtype="float32"), 200),
    "cifar10": (ModelSpec(3072, alternating((2000,) * 4, 4), dtype="float32"), 200),
    "table": (ModelSpec(8, alternating((64, 64), 8), dtype="float32"), 256),
}


CACHE = 2**20  # bytes of parameters


@dataclass(frozen=True)
class Machine:
    """One rank's share of a machine.

    flops, weights: a product of n rows by a matrix takes 2 n in out / flops, and the matrix's bytes / weights whatever
    n is; small_flops, small_weights: of matrices that stay in the second-level cache from one product to the next, as
    those of a model of at most CACHE bytes do; memory: bytes a second of an update; unit, feature: seconds, beside
    products, for a hidden unit and a feature of a row; call: of one call of a kernel; latency, network: of a message,
    in seconds and bytes a second, each way.
    """

    flops: float
    weights: float
    small_flops: float
    small_weights: float
    memory: float
    unit: float
    feature: float
    call: float
    latency: float = 0.0
    network: float = 1.0


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by one of N ranks; ``exposed`` is what of the sums is not hidden behind the backward pass."""

    compute: float
    exchange: float
    sums: float
    exposed: float

    @property
    def step(self) -> float:
        return self.compute + self.exchange + self.exposed


def all_reduce(size: float, ranks: int, machine: Machine) -> float:
    """Seconds of a sum of so many bytes: a ring for long messages, recursive doubling for short ones."""
    if ranks == 1:
        return 0.0
    ring = 2 * (ranks - 1) * machine.latency + 2 * size * (ranks - 1) / ranks / machine.network
    return min(ring, ceil(log2(ranks)) * (machine.latency + size / machine.network))


def cost(spec: ModelSpec, batch: int, ranks: int, machine: Machine) -> Cost:
    """The formula: batch is of all ranks together."""
    n, item = batch / ranks, 4 if spec.dtype == "float32" else 8
    sizes = [spec.layer_sizes(k) for k in range(len(spec.couplings))]
    layers, units = sum(len(layer) - 1 for layer in sizes), sum(sum(layer[1:-1]) for layer in sizes)
    parameters = spec.n_parameters * item
    small = parameters <= CACHE
    flops, weights = (machine.small_flops, machine.small_weights) if small else (machine.flops, machine.weights)
    forward, step = (each * n / flops for each in flops_of(spec, 1))
    backward = step - forward + 2 * parameters / weights
    forward += parameters / weights
    beside = n * (2 * units * machine.unit + spec.n_features * machine.feature)
    calls = (3 * layers + 4 * len(spec.couplings) + 8) * machine.call
    compute = forward + backward + 7 * parameters / machine.memory + beside + calls
    exchange = all_reduce((2 * batch + ranks) * 8, ranks, machine)
    buckets = buckets_of(Layout(spec), item)
    sums = [all_reduce(bucket.range.size * item, ranks, machine) for bucket in buckets]
    # The last bucket's sum begins when the backward pass is over; the others come before it.
    hidden = min(sum(sums[:-1]), backward * (len(sums) - 1) / len(sums))
    return Cost(compute, exchange, sum(sums), sum(sums) - hidden)


def trainer_of(spec: ModelSpec, batch: int, communicator: Communicator = ALONE) -> Trainer:
    rng = np.random.default_rng(0)
    d = spec.n_features
    image = d > 100
    data: Any = rng.integers(0, 256, (4 * batch, d), np.uint8) if image else rng.normal(size=(40 * batch, d))
    steps = (Dequantize(),) if image else (Standardize(np.zeros(d), np.ones(d)),)
    flow = NICE.from_spec(spec, None, steps, init="he", backend=get_backend("cpu", 1))
    split = Split.contiguous(ArraySource(data), 0, len(data), Purpose.TRAIN_NOISE)
    return Trainer(flow, split, None, TrainConfig(batch_size=batch), communicator=communicator)


def step_seconds(trainer: Trainer, seconds: float = 2.0) -> float:
    """Median of steps for about so many seconds; the same number on all ranks."""
    with trainer.backend.computing():
        trainer.step()
        began = time.perf_counter()
        trainer.step()
        count = np.array([max(5.0, min(2000.0, seconds / (time.perf_counter() - began)))])
        trainer.communicator.sum(count)
        taken = []
        for _ in range(int(count[0] / trainer.communicator.size)):
            began = time.perf_counter()
            trainer.step()
            taken.append(time.perf_counter() - began)
    return median(taken)


def measure_machine() -> Machine:
    """On one thread, of what is not in the cache: products, updates; and of what is: units, features, calls."""
    backend = get_backend("cpu", 1)
    with backend.computing():
        products = *product_rates(backend, 1000, 24), *product_rates(backend, 64, 8)
        arrays = [np.ones(10**7, np.float32) for _ in range(4)]
        update = timed(lambda: backend.update(*arrays, 0, 10**7, np.zeros(64), 0))
        small = [np.ones((2, 2), np.float32) for _ in range(3)]
        call = timed(backend.record(lambda: [backend.couple(*small, 1) for _ in range(1000)])) / 1000
        y, db = np.ones((256, 64), np.float32), np.ones(64, np.float32)
        wide = np.ones((1, 64), np.float32)

        def masks() -> None:
            for _ in range(100):
                backend.dense_backward(None, None, db, y, y, y, wide, True)

        unit = timed(backend.record(masks)) / 100 / y.size
        x, logp = np.ones((256, 64), np.float32), np.ones(256)

        def prior() -> None:
            backend.scale_prior_forward(logp, x, x, y, y, db, db, 1)
            backend.scale_prior_backward(x, x, db, db, logp, y, y, db, db, 1)

        feature = timed(backend.record(prior)) / 2 / x.size
    return Machine(*products, 7 * 4e7 / update, unit, feature, call)


def product_rates(backend: Any, size: int, count: int) -> tuple[float, float]:
    """flops and weights of products of 25 and 200 rows by so many square matrices in turn."""
    many = [np.ones((size, size), np.float32) for _ in range(count)]
    taken = {}
    for n in (25, 200):
        x, y = np.ones((n, size), np.float32), np.ones((n, size), np.float32)
        products = backend.record(lambda x=x, y=y: [backend.matmul(y, x, w) for w in many])
        taken[n] = timed(products) / count
    slope = (taken[200] - taken[25]) / 175
    return 2 * size**2 / slope, 4 * size**2 / max(taken[25] - 25 * slope, 1e-9)


def timed(work: Any, seconds: float = 0.3) -> float:
    work()
    taken, until = [], time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)


def shown(machine: Machine) -> str:
    return (
        f"{machine.flops / 1e9:.0f} GFLOP/s, weights {machine.weights / 1e9:.1f} GB/s, small ones "
        f"{machine.small_flops / 1e9:.0f} GFLOP/s and {machine.small_weights / 1e9:.1f} GB/s, updates "
        f"{machine.memory / 1e9:.1f} GB/s, {1e9 * machine.unit:.2f} ns a unit, {1e9 * machine.feature:.2f} ns a "
        f"feature, {1e9 * machine.call:.0f} ns a call"
    )


def check(records: Records, quick: bool = False) -> None:
    """Steps of one rank: the formula by constants that were measured just before, three times each."""
    print(describe())
    for name, batches in (("mnist", (10, 50, 200, 800)), ("table", (64, 256, 1024))):
        for batch in batches[:1] if quick else batches:
            trainer, found = trainer_of(MODELS[name][0], batch), []
            for _ in range(1 if quick else 3):  # a shared machine's speed changes within seconds
                before = measure_machine()
                found.append((step_seconds(trainer, 1.0), cost(MODELS[name][0], batch, 1, before).step, before))
            measured, predicted, machine = sorted(found, key=lambda each: each[0] / each[1])[len(found) // 2]
            against(records, "a step of one rank, one thread", f"{name}, batch {batch}", measured, predicted)
            print(f"  ({shown(machine)})", flush=True)


def against(records: Records, group: str, who: str, measured: float, predicted: float) -> None:
    """A line of the table of what was measured and what the formula says."""
    print(f"{group}, {who}: measured {1e3 * measured:.3g} ms, formula {1e3 * predicted:.3g} ms, "
          f"ratio {measured / predicted:.2f}", flush=True)  # fmt: skip
    records.values(group, who, "measured, ms", [1e3 * measured])
    records.values(group, who, "formula, ms", [1e3 * predicted])
    records.values(group, who, "measured / formula", [measured / predicted])


SIZES = tuple(8 * 4**k for k in range(12))  # bytes, 8 to 32 MiB


def sums_by_size(communicator: Communicator) -> dict[int, float]:
    """Seconds of a sum over ranks, the median of some; every rank begins each at about the same time."""
    found = {}
    for size in SIZES:
        array, taken, small = np.ones(size // 8), [], np.zeros(1)
        for _ in range(30 if size < 2**20 else 8):
            communicator.sum(small)
            began = time.perf_counter()
            communicator.sum(array)
            taken.append(time.perf_counter() - began)
        found[size] = median(taken)
    return found


def ranks(records: Records, quick: bool = False) -> None:
    """Under mpirun, one thread a rank: sums by size, steps by one rank and by all, in turn, beside the formula."""
    from mpi4py import MPI

    world = Mpi(MPI.COMM_WORLD)
    say: Any = print if world.rank == 0 else lambda *a, **k: None
    log = records if world.rank == 0 else Records(None, "")
    say(describe(), world.describe())
    sums, size = sums_by_size(world), world.size
    # Latency from the shortest, bandwidth from the longest message; what lies between checks the formula.
    latency = sums[SIZES[0]] / ceil(log2(size))
    network = 2 * SIZES[-1] * (size - 1) / size / sums[SIZES[-1]]
    say(f"latency {1e6 * latency:.1f} us, {network / 1e9:.2f} GB/s each way")
    blank = replace(CPU, latency=latency, network=network)
    for length, seconds in sums.items():
        group = f"a sum over {size} ranks on one machine, {world.describe().partition(', ')[2]}"
        against(log, group, f"{length:,} bytes", seconds, all_reduce(length, size, blank)) if world.rank == 0 else None
    machine = replace(together(measure_machine(), world), latency=latency, network=network)
    say(f"each rank, all at work: {shown(machine)}")
    for name, batches in (("mnist", (200, 800)), ("table", (256, 4096))):
        for batch in batches[:1] if quick else batches:
            spec, alone, all_of = MODELS[name][0], [], []
            shared = trainer_of(spec, batch, world)
            single = trainer_of(spec, batch) if world.rank == 0 else None
            for _ in range(1 if quick else 3):
                alone.append(step_seconds(single, 1.0) if single is not None else 0.0)
                sleeping_barrier(MPI.COMM_WORLD)
                all_of.append(step_seconds(shared, 1.0))
                sleeping_barrier(MPI.COMM_WORLD)
            predicted = cost(spec, batch, size, machine)
            say(f"  compute {1e3 * predicted.compute:.3g} ms, sums {1e3 * predicted.sums:.3g}, "
                f"of these exposed {1e3 * predicted.exposed:.3g}")  # fmt: skip
            if world.rank == 0:
                group = f"a step of {size} ranks, one thread each"
                against(log, group, f"{name}, batch {batch}", median(all_of), predicted.step)
                log.values(group, f"{name}, batch {batch}", "one rank, ms", [1e3 * value for value in alone])
                speed = [a / b for a, b in zip(alone, all_of, strict=True)]
                log.values(group, f"{name}, batch {batch}", "speed-up", speed)
                say(f"  one rank {1e3 * median(alone):.3g} ms, speed-up {median(speed):.2f}", flush=True)


def sleeping_barrier(communicator: Any) -> None:
    """A rank that waits leaves its core to the others; MPI's own barrier keeps it busy."""
    request = communicator.Ibarrier()
    while not request.Test():
        time.sleep(0.002)


def together(machine: Machine, communicator: Communicator) -> Machine:
    """The mean over ranks of what each has measured while the others did."""
    names = ("flops", "weights", "small_flops", "small_weights", "memory", "unit", "feature", "call")
    found = np.array([getattr(machine, name) for name in names])
    communicator.sum(found)
    return replace(machine, **dict(zip(names, found / communicator.size, strict=True)))


# Data sheets and usual numbers, not measured here: a GPU of 50 TFLOP/s in float32 and 2.5 TB/s as such kernels reach
# them, eight in a node behind links of 200 GB/s, nodes with 25 GB/s for each GPU; CPU ranks of one core like this
# machine's (check), 64 in a node that share 25 GB/s.
GPU = Machine(50e12, 2.5e12, 50e12, 2.5e12, 2.5e12, 2e-12, 2e-11, 4e-6, 10e-6, 200e9)
GPU_NODES = replace(GPU, latency=15e-6, network=25e9)
CPU = Machine(150e9, 8e9, 120e9, 40e9, 12e9, 2e-10, 1e-8, 1e-7, 1e-6, 3e9)
CPU_NODES = replace(CPU, latency=3e-6, network=25e9 / 64)


def predict(records: Records, quick: bool = False) -> None:
    kinds: tuple[tuple[str, Machine, Machine, int, tuple[int, ...]], ...] = (
        ("GPUs", GPU, GPU_NODES, 8, (1, 2, 4, 8, 16, 32, 64)),
        ("CPU ranks", CPU, CPU_NODES, 64, (1, 2, 4, 16, 64, 256, 1000)),
    )
    for kind, inside, between, node, counts in kinds:
        for name, (spec, batch) in MODELS.items():
            for grows in (False, True):
                total = "rows grow with ranks" if grows else f"batch {batch}"
                print(f"\n{name}, {kind}, {total}: ranks, ms a step, rows/s, efficiency, communication / compute")
                first = None
                for count in counts:
                    rows = batch * (count if grows else 1)
                    if rows < count:
                        print(f"  {count}: more ranks than rows")
                        continue
                    one = cost(spec, rows, count, inside if count <= node else between)
                    rate = rows / one.step
                    first = first or rate
                    share = (one.exchange + one.exposed) / one.compute
                    group = f"predicted, {kind}, {name}, {total}"
                    records.values(group, str(count), "ms a step", [1e3 * one.step])
                    records.values(group, str(count), "communication / compute", [share])
                    print(f"  {count:5} {1e3 * one.step:10.4g} {rate:12.4g} {rate / first / count:6.1%} {share:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "ranks", "predict"])
    parser.add_argument("--json", type=Path, help="write all numbers here, as JSON lines")
    parser.add_argument("--quick", action="store_true", help="does it work at all?")
    options = parser.parse_args()
    first = launched()[1] == 0  # the other ranks have nothing to write
    records = Records(options.json if first else None, "scaling")
    {"check": check, "ranks": ranks, "predict": predict}[options.what](records, options.quick)


if __name__ == "__main__":
    main()
