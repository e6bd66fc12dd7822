"""Arrays of the stand-in for CuPy: nothing of NumPy works on them, and arithmetic is launched on the current stream."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.kernels.fake_order import Access, Span, span_of

if TYPE_CHECKING:
    from tests.kernels.fake_cupy import FakeCupy


class Owner:
    """An allocation: arrays and their views keep it, launches and graphs do not."""

    def __init__(self, span: Span) -> None:
        self.span = span


class Exchanged:
    """A DLPack capsule."""

    def __init__(self, host: np.ndarray[Any, Any], owner: Owner) -> None:
        self.host, self.owner = host, owner


def span(host: np.ndarray[Any, Any]) -> Span:
    """The bytes from the first to the last of an array, which may be a view with gaps."""
    low, high = np.lib.array_utils.byte_bounds(host)
    return span_of(low, (high - low) * (host.size > 0))


class FakeArray:
    """Enough of cupy.ndarray. ``host`` holds old numbers until the work on it has been carried out."""

    __array_ufunc__ = None  # NumPy must not take part

    def __init__(self, cupy: FakeCupy, host: np.ndarray[Any, Any], owner: Owner) -> None:
        self.cupy, self.host, self.owner = cupy, host, owner

    def __array__(self, *arguments: Any, **named: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "size", "nbytes", "flags", "ndim", "itemsize"):
            return getattr(self.host, name)
        raise AttributeError(name)

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self.host.ctypes.data)

    def __len__(self) -> int:
        return len(self.host)

    # --- views --------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> FakeArray:
        return FakeArray(self.cupy, self.host[key], self.owner)

    def reshape(self, *shape: Any) -> FakeArray:
        return FakeArray(self.cupy, self.host.reshape(*shape), self.owner)

    @property
    def T(self) -> FakeArray:
        return FakeArray(self.cupy, self.host.T, self.owner)

    # --- arithmetic ---------------------------------------------------------------------------------------------------

    def __setitem__(self, key: Any, value: Any) -> None:
        given, part = self.cupy.host_of(value), self.host[key]
        access = Access(self.cupy.spans_of([value]), {span(part)})
        self.cupy.launch("assign", lambda: np.copyto(part, given, casting="same_kind"), access)

    def astype(self, dtype: Any) -> FakeArray:
        return self.cupy.compute(lambda a: a.astype(dtype), self)

    def any(self, axis: int | None = None) -> FakeArray:
        return self.cupy.compute(lambda a: np.asarray(a.any(axis=axis)), self)

    def all(self, axis: int | None = None) -> FakeArray:
        return self.cupy.compute(lambda a: np.asarray(a.all(axis=axis)), self)

    def argmax(self) -> FakeArray:
        return self.cupy.compute(lambda a: np.asarray(a.argmax()), self)

    def __bool__(self) -> bool:
        return bool(self._item())

    def __int__(self) -> int:
        return int(self._item())

    def _item(self) -> Any:
        self.cupy.get_current_stream().synchronize()
        return self.host.item()

    def __add__(self, other: Any) -> FakeArray:
        return self.cupy.compute(np.add, self, other)

    def __sub__(self, other: Any) -> FakeArray:
        return self.cupy.compute(np.subtract, self, other)

    def _in_place(self, function: Callable[..., Any], other: Any) -> FakeArray:
        given, host = self.cupy.host_of(other), self.host
        access = Access(self.cupy.spans_of([other]), self.cupy.spans_of([self]))
        self.cupy.launch("in place", lambda: function(host, given, out=host) is None, access)
        return self

    def __iadd__(self, other: Any) -> FakeArray:
        return self._in_place(np.add, other)

    def __isub__(self, other: Any) -> FakeArray:
        return self._in_place(np.subtract, other)

    def __imul__(self, other: Any) -> FakeArray:
        return self._in_place(np.multiply, other)

    def __mul__(self, other: Any) -> FakeArray:
        return self.cupy.compute(np.multiply, self, other)

    def __matmul__(self, other: Any) -> FakeArray:
        return self.cupy.compute(np.matmul, self, other)

    def __and__(self, other: Any) -> FakeArray:
        return self.cupy.compute(np.logical_and, self, other)

    def __or__(self, other: Any) -> FakeArray:
        return self.cupy.compute(np.logical_or, self, other)

    def __invert__(self) -> FakeArray:
        return self.cupy.compute(np.logical_not, self)

    # --- others' arrays -----------------------------------------------------------------------------------------------

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # kDLCUDA

    def __dlpack__(self, stream: int | None = None) -> Any:
        """As CuPy's: the consumer's stream waits for what is now the current one, be it the consumer's own."""
        consumer, producer = self.cupy.streams[stream or 0], self.cupy.get_current_stream()
        if consumer is not producer:
            event = self.cupy.cuda.Event(disable_timing=True)
            producer.record(event)
            consumer.wait_event(event)
        return Exchanged(self.host, self.owner)


ARITHMETIC: dict[str, Callable[..., Any]] = {
    name: getattr(np, name) for name in ("isfinite", "isnan", "where", "ascontiguousarray", "concatenate", "maximum")
}
