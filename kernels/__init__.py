"""Kernels: one contract (backend.py), one implementation per kind of device."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from nicecp.errors import DeviceError
from nicecp.kernels.backend import Backend, Slot

if TYPE_CHECKING:
    from nicecp.kernels.cuda_driver import Driver

__all__ = ["DEVICES", "PRECISIONS", "Backend", "Slot", "get_backend", "open_driver", "with_precision"]

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("full", "tf32")  # of float32 matrix products

logger = logging.getLogger("nicecp")


def get_backend(device: str = "auto", threads: int | None = None) -> Backend:
    """The backend of a device, chosen once and passed on.

    Parameters
    ----------
    device : "auto", "cpu" or "cuda"
        "auto" is the GPU wherever one can be used, whatever the size of the flow, else the CPU; where there is an
        NVIDIA driver but no GPU that can be used, a warning says why. Small flows may be faster on the CPU.
    threads : int, optional
        CPU threads for matrix products and kernels while we compute; None leaves the process's settings alone.

    Raises
    ------
    DeviceError
        The device was asked for and cannot be used; the message says why. Nothing falls back in silence.
    """
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}; use one of {', '.join(DEVICES)}")
    if device == "cuda" or (device == "auto" and _gpu_is_usable()):
        return _cuda("full")
    from nicecp.kernels.numba_backend import NumbaBackend

    return NumbaBackend(threads)


def with_precision(backend: Backend, precision: str, required: bool = False) -> Backend:
    """The backend of the same device that computes float32 matrix products in a precision.

    "tf32" (10 bits of mantissa in the factors) is for GPUs; a CPU computes in full, with a warning. If ``required``,
    that is a DeviceError.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    driver = getattr(backend, "driver", None)
    if driver is None:
        if precision == "tf32" and required:
            raise DeviceError("precision tf32 is for GPUs, and this is the CPU: leave it out, or use --device cuda")
        if precision == "tf32":
            logger.warning("the flow's precision is tf32, which is for GPUs: the CPU computes in full precision")
        return backend
    return backend if driver.precision == _DRIVER_PRECISION[precision] else _cuda(precision)


_DRIVER_PRECISION = {"full": "float32", "tf32": "tf32"}


def open_driver(precision: str) -> Driver:
    """The driver of the GPU; DeviceError with the reason where none can be used."""
    from nicecp.kernels import cuda_cupy

    return cuda_cupy.open_driver(precision)


@cache
def _cuda(precision: str) -> Backend:
    """One backend for each precision in a process: modules, graphs' streams and workspaces are made once."""
    from nicecp.kernels.cuda_backend import CudaBackend

    return CudaBackend(open_driver(_DRIVER_PRECISION[precision]))


@cache
def _gpu_is_usable() -> bool:
    from nicecp.kernels import detect

    problem = detect.problem()
    if problem and detect.has_driver():
        logger.warning("device auto: computing on the CPU, not on a GPU: %s", problem)
    return not problem
