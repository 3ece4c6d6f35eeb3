"""`duo.cuda`: the GPUs of this machine, their streams, events and memory, under PyTorch's names.

Nothing of CUDA is touched before it is asked for, and no memory is taken before a tensor needs it. A device is a name ('cuda', 'cuda:1'), a
`duo.device`, a number, or None, the current one. Streams never change a result: duo waits by itself where work on one stream uses what another
makes, so `wait_stream` and `wait_event` are there to place waits, not to make a program right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from duo import devices, runtime
from duo.eager.flush import flush
from duo.eager.trace import state as recording
from duo.random import initial_seed, manual_seed
from duo.random import seed as seed
from duo_ir.errors import ArgumentError, DeviceError, TraceError

manual_seed_all = manual_seed
seed_all = seed


# ------------------------------------------------------------------------------------------------------------- devices
def is_available() -> bool:
    """Whether programs can run on a GPU here; `why_not()` says what is missing. Raises nothing."""
    return why_not() is None


def why_not() -> str | None:
    """What is missing for `device="cuda"`; None where nothing is."""
    return runtime.why_no_gpu()


def device_count() -> int:
    """How many GPUs programs can run on; 0 where `is_available()` is False."""
    return runtime.gpu_count()


def current_device() -> int:
    """The number of the GPU that 'cuda' means in this thread."""
    return devices.current_gpu()


def set_device(device: Any) -> None:
    """Makes 'cuda' mean that GPU in this thread. Raises DeviceError where it is not there."""
    devices.set_current_gpu(_number(_checked(device)))


@contextmanager
def device(device: Any) -> Iterator[None]:
    """'cuda' means that GPU inside; None and negative numbers change nothing."""
    before = devices.current_gpu()
    if device is not None and not (isinstance(device, int) and device < 0):
        set_device(device)
    try:
        yield
    finally:
        devices.set_current_gpu(before)


class DeviceProperties(NamedTuple):
    """`total_memory` in bytes; `major`.`minor`: compute capability; `shared_memory_per_block_optin` in bytes."""

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int
    shared_memory_per_block_optin: int


def get_device_properties(device: Any = None) -> DeviceProperties:
    """What the GPU is. Raises DeviceError where it is not there."""
    p = _backend(device).driver.properties
    major, minor = divmod(p.arch, 10)
    return DeviceProperties(p.name, major, minor, p.memory, p.multiprocessors, p.shared)


def get_device_name(device: Any = None) -> str:
    """The GPU's name."""
    return get_device_properties(device).name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """(major, minor) compute capability."""
    found = get_device_properties(device)
    return found.major, found.minor


def synchronize(device: Any = None) -> None:
    """Runs what this thread has recorded, and waits for all that the GPU was given. Raises IndexOutOfRange where an index was found out of
    range there."""
    name = _checked(device)
    _run_recorded()
    runtime.backend(name).synchronize()


def source(program: Any, device: Any = None) -> str:
    """The CUDA C that a program becomes, what `duo.lower(f, *args)` or `tf.lower(fetches, feeds)` gives: a function for each launch. It is written
    for that GPU, and where no GPU is there and none is named, for one of compute capability 9.0."""
    there = device is not None or is_available()
    return runtime.cuda_source(program, _checked(device) if there else None)


def _checked(device: Any) -> str:
    """The canonical name of a GPU that is there. Raises DeviceError."""
    name = f"cuda:{devices.current_gpu()}" if device is None else devices.canonical(device)
    if name == devices.CPU:
        raise DeviceError(f"{str(device)!r} is no GPU: duo.cuda takes 'cuda', 'cuda:N' or a GPU's number")
    return runtime.check_device(name)


def _run_recorded() -> None:
    """Runs what this thread has recorded. Raises TraceError in a function that is being compiled."""
    if recording.capture is not None:
        raise TraceError(
            "streams, events and waiting are no part of a compiled function: use duo.cuda around its call, which runs on the caller's stream"
        )
    flush()


def _backend(device: Any) -> Any:
    return runtime.backend(_checked(device))


def _number(name: str) -> int:
    return int(name.partition(":")[2])


