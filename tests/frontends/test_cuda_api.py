"""`duo.cuda` on the emulated GPU: what it says of the device, streams and events under eager mode and compiled functions, memory; and what it
says where there is no GPU."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest

import duo
from duo import cli, runtime
from duo_backends.blocks import OutOfMemory
from duo_ir.errors import ArgumentError, DeviceError, IndexOutOfRange, TraceError
from tests.cuda_emulator.support import needs_emulator
from tests.frontends.cuda_support import gpu  # noqa: F401

on_gpu = [needs_emulator, pytest.mark.usefixtures("gpu")]
pytestmark = on_gpu
MIB = 1 << 20


def test_what_the_device_is():
    assert duo.cuda.is_available() and duo.cuda.why_not() is None
    assert duo.cuda.device_count() == 1 and duo.cuda.current_device() == 0
    assert "emulating" in duo.cuda.get_device_name() and duo.cuda.get_device_capability("cuda:0") == (9, 0)
    found = duo.cuda.get_device_properties(0)
    assert found.multi_processor_count == 132 and found.total_memory == duo.cuda.mem_get_info()[1]
    with duo.cuda.device(0), duo.cuda.device(None), duo.cuda.device(-1):
        assert duo.ones(2, device="cuda").device == "cuda:0"
    with pytest.raises(DeviceError, match=r"'cpu' is no GPU"):
        duo.cuda.synchronize("cpu")
    duo.cuda.set_device("cuda:0")
    assert duo.cuda.manual_seed_all is duo.cuda.manual_seed is duo.manual_seed


SCRIPT = """
import sys, duo
assert "duo.cuda" not in sys.modules and not any("cuda" in m for m in sys.modules if m.startswith("duo_backends"))
assert duo.cuda.is_available() is False and duo.cuda.device_count() == 0, duo.cuda.why_not()
assert "libcuda" in duo.cuda.why_not() or "PyCUDA" in duo.cuda.why_not() or "finds no GPU" in duo.cuda.why_not()
for call in (duo.cuda.synchronize, duo.cuda.Stream, duo.cuda.memory_allocated, lambda: duo.cuda.set_device(0)):
    try:
        call()
    except duo.DuoError as error:
        assert "cannot be used" in str(error), error
    else:
        raise AssertionError(call)
duo.cuda.empty_cache()
text = duo.cuda.source(duo.lower(lambda x: (x @ x).relu().sum(), duo.ones(4, 4)))
assert text.count("__global__") >= 2, text
from duo import cli
cli.main(["info"])
import duo.graph as tf
assert not tf.test.is_gpu_available() and tf.test.gpu_device_name() == ""
assert [d.device_type for d in tf.config.list_physical_devices()] == ["CPU"]
"""


@pytest.mark.skipif(runtime.why_no_gpu() is None, reason="this machine has a GPU")
def test_where_there_is_no_gpu():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gpu         none: " in done.stdout


def test_programs_as_cuda_c(capsys):
    program = duo.lower(lambda x: (x * 2 + 1).sum(), duo.ones(8))
    text = duo.cuda.source(program)
    assert "__global__" in text and text == duo.cuda.source(program, "cuda:0")
    assert cli.main(["info"]) == 0 and "gpu         CPU emulating a GPU" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- streams
def test_streams_never_change_a_result():
    x = duo.arange(64.0, device="cuda")
    a, b = duo.cuda.Stream(), duo.cuda.Stream(priority=-1)
    with duo.cuda.stream(a):
        y = x * 3
        assert duo.cuda.current_stream() == a != b
    with duo.cuda.stream(b):
        z = (y + x).sum()
        y += 1
    del x
    with duo.cuda.stream(a), duo.cuda.stream(None):
        u = y * 2
        garbage = [duo.full((64,), float(k), device="cuda") for k in range(5)]
    assert duo.cuda.current_stream() == duo.cuda.default_stream()
    assert z.item() == 4 * 63 * 32 and u.tolist() == [2 * (3 * k + 1) for k in range(64)]
    assert garbage[3].sum().item() == 192


def test_what_was_recorded_before_a_stream_is_entered_runs_before(gpu):  # noqa: F811
    s = duo.cuda.Stream()
    x = duo.ones(4, device="cuda")
    y = x + 1
    with duo.cuda.stream(s):
        assert y._val.buf is not None
        z = y * 2
    assert z._val.buf is not None and z._val.buf.uses.written.stream is s._stream
    assert y._val.buf.uses.last[gpu.runtime.default] is not None


def test_training_on_a_stream_gives_the_same_bits():
    def train(device, stream):
        duo.manual_seed(0)
        model = duo.nn.Linear(6, 3).to(device)
        optimizer = duo.optim.Adam(model.parameters(), lr=0.1)
        step = duo.compile(lambda x: (model(x) ** 2).mean())
        for k in range(4):
            with duo.cuda.stream(stream if k % 2 else None):
                optimizer.zero_grad()
                loss = step(duo.ones(5, 6, device=device) * k)
                loss.backward()
                optimizer.step()
        return [p.tolist() for p in model.parameters()]

    assert train("cuda", duo.cuda.Stream()) == train("cpu", None)


def test_a_compiled_function_runs_on_its_callers_stream(gpu):  # noqa: F811
    s, x = duo.cuda.Stream(), duo.ones(3, device="cuda")
    step = duo.compile(lambda t: t * 2)
    for _ in range(3):
        with duo.cuda.stream(s):
            y = step(x)
    assert y._val.buf.uses.written.stream is s._stream and y.tolist() == [2.0] * 3

    @duo.compile
    def inside(t):
        with duo.cuda.stream(s):
            return t * 2

    with pytest.raises(TraceError, match="around its call"):
        inside(x)


def test_events():
    s = duo.cuda.Stream()
    first, last, plain = (duo.cuda.Event(enable_timing=t) for t in (True, True, False))
    assert first.query() and "not recorded" in repr(first)
    first.synchronize()
    x = duo.ones(1000, device="cuda")
    first.record()
    y = x * 2
    last.record()
    assert y._val.buf is not None  # what this thread has recorded is before the event
    assert first.elapsed_time(last) > 0 and first.query() and last.query()
    with pytest.raises(ArgumentError, match="enable_timing=True"):
        first.elapsed_time(plain)
    with pytest.raises(ArgumentError, match="not shared between processes"):
        duo.cuda.Event(interprocess=True)
    s.wait_event(last)
    s.wait_stream(duo.cuda.current_stream())
    event = s.record_event()
    event.wait()
    event.synchronize()
    s.synchronize()
    assert s.query() and s.cuda_stream and s.device == "cuda:0"


def test_an_event_orders_the_work_of_streams(gpu):  # noqa: F811
    """The same by hand, as the emulator shows: the default stream's queue is not run unless the event is waited for."""
    x = duo.ones(8, device="cuda")
    y = x + 1
    event = duo.cuda.Event()
    event.record()
    other = duo.cuda.Stream()
    other.wait_event(event)
    other.synchronize()
    assert event.query()
    del y


