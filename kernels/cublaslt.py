"""cuBLASLt by ctypes: matrix products that can be captured in a CUDA graph, with bias, ReLU and their gradients inside.

CuPy refuses its own cuBLAS calls while a stream is captured (https://github.com/cupy/cupy/issues/6290). The kept
binding, nvmath-python's, would bring cuda-core and a cuda-bindings of no fixed version; these dozen functions have been
the same since CUDA 11 and need no package but the library itself. Values and structures are those of cublasLt.h; a test
compares them with the header where that is installed.

cuBLASLt counts columns first. A row-major matrix is the transpose of a column-major one, so that
out = op(a) op(b) is computed as out^T = op(b)^T op(a)^T: its A is our b, its B our a, its rows our columns.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p, sizeof
from dataclasses import dataclass
from typing import Any

import numpy as np

from nicecp.errors import DeviceError

# cudaDataType_t, cublasComputeType_t, cublasOperation_t
R_32F, R_64F = 0, 1
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77
OP_N, OP_T = 0, 1
# cublasLtMatmulDescAttributes_t
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD = 3, 4, 7, 8, 11, 12
# cublasLtMatmulPreferenceAttributes_t
MAX_WORKSPACE_BYTES, REDUCTION_SCHEMES = 1, 3
MIN_ALIGNMENT = (5, 6, 7, 8)  # of A, B, C, D
# cublasLtReductionScheme_t: parts of a sum that lie in the workspace and are added in a step of their own, in one order
APART = 2 | 4
# cublasLtEpilogue_t
DEFAULT, BIAS, RELU_BIAS, RELU_AUX_BIAS, DRELU_BGRAD, BGRADA = 1, 4, 6, 134, 152, 256

MASK_BITS = 128  # the leading dimension of a ReLU mask is a multiple of it
MAX_ALIGNMENT = 256  # bytes
WORKSPACE = 32 * 2**20  # bytes, of each stream: what NVIDIA recommends for Hopper; fixed, so that the choice is too

NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = [("data", c_uint64 * 8)]


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algo", Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


_P, _SIZE = c_void_p, c_size_t
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "Create": (_P,),
    "MatmulDescCreate": (_P, c_int, c_int),
    "MatmulDescSetAttribute": (_P, c_int, _P, _SIZE),
    "MatrixLayoutCreate": (_P, c_int, c_uint64, c_uint64, c_int64),
    "MatmulPreferenceCreate": (_P,),
    "MatmulPreferenceSetAttribute": (_P, c_int, _P, _SIZE),
    "MatmulAlgoGetHeuristic": (_P, _P, _P, _P, _P, _P, _P, c_int, _P, _P),
    "Matmul": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _SIZE, _P),
}


@functools.cache
def library() -> Any:
    """The loaded library with its functions declared: what CUDA's packages installed, else what the system knows.

    Raises OSError where there is none.
    """
    paths: list[str] = []
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib  # comes with CuPy

        path = load_nvidia_dynamic_lib("cublasLt").abs_path
        paths += [path] if path else []
    except (ImportError, RuntimeError):
        pass
    for name in (*paths, *NAMES):
        try:
            return declared(ctypes.CDLL(name))
        except OSError:
            continue
    raise OSError("libcublasLt.so was not found")


def declared(lib: Any) -> Any:
    """The library with argument and result types of what is used of it."""
    for name, arguments in PROTOTYPES.items():
        function = getattr(lib, "cublasLt" + name)
        function.argtypes, function.restype = arguments, c_int
    lib.cublasLtGetVersion.argtypes, lib.cublasLtGetVersion.restype = (), c_size_t
    lib.cublasLtGetStatusString.argtypes, lib.cublasLtGetStatusString.restype = (c_int,), c_char_p
    return lib


def version(lib: Any) -> str:
    """'13.1.1'"""
    number = int(lib.cublasLtGetVersion())
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def mask_ld(columns: int) -> int:
    """Bits from one row of a ReLU mask to the next, in our rows: a thousand columns take 1024."""
    return -(-columns // MASK_BITS) * MASK_BITS


def mask_bytes(rows: int, columns: int) -> int:
    """Of a ReLU mask."""
    return rows * mask_ld(columns) // 8


@dataclass(frozen=True)
class Kind:
    """All that an algorithm is chosen for. out : (m, n) = op(a) op(b), k terms each.

    alignment : the largest power of two, at most 256, that all addresses are multiples of.
    """

    dtype: str
    m: int
    n: int
    k: int
    transpose_a: bool = False
    transpose_b: bool = False
    epilogue: int = DEFAULT
    alignment: int = MAX_ALIGNMENT

    @property
    def masked(self) -> bool:
        return self.epilogue in (RELU_AUX_BIAS, DRELU_BGRAD)

    def layouts(self) -> dict[str, tuple[int, int, int]]:
        """(rows, columns, leading dimension) of cuBLASLt's A, B and D."""
        m, n, k = self.m, self.n, self.k
        return {
            "A": (k, n, k) if self.transpose_b else (n, k, n),
            "B": (m, k, m) if self.transpose_a else (k, m, k),
            "D": (n, m, n),
        }