# ------------------------------------------------------------------------------------------------------------- streams
class Stream:
    """A queue of work on a GPU, run in order, beside other streams. `with duo.cuda.stream(s):` sends this thread's work there. All streams have one
    priority, whatever is asked for."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self._bind(_checked(device), None)

    def _bind(self, name: str, stream: Any) -> None:
        self._device = name
        self._runtime = runtime.backend(name).runtime
        self._own = stream is None
        self._stream = self._runtime.new_stream() if stream is None else stream

    def __del__(self) -> None:
        if getattr(self, "_own", False):
            self._runtime.give_back(self._stream)

    @property
    def device(self) -> devices.Device:
        return devices.Device(self._device)

    @property
    def cuda_stream(self) -> int:
        """Its address, as other libraries know it."""
        return self._runtime.driver.handle(self._stream.queue)  # type: ignore[no-any-return]

    def __cuda_stream__(self) -> tuple[int, int]:
        """The protocol of CUDA's Python libraries: (version, address)."""
        return 0, self.cuda_stream

    def wait_stream(self, stream: Stream) -> None:
        """What is given to this stream from now on comes after all that `stream` has been given."""
        self.wait_event(stream.record_event())

    def wait_event(self, event: Event) -> None:
        """What is given to this stream from now on comes after the event."""
        _run_recorded()
        event._wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        """The event (a new one by default) is after all that the stream has been given."""
        event = event if event is not None else Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether all that the stream was given is done."""
        _run_recorded()
        with self._runtime.driver as driver:
            return driver.idle(self._stream.queue)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        """Waits for all that the stream was given. Raises IndexOutOfRange where an index was found out of range."""
        _run_recorded()
        self._runtime.synchronize(self._stream)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self._stream is other._stream

    def __hash__(self) -> int:
        return hash(self._stream)

    def __repr__(self) -> str:
        return f"<duo.cuda.Stream device={self._device} cuda_stream={self.cuda_stream:#x}>"


def _known(name: str, stream: Any) -> Stream:
    made = Stream.__new__(Stream)
    made._bind(name, stream)
    return made


def current_stream(device: Any = None) -> Stream:
    """Where this thread's work goes."""
    name = _checked(device)
    return _known(name, runtime.backend(name).runtime.stream)


def default_stream(device: Any = None) -> Stream:
    """Where work goes unless told otherwise."""
    name = _checked(device)
    return _known(name, runtime.backend(name).runtime.default)


def set_stream(stream: Stream) -> None:
    """This thread's work goes to that stream from now on."""
    _run_recorded()
    stream._runtime.set_stream(stream._stream)


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """This thread's work goes to that stream, and 'cuda' means its GPU, inside (None changes nothing). What was recorded before is run before, what is recorded
    inside is run at the end of it at the latest."""
    if stream is None:
        yield
        return
    _run_recorded()
    with device(stream._device), stream._runtime.on(stream._stream):
        try:
            yield
        finally:
            _run_recorded()


