"""What this machine offers, and whether gradients are right on every device of it: the findings of `nicecp doctor`."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from nicecp.errors import NicecpError
from nicecp.flow import NICE
from nicecp.kernels import detect, get_backend
from nicecp.machine import as_bytes, cpu_model, default_threads, physical_memory

PACKAGES = ("numpy", "numba", "scipy", "h5py", "click", "threadpoolctl", "tqdm")
OPTIONAL = ("matplotlib", "scikit-learn", *detect.DISTRIBUTIONS)
VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_CACHE_DIR", "NUMBA_DISABLE_JIT",
    "CUDA_VISIBLE_DEVICES", "CUDA_PATH", "CUPY_CACHE_DIR",
)  # fmt: skip
DEVICES = ("all", "cpu", "cuda")
ROWS, FEATURES, SEED = 8, 7, 1


@dataclass(frozen=True)
class Finding:
    """One line. ``problem`` : something that should be mended; its remedy is in the text."""

    name: str
    text: str
    problem: bool = False


def examine(device: str = "all") -> Iterator[Finding]:
    """Findings as they are made: the machine, packages, BLAS, Numba's cache, the GPU, and a gradient check each on the
    CPU and on the GPU.

    device : "all" (a GPU that is not there is no problem, one that is there and cannot be used is), "cpu" (no word of
        GPUs) or "cuda" (a GPU that cannot be used is a problem, and the CPU's gradients are not checked).
    """
    if device not in DEVICES:
        raise ValueError(f"the device must be one of {', '.join(DEVICES)}, got {device!r}")
    yield from _machine()
    yield from _packages()
    yield from _blas()
    yield _numba_cache()
    gpu = False
    if device != "cpu":
        found = detect.look()
        yield from _gpu(found, needed=device == "cuda")
        gpu = not found.problem
    if device != "cuda":
        yield from _gradients("cpu", ("float64", "float32"))
    if gpu:
        yield from _gradients("cuda", ("float64", "float32", "tf32"))


def _machine() -> Iterator[Finding]:
    from nicecp import __version__

    yield Finding("nicecp", f"{__version__}, Python {platform.python_version()}, {platform.system()}")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = physical_memory()
    yield Finding(
        "CPU",
        f"{cpu_model()}, {allowed} of {os.cpu_count()} cores allowed, {_threads(default_threads())} by default"
        + ("" if memory is None else f", {as_bytes(memory)} of memory"),
    )
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    if given:
        yield Finding("environment", ", ".join(given))


def _packages() -> Iterator[Finding]:
    import h5py

    found, missing = [], []
    for name in (*PACKAGES, *OPTIONAL):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            if name in PACKAGES:
                missing.append(name)
    yield Finding("packages", ", ".join(found))
    if missing:
        yield Finding("packages", f"{', '.join(missing)} not installed: reinstall nicecp", problem=True)
    yield Finding("HDF5", h5py.version.hdf5_version)


def _blas() -> Iterator[Finding]:
    """NumPy's matrix products, and SciPy's, which Numba calls where NumPy's are not exported."""
    import scipy.linalg  # noqa: F401  (loads its BLAS)
    from threadpoolctl import threadpool_info

    found = []
    for library in threadpool_info():
        if library.get("user_api") != "blas":
            continue
        path = str(library.get("filepath"))
        owner = next((name for name in ("numpy", "scipy") if f"{name}.libs" in path or f"/{name}/" in path), "shared")
        text = f"{library.get('internal_api')} {library.get('version')}, {_threads(library.get('num_threads'))}"
        kind = library.get("architecture")
        found.append(Finding(f"BLAS ({owner})", f"{text}, {kind}" if kind else text))
    yield from sorted(found, key=lambda finding: finding.name)
    if not found:
        yield Finding("BLAS", "none that is known: matrix products may be slow, install NumPy from PyPI", problem=True)


def _threads(count: object) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _numba_cache() -> Finding:
    """Whether compiled kernels are kept from one process to the next: otherwise each waits some 15 s for them."""
    from nicecp.kernels._numba_tape import replay

    cache = getattr(replay, "_cache", None)
    folder = getattr(cache, "cache_path", None)
    if folder is None:
        remedy = "every process compiles anew; name a folder in NUMBA_CACHE_DIR"
        return Finding("Numba cache", f"there is no folder that can be written: {remedy}", problem=True)
    kept = [path for path in Path(folder).glob("*.nb[ic]") if path.is_file()] if os.path.isdir(folder) else []
    size = as_bytes(sum(path.stat().st_size for path in kept))
    return Finding("Numba cache", f"{folder!r}, {len(kept)} files, {size}")


def _gpu(found: detect.Found, needed: bool) -> Iterator[Finding]:
    if found.driver is not None:
        yield Finding("NVIDIA driver", f"for CUDA {found.driver[0]}.{found.driver[1]}")
    for number, gpu in enumerate(found.gpus):
        capability = f"compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        used = "" if number == 0 else "; not used: choose with CUDA_VISIBLE_DEVICES"
        yield Finding(f"GPU {number}", f"{gpu.name}, {as_bytes(gpu.memory)}, {capability}{used}")
    if found.nvrtc:
        yield Finding("NVRTC", found.nvrtc)
    if found.cublaslt:
        yield Finding("cuBLASLt", found.cublaslt)
    if found.problem:
        yield Finding("GPU", found.problem, problem=needed or found.driver is not None)


def _gradients(device: str, kinds: tuple[str, ...]) -> Iterator[Finding]:
    """nicecp.testing's check on a small flow with both kinds of coupling, in every dtype and precision."""
    from nicecp.testing import check_gradients

    name = f"gradients, {device}"
    try:
        backend = get_backend(device)
    except NicecpError as error:
        yield Finding(name, str(error), problem=True)
        return
    x = np.random.default_rng(SEED).normal(size=(ROWS, FEATURES))
    for kind in kinds:
        dtype, precision = ("float32", "tf32") if kind == "tf32" else (kind, "full")
        began = time.perf_counter()
        try:
            flow = NICE(
                FEATURES, (8, 8), 4, dtype=dtype, seed=SEED, coupling=("additive", "affine"), init="he",
                precision=precision, device=backend.device,
            )  # fmt: skip
            report = check_gradients(flow, x, max_checks=64)
        except (AssertionError, NicecpError, RuntimeError, FloatingPointError) as error:
            yield Finding(name, f"{kind}: {' '.join(str(error).split())}; please report this", problem=True)
            continue
        worst = f"largest error {report.error:.2g} of what is allowed (by {report.worst})"
        yield Finding(name, f"{kind}: right; {worst}, {time.perf_counter() - began:.1f} s")
