"""The CUDA driver, as little of it as duo needs: `Driver` says what, `PycudaDriver` does it through PyCUDA.

Work goes to the device's primary context, which other libraries (PyTorch, CuPy) use as well: whoever calls brackets what they do by
`with driver:`, from any thread. Addresses, streams, events and functions are the driver's own objects. CUDA graphs, which PyCUDA lacks, are
captured and replayed by ctypes on libcuda (`Graphs`). Nothing here is imported with duo; PyCUDA is when a driver is made.
"""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass
from typing import Any, Protocol

from duo_ir.errors import DeviceError, DuoError

WAY_OUT = "install NVIDIA's driver, and PyCUDA by `pip install 'duo[gpu]'`"
MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
PLAIN_SHARED = 48 << 10  # bytes of dynamic shared memory that a function may use unasked


class OutOfDeviceMemory(DuoError, MemoryError):
    """The device has no memory left; the pool frees what it can and tries again."""


@dataclass(frozen=True)
class Properties:
    """The device: its name, compute capability times ten, multiprocessors, most dynamic shared memory of a block in bytes, bytes of memory."""

    name: str
    arch: int
    multiprocessors: int
    shared: int
    memory: int


class Pinned(Protocol):
    """Page-locked memory of the host, which the device copies from and to while the host goes on."""

    ptr: int
    nbytes: int


class Driver(Protocol):
    """What duo does with a device. All but the properties happens inside `with driver:`. What takes a stream does not wait for it."""

    properties: Properties

    def __enter__(self) -> Any: ...
    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...

    def allocate(self, nbytes: int) -> int:
        """The address of new memory. Raises OutOfDeviceMemory."""
        ...

    def free(self, ptr: int) -> None: ...
    def memory(self) -> tuple[int, int]:
        """Bytes free and in all, whoever uses them."""
        ...

    def pinned(self, nbytes: int) -> Pinned: ...
    def to_device(self, ptr: int, host: int, nbytes: int, stream: Any) -> None:
        """From pinned memory at the address `host`."""
        ...

    def to_host(self, host: int, ptr: int, nbytes: int, stream: Any) -> None:
        """To pinned memory at the address `host`."""
        ...

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None: ...
    def fill(self, ptr: int, byte: int, nbytes: int, stream: Any) -> None: ...

    def load(self, cubin: bytes) -> Any:
        """A module; its functions are there while it is referenced."""
        ...

    def function(self, module: Any, name: str, shared: int = 0) -> Any:
        """A kernel. shared: the most bytes of dynamic shared memory that it will be launched with."""
        ...

    def launch(self, function: Any, blocks: int, threads: int, arguments: Any, shared: int, stream: Any) -> None:
        """arguments: a buffer with the parameters, eight bytes each."""
        ...

    def stream(self) -> Any: ...
    def synchronize(self, stream: Any) -> None: ...
    def idle(self, stream: Any) -> bool:
        """Whether all that the stream was given has run."""
        ...

    def synchronize_all(self) -> None:
        """Waits for all streams, other libraries' included."""
        ...

    def event(self) -> Any: ...
    def record(self, event: Any, stream: Any) -> None: ...
    def ready(self, event: Any) -> bool:
        """Whether all that was before the event has run."""
        ...

    def wait(self, event: Any) -> None: ...
    def stream_wait(self, stream: Any, event: Any) -> None: ...
    def elapsed(self, first: Any, second: Any) -> float:
        """Milliseconds between two events that are ready."""
        ...

    def handle(self, stream: Any) -> int:
        """The stream's address, as other libraries know it."""
        ...

    def foreign_event(self, handle: int) -> Any:
        """An event after all that another library's stream was given (0 and 1 stand for the default stream, 2 for this thread's)."""
        ...

    def foreign_wait(self, handle: int, stream: Any) -> None:
        """Another library's stream waits for all that ours was given."""
        ...

    def begin_capture(self, stream: Any) -> None:
        """What this thread gives the stream from now on is not run, but kept."""
        ...

    def end_capture(self, stream: Any) -> Any:
        """A graph of what was kept; None where capturing failed."""
        ...

    def replay(self, graph: Any, stream: Any) -> None: ...


class Graph:
    """An executable CUDA graph."""

    __slots__ = ("_graphs", "handle")

    def __init__(self, handle: int, graphs: Graphs) -> None:
        self.handle, self._graphs = handle, graphs

    def __del__(self) -> None:
        try:
            self._graphs.library.cuGraphExecDestroy(ctypes.c_void_p(self.handle))
        except (AttributeError, TypeError):  # at the interpreter's end
            pass