def alignment_of(*addresses: int) -> int:
    """The largest power of two, at most 256, that all addresses (0: none) are multiples of."""
    together = MAX_ALIGNMENT
    for address in addresses:
        together |= address
    return together & -together


class Plan:
    """One kind of product: its descriptors, and the algorithm that the heuristic named first. ``offered``: whether any.

    Kept as long as the library: a graph that was captured refers to nothing here, but the next call does.
    """

    def __init__(self, products: Products, kind: Kind, bias: int, aux: int) -> None:
        self._products, self._kind = products, kind
        single = kind.dtype == "float32"
        real = R_32F if single else R_64F
        compute = (COMPUTE_32F_FAST_TF32 if products.tf32 else COMPUTE_32F) if single else COMPUTE_64F
        number: Any = c_float if single else c_double
        self._one, self._zero = number(1), number(0)
        self._description = products.new("MatmulDescCreate", compute, real)
        self._set(TRANSA, c_int32(OP_T if kind.transpose_b else OP_N))
        self._set(TRANSB, c_int32(OP_T if kind.transpose_a else OP_N))
        self._set(EPILOGUE, c_int32(kind.epilogue))
        if kind.masked:
            self._set(AUX_LD, c_int64(mask_ld(kind.n)))
        self._layouts = [
            products.new("MatrixLayoutCreate", real, rows, columns, ld) for rows, columns, ld in kind.layouts().values()
        ]
        self._point(bias, aux)  # the heuristic looks at their alignment
        self._algorithm = Algorithm()
        self.offered = self._choose()

    def _set(self, attribute: int, value: Any) -> None:
        self._products.call("MatmulDescSetAttribute", self._description, attribute, byref(value), sizeof(value))

    def _point(self, bias: int, aux: int) -> None:
        if self._kind.epilogue != DEFAULT:
            self._set(BIAS_POINTER, c_void_p(bias))
        if self._kind.masked:
            self._set(AUX_POINTER, c_void_p(aux))

    def _choose(self) -> bool:
        products = self._products
        preference = products.new("MatmulPreferenceCreate")
        settings: list[tuple[int, Any]] = [(MAX_WORKSPACE_BYTES, c_uint64(WORKSPACE))]
        settings += [(REDUCTION_SCHEMES, ctypes.c_uint32(APART))]
        settings += [(attribute, ctypes.c_uint32(self._kind.alignment)) for attribute in MIN_ALIGNMENT]
        for attribute, value in settings:
            products.call("MatmulPreferenceSetAttribute", preference, attribute, byref(value), sizeof(value))
        a, b, d = self._layouts
        best, count = Heuristic(), c_int()
        # No algorithm is an answer, be it by its status or by an empty list.
        status = products.lib.cublasLtMatmulAlgoGetHeuristic(
            products.handle, self._description, a, b, d, d, preference, 1, byref(best), byref(count)
        )
        self._algorithm = best.algo
        return bool(status == 0 and count.value > 0 and best.state == 0 and best.workspace <= WORKSPACE)

    def run(self, arrays: tuple[int, int, int], bias: int, aux: int, workspace: int, stream: int) -> None:
        """Launch; arrays : addresses of a, b and out. ``workspace`` has WORKSPACE bytes and is that of the stream."""
        a, b, out = arrays
        self._point(bias, aux)
        left, right, d = self._layouts
        self._products.call(
            "Matmul",
            self._products.handle,
            self._description,
            byref(self._one),
            b,
            left,
            a,
            right,
            byref(self._zero),
            out,
            d,
            out,
            d,
            byref(self._algorithm),
            workspace,
            WORKSPACE,
            stream,
        )


class Products:
    """The library's handle, and a Plan for every kind of product that was asked for.

    float32 is computed in float32 unless ``tf32``; float64 always in float64.
    """

    def __init__(self, lib: Any, tf32: bool = False) -> None:
        self.lib, self.tf32 = lib, tf32
        self.handle = self.new("Create")
        self._plans: dict[Kind, Plan] = {}

    def plan(self, kind: Kind, bias: int = 0, aux: int = 0) -> Plan | None:
        """The plan of a kind, or None where the library has no algorithm for it: ask again without an epilogue."""
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plans[kind] = Plan(self, kind, bias, aux)
        return plan if plan.offered else None

    def new(self, name: str, *arguments: Any) -> c_void_p:
        """What a Create function makes."""
        made = c_void_p()
        self.call(name, byref(made), *arguments)
        return made

    def call(self, name: str, *arguments: Any) -> None:
        """DeviceError with the library's words where it refuses."""
        status = getattr(self.lib, "cublasLt" + name)(*arguments)
        if status:
            words = (self.lib.cublasLtGetStatusString(status) or b"").decode("utf-8", "replace")
            raise DeviceError(f"cuBLASLt refuses {name} (status {status}, {words}): see nicecp doctor")


def kind_of(dtype: Any, out: tuple[int, int], k: int, **given: Any) -> Kind:
    """A Kind from an output's shape; DeviceError for a dtype that is not computed in."""
    name = np.dtype(dtype).name
    if name not in ("float32", "float64"):
        raise DeviceError(f"matrix products are computed in float32 and float64, not {name}")
    return Kind(name, *out, k, **given)
