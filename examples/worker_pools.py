"""multiprocessing: chains in fork and spawn pools, after training in the parent, equal the serial ones bit for bit.

    python examples/worker_pools.py

Nothing hangs: the library's threads are made anew in every child, and hold no locks when a process is forked.
"""

from __future__ import annotations

import functools
import multiprocessing
import warnings

import banana
import numpy as np

import nicecp

CHAINS, STEPS = 8, 2000


def chain(flow: nicecp.NICE, seed: int) -> np.ndarray:
    """A Metropolis chain on the flow, point by point : (STEPS, 4)."""
    rng = np.random.default_rng(seed)
    x = flow.sample(1, rng)[0]
    current = flow.log_prob(x)
    steps = np.empty((STEPS, flow.dim))
    for step in steps:
        proposed = x + 0.8 * rng.normal(size=flow.dim)
        value = flow.log_prob(proposed)
        if np.log(rng.random()) < value - current:
            x, current = proposed, value
        step[:] = x
    return steps


def main() -> None:
    flow = nicecp.NICE(banana.DIM, (32, 32), 4, "gaussian", coupling="affine", init="he", seed=0, threads=2)
    nicecp.fit(flow, banana.sample(4000, seed=0), epochs=10, whiten="gaussian")
    serial = [chain(flow, seed) for seed in range(CHAINS)]
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's general advice against fork beside threads
            work = pool.map_async(functools.partial(chain, flow), range(CHAINS))
            found = work.get(timeout=50)
        same = all(np.array_equal(one, other) for one, other in zip(found, serial, strict=True))
        print(
            f"{method}: {CHAINS} chains of {STEPS} steps, {'the same bits' if same else 'OTHER NUMBERS'} as in series"
        )
        assert same
        nicecp.fit(flow, banana.sample(1000, seed=1), epochs=1)  # the parent trains on, and forks again
        serial = [chain(flow, seed) for seed in range(CHAINS)]
    assert len({one.tobytes() for one in serial}) == CHAINS


if __name__ == "__main__":
    main()