class Graphs:
    """Capture and replay by ctypes on libcuda; a stream is its handle."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._launch = library.cuGraphLaunch
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def begin(self, stream: int) -> None:
        # thread-local: what other threads allocate meanwhile, PyTorch's say, does not spoil the capture
        self._check("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), ctypes.c_int(1))

    def end(self, stream: int) -> Graph | None:
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        if self.library.cuStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph)) or not graph.value:
            return None
        try:
            code = self.library.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self.library.cuGraphDestroy(graph)
        return None if code or not executable.value else Graph(executable.value, self)

    def replay(self, graph: Graph, stream: int) -> None:
        code = self._launch(graph.handle, stream)
        if code:
            raise failure(self.library, "cuGraphLaunch", code)

    def _check(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise failure(self.library, name, code)


class RawEvent:
    """An event of `Foreign`; when it ends, its address serves the next one."""

    __slots__ = ("_foreign", "address")

    def __init__(self, address: int, foreign: Foreign) -> None:
        self.address, self._foreign = address, foreign

    def __del__(self) -> None:
        self._foreign.idle.append(self.address)

    @property
    def raw(self) -> RawEvent:
        return self

    def query(self) -> bool:
        return self._foreign.call("cuEventQuery", self.address, 600) == 0

    def synchronize(self) -> None:
        self._foreign.call("cuEventSynchronize", self.address)


class Foreign:
    """Other libraries' streams, which PyCUDA has no object for, by ctypes on libcuda: each is its address."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.idle: list[int] = []

    def call(self, name: str, first: int, *allowed: int, more: tuple[Any, ...] = ()) -> int:
        """Calls the driver. Raises DeviceError for a result code that is not `allowed`."""
        code: int = getattr(self._library, name)(ctypes.c_void_p(first), *more)
        if code and code not in allowed:
            raise failure(self._library, name, code)
        return code

    def event(self, stream: int) -> RawEvent:
        """After all that the stream was given."""
        try:
            made = RawEvent(self.idle.pop(), self)
        except IndexError:
            address = ctypes.c_void_p()
            code = self._library.cuEventCreate(ctypes.byref(address), ctypes.c_uint(2))  # CU_EVENT_DISABLE_TIMING
            if code:
                raise failure(self._library, "cuEventCreate", code) from None
            made = RawEvent(address.value or 0, self)
        self.call("cuEventRecord", made.address, more=(ctypes.c_void_p(stream),))
        return made

    def wait(self, stream: int, event: RawEvent) -> None:
        """What the stream is given from now on comes after the event."""
        self.call("cuStreamWaitEvent", stream, more=(ctypes.c_void_p(event.address), ctypes.c_uint(0)))


def failure(library: ctypes.CDLL, call: str, code: int) -> DuoError:
    """The error for a result code of the driver."""
    text = ctypes.c_char_p()
    library.cuGetErrorString(code, ctypes.byref(text))
    said = text.value.decode(errors="replace") if text.value else f"error {code}"
    if code == 2:
        return OutOfDeviceMemory(f"{call}: {said}")
    return DeviceError(f"the GPU's driver reports for {call}: {said} (code {code})")


