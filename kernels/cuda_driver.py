"""What the CUDA backend needs from a device: memory, compiled kernels, matrix products, streams, a recorder.

The backend (kernels/cuda_backend.py) knows the kernel contract and nothing of CuPy; a driver knows a device and nothing
of flows. So the same backend, with the same kernels, runs on a GPU and in the tests' emulation on a CPU.

Arrays of a driver have ``shape``, ``dtype``, ``size``, ``nbytes``, ``reshape``, slices that are views, assignment to
slices, and ``flags.c_contiguous``, as NumPy's and CuPy's have. A driver is used by one thread at a time.

Order: what is launched runs in the order of the launches, but for what stands in a ``side`` block, which runs beside
what is launched after the block. ``wait`` joins it again, as do ``capture`` at its end, ``synchronize``, and copies to
and from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from numpy.typing import DTypeLike, NDArray

from nicecp.kernels.backend import Array

Dims: TypeAlias = tuple[int, ...]  # one to three numbers, x first
Kernel: TypeAlias = Callable[[Dims, Dims, tuple[Any, ...]], None]
Token: TypeAlias = Any  # of a side block; drivers choose what it is


@dataclass(frozen=True)
class Bias:
    """out = a @ b + bias, bias : (columns,)."""

    bias: Array


@dataclass(frozen=True)
class ReluBias:
    """out = max(a @ b + bias, 0), where max(NaN, 0) is NaN; mask (from ``relu_mask``) then says where out > 0.

    A device whose own epilogue turns NaN into 0 does not offer it. mask None: not wanted.
    """

    bias: Array
    mask: Array | None = None


@dataclass(frozen=True)
class MaskedBiasGradient:
    """out = a @ b where the mask is set, else 0; db : (columns,) = the sum of out over its rows."""

    mask: Array
    db: Array


@dataclass(frozen=True)
class BiasGradient:
    """out = a.T @ b as usual; db : (columns,) = the sum of b over its rows, on the way (transpose_a only)."""

    db: Array


Epilogue: TypeAlias = Bias | ReluBias | MaskedBiasGradient | BiasGradient


class Driver(Protocol):
    """A device. Calls launch and return; only ``alloc``, ``to_host`` and ``synchronize`` wait for the device."""

    @property
    def name(self) -> str:
        """What people call the device, e.g. "NVIDIA H200"."""

    @property
    def precision(self) -> str:
        """Of float32 products: "float32", or "tf32" where it was asked for."""

    @property
    def blocks(self) -> int:
        """Blocks of 256 threads that fill the device: elementwise kernels launch no more and stride over the rest."""

    # --- memory -----------------------------------------------------------------------------------

    def alloc(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        """(shape) zeros, C-contiguous, on a 256-byte boundary. Never called during a capture.

        Raises MemoryError (with the sizes) where the device has not enough.
        """

    def to_device(self, dst: Array, src: NDArray[Any]) -> None:
        """dst[...] = src, of the same shape and dtype, both C-contiguous; src may be changed when this returns."""

    def to_host(self, src: Array) -> NDArray[Any]:
        """A new host array with the content of src, after all that was launched before."""

    def address(self, array: Array) -> int:
        """Of the first byte, on the device."""

    # --- the array library, and arrays of others --------------------------------------------------

    @property
    def xp(self) -> Any:
        """CuPy, or what stands for it."""

    def arithmetic(self) -> AbstractContextManager[None]:
        """What ``xp`` computes inside runs in the order of the launches. Not during a capture."""

    def borrow(self, x: Any) -> Array:
        """An array of ours on the memory of any DLPack array on this device, behind what its owner has launched."""

    def result(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        """An uninitialised array for the caller, in whose stream's memory it is allocated."""

    def hand_over(self) -> None:
        """The caller's stream waits for all that was launched."""

    def pinned(self, shape: int | Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialised host array in page-locked memory, for ``upload``."""

    def upload(self, dst: Array, src: NDArray[Any]) -> Token:
        """dst[...] = src from a ``pinned`` array, behind all launches so far and beside what follows.

        src must stay as it is until ``uploaded``; what reads dst comes after ``wait``.
        """

    def uploaded(self, token: Token) -> None:
        """Wait, on the host, for the end of an upload. From any thread."""

    # --- work -------------------------------------------------------------------------------------

    def kernel(self, name: str) -> Kernel:
        """launch(grid, block, arguments) of a kernel of kernels/cuda_source.py, compiled at the first request.

        Arguments are arrays, for pointers, and NumPy scalars of exactly the parameter's type. Shared memory is static.
        Compiling and loading happen here and not in the launch, so that a launch can be captured.
        """

    def prepare(
        self,
        out: Array,
        a: Array,
        b: Array,
        transpose_a: bool = False,
        transpose_b: bool = False,
        epilogue: Epilogue | None = None,
    ) -> bool:
        """Get ready for a ``gemm`` with these arguments that is captured later; False if it has no such epilogue.

        Chooses the algorithm, loads what is loaded lazily, makes workspaces. The arrays are neither read nor written.
        """

    def gemm(
        self,
        out: Array,
        a: Array,
        b: Array,
        transpose_a: bool = False,
        transpose_b: bool = False,
        epilogue: Epilogue | None = None,
    ) -> None:
        """out : (m, n) = op(a) @ op(b), all row-major and of one dtype, with an epilogue that ``prepare`` accepted.

        The same arguments give the same bits. Without an epilogue it needs no ``prepare`` outside of a capture.
        """

    def relu_mask(self, rows: int, columns: int) -> Array:
        """Memory for the mask of a ReluBias product of this size, in whatever form the device keeps it."""

    # --- order ------------------------------------------------------------------------------------

    def side(self) -> AbstractContextManager[Token]:
        """Launches inside run after all that was launched before the block, and beside what follows it.

        Blocks run one after the other. Not nested. Yields a token for ``wait``.
        """

    def wait(self, token: Token) -> None:
        """What is launched from now on runs after that side block. Not inside a side block."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """A runnable that launches what ``step`` launches, as often as it is called: a graph.

        step is called once, here, and what it launches is not carried out. It calls launches, ``gemm``, ``side`` and
        ``wait``, and allocates nothing; the caller keeps all arrays alive. Tokens are those of the capture.
        """

    def synchronize(self) -> None:
        """Wait for all that was launched."""


@runtime_checkable
class Streams(Protocol):
    """What a driver has as well on whose streams another library (NCCL) can launch."""

    cupy: Any

    @property
    def stream(self) -> int:
        """The address of the stream that the next launch is on."""


@runtime_checkable
class Lanes(Protocol):
    """What a driver with several side streams has as well; one without has a single lane."""

    @property
    def lanes(self) -> int:
        """How many."""

    def side(self, lane: int = 0, after: Sequence[Token] = ()) -> AbstractContextManager[Token]:
        """As Driver.side, on one of the side streams: blocks of a lane run one after the other.

        It begins after these blocks of other lanes, and after all that the main stream was given before it.
        """
