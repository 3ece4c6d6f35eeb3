"""`duo_backends.cuda.driver.Driver` by ctypes on the emulated libcuda, for machines where PyCUDA cannot be installed."""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

from duo_backends.cuda.driver import MAX_SHARED, PLAIN_SHARED, Graphs, Properties, failure


class Pinned:
    def __init__(self, driver: CtypesDriver, nbytes: int) -> None:
        self._driver, self.nbytes = driver, nbytes
        address = c_void_p()
        driver.call("cuMemHostAlloc", byref(address), c_size_t(nbytes), c_uint(0))
        self.ptr = address.value or 0

    def __del__(self) -> None:
        with self._driver:
            self._driver.call("cuMemFreeHost", c_void_p(self.ptr))


class CtypesDriver:
    def __init__(self, library: str) -> None:
        self.library = ctypes.CDLL(library)
        self.call("cuInit", c_uint(0))
        self._context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", byref(self._context), c_int(0))
        name = ctypes.create_string_buffer(100)
        self.call("cuDeviceGetName", name, c_int(100), c_int(0))
        memory = c_size_t()
        self.call("cuDeviceTotalMem_v2", byref(memory), c_int(0))
        major, minor, processors, shared = (self._attribute(n) for n in (75, 76, 16, 97))
        self.properties = Properties(name.value.decode(), 10 * major + minor, processors, shared, memory.value)
        self._graphs = Graphs(self.library)
        self._local = threading.local()

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise failure(self.library, name, code)

    def _attribute(self, number: int) -> int:
        value = c_int()
        self.call("cuDeviceGetAttribute", byref(value), c_int(number), c_int(0))
        return value.value

    def __enter__(self) -> CtypesDriver:
        depth = getattr(self._local, "depth", 0)
        if depth == 0:
            self.call("cuCtxPushCurrent_v2", self._context)
        self._local.depth = depth + 1
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._local.depth -= 1
        if self._local.depth == 0:
            self.call("cuCtxPopCurrent_v2", None)

    def allocate(self, nbytes: int) -> int:
        address = c_ulonglong()
        self.call("cuMemAlloc_v2", byref(address), c_size_t(nbytes))
        return address.value

    def free(self, ptr: int) -> None:
        self.call("cuMemFree_v2", c_ulonglong(ptr))

    def memory(self) -> tuple[int, int]:
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def pinned(self, nbytes: int) -> Pinned:
        return Pinned(self, nbytes)

    def to_device(self, ptr: int, host: int, nbytes: int, stream: Any) -> None:
        self.call("cuMemcpyHtoDAsync_v2", c_ulonglong(ptr), c_void_p(host), c_size_t(nbytes), stream)

    def to_host(self, host: int, ptr: int, nbytes: int, stream: Any) -> None:
        self.call("cuMemcpyDtoHAsync_v2", c_void_p(host), c_ulonglong(ptr), c_size_t(nbytes), stream)

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        self.call("cuMemcpyDtoDAsync_v2", c_ulonglong(target), c_ulonglong(source), c_size_t(nbytes), stream)

    def fill(self, ptr: int, byte: int, nbytes: int, stream: Any) -> None:
        self.call("cuMemsetD8Async", c_ulonglong(ptr), ctypes.c_ubyte(byte), c_size_t(nbytes), stream)

    def load(self, cubin: bytes) -> Any:
        module = c_void_p()
        self.call("cuModuleLoadData", byref(module), cubin)
        return module

    def function(self, module: Any, name: str, shared: int = 0) -> Any:
        function = c_void_p()
        self.call("cuModuleGetFunction", byref(function), module, name.encode())
        if shared > PLAIN_SHARED:
            self.call("cuFuncSetAttribute", function, c_int(MAX_SHARED), c_int(shared))
        return function

    def launch(self, function: Any, blocks: int, threads: int, arguments: Any, shared: int, stream: Any) -> None:
        words = bytes(arguments)
        buffer, size = ctypes.create_string_buffer(words, len(words)), c_size_t(len(words))
        extra = (c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), None)
        shape = [c_uint(n) for n in (blocks, 1, 1, threads, 1, 1, shared)]
        self.call("cuLaunchKernel", function, *shape, stream, None, extra)

    def stream(self) -> Any:
        stream = c_void_p()
        self.call("cuStreamCreate", byref(stream), c_uint(0))
        return stream

    def synchronize(self, stream: Any) -> None:
        self.call("cuStreamSynchronize", stream)

    def idle(self, stream: Any) -> bool:
        code: int = self.library.cuStreamQuery(stream)
        if code not in (0, 600):
            raise failure(self.library, "cuStreamQuery", code)
        return code == 0

    def synchronize_all(self) -> None:
        self.call("cuCtxSynchronize")

    def event(self) -> Any:
        event = c_void_p()
        self.call("cuEventCreate", byref(event), c_uint(0))
        return event

    def record(self, event: Any, stream: Any) -> None:
        self.call("cuEventRecord", event, stream)

    def ready(self, event: Any) -> bool:
        code: int = self.library.cuEventQuery(event)
        if code not in (0, 600):
            raise failure(self.library, "cuEventQuery", code)
        return code == 0

    def wait(self, event: Any) -> None:
        self.call("cuEventSynchronize", event)

    def stream_wait(self, stream: Any, event: Any) -> None:
        self.call("cuStreamWaitEvent", stream, event, c_uint(0))

    def elapsed(self, first: Any, second: Any) -> float:
        value = c_float()
        self.call("cuEventElapsedTime", byref(value), first, second)
        return value.value

    def handle(self, stream: Any) -> int:
        return stream.value or 0

    def foreign_event(self, handle: int) -> Any:
        event = self.event()
        self.record(event, c_void_p(handle))
        return event

    def foreign_wait(self, handle: int, stream: Any) -> None:
        self.stream_wait(c_void_p(handle), self.foreign_event(self.handle(stream)))

    def begin_capture(self, stream: Any) -> None:
        self._graphs.begin(stream.value)

    def end_capture(self, stream: Any) -> Any:
        return self._graphs.end(stream.value)

    def replay(self, graph: Any, stream: Any) -> None:
        self._graphs.replay(graph, stream.value)
