"""What a run depends on beside its settings: versions, threads, memory."""

from __future__ import annotations

import os
import platform

from nicecp.kernels import get_backend
from nicecp.kernels.backend import Backend


def _blas() -> list[dict[str, object]]:
    """The BLAS libraries that NumPy and SciPy have loaded, as threadpoolctl describes them."""
    import numpy as np  # noqa: F401  (its BLAS must be loaded to be found)
    from threadpoolctl import threadpool_info

    return [library for library in threadpool_info() if library.get("user_api") == "blas"]


def versions(backend: Backend | None = None) -> dict[str, str]:
    """Name to version of all that can change a run's bits, with a GPU's of a backend on one."""
    import h5py
    import numba
    import numpy as np

    from nicecp import __version__

    driver = getattr(backend, "driver", None)
    gpu = {} if driver is None else {"gpu": f"{driver.name}, {driver.precision}"}
    return gpu | {
        "nicecp": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "h5py": h5py.__version__,
        "blas": blas_version(),
    }


def blas_version() -> str:
    """Name and version of the BLAS, e.g. 'openblas 0.3.29': NumPy's, where SciPy brings its own."""
    libraries = sorted(_blas(), key=lambda library: "numpy" not in str(library.get("filepath")))
    found = [f"{library.get('internal_api', 'blas')} {library.get('version') or 'unknown'}" for library in libraries]
    return found[0] if found else "unknown"


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            for line in info:
                if line.startswith(("model name", "Model")):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def default_threads() -> int:
    """As many as the BLAS would use: its environment variables and the process's CPUs have been taken into account."""
    counts = [count for library in _blas() if isinstance(count := library.get("num_threads"), int) and count > 0]
    return max(counts, default=os.cpu_count() or 1)


def open_backend(device: str, threads: int | None) -> Backend:
    """The backend of a device with an explicit number of threads, so that it can be recorded.

    Raises DeviceError, and ValueError for fewer than one thread.
    """
    return get_backend(device, default_threads() if threads is None else threads)


def physical_memory() -> int | None:
    """Bytes of RAM, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def require_memory(size: int, what: str) -> None:
    """MemoryError, in one line, if ``size`` bytes are more than the machine has: an allocation
    of untouched memory would succeed."""
    memory = physical_memory()
    if memory is not None and size > memory:
        raise MemoryError(f"{what} needs {as_bytes(size)} of memory, this machine has {as_bytes(memory)}")


def as_bytes(size: float) -> str:
    """'512 bytes', '1.5 MiB'."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        if unit != "TiB":
            size /= 1024
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size:,.1f} {unit}"
