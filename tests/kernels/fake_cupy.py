"""A stand-in for CuPy on a machine without a GPU: arrays in host memory, streams that remember what was launched.

Work is carried out in an order that the streams and events allow: schedule 0, as it is launched; 1, when the host waits
for it and not before, work beside the main stream as late as possible; others, in graphs, in an order of their own. So
what was launched without waiting for what it needs reads old numbers in one of them; and whatever the schedule,
work that meets in no order is a Race (fake_order.py), memory that a graph needs and nobody keeps an error.
"""

from __future__ import annotations

import ctypes
import random
import threading
import weakref
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.kernels.fake_arrays import ARITHMETIC, FakeArray, Owner, span
from tests.kernels.fake_order import Access, Clock, Order, Span, meet, span_of

ALIGNMENT = 512  # bytes
NAMES = ("main", "copy", "side", "side 1")  # of a driver's streams, in the order in which it makes them


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
        self.clock: Clock = {}
        self.graph: object = None  # the capture it belongs to

    def synchronize(self) -> None:
        assert self.stream is not None
        self.cupy.calls.append(("event.synchronize", self.stream.name))
        self.stream.carry_out(self.at)
        self.cupy.order.host_waits(self.clock)


class Queue:
    """Work in order, and events of other queues to wait for."""

    def __init__(self) -> None:
        self.items: list[Callable[[], None] | tuple[Queue, int]] = []
        self.done = 0

    def carry_out(self, until: int) -> None:
        while self.done < until:
            item = self.items[self.done]
            self.done += 1
            if isinstance(item, tuple):
                item[0].carry_out(item[1])
            else:
                item()

    def step(self) -> bool:
        """One item, unless it waits for another queue's."""
        if self.done == len(self.items):
            return False
        item = self.items[self.done]
        if isinstance(item, tuple):
            if item[0].done < item[1]:
                return False
        else:
            item()
        self.done += 1
        return True


class Stream:
    def __init__(self, cupy: FakeCupy, non_blocking: bool = False, name: str = "") -> None:
        assert non_blocking, "the legacy stream must not hold up ours"
        self.cupy, self.ptr = cupy, 0 if name else len(cupy.streams)
        self.name = name or NAMES[(len(cupy.streams) - 1) % len(NAMES)]
        self.queue = Queue()
        cupy.streams[self.ptr] = self

    def __enter__(self) -> Stream:
        self.cupy.current.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self.cupy.current.pop()

    def put(self, what: str, work: Callable[[], None], access: Access) -> None:
        self.cupy.raise_what_broke()
        graph = self.cupy.capturing
        if graph is not None:
            assert self.ptr in graph.queues, f"{what} on the {self.name} stream would not be captured"
            graph.order.launched(self.ptr, what, access)
            graph.queues[self.ptr].items.append(work)
            graph.work.append((self.name, what, work))
            return
        self.cupy.calls.append((what, self.name))
        self.cupy.order.launched(self.ptr, what, access)
        self.queue.items.append(work)
        if self.cupy.schedule == 0:
            self.carry_out(len(self.queue.items))

    def _place(self) -> tuple[Order, Queue]:
        """Where launches go now."""
        graph = self.cupy.capturing
        if graph is None:
            return self.cupy.order, self.queue
        assert self.ptr in graph.queues, f"the {self.name} stream is no part of the capture"
        return graph.order, graph.queues[self.ptr]

    def record(self, event: Event) -> None:
        order, queue = self._place()
        event.stream, event.at, event.graph = self, len(queue.items), self.cupy.capturing
        event.clock = order.recorded(self.ptr)
        self.cupy.calls.append(("record", self.name))

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None, "an event that nobody has recorded"
        self.cupy.calls.append(("wait", self.name, event.stream.name))
        graph = self.cupy.capturing
        assert event.graph is graph, "an event from outside of the capture"
        if graph is None:
            self.cupy.order.waits(self.ptr, event.clock)
            self.queue.items.append((event.stream.queue, event.at))
            return
        graph.order.waits(self.ptr, event.clock)
        queue = graph.queues.setdefault(self.ptr, Queue())
        queue.items.append((graph.queues[event.stream.ptr], event.at))
        if self is not graph.origin:
            graph.order.launched(self.ptr, "fork", Access())  # what must be joined, also if no work follows

    def carry_out(self, until: int) -> None:
        with self.cupy.lock:  # several threads may wait for the same work
            self.queue.carry_out(until)

    def synchronize(self) -> None:
        assert self.cupy.capturing is None, "the host must not wait in a capture"
        self.cupy.calls.append(("synchronize", self.name))
        self.carry_out(len(self.queue.items))
        self.cupy.order.host_waits(self.cupy.order.recorded(self.ptr))
        self.cupy.raise_what_broke()

    def begin_capture(self) -> None:
        assert self.cupy.capturing is None
        self.cupy.calls.append(("begin_capture", self.name))
        self.cupy.capturing = Graph(self.cupy, self)

    def end_capture(self) -> Graph:
        graph, self.cupy.capturing = self.cupy.capturing, None
        assert graph is not None
        assert graph.origin is self
        self.cupy.calls.append(("end_capture", self.name))
        joined = graph.order.clock(self.ptr)
        if any(joined.get(other, 0) < graph.order.clock(other).get(other, 0) for other in graph.queues):
            raise CUDARuntimeError("cudaErrorStreamCaptureUnjoined")
        graph.access = graph.order.touched()
        graph.needs = self.cupy.allocations(graph.access)
        self.cupy.last_graph = graph
        return graph


