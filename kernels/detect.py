"""Whether an NVIDIA GPU can be used here, and if not exactly why.

Asked in the order in which a user would mend things: driver, GPU, CuPy, NVRTC, cuBLASLt. Without a driver the answer
takes a fraction of a millisecond and imports nothing; CuPy is imported only once all before it is well.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

LIBRARY = "libcuda.so.1"  # comes with the driver, never with a package
OLDEST_GPU = (7, 5)  # compute capability: what CUDA 13 still compiles for
OLDEST_DRIVER = 12  # CUDA versions that there are extras for: 12 and 13
NEWEST_EXTRA = 13
DISTRIBUTIONS = ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy")

_NO_DEVICE = 100  # CUresult; https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TYPES.html
_CAPABILITY = (75, 76)  # CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it; memory in bytes."""

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Found:
    """What there is. ``problem`` is why this process's GPU cannot be used, one line with the remedy, or "" if it can.

    driver : newest CUDA version that the driver supports, such as (13, 0), or None; cupy : "name version" of every
    installed distribution that brings CuPy; nvrtc, cublaslt : their versions, "" where they were not looked for.
    """

    driver: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    cupy: tuple[str, ...] = ()
    nvrtc: str = ""
    cublaslt: str = ""
    problem: str = ""


class _Problem(Exception):
    """One line: why not, and what to do."""


_rank = 0  # of the processes on this machine that each want a GPU


def use(rank: int) -> None:
    """Take another GPU than the first, before any is looked for: the ranks on a machine share its GPUs out.

    Where there are fewer than ranks, some get the same one (nicecp.rank_devices notices). CUDA keeps the choice for the
    thread that opens the driver.
    """
    global _rank
    _rank = rank


def ordinal() -> int:
    """The number of the GPU that this process uses, among those that it may see."""
    return _rank % max(1, len(look().gpus)) if _rank else 0


@functools.cache
def problem() -> str:
    """Why no GPU can be used, with the remedy; "" if one can. Looked up once in a process."""
    return look().problem


def has_driver() -> bool:
    """Whether there is an NVIDIA driver: without one nobody expects a GPU to be used."""
    return _driver() is not None


def look() -> Found:
    """Look for all that a GPU needs, up to the first thing that is missing. Never raises."""
    found: dict[str, Any] = {}
    try:
        driver = _driver()
        if driver is None:
            raise _Problem(f"no NVIDIA driver was found ({LIBRARY}): install the driver of the GPU, or use the CPU")
        found["driver"] = version = _driver_version(driver)
        found["cupy"] = installed = _installed()
        _start(driver)
        found["gpus"] = gpus = _gpus(driver)
        _check_gpu(gpus[_rank % len(gpus)])
        _check_versions(version, installed)
        _look_with_cupy(version, found)
    except _Problem as why:
        found["problem"] = " ".join(str(why).split())
    return Found(**found)


# --- the driver ---------------------------------------------------------------------------------------------------


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


def _driver_version(driver: ctypes.CDLL) -> tuple[int, int]:
    number = ctypes.c_int()
    _call(driver, "cuDriverGetVersion", ctypes.byref(number))  # works before cuInit
    major, minor = divmod(number.value, 1000)
    if major < OLDEST_DRIVER:
        raise _Problem(f"the NVIDIA driver supports CUDA {major}.{minor // 10}, {OLDEST_DRIVER}.0 is needed: update it")
    return major, minor // 10


def _start(driver: ctypes.CDLL) -> None:
    code = driver.cuInit(ctypes.c_uint(0))
    if code == _NO_DEVICE:
        raise _no_gpu()
    if code:
        raise _Problem(f"the NVIDIA driver does not start ({_words(driver, code)}): look at nvidia-smi, or reboot")


