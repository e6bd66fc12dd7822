"""Calls of the CUDA backend: what a contract operation comes down to on a device, and what it reads and writes.

They are carried out at once, or written down in a list that kernels/cuda_plan.py makes into a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nicecp.kernels.backend import Array
from nicecp.kernels.cuda_driver import Bias, BiasGradient, Dims, Driver, Epilogue, MaskedBiasGradient, ReluBias
from nicecp.kernels.cuda_source import BIAS_COLUMNS, SUFFIX, THREADS

ROW_BLOCK = 128  # columns above which a row is summed by a whole block and not by a warp


class Launch(NamedTuple):
    """A kernel with all that a driver wants to know."""

    kernel: str
    grid: Dims
    block: Dims
    arguments: tuple[Any, ...]


@dataclass(eq=False, kw_only=True)
class Call:
    """One launch. side: in a recorded step it may run beside what follows."""

    side: bool = False

    def writes(self) -> list[Array]:
        """Arrays that it writes, without those that stand in for an output nobody wants."""
        return []

    def reads(self) -> list[Array]:
        """Arrays that it reads."""
        return []

    def launch(self, driver: Driver) -> Launch:
        """The kernel that does it."""
        raise TypeError(f"{type(self).__name__} is no kernel")

    def prepare(self, driver: Driver) -> None:
        """Load what it needs, so that it can be captured."""
        driver.kernel(self.launch(driver).kernel)

    def run(self, driver: Driver) -> None:
        """Launch it."""
        kernel, grid, block, arguments = self.launch(driver)
        driver.kernel(kernel)(grid, block, arguments)


@dataclass(eq=False, kw_only=True)
class Plain(Call):
    """A launch of which the plan needs to know no more than what it touches."""

    what: Launch
    written: tuple[Array, ...]
    read: tuple[Array, ...]

    def writes(self) -> list[Array]:
        return list(self.written)

    def reads(self) -> list[Array]:
        return list(self.read)

    def launch(self, driver: Driver) -> Launch:
        return self.what


@dataclass(eq=False, kw_only=True)
class Product(Call):
    """out = op(a) @ op(b), with an epilogue that the driver has accepted."""

    out: Array
    a: Array
    b: Array
    transpose_a: bool = False
    transpose_b: bool = False
    epilogue: Epilogue | None = None

    def writes(self) -> list[Array]:
        match self.epilogue:
            case MaskedBiasGradient(_, more) | BiasGradient(more):
                return [self.out, more]
            case ReluBias(_, mask) if mask is not None:
                return [self.out, mask]
        return [self.out]

    def reads(self) -> list[Array]:
        match self.epilogue:
            case MaskedBiasGradient(more, _) | Bias(more) | ReluBias(more, _):
                return [self.a, self.b, more]
        return [self.a, self.b]

    def take(self, driver: Driver, epilogue: Epilogue) -> bool:
        """Whether the driver does that on the way; if so it is part of the product from now on."""
        if self.epilogue is not None:
            return False
        if driver.prepare(self.out, self.a, self.b, self.transpose_a, self.transpose_b, epilogue):
            self.epilogue = epilogue
        return self.epilogue is not None

    def prepare(self, driver: Driver) -> None:
        driver.prepare(self.out, self.a, self.b, self.transpose_a, self.transpose_b, self.epilogue)

    def run(self, driver: Driver) -> None:
        driver.gemm(self.out, self.a, self.b, self.transpose_a, self.transpose_b, self.epilogue)


@dataclass(eq=False, kw_only=True)
class BiasForward(Call):
    """y : (n, o) += b, then max(y, 0) if relu."""

    y: Array
    b: Array
    relu: bool

    def writes(self) -> list[Array]:
        return [self.y]

    def reads(self) -> list[Array]:
        return [self.y, self.b]

    def launch(self, driver: Driver) -> Launch:
        n, o = self.y.shape
        arguments = (self.y, self.b, np.int64(n), np.int32(o), np.int32(self.relu))
        return Launch(named("bias_forward", self.y), spread(driver, n * o, 4), (THREADS,), arguments)


@dataclass(eq=False, kw_only=True)
class BiasBackward(Call):
    """dy : (n, o) = 0 where y <= 0 if relu; db : (o,) = sum of dy over rows, or None."""

    dy: Array
    db: Array | None
    y: Array
    relu: bool

    def writes(self) -> list[Array]:
        return ([self.dy] if self.relu else []) + ([] if self.db is None else [self.db])

    def reads(self) -> list[Array]:
        return [self.dy, self.y] if self.relu else [self.dy]

    def launch(self, driver: Driver) -> Launch:
        n, o = self.dy.shape
        db = self.dy if self.db is None else self.db
        flags = (np.int32(self.relu), np.int32(self.db is not None))
        arguments = (self.dy, db, self.y, np.int64(n), np.int32(o), *flags)
        return Launch(named("bias_backward", self.dy), (-(-o // BIAS_COLUMNS),), (THREADS,), arguments)


@dataclass(eq=False, kw_only=True)
class Couple(Call):
    """y = x + sign * m; with a bias, m += bias first."""

    y: Array
    x: Array
    m: Array
    sign: int
    bias: Array | None = None

    def writes(self) -> list[Array]:
        return [self.y] if self.bias is None else [self.y, self.m]

    def reads(self) -> list[Array]:
        return [self.x, self.m] if self.bias is None else [self.x, self.m, self.bias]

    def launch(self, driver: Driver) -> Launch:
        size, sign = self.y.size, np.int32(self.sign)
        arguments: tuple[Any, ...] = (self.y, self.x, self.m, np.int64(size), sign)
        kernel = "couple"
        if self.bias is not None:
            n, k = self.y.shape
            kernel, arguments = "bias_couple", (self.y, self.x, self.m, self.bias, np.int64(n), np.int32(k), sign)
        return Launch(named(kernel, self.y), spread(driver, size, 4), (THREADS,), arguments)


@dataclass(eq=False, kw_only=True)
class Coefficients(Call):
    """What updates need of the state, computed once: out : (8,) float64."""

    out: Array
    state: Array
    optimizer: int

    def writes(self) -> list[Array]:
        return [self.out]

    def reads(self) -> list[Array]:
        return [self.state]

    def launch(self, driver: Driver) -> Launch:
        return Launch("update_coefficients_f64", (1,), (1,), (self.out, self.state, np.int32(self.optimizer)))


@dataclass(eq=False, kw_only=True)
class Update(Call):
    """Elements offset..offset + size of p, m, v from g, by coefficients : (8,)."""

    p: Array
    g: Array
    m: Array
    v: Array
    offset: int
    size: int
    state: Array
    optimizer: int
    coefficients: Array

    def writes(self) -> list[Array]:
        part = slice(self.offset, self.offset + self.size)
        return [self.p[part], self.m[part], self.v[part], self.state]

    def reads(self) -> list[Array]:
        return [self.g[self.offset : self.offset + self.size], self.coefficients]

    def launch(self, driver: Driver) -> Launch:
        buffers, extent = (self.p, self.g, self.m, self.v), (np.int64(self.offset), np.int64(self.size))
        arguments = (*buffers, self.coefficients, self.state, *extent)
        kernel = named(("update_adam", "update_rmsprop")[self.optimizer], self.p)
        return Launch(kernel, spread(driver, self.size, 4), (THREADS,), arguments)


def named(kernel: str, array: Array) -> str:
    """The kernel for an array's dtype; ValueError for one that is neither float32 nor float64."""
    try:
        return f"{kernel}_{SUFFIX[str(array.dtype)]}"
    except KeyError:
        raise ValueError(f"kernels work on float32 and float64 arrays, not {array.dtype}") from None


def spread(driver: Driver, size: int, each: int = 1) -> Dims:
    """A grid for so many elements, ``each`` to a thread, that strides over what the device cannot hold at once."""
    return (max(1, min(-(-size // (THREADS * each)), driver.blocks)),)


def by_row(driver: Driver, rows: int, columns: int) -> tuple[Dims, Dims]:
    """Grid and block of a kernel that sums over columns."""
    across = THREADS if columns > ROW_BLOCK else 32
    down = THREADS // across
    return (max(1, min(-(-rows // down), driver.blocks)),), (across, down)
