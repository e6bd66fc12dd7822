"""A flow as the target of a Metropolis loop in C: compiled code calls the density through a function pointer.

    python examples/c_metropolis.py

Needs a C compiler, ``cc`` or the one that the environment variable CC names. The chain's moments are compared with
those of the flow's own exact samples.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

import nicecp

D, STEPS, WIDTH = 3, 400_000, 0.9
BLOCKS = 40  # of the chain: their means say how well its mean is known, correlated as it is
SIGMA = 4.5


def table(rows: int = 4000) -> np.ndarray:
    """Three columns with a bent, correlated density."""
    random = np.random.default_rng(1)
    x = random.normal(size=(rows, D))
    x[:, 1] = 0.6 * x[:, 1] + 0.5 * x[:, 0] ** 2
    x[:, 2] += 0.8 * x[:, 0]
    return x


def compiled(folder: str) -> ctypes.CDLL:
    """metropolis.c as a shared library."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise SystemExit(f"no C compiler: {compiler[0]!r} is not there; install one, or name it in CC")
    library = Path(folder, "metropolis.so")
    source = Path(__file__).with_name("metropolis.c")
    subprocess.run([*compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-lm"], check=True)
    return ctypes.CDLL(str(library))


def main() -> None:
    states, bad = np.zeros((STEPS, D)), ctypes.c_long(-1)
    with tempfile.TemporaryDirectory() as folder:
        metropolis = compiled(folder).metropolis
        metropolis.restype = ctypes.c_long
        flow = nicecp.NICE(D, (32, 32), 4, "gaussian", init="he", coupling="affine", seed=1)
        nicecp.fit(flow, table(), epochs=20, batch_size=100)
        density = flow.cfunc()
        start = time.perf_counter()
        accepted = metropolis(
            ctypes.c_void_p(density.address), D, ctypes.c_long(STEPS), ctypes.c_double(WIDTH), ctypes.c_uint64(7),
            states.ctypes.data_as(ctypes.POINTER(ctypes.c_double)), ctypes.byref(bad),
        )  # fmt: skip
        seconds = time.perf_counter() - start
    if accepted < 0:
        raise SystemExit(f"the density is not a number at {states[bad.value]}")
    print(f"{STEPS} steps in {seconds:.2f} s, {1e6 * seconds / STEPS:.2f} us each; accepted {accepted / STEPS:.1%}")

    samples = flow.sample(STEPS // 4, 3)
    for name, chain, exact in (("mean", states, samples), ("mean square", states**2, samples**2)):
        blocks = chain.reshape(BLOCKS, -1, D).mean(axis=1)
        error = np.hypot(blocks.std(axis=0, ddof=1) / BLOCKS**0.5, exact.std(axis=0) / len(exact) ** 0.5)
        off = (chain.mean(axis=0) - exact.mean(axis=0)) / error
        for column in range(D):
            print(
                f"{name:11} of {flow.names[column]}: C {chain.mean(axis=0)[column]:8.4f}, "
                f"exact samples {exact.mean(axis=0)[column]:8.4f}, {off[column]:+.1f} standard errors"
            )
        if not (np.abs(off) < SIGMA).all():
            raise SystemExit(f"the chain's {name} is not that of the flow")


if __name__ == "__main__":
    main()