def load_library() -> ctypes.CDLL:
    """libcuda. Raises DeviceError where there is none."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError(f"there is no CUDA driver (libcuda.so.1) on this machine: {WAY_OUT}")


def device_count() -> int:
    """How many GPUs the CUDA driver finds. Raises DeviceError where it is not there."""
    load_library()
    cuda = _pycuda()
    try:
        cuda.init()
        return cuda.Device.count()  # type: ignore[no-any-return]
    except cuda.Error as error:
        raise DeviceError(f"the CUDA driver does not start: {error}; {WAY_OUT}") from None


class _Owned:
    """An object of PyCUDA, which must not end outside its context: when this one ends it goes to `heir`."""

    __slots__ = ("_heir", "raw")

    def __init__(self, raw: Any, heir: list[Any]) -> None:
        self.raw, self._heir = raw, heir

    def __del__(self) -> None:
        self._heir.append(self.raw)


class PycudaPinned(_Owned):
    """Page-locked memory from PyCUDA."""

    __slots__ = ("nbytes", "ptr")

    def __init__(self, raw: Any, heir: list[Any]) -> None:
        super().__init__(raw, heir)
        self.nbytes: int = raw.nbytes
        self.ptr: int = raw.ctypes.data


class PycudaDriver:
    """`Driver` through PyCUDA, for one device. PyCUDA's errors leave the `with` block as DeviceError."""

    def __init__(self, device: int = 0) -> None:
        library = load_library()
        self._cuda = cuda = _pycuda()
        try:
            cuda.init()
            count = cuda.Device.count()
        except cuda.Error as error:
            raise DeviceError(f"the CUDA driver does not start: {error}; {WAY_OUT}") from None
        if not 0 <= device < count:
            raise DeviceError(f"there is no GPU number {device}; the CUDA driver finds {count}")
        found = cuda.Device(device)
        attribute = cuda.device_attribute
        major, minor = found.compute_capability()
        # PyCUDA knows no name for the opt-in limit: CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        shared = ctypes.c_int()
        if library.cuDeviceGetAttribute(ctypes.byref(shared), 97, device) or not shared.value:
            shared.value = PLAIN_SHARED
        self.properties = Properties(
            found.name(),
            10 * major + minor,
            found.get_attribute(attribute.MULTIPROCESSOR_COUNT),
            shared.value,
            found.total_memory(),
        )
        self._context = found.retain_primary_context()
        self._graphs, self._foreign = Graphs(library), Foreign(library)
        self._local = threading.local()
        self._process = os.getpid()
        self._blocks: dict[int, Any] = {}
        self._dead: list[Any] = []  # what nobody needs any more
        self._events: list[Any] = []  # those that nobody uses at the moment
        self._portable = cuda.host_alloc_flags.PORTABLE

    # ------------------------------------------------------------------------------------------------------- context
    def __enter__(self) -> PycudaDriver:
        depth = getattr(self._local, "depth", 0)
        if depth == 0:
            if self._process != os.getpid():
                raise DeviceError(
                    "the GPU was used before this process was forked, and CUDA does not survive that: start processes by 'spawn' "
                    "(multiprocessing.set_start_method), or use the GPU in children only"
                )
            self._context.push()
            self._dead.clear()
        self._local.depth = depth + 1
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._local.depth -= 1
        if self._local.depth == 0:
            self._context.pop()
        if isinstance(error, self._cuda.Error):
            raise DeviceError(f"the GPU reports: {error}") from error

    # -------------------------------------------------------------------------------------------------------- memory
    def allocate(self, nbytes: int) -> int:
        try:
            block = self._cuda.mem_alloc(nbytes)
        except self._cuda.MemoryError as error:
            raise OutOfDeviceMemory(str(error)) from None
        ptr = int(block)
        self._blocks[ptr] = block
        return ptr

    def free(self, ptr: int) -> None:
        self._blocks.pop(ptr).free()

    def memory(self) -> tuple[int, int]:
        return self._cuda.mem_get_info()  # type: ignore[no-any-return]

    def pinned(self, nbytes: int) -> PycudaPinned:
        return PycudaPinned(self._cuda.pagelocked_empty(nbytes, "u1", mem_flags=self._portable), self._dead)

    def to_device(self, ptr: int, host: int, nbytes: int, stream: Any) -> None:
        self._cuda.memcpy_htod_async(ptr, _view(host, nbytes), stream)

    def to_host(self, host: int, ptr: int, nbytes: int, stream: Any) -> None:
        self._cuda.memcpy_dtoh_async(_view(host, nbytes), ptr, stream)

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        self._cuda.memcpy_dtod_async(target, source, nbytes, stream)

    def fill(self, ptr: int, byte: int, nbytes: int, stream: Any) -> None:
        self._cuda.memset_d8_async(ptr, byte, nbytes, stream)

    # ------------------------------------------------------------------------------------------------------- kernels
    def load(self, cubin: bytes) -> Any:
        return _Owned(self._cuda.module_from_buffer(cubin), self._dead)

    def function(self, module: Any, name: str, shared: int = 0) -> Any:
        found = module.raw.get_function(name)
        if shared > PLAIN_SHARED:
            found.set_attribute(self._cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        return found

    def launch(self, function: Any, blocks: int, threads: int, arguments: Any, shared: int, stream: Any) -> None:
        function._launch_kernel((blocks, 1), (threads, 1, 1), arguments, shared, stream)

    # ---------------------------------------------------------------------------------------------- streams and events
    def stream(self) -> Any:
        return self._cuda.Stream()

    def synchronize(self, stream: Any) -> None:
        stream.synchronize()

    def idle(self, stream: Any) -> bool:
        return stream.is_done()  # type: ignore[no-any-return]

    def synchronize_all(self) -> None:
        self._context.synchronize()

    def event(self) -> Any:
        try:
            return _Owned(self._events.pop(), self._events)
        except IndexError:
            return _Owned(self._cuda.Event(), self._events)

    def record(self, event: Any, stream: Any) -> None:
        event.raw.record(stream)

    def ready(self, event: Any) -> bool:
        return event.raw.query()  # type: ignore[no-any-return]

    def wait(self, event: Any) -> None:
        event.raw.synchronize()

    def stream_wait(self, stream: Any, event: Any) -> None:
        if event.__class__ is RawEvent:
            self._foreign.wait(stream.handle, event)
        else:
            stream.wait_for_event(event.raw)

    def elapsed(self, first: Any, second: Any) -> float:
        return second.raw.time_since(first.raw)  # type: ignore[no-any-return]

    def handle(self, stream: Any) -> int:
        return stream.handle  # type: ignore[no-any-return]

    def foreign_event(self, handle: int) -> RawEvent:
        return self._foreign.event(handle)

    def foreign_wait(self, handle: int, stream: Any) -> None:
        self._foreign.wait(handle, self._foreign.event(stream.handle))

    # -------------------------------------------------------------------------------------------------------- graphs
    def begin_capture(self, stream: Any) -> None:
        self._graphs.begin(stream.handle)

    def end_capture(self, stream: Any) -> Any:
        return self._graphs.end(stream.handle)

    def replay(self, graph: Any, stream: Any) -> None:
        self._graphs.replay(graph, stream.handle)


def _view(host: int, nbytes: int) -> Any:
    """The memory at an address as an object that PyCUDA copies."""
    return (ctypes.c_char * nbytes).from_address(host)


def _pycuda() -> Any:
    try:
        import pycuda.driver
    except ImportError as error:
        raise DeviceError(f"the GPU backend needs PyCUDA, which does not import here ({error}): {WAY_OUT}") from None
    return pycuda.driver