def _gpus(driver: ctypes.CDLL) -> tuple[Gpu, ...]:
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if count.value < 1:
        raise _no_gpu()
    found = []
    for ordinal in range(count.value):
        device, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        _call(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        _call(driver, "cuDeviceGetName", name, ctypes.c_int(len(name)), device)
        _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(size), device)
        version = [ctypes.c_int(), ctypes.c_int()]
        for number, attribute in zip(version, _CAPABILITY, strict=True):
            _call(driver, "cuDeviceGetAttribute", ctypes.byref(number), ctypes.c_int(attribute), device)
        found.append(Gpu(name.value.decode("utf-8", "replace"), size.value, (version[0].value, version[1].value)))
    return tuple(found)


def _no_gpu() -> _Problem:
    return _Problem("there is an NVIDIA driver but no GPU that it may use: see nvidia-smi and CUDA_VISIBLE_DEVICES")


def _call(driver: ctypes.CDLL, name: str, *arguments: Any) -> None:
    code = getattr(driver, name)(*arguments)
    if code:
        raise _Problem(f"the NVIDIA driver does not answer {name} ({_words(driver, code)}): look at nvidia-smi")


def _words(driver: ctypes.CDLL, code: int) -> str:
    """The driver's own words for an error code."""
    text = ctypes.c_char_p()
    if driver.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text)) or not text.value:
        return f"error {code}"
    return f"error {code}, {text.value.decode('utf-8', 'replace')}"


# --- versions that must fit ---------------------------------------------------------------------------------------


def _check_gpu(gpu: Gpu) -> None:
    if gpu.capability < OLDEST_GPU:
        has, needs = ("{}.{}".format(*pair) for pair in (gpu.capability, OLDEST_GPU))
        raise _Problem(
            f"{gpu.name} is too old: compute capability {has}, {needs} is needed (Turing, 2018): use the CPU"
        )


def _installed() -> tuple[str, ...]:
    """Distributions that bring a package ``cupy``, with their versions."""
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


def _install(driver: tuple[int, int]) -> str:
    return f"pip install 'nicecp[cuda{min(driver[0], NEWEST_EXTRA)}]'"


def _check_versions(driver: tuple[int, int], installed: Sequence[str]) -> None:
    names = [one.split()[0] for one in installed]
    if not names:
        raise _Problem(f"CuPy is not installed: {_install(driver)}")
    if len(names) > 1:
        both = " and ".join(names)
        raise _Problem(
            f"{both} are installed together and overwrite one another: pip uninstall {' '.join(names)}, then "
            f"{_install(driver)}"
        )
    needs = {"cupy-cuda13x": 13, "cupy-cuda12x": 12}.get(names[0])
    if names[0] == "cupy-cuda11x":
        raise _Problem(f"cupy-cuda11x is too old: pip uninstall cupy-cuda11x, then {_install(driver)}")
    if needs is not None and driver[0] < needs:
        raise _Problem(
            f"{names[0]} needs a driver for CUDA {needs}, this is one for {driver[0]}.{driver[1]}: update the driver, "
            f"or pip uninstall {names[0]}, then {_install(driver)}"
        )


# --- with CuPy ----------------------------------------------------------------------------------------------------


def import_cupy() -> Any:
    """The module; ImportError where it, or what it links to, is broken."""
    import cupy

    return cupy


def _look_with_cupy(driver: tuple[int, int], found: dict[str, Any]) -> None:
    from nicecp.kernels import cublaslt

    try:
        cupy = import_cupy()
        cupy.cuda.runtime.getDeviceCount()
    except (ImportError, RuntimeError, AttributeError, OSError) as error:  # CuPy's CUDA errors are RuntimeErrors
        reason = f"{type(error).__name__}: {error}"
        raise _Problem(f"CuPy is installed and does not work ({reason}): reinstall it, {_install(driver)}") from error
    try:
        found["nvrtc"] = ".".join(str(part) for part in cupy.cuda.nvrtc.getVersion())
    except (ImportError, RuntimeError, OSError) as error:  # DynamicLibNotFoundError is a RuntimeError
        raise _Problem(f"NVRTC, CUDA's run-time compiler, is missing: {_install(driver)}") from error
    try:
        found["cublaslt"] = cublaslt.version(cublaslt.library())
    except OSError as error:
        raise _Problem(f"cuBLASLt, CUDA's matrix products, is missing: {_install(driver)}") from error
