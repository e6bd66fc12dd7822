"""A driver (kernels/cuda_driver.py) without a GPU: kernels by g++, products by NumPy, streams and graphs by lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nicecp.kernels import cuda_source
from nicecp.kernels.backend import ALIGNMENT, Array
from nicecp.kernels.cuda_driver import Bias, BiasGradient, Dims, Epilogue, Kernel, MaskedBiasGradient, ReluBias
from tests.emulated import build
from tests.emulated.build import EmulatedKernel, EmulationError
from tests.emulated.memory import Memory, guarded

Work = Callable[[], None]


class EmulatedDriver:
    """A device of our own.

    schedule : the order of threads and blocks, 0 forward, 1 backward, others mixed. late : side blocks run as late as
    they may, when somebody waits for them, instead of at once: what relies on anything in between is seen. epilogues :
    whether products offer them. blocks : few, so that kernels stride.
    """

    name = "emulated"
    precision = "float32"

    def __init__(self, schedule: int = 0, late: bool = False, epilogues: bool = False, blocks: int = 5) -> None:
        self.schedule, self.late, self.epilogues, self.blocks = schedule, late, epilogues, blocks
        self.launches = 0  # kernels and products, for tests that count
        self._kernels: dict[str, Kernel] = {}
        self._prepared: set[tuple[Any, ...]] = set()
        self._recorded: list[Work] | None = None  # during a capture
        self._side: list[Work] | None = None  # inside a side block
        self._waiting: list[tuple[int, list[Work]]] = []  # side blocks that have not run yet
        self._blocks = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return EmulatedDriver, (self.schedule, self.late, self.epilogues, self.blocks)

    # --- memory -----------------------------------------------------------------------------------

    def alloc(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        self._outside_a_capture("memory is allocated")
        return guarded(shape, dtype)

    def to_device(self, dst: Array, src: NDArray[Any]) -> None:
        self.synchronize()
        if dst.dtype != src.dtype or dst.shape != src.shape or not (dst.flags.c_contiguous and src.flags.c_contiguous):
            raise EmulationError(f"{src.dtype} {src.shape} is copied as it is to {dst.dtype} {dst.shape}")
        dst[...] = src

    def to_host(self, src: Array) -> NDArray[Any]:
        self.synchronize()
        return np.array(src, subok=False)

    def address(self, array: Array) -> int:
        return int(array.ctypes.data)

    # --- work -------------------------------------------------------------------------------------

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._outside_a_capture(f"{name} is compiled")
            compiled = EmulatedKernel(build.unit(cuda_source.unit_of(name)), name)
            self._kernels[name] = partial(self._launch, compiled)
        return self._kernels[name]

    def _launch(self, kernel: EmulatedKernel, grid: Dims, block: Dims, arguments: tuple[Any, ...]) -> None:
        def work() -> None:
            self.launches += 1
            kernel(grid, block, arguments, self.schedule)
            for array in arguments:
                if isinstance(array, Memory):
                    array.check(kernel.name)

        for array in arguments:
            if isinstance(array, np.ndarray) and not isinstance(array, Memory):
                raise EmulationError(f"{kernel.name}: a host array is passed to a kernel")
        self._submit(work)

    def prepare(
        self,
        out: Array,
        a: Array,
        b: Array,
        transpose_a: bool = False,
        transpose_b: bool = False,
        epilogue: Epilogue | None = None,
    ) -> bool:
        self._outside_a_capture("a product is prepared")
        if epilogue is not None and not self.epilogues:
            return False
        self._prepared.add(_product(out, a, b, transpose_a, transpose_b, epilogue))
        return True

    def gemm(
        self,
        out: Array,
        a: Array,
        b: Array,
        transpose_a: bool = False,
        transpose_b: bool = False,
        epilogue: Epilogue | None = None,
    ) -> None:
        unknown = _product(out, a, b, transpose_a, transpose_b, epilogue) not in self._prepared
        if unknown and (self._recorded is not None or epilogue is not None):
            raise EmulationError("a product was not prepared")
        if any(not isinstance(array, Memory) for array in (out, a, b)):
            raise EmulationError("a host array is passed to a product")

        def work() -> None:
            self.launches += 1
            with np.errstate(all="ignore"):
                np.matmul(a.T if transpose_a else a, b.T if transpose_b else b, out=out)
                _finish(out, b, epilogue)

        self._submit(work)

    def relu_mask(self, rows: int, columns: int) -> Array:
        return self.alloc((rows, -(-columns // 128) * 16), np.uint8)  # bits, rows padded to 128 of them

    # --- order ------------------------------------------------------------------------------------

    def _submit(self, work: Work) -> None:
        for collected in (self._side, self._recorded):
            if collected is not None:
                collected.append(work)
                return
        work()

    @contextmanager
    def side(self) -> Iterator[int]:
        if self._side is not None:
            raise EmulationError("a side block inside another one")
        self._blocks += 1
        token, works = self._blocks, list[Work]()
        self._side = works
        try:
            yield token
        finally:
            self._side = None
        self._submit(partial(self._begin, token, works))

    def _begin(self, token: int, works: list[Work]) -> None:
        self._waiting.append((token, works))
        if not self.late:
            self._catch_up(token)

    def wait(self, token: int) -> None:
        if self._side is not None:
            raise EmulationError("a wait inside a side block")
        self._submit(partial(self._catch_up, token))

    def _catch_up(self, token: int) -> None:
        while self._waiting and self._waiting[0][0] <= token:
            for work in self._waiting.pop(0)[1]:
                work()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self._outside_a_capture("a capture begins")
        self.synchronize()
        recorded = self._recorded = []
        try:
            step()
        finally:
            self._recorded = None

        def replay() -> None:
            for work in recorded:
                work()
            self.synchronize()

        return replay

    def synchronize(self) -> None:
        self._outside_a_capture("the host waits")
        self._catch_up(self._blocks)

    def _outside_a_capture(self, what: str) -> None:
        if self._recorded is not None:
            raise EmulationError(f"{what} during a capture")


def _product(out: Array, a: Array, b: Array, transpose_a: bool, transpose_b: bool, epilogue: Epilogue | None) -> Any:
    """What a product's preparation depends on."""
    return out.shape, a.shape, b.shape, str(out.dtype), transpose_a, transpose_b, type(epilogue)


def _finish(out: Array, b: Array, epilogue: Epilogue | None) -> None:
    columns = out.shape[1]
    if isinstance(epilogue, (Bias, ReluBias)):
        out += epilogue.bias
    if isinstance(epilogue, ReluBias):
        out[out < 0] = 0
        if epilogue.mask is not None:
            bits = np.packbits(np.asarray(~(out <= 0)), axis=1)
            epilogue.mask[:, : bits.shape[1]] = bits
    if isinstance(epilogue, MaskedBiasGradient):
        bits = np.unpackbits(np.asarray(epilogue.mask), axis=1, count=columns)
        out[bits == 0] = 0
        epilogue.db[...] = out.sum(axis=0)
    if isinstance(epilogue, BiasGradient):
        epilogue.db[...] = b.sum(axis=0)


assert ALIGNMENT % 16 == 0  # what kernels take for aligned
