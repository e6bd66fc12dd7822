"""Every kernel of a training step on its own, at the MNIST model's sizes, beside what its bytes or operations need."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.gpu_ours import ceilings, seconds_of
from benchmarks.machine import describe
from nicecp.kernels import get_backend
from nicecp.kernels.backend import OPTIMIZERS, PRIORS, Backend, Slot

Work = tuple[str, Callable[[], None], float, float]  # name, call, bytes, operations


def works(backend: Backend, n: int, d: int, h: int) -> list[Work]:
    """The operations of a step for n rows of d features and h hidden units, with the bytes that they must move."""
    rng = np.random.default_rng(1)

    def put(*shape: int, dtype: Any = np.float32) -> Any:
        array = backend.alloc(shape, dtype)
        backend.copy_in(array, rng.standard_normal(shape).astype(dtype))
        return array

    half = d // 2
    x, x0, x1, m0 = put(n, d), put(n, half), put(n, half), put(n, half)
    y, dy, w, dw, b, db, a = put(n, h), put(n, h), put(h, h), put(h, h), put(h), put(h), put(n, h)
    s0, s1, logp, dlogp = put(half), put(half), put(n, dtype=np.float64), put(n, dtype=np.float64)
    weight, state = backend.asarray(np.ones(n)), backend.asarray(_state())
    data = backend.asarray(rng.integers(0, 256, (max(n, 2000), d), dtype=np.uint8))
    index = backend.asarray(rng.integers(0, max(n, 2000), n))
    order = backend.asarray(np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)]))
    shift, scale = backend.asarray(np.zeros(d)), backend.asarray(np.ones(d))
    size = 19 * h * h  # as many as the model has: a step's parameters do not stay in the cache
    p, g, first, second = put(size), put(size), put(size), backend.asarray(np.ones(size, np.float32))
    product, row, prior = 2.0 * n * h * h, 4.0 * n, PRIORS["logistic"]
    return [
        ("load_batch, bytes",
         lambda: backend.load_batch(x0, x1, weight, data, index, index, order, shift, scale, state, 1, 0),
         row * d * 1.25, 0.0),
        ("join", lambda: backend.join(x, x0, x1, order), 2 * row * d, 0.0),
        ("dense_forward, ReLU", lambda: backend.dense_forward(y, a, w, b, True), 4.0 * (2 * n * h + h * h), product),
        ("dense_backward, ReLU", lambda: backend.dense_backward(a, dw, db, dy, y, x=y, w=w, relu=True),
         4.0 * (4 * n * h + 2 * h * h), 2 * product),
        ("couple", lambda: backend.couple(x1, x1, m0, 1), 3 * row * half, 0.0),
        ("scale_prior_forward",
         lambda: backend.scale_prior_forward(logp, x0, x1, x0, x1, s0, s1, prior), 2 * row * d, 0.0),
        ("scale_prior_backward",
         lambda: backend.scale_prior_backward(x0, x1, s0, s1, dlogp, x0, x1, s0, s1, prior), 2 * row * d, 0.0),
        ("loss", lambda: backend.loss(state, dlogp, logp, weight), 24.0 * n, 0.0),
        ("update, AdaM", lambda: backend.update(p, g, first, second, 0, size, state, OPTIMIZERS["adam"]),
         28.0 * size, 0.0),
        ("advance", lambda: backend.advance(state), 0.0, 0.0),
    ]  # fmt: skip


def _state() -> np.ndarray[Any, Any]:
    from nicecp.optimizers import AdaM

    state = np.zeros(Slot.SIZE)
    AdaM(rate=1e-9).write(state)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work?")
    options = parser.parse_args()
    backend = get_backend(options.device, 1)
    bound = ceilings(backend, options.quick)
    sizes = (20, 16, 32) if options.quick else (200, 784, 1000)
    rows = []
    print(f"{'':24} {'us':>9} {'floor, us':>10} {'share':>6}")
    for name, call, size, flops in works(backend, *sizes):
        seconds = seconds_of(backend, call, 2 if options.quick else 50, 3 if options.quick else 20)
        floor = max(size / bound["bytes_per_second"], flops / bound["flops_per_second"])
        rows.append({"name": name, "seconds": seconds, "floor": floor, "bytes": size, "flops": flops})
        print(f"{name:24} {1e6 * seconds:9.2f} {1e6 * floor:10.2f} {floor / seconds:6.2f}", flush=True)
    if options.json:
        report = {"machine": describe(), "device": options.device, "sizes": sizes, "ceilings": bound, "kernels": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
