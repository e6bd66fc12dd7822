"""Kernels: one contract (backend.py), one implementation per kind of device."""

from __future__ import annotations

from nicecp.errors import DeviceError
from nicecp.kernels.backend import Backend

DEVICES = ("auto", "cpu", "cuda")


def get_backend(device: str = "auto", threads: int | None = None) -> Backend:
    """The backend of a device, chosen once and passed on.

    Parameters
    ----------
    device : "auto", "cpu" or "cuda"
        "auto" is the best device that can be used here.
    threads : int, optional
        CPU threads for matrix products and kernels while we compute; None leaves the process's settings alone.

    Raises
    ------
    DeviceError
        The device was asked for and cannot be used; the message says why. Nothing falls back in silence.
    """
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}; use one of {', '.join(DEVICES)}")
    if device == "cuda":
        raise DeviceError("device 'cuda': this version of nicecp has no CUDA backend; use --device cpu")
    from nicecp.kernels.numba_backend import NumbaBackend

    return NumbaBackend(threads)
