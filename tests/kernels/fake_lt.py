"""A stand-in for libcublasLt: descriptors as the documentation describes them, products by NumPy on real addresses.

It knows nothing of rows-first matrices: what it computes is D = op(A) op(B) of column-major matrices with the
documented epilogues, so that a test sees whether nicecp.kernels.cublaslt asks for what it means.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nicecp.kernels.cublaslt import PROTOTYPES, WORKSPACE
from tests.kernels.fake_order import Access, span_of

NUMBERS = {0: np.dtype(np.float32), 1: np.dtype(np.float64)}


def plain(value: Any) -> int:
    """The number in a ctypes argument."""
    return int(getattr(value, "value", value) or 0)


def column_major(address: int, dtype: np.dtype[Any], rows: int, columns: int, ld: int) -> NDArray[Any]:
    """(rows, columns) view of memory in which a column begins every ld numbers."""
    assert ld >= rows
    count = ld * columns
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(raw, dtype, count).reshape(columns, ld).T[:rows]


class FakeLt:
    """``declined`` : epilogues for which the heuristic has nothing; ``relu_hides_nan`` : max(NaN, 0) is 0 in a product.

    calls : what was asked of it, in order. run : how a product is carried out (a stream may put it off), and what
    memory it touches.
    """

    def __init__(self, declined: tuple[int, ...] = (), relu_hides_nan: bool = False) -> None:
        self.declined, self.relu_hides_nan = declined, relu_hides_nan
        self.calls: list[tuple[Any, ...]] = []
        self.made: list[dict[Any, Any]] = [{}]
        self.status = 0
        self.run: Callable[[int, Callable[[], None], Access], None] = lambda stream, work, access: work()
        for name in PROTOTYPES:
            setattr(self, "cublasLt" + name, self._function(name))
        self.cublasLtGetVersion = lambda: 130101
        self.cublasLtGetStatusString = lambda status: b"words for %d" % status

    def _function(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if self.status:
                return self.status
            result: int = getattr(self, "_" + name)(*arguments) or 0
            return result

        return call

    # --- objects ------------------------------------------------------------------------------------------------------

    def _new(self, handle: Any, **content: Any) -> None:
        handle._obj.value = len(self.made)
        self.made.append(content)

    def _Create(self, handle: Any) -> None:
        self._new(handle, kind="handle")

    def _MatmulDescCreate(self, handle: Any, compute: int, scale: int) -> None:
        self._new(handle, kind="description", compute=compute, scale=scale)

    def _MatrixLayoutCreate(self, handle: Any, dtype: int, rows: int, columns: int, ld: int) -> None:
        self._new(handle, kind="layout", dtype=dtype, shape=(rows, columns), ld=ld)

    def _MatmulPreferenceCreate(self, handle: Any) -> None:
        self._new(handle, kind="preference")

    def _set(self, handle: Any, attribute: int, value: Any, size: int) -> None:
        assert ctypes.sizeof(value._obj) == size
        self.made[plain(handle)][attribute] = plain(value._obj)

    _MatmulDescSetAttribute = _set
    _MatmulPreferenceSetAttribute = _set

    # --- products -----------------------------------------------------------------------------------------------------

    def _MatmulAlgoGetHeuristic(
        self,
        handle: Any,
        desc: Any,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        preference: Any,
        wanted: int,
        best: Any,
        count: Any,
    ) -> int:
        about = self.made[plain(desc)]
        assert self.made[plain(handle)]["kind"] == "handle"
        self.calls.append(("heuristic", dict(about), dict(self.made[plain(preference)])))
        self._checked(about, *(self.made[plain(layout)] for layout in (a, b, d)))
        offered = about[7] not in self.declined
        best._obj.algo.data[0] = 7
        best._obj.workspace = 2**20
        best._obj.state = 0 if offered else 15
        count._obj.value = int(offered)
        return 0 if offered else 15

    @staticmethod
    def _checked(about: dict[Any, Any], a: dict[Any, Any], b: dict[Any, Any], d: dict[Any, Any]) -> int:
        """The shapes must fit -> k."""
        (m, k), (other, n) = (
            layout["shape"][::-1] if about[transpose] else layout["shape"] for layout, transpose in ((a, 3), (b, 4))
        )
        assert k == other
        assert d["shape"] == (m, n)
        assert len({layout["dtype"] for layout in (a, b, d)} | {about["scale"]}) == 1
        return int(k)

    def _Matmul(
        self, handle: Any, desc: Any, alpha: Any, a: Any, left: Any, b: Any, right: Any, beta: Any, c: Any,
        c_layout: Any, d: Any, d_layout: Any, algorithm: Any, workspace: Any, size: int, stream: Any,
    ) -> None:  # fmt: skip
        about = dict(self.made[plain(desc)])
        layouts = [self.made[plain(layout)] for layout in (left, right, d_layout)]
        self._checked(about, *layouts)
        assert algorithm._obj.data[0] == 7, "not the algorithm that the heuristic named"
        assert plain(workspace)
        assert size == WORKSPACE
        assert (alpha._obj.value, beta._obj.value) == (1, 0)
        addresses = [plain(address) for address in (a, b, d)]
        assert plain(c) == addresses[2]
        self.calls.append(("matmul", about, addresses, plain(workspace), plain(stream)))
        access = self._access(about, layouts, addresses, plain(workspace))
        self.run(plain(stream), lambda: self._compute(about, layouts, addresses), access)

    @staticmethod
    def _access(about: dict[Any, Any], layouts: list[dict[Any, Any]], addresses: list[int], workspace: int) -> Access:
        """Also the workspace is written: two products at a time must not share it."""
        item, epilogue = NUMBERS[about["scale"]].itemsize, about[7]
        a, b, d = (
            span_of(address, layout["ld"] * layout["shape"][1] * item)
            for address, layout in zip(addresses, layouts, strict=True)
        )
        access = Access({a, b}, {d, span_of(workspace, WORKSPACE)})
        rows, columns = layouts[2]["shape"]
        if epilogue != 1:
            gradient = epilogue == 256 or epilogue & 16
            (access.writes if gradient else access.reads).add(span_of(about[8], rows * item))
        if epilogue & 128:
            (access.reads if epilogue & 8 else access.writes).add(span_of(about[11], about[12] // 8 * columns))
        return access

    @np.errstate(all="ignore")
    def _compute(self, about: dict[Any, Any], layouts: list[dict[Any, Any]], addresses: list[int]) -> None:
        dtype, epilogue = NUMBERS[about["scale"]], about[7]
        a, b, d = (
            column_major(address, dtype, *layout["shape"], layout["ld"])
            for address, layout in zip(addresses, layouts, strict=True)
        )
        a, b = (matrix.T if about[transpose] else matrix for matrix, transpose in ((a, 3), (b, 4)))
        result = (a @ b).astype(dtype)
        m = d.shape[0]
        vector = column_major(about[8], dtype, m, 1, m)[:, 0] if epilogue != 1 else np.zeros(0)
        mask = None
        if epilogue & 128:
            ld = about[12]
            assert ld % 128 == 0
            mask = column_major(about[11], np.dtype(np.uint8), ld // 8, d.shape[1], ld // 8)
        if epilogue & 4:
            result += vector[:, None]
        if epilogue & 2:
            bits = result > 0
            relu = np.where(bits, result, 0) if self.relu_hides_nan else np.maximum(result, 0)
            if mask is not None:
                padded = np.zeros((mask.shape[0] * 8, d.shape[1]), bool)
                padded[:m] = bits
                mask[...] = np.packbits(padded, axis=0, bitorder="little")
            result = relu
        if epilogue & 8:
            assert mask is not None
            result = np.where(np.unpackbits(mask, axis=0, bitorder="little")[:m] == 1, result, 0)
            vector[...] = result.sum(axis=1)
        if epilogue == 256:
            vector[...] = a.sum(axis=1)
        d[...] = result
