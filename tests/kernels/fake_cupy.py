"""A stand-in for CuPy on a machine without a GPU: arrays in host memory, streams that remember what was launched.

Work is carried out when the host waits for it, in an order that the streams and events allow, and not before: what was
launched without waiting for what it needs reads old numbers. Side work is put off as long as possible.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class FakeArray:
    """Enough of cupy.ndarray: shape, views, an address."""

    def __init__(self, host: np.ndarray[Any, Any]) -> None:
        self.host = host

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "size", "nbytes", "flags", "ndim"):
            return getattr(self.host, name)
        raise AttributeError(name)

    def __getitem__(self, key: Any) -> FakeArray:
        return FakeArray(self.host[key])

    def __len__(self) -> int:
        return len(self.host)

    def reshape(self, *shape: Any) -> FakeArray:
        return FakeArray(self.host.reshape(*shape))

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self.host.ctypes.data)


class Event:
    def __init__(self, cupy: FakeCupy, disable_timing: bool) -> None:
        assert disable_timing, "events with timing are slower"
        self.cupy = cupy
        self.stream: Stream | None = None
        self.at = 0
        self.graph: object = None  # the capture it belongs to

    def synchronize(self) -> None:
        assert self.stream is not None
        self.cupy.calls.append(("event.synchronize", self.stream.name))
        self.stream.carry_out(self.at)


class Stream:
    """A queue: work, or an event of another stream to wait for."""

    def __init__(self, cupy: FakeCupy, non_blocking: bool = False) -> None:
        assert non_blocking, "the legacy stream must not hold up ours"
        self.cupy, self.ptr = cupy, len(cupy.streams) + 1
        self.name = ("main", "side", "copy")[len(cupy.streams) % 3]
        self.queue: list[Callable[[], None] | Event] = []
        self.done = 0
        cupy.streams[self.ptr] = self

    def __enter__(self) -> Stream:
        self.cupy.current.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self.cupy.current.pop()

    def put(self, what: str, work: Callable[[], None]) -> None:
        graph = self.cupy.capturing
        if graph is not None:
            assert self.ptr in graph.joined, f"{what} on the {self.name} stream would not be captured"
            graph.work.append((self.name, what, work))
            return
        self.cupy.calls.append((what, self.name))
        self.queue.append(work)

    def record(self, event: Event) -> None:
        event.stream, event.at, event.graph = self, len(self.queue), self.cupy.capturing
        self.cupy.calls.append(("record", self.name))

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None, "an event that nobody has recorded"
        self.cupy.calls.append(("wait", self.name, event.stream.name))
        graph = self.cupy.capturing
        assert event.graph is graph, "an event from outside of the capture"
        if graph is None:
            self.queue.append(event)
        elif self is graph.origin:
            graph.open.discard(event.stream.ptr)
        else:
            graph.joined.add(self.ptr)
            graph.open.add(self.ptr)

    def carry_out(self, until: int) -> None:
        while self.done < until:
            item = self.queue[self.done]
            self.done += 1
            if isinstance(item, Event):
                assert item.stream is not None
                item.stream.carry_out(item.at)
            else:
                item()

    def synchronize(self) -> None:
        assert self.cupy.capturing is None, "the host must not wait in a capture"
        self.cupy.calls.append(("synchronize", self.name))
        self.carry_out(len(self.queue))

    def begin_capture(self) -> None:
        self.cupy.calls.append(("begin_capture", self.name))
        self.cupy.capturing = Graph(self.cupy, self)

    def end_capture(self) -> Graph:
        graph, self.cupy.capturing = self.cupy.capturing, None
        assert graph is not None
        self.cupy.calls.append(("end_capture", self.name))
        if graph.open:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnjoined")
        return graph


class Graph:
    def __init__(self, cupy: FakeCupy, origin: Stream) -> None:
        self.cupy, self.origin, self.joined = cupy, origin, {origin.ptr}
        self.open: set[int] = set()  # streams with work that the origin has not waited for
        self.work: list[tuple[str, str, Callable[[], None]]] = []

    def upload(self, stream: Stream) -> None:
        self.cupy.calls.append(("upload graph", stream.name))

    def launch(self, stream: Stream) -> None:
        def play() -> None:
            for _, _, work in self.work:
                work()

        stream.put("launch graph", play)


class Kernel:
    def __init__(self, cupy: FakeCupy, name: str) -> None:
        self.cupy, self.name = cupy, name

    @property
    def attributes(self) -> dict[str, int]:
        self.cupy.calls.append(("load", self.name))
        return {}

    def __call__(self, grid: Any, block: Any, arguments: Any) -> None:
        launched = (self.name, grid, block, arguments)
        self.cupy.current[-1].put(f"kernel {self.name}", lambda: self.cupy.run_kernel(*launched))


class FakeCupy:
    """The module. ``memory`` : bytes that may still be allocated; ``run_kernel`` : what a kernel does."""

    def __init__(self, memory: int = 2**40) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.streams: dict[int, Stream] = {}
        self.current: list[Stream] = []
        self.capturing: Graph | None = None
        self.memory = memory
        self.run_kernel: Callable[..., None] = lambda *launched: None
        self.alive: list[Any] = []
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDevice=lambda: 0,
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda device: {
                "name": b"Fake GPU", "multiProcessorCount": 4, "maxThreadsPerMultiProcessor": 2048,
            },
            memGetInfo=lambda: (1000, 2000),
            memcpyAsync=self._memcpy,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
            memcpyDeviceToDevice=3,
        )  # fmt: skip
        self.cuda = SimpleNamespace(
            runtime=runtime,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            Stream=lambda non_blocking=False: Stream(self, non_blocking),
            Event=lambda disable_timing=False: Event(self, disable_timing),
            alloc_pinned_memory=self._pinned,
            nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
        )

    def _pinned(self, size: int) -> Any:
        self.calls.append(("pinned", size))
        return (ctypes.c_uint8 * size)()

    def _memcpy(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        self.streams[stream].put(f"memcpy {kind}", lambda: ctypes.memmove(dst, src, size) and None)

    def _make(self, shape: Any, dtype: Any, value: float) -> FakeArray:
        """Filled by a launch, until when it holds other numbers."""
        assert self.capturing is None, "memory must not be allocated in a capture"
        count = int(np.prod(shape))
        item = np.dtype(dtype)
        if count * item.itemsize > self.memory:
            raise OutOfMemoryError(f"Out of memory allocating {count * item.itemsize} bytes")
        self.memory -= count * item.itemsize
        raw = np.full(count * item.itemsize + 512, 0xAA, np.uint8)
        offset = -raw.ctypes.data % 512
        host = raw[offset : offset + count * item.itemsize].view(item).reshape(shape)
        self.alive.append(raw)  # a queue may still work on what Python has forgotten, as CuPy's pool allows
        array = FakeArray(host)
        self.current[-1].put("fill", lambda: host.fill(value))
        return array

    def zeros(self, shape: Any, dtype: Any) -> FakeArray:
        return self._make(shape, dtype, 0)

    def full(self, shape: Any, value: float, dtype: Any) -> FakeArray:
        return self._make(shape, dtype, value)

    def ascontiguousarray(self, array: FakeArray) -> FakeArray:
        out = self._make(array.shape, array.dtype, 0)
        self.current[-1].put("contiguous", lambda: np.copyto(out.host, array.host))
        return out

    def RawModule(self, code: str, options: tuple[str, ...], backend: str) -> Any:
        self.calls.append(("module", code, options, backend))
        return SimpleNamespace(get_function=lambda name: Kernel(self, name))