class Graph:
    """Work on several streams and its order. It keeps no memory alive."""

    def __init__(self, cupy: FakeCupy, origin: Stream) -> None:
        self.cupy, self.origin = cupy, origin
        self.order, self.queues = Order(), {origin.ptr: Queue()}
        self.work: list[tuple[str, str, Callable[[], None]]] = []
        self.access = Access()
        self.needs: set[int] = set()  # numbers of allocations

    def upload(self, stream: Stream) -> None:
        self.cupy.calls.append(("upload graph", stream.name))

    def launch(self, stream: Stream) -> None:
        lost = self.needs - {number for _, number in self.cupy.live.values()}
        assert not lost, "a graph is launched after memory that it works on was given back"
        stream.put("launch graph", self._play, self.access)

    def _play(self) -> None:
        schedule, queues = self.cupy.schedule, list(self.queues.values())
        for queue in queues:
            queue.done = 0
        if schedule == 0:
            for _, _, work in self.work:
                work()
        elif schedule == 1:
            for queue in queues:  # the origin's is the first
                queue.carry_out(len(queue.items))
        else:
            choice = random.Random(schedule)
            while any(queue.done < len(queue.items) for queue in queues):
                choice.choice(queues).step()


class Kernel:
    def __init__(self, cupy: FakeCupy, name: str) -> None:
        self.cupy, self.name = cupy, name

    @property
    def attributes(self) -> dict[str, int]:
        self.cupy.calls.append(("load", self.name))
        return {}

    def __call__(self, grid: Any, block: Any, arguments: Any) -> None:
        launched = (self.name, grid, block, tuple(_bare(one) for one in arguments))
        access = self.cupy.accesses(self.name, arguments)
        self.cupy.current[-1].put(f"kernel {self.name}", lambda: self.cupy.run_kernel(*launched), access)


def _bare(argument: Any) -> Any:
    """What a launch keeps of an argument: of an array its address, and not the array."""
    return argument.host if isinstance(argument, FakeArray) else argument


