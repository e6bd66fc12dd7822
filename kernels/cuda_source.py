"""The text of the CUDA kernels: which units there are, what is in them, and how they are compiled.

A unit is one .cu file for one floating-point type, e.g. "dense_f32"; its kernels end in the same suffix, e.g.
bias_forward_f32. Drivers compile a unit when the first of its kernels is asked for: a flow in float32 never pays for
float64, a training run never for sampling. Texts include nothing, so that NVRTC, nvcc and g++ all take them.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from nicecp.kernels import backend
from nicecp.kernels.backend import FACTOR_BOUND, OPTIMIZERS, PRIORS, Slot

REALS = {"f32": "float", "f64": "double"}
SUFFIX = {"float32": "f32", "float64": "f64"}
TOPICS = {  # file -> types it is compiled for
    "borders": ("f32", "f64"),
    "dense": ("f32", "f64"),
    "coupling": ("f32", "f64"),
    "spline": ("f32", "f64"),
    "scaling": ("f32", "f64"),
    "update": ("f32", "f64"),
    "random": ("f32", "f64"),
    "state": ("f64",),
}
UNITS = tuple(f"{topic}_{suffix}" for topic, suffixes in TOPICS.items() for suffix in suffixes)
OPTIONS = ("--std=c++17",)  # of NVRTC and nvcc; CuPy adds -ftz=true and the architecture
THREADS = 256  # of every block, as in cuda_common.h
BIAS_COLUMNS = 16  # of a block of bias_backward, as in cuda_dense.cu
SCALE_COLUMNS = 8  # of a block of scale_prior_backward, as in cuda_scaling.cu

_FOLDER = Path(__file__).parent
_KERNEL = re.compile(r"^(?:KERNEL|KERNEL_WITH|LOAD|GATHER)\((\w+)[),]", re.MULTILINE)


@cache
def _file(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


@cache
def kernels(unit: str) -> tuple[str, ...]:
    """Names of a unit's kernels, in the order of the text."""
    topic, suffix = _split(unit)
    return tuple(f"{name}_{suffix}" for name in _KERNEL.findall(_file(f"cuda_{topic}.cu")))


@cache
def unit_of(kernel: str) -> str:
    """The unit that a kernel is in; ValueError if there is no such kernel."""
    for unit in UNITS:
        if kernel in kernels(unit):
            return unit
    raise ValueError(f"there is no CUDA kernel {kernel!r}")


@cache
def text(unit: str) -> str:
    """All that is compiled for a unit."""
    topic, suffix = _split(unit)
    parts = [_definitions(suffix), '#line 1 "cuda_common.h"', _file("cuda_common.h")]
    parts += [f'#line 1 "cuda_{topic}.cu"', _file(f"cuda_{topic}.cu")]
    return "\n".join(parts)


def _definitions(suffix: str) -> str:
    numbers: dict[str, float] = {"FACTOR_BOUND": FACTOR_BOUND}
    numbers |= {name: value for name, value in vars(backend).items() if name.startswith("SPLINE_")}
    numbers |= {f"SLOT_{name}": value for name, value in vars(Slot).items() if isinstance(value, int)}
    numbers |= {f"PRIOR_{name.upper()}": value for name, value in PRIORS.items()}
    numbers |= {f"OPTIMIZER_{name.upper()}": value for name, value in OPTIMIZERS.items()}
    lines = [f"#define REAL {REALS[suffix]}", f"#define SUFFIX {suffix}"]
    return "\n".join(lines + [f"#define {name} {value!r}" for name, value in numbers.items()])


def _split(unit: str) -> tuple[str, str]:
    if unit not in UNITS:
        raise ValueError(f"there is no CUDA unit {unit!r}: expected one of {', '.join(UNITS)}")
    topic, suffix = unit.rsplit("_", 1)
    return topic, suffix
