"""The CUDA backend's driver on a real GPU: CuPy for memory, compilation, streams and graphs, cuBLASLt for products.

Nothing here runs on CuPy's current stream: a user's own CuPy code may use any. All work is on streams of our own
(kernels/cuda_streams.py): a main one, two beside it, and one that carries data to the device meanwhile.

Graphs: a captured step refers to addresses, so nothing is allocated while one is captured, whoever captures keeps the
arrays alive, and kernels and products are made ready before (``kernel``, ``prepare``): loading a module or choosing an
algorithm in the middle of a capture would break it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nicecp.errors import DeviceError, DeviceMemoryError
from nicecp.kernels import cublaslt, cuda_source
from nicecp.kernels.backend import Array
from nicecp.kernels.cublaslt import Kind, Plan
from nicecp.kernels.cuda_driver import Bias, BiasGradient, Dims, Epilogue, Kernel, MaskedBiasGradient, ReluBias
from nicecp.kernels.cuda_pinned import Staging, pinned
from nicecp.kernels.cuda_streams import Streams, Token

PRECISIONS = ("float32", "tf32")


class CupyDriver:
    """See kernels.cuda_driver.Driver and Lanes. One for each precision in a process (nicecp.kernels.get_backend).

    cupy : the module; products : cuBLASLt; Raises DeviceError where the GPU does not answer.
    """

    def __init__(self, cupy: Any, products: cublaslt.Products, precision: str = "float32") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.cupy, self._products, self.precision = cupy, products, precision
        with self._reporting("start"):
            properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
            self._streams = Streams(cupy)
        self.name: str = properties["name"].decode("utf-8", "replace")
        self.blocks = int(properties["multiProcessorCount"]) * (int(properties["maxThreadsPerMultiProcessor"]) // 256)
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, Kernel] = {}
        self._workspaces: dict[int, Array] = {}
        self._ready: dict[Kind, bool] = {}
        self._staging = Staging(cupy)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_driver, (self.precision,)

    # --- memory -----------------------------------------------------------------------------------

    def alloc(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        if self._streams.capturing:
            raise RuntimeError("memory was asked for while a step is captured")
        with self._reporting("allocate", shape, dtype), self._streams.main:
            return self.cupy.zeros(shape, np.dtype(dtype))

    def to_device(self, dst: Array, src: NDArray[Any]) -> None:
        self._check_copy(dst, src)
        with self._reporting("copy to the GPU"):
            self._streams.join()
            self._staging.to_device(self.address(dst), src, self._streams.main)

    def to_host(self, src: Array) -> NDArray[Any]:
        with self._reporting("copy from the GPU"):
            self._streams.join()
            if not src.flags.c_contiguous:
                with self._streams.main:
                    src = self.cupy.ascontiguousarray(src)
            out = np.empty(src.shape, src.dtype)
            self._staging.to_host(out, self.address(src), self._streams.main)
            return out

    def address(self, array: Array) -> int:
        return int(array.data.ptr)

    # --- the array library, and arrays of others --------------------------------------------------

    @property
    def xp(self) -> Any:
        return self.cupy

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        if self._streams.capturing:
            raise RuntimeError("CuPy's own arithmetic is not captured")
        with self._reporting("compute"), self._streams.main:
            self._streams.join()
            yield

    def borrow(self, x: Any) -> Array:
        # PyTorch makes our stream wait for its own. CuPy makes it wait for the current one, which then is ours.
        with self._reporting("take over an array"):
            self._streams.main.wait_event(self._streams.mark(self.cupy.cuda.get_current_stream()))
            with self._streams.main:
                return self.cupy.from_dlpack(x)

    def result(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        # CuPy's pool gives memory back to the stream that it was allocated on. It is the caller who will drop this.
        with self._reporting("allocate", shape, dtype):
            array = self.cupy.empty(shape, np.dtype(dtype))
            self._streams.main.wait_event(self._streams.mark(self.cupy.cuda.get_current_stream()))
            return array

    def hand_over(self) -> None:
        self._streams.join()
        self.cupy.cuda.get_current_stream().wait_event(self._streams.mark(self._streams.main))

    def pinned(self, shape: int | Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """A host array in page-locked memory, which ``upload`` reads while the GPU computes."""
        with self._reporting("lock host memory", shape, dtype):
            return pinned(self.cupy, shape, dtype)

    def upload(self, dst: Array, src: NDArray[Any]) -> Token:
        """dst[...] = src from a ``pinned`` array, beside what is launched from now on and behind all before.

        ``src`` must stay as it is until ``uploaded``; what reads dst comes after ``wait``.
        """
        self._check_copy(dst, src)
        runtime = self.cupy.cuda.runtime
        with self._reporting("copy to the GPU"):
            self._streams.join()
            self._streams.copy.wait_event(self._streams.mark(self._streams.main))
            if src.nbytes:
                runtime.memcpyAsync(
                    self.address(dst), src.ctypes.data, src.nbytes, runtime.memcpyHostToDevice, self._streams.copy.ptr
                )
            return Token(event=self._streams.mark(self._streams.copy))

    def uploaded(self, token: Token) -> None:
        """Wait, on the host, for the end of an upload: its source may then be changed. From any thread."""
        token.event.synchronize()

    def _check_copy(self, dst: Array, src: Any) -> None:
        if dst.shape != src.shape or dst.dtype != src.dtype:
            raise ValueError(f"cannot copy {src.dtype} {src.shape} into {dst.dtype} {dst.shape}")
        if not (dst.flags.c_contiguous and src.flags.c_contiguous):
            raise ValueError("only C-contiguous arrays are copied")

    # --- kernels ----------------------------------------------------------------------------------

    def kernel(self, name: str) -> Kernel:
        made = self._kernels.get(name)
        if made is None:
            made = self._kernels[name] = self._load(name)
        return made

    def _load(self, name: str) -> Kernel:
        unit = cuda_source.unit_of(name)
        with self._reporting(f"compile {unit}"):
            if unit not in self._modules:
                self._modules[unit] = self.cupy.RawModule(
                    code=cuda_source.text(unit), options=cuda_source.OPTIONS, backend="nvrtc"
                )
            function = self._modules[unit].get_function(name)
            function.attributes  # noqa: B018 (asks the driver, which then really loads the function)

        def launch(grid: Dims, block: Dims, arguments: tuple[Any, ...]) -> None:
            with self._streams.current:
                function(grid, block, arguments)

        return launch

    # --- products ---------------------------------------------------------------------------------

    def prepare(
        self,
        out: Array,
        a: Array,
        b: Array,
        transpose_a: bool = False,
        transpose_b: bool = False,
        epilogue: Epilogue | None = None,
    ) -> bool:
        if out.size == 0:
            return True
        kind, bias, aux = self._kind(out, a, b, transpose_a, transpose_b, epilogue)
        ready = self._ready.get(kind)
        if ready is None:
            if self._streams.capturing:
                raise RuntimeError("a product was not made ready before the step was captured")
            for stream in self._streams.computing:
                self._workspace(stream)
            plan = self._products.plan(kind, bias, aux)
            ready = self._ready[kind] = plan is not None and self._try(plan, kind, out, a, b)
        return ready

    def _try(self, plan: Plan, kind: Kind, out: Array, a: Array, b: Array) -> bool:
        """Run once on scratch, which loads the algorithm's code -> whether it computes what is wanted of it.

        A ReLU inside of a product may turn NaN into 0, which would hide a bad number: then it is not offered.
        """
        cupy = self.cupy
        with self._reporting("try a matrix product"), self._streams.main:
            arrays = [cupy.full(array.shape, np.nan, array.dtype) for array in (a, b, out)]
            # One scratch for the bias or its gradient, one for the mask.
            vector = cupy.zeros(out.shape[1], out.dtype)
            mask = cupy.zeros(cublaslt.mask_bytes(*out.shape), np.uint8)
            workspace = self.address(self._workspace(self._streams.main))
            at = [self.address(array) for array in (*arrays, vector, mask)]
            plan.run((at[0], at[1], at[2]), at[3], at[4], workspace, self._streams.main.ptr)
            if kind.epilogue not in (cublaslt.RELU_BIAS, cublaslt.RELU_AUX_BIAS):
                return True
            return bool(np.isnan(self.to_host(arrays[2])).all())

    def gemm(
        self,
        out: Array,
        a: Array,
        b: Array,
        transpose_a: bool = False,
        transpose_b: bool = False,
        epilogue: Epilogue | None = None,
    ) -> None:
        if out.size == 0:
            return
        kind, bias, aux = self._kind(out, a, b, transpose_a, transpose_b, epilogue)
        if self._streams.capturing and kind not in self._ready:
            raise RuntimeError("a product was not made ready before the step was captured")
        plan = self._products.plan(kind, bias, aux)
        if plan is None:
            what = f"{kind.dtype} products of ({kind.m}, {kind.k}) and ({kind.k}, {kind.n})"
            raise DeviceError(f"cuBLASLt has no algorithm for {what} with epilogue {kind.epilogue}: see nicecp doctor")
        with self._reporting("multiply matrices"):
            addresses = self.address(a), self.address(b), self.address(out)
            plan.run(
                addresses, bias, aux, self.address(self._workspace(self._streams.current)), self._streams.current.ptr
            )

    def _kind(
        self, out: Array, a: Array, b: Array, transpose_a: bool, transpose_b: bool, epilogue: Epilogue | None
    ) -> tuple[Kind, int, int]:
        """What the product is, and the addresses of its bias (or where the bias's gradient goes) and mask, else 0."""
        number, bias, aux = cublaslt.DEFAULT, 0, 0
        if isinstance(epilogue, Bias):
            number, bias = cublaslt.BIAS, self.address(epilogue.bias)
        elif isinstance(epilogue, ReluBias):
            number, bias = cublaslt.RELU_BIAS, self.address(epilogue.bias)
            if epilogue.mask is not None:
                number, aux = cublaslt.RELU_AUX_BIAS, self.address(epilogue.mask)
        elif isinstance(epilogue, MaskedBiasGradient):
            number, bias, aux = cublaslt.DRELU_BGRAD, self.address(epilogue.db), self.address(epilogue.mask)
        elif isinstance(epilogue, BiasGradient):
            number, bias = cublaslt.BGRADA, self.address(epilogue.db)  # the library's A is our b
        alignment = cublaslt.alignment_of(*(self.address(array) for array in (out, a, b)), bias, aux)
        kind = cublaslt.kind_of(
            out.dtype,
            out.shape,
            a.shape[0] if transpose_a else a.shape[1],
            transpose_a=transpose_a,
            transpose_b=transpose_b,
            epilogue=number,
            alignment=alignment,
        )
        return kind, bias, aux

    def _workspace(self, stream: Any) -> Array:
        """Of one stream: two products at a time must not share it."""
        array = self._workspaces.get(stream.ptr)
        if array is None:
            array = self._workspaces[stream.ptr] = self.alloc(cublaslt.WORKSPACE, np.uint8)
            stream.wait_event(self._streams.mark(self._streams.main))  # alloc writes zeros
        return array

    def relu_mask(self, rows: int, columns: int) -> Array:
        return self.alloc(cublaslt.mask_bytes(rows, columns), np.uint8)

    # --- order ------------------------------------------------------------------------------------

    @property
    def lanes(self) -> int:
        return len(self._streams.sides)

    @property
    def stream(self) -> int:
        return int(self._streams.current.ptr)

    def side(self, lane: int = 0, after: Sequence[Token] = ()) -> AbstractContextManager[Token]:
        return self._streams.side(lane, after)

    def wait(self, token: Token) -> None:
        self._streams.wait(token)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        with self._reporting("capture a step"):
            return self._streams.capture(step)

    def synchronize(self) -> None:
        with self._reporting("finish"):
            self._streams.join()
            self._streams.main.synchronize()

    # --- errors -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reporting(self, what: str, shape: Any = None, dtype: Any = None) -> Iterator[None]:
        """CuPy's errors as ours: running out of memory says what to lower."""
        try:
            yield
        except (self.cupy.cuda.memory.OutOfMemoryError, self.cupy.cuda.runtime.CUDARuntimeError) as error:
            text = " ".join(str(error).split())
            if not isinstance(error, MemoryError) and "MemoryAllocation" not in text:
                raise DeviceError(f"the GPU failed to {what}: {text}") from error
            wanted = "" if shape is None else f" for {_bytes(shape, dtype):,} bytes"
            raise DeviceMemoryError(
                f"not enough memory on the GPU{wanted}{self._free()}: lower --batch-size, let the data stream with "
                "--device-memory-limit, or use --device cpu"
            ) from error

    def _free(self) -> str:
        try:
            free, total = self.cupy.cuda.runtime.memGetInfo()
        except Exception:  # the GPU may be past answering; the message is about something else
            return ""
        return f" ({free:,} of {total:,} are free)"


def _bytes(shape: int | Sequence[int], dtype: DTypeLike) -> int:
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    return int(np.prod(dims, dtype=np.int64)) * np.dtype(dtype).itemsize


@functools.cache
def open_driver(precision: str = "float32") -> CupyDriver:
    """The driver of this process's GPU (detect.use), one for each precision in a process.

    Raises DeviceError, with the reason, where no GPU can be used.
    """
    from nicecp.kernels import detect

    problem = detect.problem()
    if problem:
        raise DeviceError(f"device 'cuda': {problem} (without a GPU: --device cpu)")
    products = cublaslt.Products(cublaslt.library(), tf32=precision == "tf32")
    cupy = detect.import_cupy()
    cupy.cuda.Device(detect.ordinal()).use()
    return CupyDriver(cupy, products, precision)