class Event:
    """A point in a stream's work. enable_timing: whether `elapsed_time` may be asked (it is ready sooner without)."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        if interprocess:
            raise ArgumentError("events are not shared between processes; wait in the process that runs the work")
        self.enable_timing = enable_timing
        self._runtime: Any = None
        self._event: Any = None

    def record(self, stream: Stream | None = None) -> None:
        """The event is after all that the stream (this thread's by default) has been given, what this thread has recorded included."""
        _run_recorded()
        stream = stream if stream is not None else current_stream()
        self._runtime = stream._runtime
        driver = self._runtime.driver
        with self._runtime.lock, driver:
            self._event = driver.event()
            driver.record(self._event, stream._stream.queue)

    def wait(self, stream: Stream | None = None) -> None:
        """What the stream (this thread's by default) is given from now on comes after the event."""
        (stream if stream is not None else current_stream()).wait_event(self)

    def _wait(self, stream: Stream) -> None:
        if self._event is not None:
            with stream._runtime.lock, stream._runtime.driver as driver:
                driver.stream_wait(stream._stream.queue, self._event)

    def query(self) -> bool:
        """Whether all before the event is done; so it is before it was recorded."""
        if self._event is None:
            return True
        with self._runtime.driver as driver:
            return driver.ready(self._event)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        """Waits until all before the event is done. Raises IndexOutOfRange where an index was found out of range."""
        if self._event is not None:
            with self._runtime.driver as driver:
                driver.wait(self._event)
            self._runtime.look()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to that one; waits for both. Raises ArgumentError where one was made without enable_timing, or not recorded."""
        for event in (self, end_event):
            if not event.enable_timing or event._event is None:
                raise ArgumentError(
                    "elapsed_time needs two events that were made by Event(enable_timing=True) and recorded"
                )
        self.synchronize()
        end_event.synchronize()
        with self._runtime.driver as driver:
            return driver.elapsed(self._event, end_event._event)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"<duo.cuda.Event {'not recorded' if self._event is None else 'recorded'}>"


# -------------------------------------------------------------------------------------------------------------- memory
def _pool(device: Any) -> Any:
    return _backend(device).runtime.pool


def memory_allocated(device: Any = None) -> int:
    """Bytes of the blocks of live tensors."""
    return _pool(device).allocated  # type: ignore[no-any-return]


def max_memory_allocated(device: Any = None) -> int:
    """The most `memory_allocated` at any time since `reset_peak_memory_stats`."""
    return _pool(device).most  # type: ignore[no-any-return]


def memory_reserved(device: Any = None) -> int:
    """Bytes that duo has taken from the device: live tensors, and blocks kept for the next ones."""
    return _pool(device).statistics.reserved  # type: ignore[no-any-return]


def max_memory_reserved(device: Any = None) -> int:
    """The most `memory_reserved` at any time since `reset_peak_memory_stats`."""
    return _pool(device).statistics.peak  # type: ignore[no-any-return]


def reset_peak_memory_stats(device: Any = None) -> None:
    """The most is counted anew from now on."""
    _pool(device).reset_peaks()


def memory_stats(device: Any = None) -> dict[str, int]:
    """All that is counted, under PyTorch's names: bytes allocated and reserved, now and at most, requests that were tried again after
    memory was given back (`num_alloc_retries`), and those refused (`num_ooms`)."""
    pool = _pool(device)
    allocated, statistics = pool.allocated, pool.statistics
    return {
        "allocated_bytes.all.current": allocated,
        "allocated_bytes.all.peak": pool.most,
        "reserved_bytes.all.current": statistics.reserved,
        "reserved_bytes.all.peak": statistics.peak,
        "num_alloc_retries": pool.retries,
        "num_ooms": pool.failures,
    }


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Bytes of the device that are free, and in all, whoever uses them."""
    with _backend(device).driver as driver:
        return driver.memory()  # type: ignore[no-any-return]


def empty_cache() -> None:
    """Gives memory that no tensor uses back to the devices that are in use."""
    for name in runtime.in_use():
        if name != devices.CPU:
            runtime.backend(name).runtime.pool.trim()


def set_memory_limit(nbytes: int | None, device: Any = None) -> None:
    """The most bytes that duo takes of the device (None: what there is). More is OutOfMemory; what is taken already stays."""
    if nbytes is not None and nbytes < 0:
        raise ArgumentError(f"a limit of {nbytes} bytes is negative")
    _pool(device).limit = nbytes


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    """The same, as a part of the device's memory, from 0 to 1."""
    if not 0 <= fraction <= 1:
        raise ArgumentError(f"a fraction of memory is from 0 to 1, not {fraction}")
    set_memory_limit(int(fraction * get_device_properties(device).total_memory), device)


__all__ = [
    "DeviceProperties", "Event", "Stream", "current_device", "current_stream", "default_stream", "device", "device_count", "empty_cache",
    "get_device_capability", "get_device_name", "get_device_properties", "initial_seed", "is_available", "manual_seed", "manual_seed_all",
    "max_memory_allocated", "max_memory_reserved", "mem_get_info", "memory_allocated", "memory_reserved", "memory_stats",
    "reset_peak_memory_stats", "seed", "seed_all", "set_device", "set_memory_limit", "set_per_process_memory_fraction", "set_stream", "source", "stream",
    "synchronize", "why_not",
]  # fmt: skip
