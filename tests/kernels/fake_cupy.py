"""A stand-in for CuPy on a machine without a GPU: arrays in host memory, streams that remember what was launched.

Work is carried out when the host waits for it, in an order that the streams and events allow, and not before: what was
launched without waiting for what it needs reads old numbers. Side work is put off as long as possible.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.kernels.fake_arrays import ARITHMETIC, FakeArray


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


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

    def __init__(self, cupy: FakeCupy, non_blocking: bool = False, name: str = "") -> None:
        assert non_blocking, "the legacy stream must not hold up ours"
        self.cupy, self.ptr = cupy, 0 if name else len(cupy.streams)
        self.name = name or ("copy", "main", "side")[len(cupy.streams) % 3]
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
        with self.cupy.lock:  # several threads may wait for the same work
            self._carry_out(until)

    def _carry_out(self, until: int) -> None:
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

    def __init__(self, memory: int = 2**40, allocate: Callable[..., Any] = np.empty) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.streams: dict[int, Stream] = {}
        self.current: list[Stream] = []
        self.capturing: Graph | None = None
        self.memory, self.allocate, self.lock = memory, allocate, threading.RLock()
        self.run_kernel: Callable[..., None] = lambda *launched: None
        self.current.append(Stream(self, non_blocking=True, name="user"))
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
            get_current_stream=self.get_current_stream,
            Device=lambda number=None: SimpleNamespace(use=lambda: None, pci_bus_id=f"0000:{number or 0:02x}:00.0"),
            nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
        )

    def _pinned(self, size: int) -> Any:
        self.calls.append(("pinned", size))
        return (ctypes.c_uint8 * size)()

    def _memcpy(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        self.streams[stream].put(f"memcpy {kind}", lambda: ctypes.memmove(dst, src, size) and None)

    def _array(self, shape: Any, dtype: Any) -> FakeArray:
        """With other numbers in it than anybody wants."""
        assert self.capturing is None, "memory must not be allocated in a capture"
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > self.memory:
            raise OutOfMemoryError(f"Out of memory allocating {size} bytes")
        self.memory -= size
        host = self.allocate(shape, dtype)
        host.reshape(-1).view(np.uint8).fill(0xAA)
        return FakeArray(self, host)

    def _make(self, shape: Any, dtype: Any, value: float) -> FakeArray:
        """Filled by a launch, until when it holds other numbers."""
        array = self._array(shape, dtype)
        self.current[-1].put("fill", lambda: array.host.fill(value))
        return array

    def zeros(self, shape: Any, dtype: Any) -> FakeArray:
        return self._make(shape, dtype, 0)

    def full(self, shape: Any, value: float, dtype: Any) -> FakeArray:
        return self._make(shape, dtype, value)

    def empty(self, shape: Any, dtype: Any) -> FakeArray:
        return self._array(shape, dtype)

    def ones(self, shape: Any, dtype: Any) -> FakeArray:
        return self._make(shape, dtype, 1)

    # --- arithmetic ---------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name not in ARITHMETIC:
            raise AttributeError(name)
        return lambda *arguments: self.compute(ARITHMETIC[name], *arguments)

    def get_current_stream(self) -> Stream:
        return self.current[-1]

    def launch(self, what: str, work: Callable[[], None]) -> None:
        assert self.capturing is None, f"CuPy's own {what} in a capture"
        self.current[-1].put(what, work)

    def host_of(self, value: Any) -> Any:
        """What NumPy computes with; CuPy refuses NumPy's arrays."""
        if isinstance(value, (list, tuple)):
            return [self.host_of(item) for item in value]
        if isinstance(value, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        return value.host if isinstance(value, FakeArray) else value

    def compute(self, function: Callable[..., Any], *arguments: Any) -> FakeArray:
        """A new array that the current stream will fill with function(arguments)."""
        hosts = [self.host_of(argument) for argument in arguments]
        with np.errstate(all="ignore"):
            like = np.asarray(function(*hosts))
        out = self._array(like.shape, like.dtype)

        def work() -> None:
            with np.errstate(all="ignore"):
                np.copyto(out.host, function(*hosts))

        self.launch(getattr(function, "__name__", "arithmetic"), work)
        return out

    def from_dlpack(self, array: Any) -> FakeArray:
        return FakeArray(self, array.__dlpack__(stream=self.current[-1].ptr))

    def RawModule(self, code: str, options: tuple[str, ...], backend: str) -> Any:
        self.calls.append(("module", code, options, backend))
        return SimpleNamespace(get_function=lambda name: Kernel(self, name))