def test_a_failed_check_is_raised_by_whoever_waits():
    s = duo.cuda.Stream()
    x, i = duo.ones(3, device="cuda"), duo.tensor([0, 7], device="cuda")
    with duo.cuda.stream(s):
        y = duo.nn.functional.embedding(i, x.reshape(3, 1))
    with pytest.raises(IndexOutOfRange, match="7"):
        s.synchronize()
    duo.cuda.synchronize()
    del y


def test_streams_end_and_serve_again():
    s = duo.cuda.Stream()
    address = s.cuda_stream
    with duo.cuda.stream(s):
        x = duo.ones(3, device="cuda") * 4
    del s
    assert duo.cuda.Stream().cuda_stream == address and x.tolist() == [4.0] * 3
    t = duo.cuda.Stream()
    duo.cuda.set_stream(t)
    assert duo.cuda.current_stream() == t and hash(t) == hash(duo.cuda.current_stream())
    duo.cuda.set_stream(duo.cuda.default_stream())


# -------------------------------------------------------------------------------------------------------------- memory
def test_memory_is_counted():
    gc.collect()
    duo.cuda.synchronize()
    duo.cuda.reset_peak_memory_stats()
    before = duo.cuda.memory_allocated()
    x = duo.zeros(2 * MIB, device="cuda") + 0
    x.sum().item()
    assert duo.cuda.memory_allocated() - before == 8 * MIB
    assert duo.cuda.memory_reserved() >= 8 * MIB and duo.cuda.max_memory_reserved() >= duo.cuda.memory_reserved()
    del x
    assert duo.cuda.memory_allocated() == before and duo.cuda.max_memory_allocated() >= before + 8 * MIB
    stats = duo.cuda.memory_stats()
    assert stats["allocated_bytes.all.current"] == before and stats["num_ooms"] == 0
    reserved = duo.cuda.memory_reserved()
    duo.cuda.empty_cache()
    assert duo.cuda.memory_reserved() <= reserved - 8 * MIB
    free, total = duo.cuda.mem_get_info()
    assert 0 < free < total


def test_limits():
    total, big = duo.cuda.get_device_properties().total_memory, np.zeros(4 * MIB, "f4")
    try:
        duo.cuda.set_memory_limit(duo.cuda.memory_reserved() + 4 * MIB)
        with pytest.raises(OutOfMemory, match="limit"):
            duo.tensor(big, device="cuda")
        duo.cuda.set_per_process_memory_fraction(0.5)
        assert runtime.backend("cuda:0").runtime.pool.limit == total // 2
        assert duo.tensor(big, device="cuda").sum().item() == 0
        for wrong in (lambda: duo.cuda.set_per_process_memory_fraction(1.5), lambda: duo.cuda.set_memory_limit(-1)):
            with pytest.raises(ArgumentError):
                wrong()
    finally:
        duo.cuda.set_memory_limit(None)
        duo.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- profile
def test_a_profile_has_the_kernels_of_every_device(gpu, monkeypatch, tmp_path):  # noqa: F811
    from duo_backends.cuda.peaks import Peaks

    monkeypatch.setitem(gpu.__dict__, "peaks", Peaks(1000.0, 100.0))
    x, y = duo.ones(24, 40, device="cuda"), duo.ones(24, 40)

    def work():
        return [(t @ t.T).sum().item() for t in (x, y)]

    work()
    work()
    with duo.profile(show=False) as p:
        for _ in range(2):
            assert work() == [24 * 24 * 40.0] * 2
    rows = {r.device: r for r in p.kernels if r.name == "matmul 24x40x24 f32"}
    assert set(rows) == {"cpu", "cuda:0"} and all(r.calls == 2 for r in rows.values())
    assert rows["cuda:0"].flops == rows["cpu"].flops == 2 * 2 * 24 * 40 * 24
    line = f"test_cuda_api.py:{work.__code__.co_firstlineno + 1}"
    assert {r.device for r in p.lines if r.name == line} == {"cpu", "cuda:0"}
    assert "cuda:0 matmul 24x40x24" in str(p) and "1000 GFLOP/s, 100 GB/s" in str(p)
    p.chrome_trace(tmp_path / "trace.json")
    assert '"device": "cuda:0"' in (tmp_path / "trace.json").read_text()
    assert np.isclose(p.kernel_seconds, sum(r.seconds for r in p.kernels))
