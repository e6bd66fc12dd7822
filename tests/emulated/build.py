"""Compiles CUDA sources with g++ behind tests/emulated/device.h, and launches their kernels on NumPy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nicecp.kernels import cuda_source

HERE = Path(__file__).parent
HEADERS = ("device.h", "language.h")
# No contraction: the CPU's numbers have none. Alignment and aliasing are the kernels' business, and are as in CUDA.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")

MISSING = "the CUDA kernels are not run: g++ is not installed, or this is not Linux"


class EmulationError(AssertionError):
    """A kernel did what it must not do; the message says where. An AssertionError: it is what tests look for."""


def compiler() -> str | None:
    """The path of g++ on Linux, or None: elsewhere the name may be another compiler's, and shared memory needs ELF."""
    return shutil.which("g++") if sys.platform == "linux" else None


def cache_folder() -> Path:
    """Where compiled units are kept, by the hash of all that they are made of: a folder of this user alone."""
    folder = Path(tempfile.gettempdir(), f"nicecp-emulated-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


def build(text: str, kernels: Sequence[str], flush: bool) -> ctypes.CDLL:
    """The library of these extern "C" kernels. flush: denormal numbers are 0."""
    exports = "\n".join(f"EXPORT({name}, {str(flush).lower()})" for name in kernels)
    whole = "\n".join([*(f'#include "{name}"' for name in HEADERS), text, exports, ""])
    g = hashlib.sha256(repr((FLAGS, [(HERE / name).read_text() for name in HEADERS], whole)).encode())
    library = cache_folder() / f"{g.hexdigest()[:32]}.so"
    if not library.exists():
        path = compiler()
        if path is None:
            raise FileNotFoundError(MISSING)
        made = library.with_suffix(f".{os.getpid()}")
        command = [path, *FLAGS, "-I", str(HERE), "-x", "c++", "-", "-o", str(made)]
        done = subprocess.run(command, input=whole, text=True, capture_output=True)
        if done.returncode:
            raise EmulationError(f"g++ refuses the kernels:\n{done.stderr}")
        os.replace(made, library)
    return ctypes.CDLL(str(library))


@cache
def unit(name: str) -> ctypes.CDLL:
    """A unit of kernels/cuda_source.py."""
    return build(cuda_source.text(name), cuda_source.kernels(name), name.endswith("_f32"))


class EmulatedKernel:
    """A kernel that launches as a driver's do, and looks at its arguments' types."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        self._launch = getattr(library, f"{name}__launch")
        self._message = library.device_message
        parameters = getattr(library, f"{name}__parameters")
        self._message.restype = parameters.restype = ctypes.c_char_p
        self._parameters = re.findall("....", parameters().decode())
        self.constants = [kind[1] == "c" for kind in self._parameters]  # whether a parameter points to what is const

    def __call__(self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], schedule: int = 0) -> None:
        if len(arguments) != len(self._parameters):
            raise EmulationError(f"{self.name} takes {len(self._parameters)} arguments, not {len(arguments)}")
        values = [
            self._value(i, one, kind) for i, (one, kind) in enumerate(zip(arguments, self._parameters, strict=True))
        ]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        if self._launch(_three(grid), _three(block), ctypes.c_uint(schedule), pointers):
            raise EmulationError(f"{self.name}: {self._message().decode()}")

    def _value(self, position: int, given: Any, parameter: str) -> Any:
        pointer, constant, kind = parameter[0] == "p", parameter[1] == "c", parameter[2:]
        if not isinstance(given, np.ndarray if pointer else np.generic):
            raise EmulationError(f"{self.name}: argument {position} is a {type(given).__name__}")
        if f"{given.dtype.kind}{given.dtype.itemsize}" != kind:
            raise EmulationError(f"{self.name}: argument {position} is {given.dtype}, and its parameter {kind}")
        if isinstance(given, np.ndarray):
            if not given.flags.c_contiguous or not (constant or given.flags.writeable):
                raise EmulationError(f"{self.name}: argument {position} is not contiguous, or is read-only")
            return ctypes.c_void_p(given.ctypes.data)
        return ctypes.create_string_buffer(given.tobytes(), 8)


def _three(dims: Sequence[int]) -> Any:
    return (ctypes.c_uint * 3)(*(*dims, 1, 1)[:3])