def aligned(shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """Uninitialised, on a boundary as CuPy's pool has them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    whole = np.empty(size + ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return whole[start : start + size].view(dtype).reshape(shape)


class FakeCupy:
    """The module. memory : bytes that may still be allocated; run_kernel : what a kernel does with arrays of NumPy;
    accesses : the memory that a kernel reads and writes, if not all of its arrays; live : allocations, first byte ->
    end and number."""

    def __init__(self, memory: int = 2**40, allocate: Callable[..., Any] = aligned, schedule: int = 1) -> None:
        self.schedule, self.order, self.live = schedule, Order(), dict[int, tuple[int, int]]()
        self._freed: list[tuple[Span, Clock]] = []  # what was given back, and when
        self._allocated = 0
        self.calls: list[tuple[Any, ...]] = []
        self.streams: dict[int, Stream] = {}
        self.current: list[Stream] = []
        self.capturing: Graph | None = None
        self.last_graph: Graph | None = None
        self.memory, self.allocate, self.lock = memory, allocate, threading.RLock()
        self.run_kernel: Callable[..., None] = lambda *launched: None
        self.accesses: Callable[..., Access] = lambda name, arguments: Access(*[self.spans_of(arguments)] * 2)
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
        access = Access({span_of(src, size)}, {span_of(dst, size)})
        self.streams[stream].put(f"memcpy {kind}", lambda: ctypes.memmove(dst, src, size) and None, access)

    def _array(self, shape: Any, dtype: Any) -> FakeArray:
        """With other numbers in it than anybody wants."""
        assert self.capturing is None, "memory must not be allocated in a capture"
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > self.memory:
            raise OutOfMemoryError(f"Out of memory allocating {size} bytes")
        self.memory -= size
        host = self.allocate(shape, dtype)
        host.reshape(-1).view(np.uint8).fill(0xAA)
        self._allocated += 1
        owner = Owner(span_of(host.ctypes.data, max(1, size)))
        self.live[owner.span[0]] = owner.span[1], self._allocated
        weakref.finalize(owner, self._given_back, owner.span, self.current[-1].ptr).atexit = False
        return FakeArray(self, host, owner)

    def _given_back(self, whole: Span, stream: int) -> None:
        """To the stream that allocated it, as the pool does. Python may call this at any moment: it is only noted."""
        self.live.pop(whole[0], None)
        self._freed.append((whole, self.order.recorded(stream)))

    def raise_what_broke(self) -> None:
        """A Race, if memory was given back too early."""
        while self._freed:
            self.order.given_back(*self._freed.pop(0))

    def allocations(self, access: Access) -> set[int]:
        """Numbers of those that contain the memory; that of the host is none."""
        spans = access.reads | access.writes
        return {
            number for start, (end, number) in list(self.live.items()) if any(meet((start, end), one) for one in spans)
        }

    def spans_of(self, arguments: Iterable[Any]) -> set[Span]:
        """Of the arrays among arguments."""
        hosts = [one.host for one in arguments if isinstance(one, FakeArray)]
        return {span(host) for host in hosts if host.size}

    def _make(self, shape: Any, dtype: Any, value: float) -> FakeArray:
        """Filled by a launch, until when it holds other numbers."""
        array = self._array(shape, dtype)
        host = array.host
        self.current[-1].put("fill", lambda: host.fill(value), Access(set(), self.spans_of([array])))
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

    def launch(self, what: str, work: Callable[[], None], access: Access) -> None:
        assert self.capturing is None, f"CuPy's own {what} in a capture"
        self.current[-1].put(what, work, access)

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
        host = out.host

        def work() -> None:
            with np.errstate(all="ignore"):
                np.copyto(host, function(*hosts))

        flat = [one for given in arguments for one in (given if isinstance(given, (list, tuple)) else [given])]
        access = Access(self.spans_of(flat), self.spans_of([out]))
        self.launch(getattr(function, "__name__", "arithmetic"), work, access)
        return out

    def from_dlpack(self, array: Any) -> FakeArray:
        capsule = array.__dlpack__(stream=self.current[-1].ptr)
        return FakeArray(self, capsule.host, capsule.owner)

    def RawModule(self, code: str, options: tuple[str, ...], backend: str) -> Any:
        self.calls.append(("module", code, options, backend))
        return SimpleNamespace(get_function=lambda name: Kernel(self, name))
