"""A machine with no GPU: everything imports, nothing of CUDA is touched, and asking for the device says what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import duo
from duo import devices, runtime
from duo_backends.cuda import backend as cuda
from duo_ir.errors import DeviceError


def test_names():
    assert str(duo.device("cuda:1")) == "cuda:1" and duo.device("cuda", 1).index == 1 and duo.device(2) == "cuda:2"
    assert duo.device("cpu:0") == duo.device("cpu") and duo.device("cpu").index is None
    assert (
        repr(duo.device("cuda")) == "device(type='cuda', index=0)" and repr(duo.device("cpu")) == "device(type='cpu')"
    )
    assert duo.device("cuda") != duo.device("cpu") and duo.device("cpu") != "tpu" and duo.device("cpu") != 0
    assert devices.canonical("cuda:03") is devices.canonical("cuda:3")
    for wrong in ("tpu", "cuda:x", "cuda:-1", "", 1.5, True, -1):
        with pytest.raises(DeviceError, match="names no device"):
            duo.device(wrong)


def test_what_is_missing(monkeypatch):
    def missing(text):
        def find(*_):
            raise DeviceError(text)

        return find

    monkeypatch.setattr(cuda, "PycudaDriver", missing("there is no CUDA driver (libcuda.so.1)"))
    for ask in (
        lambda: duo.ones(2).to("cuda"),
        lambda: duo.zeros(2, device="cuda:0"),
        lambda: duo.nn.Linear(1, 1).cuda(),
        lambda: duo.set_default_device("cuda"),
        lambda: duo.Generator(device="cuda"),
    ):
        with pytest.raises(DeviceError, match=r"device 'cuda:0' cannot be used: there is no CUDA driver"):
            ask()
    with duo.device("cuda"), pytest.raises(DeviceError, match="no CUDA driver"):
        duo.ones(2)
    monkeypatch.setattr(cuda, "PycudaDriver", lambda number: object())
    monkeypatch.setattr(cuda, "find_compiler", missing("compiling for a GPU needs NVRTC"))
    with pytest.raises(DeviceError, match="cannot be used: compiling for a GPU needs NVRTC"):
        duo.ones(2).cuda()
    assert runtime.in_use() == ["cpu"] or "cuda:0" not in runtime.in_use()
    duo.synchronize()


def test_import_touches_nothing_of_cuda():
    code = (
        "import sys, duo; (duo.ones(2) + 1).tolist(); "
        "print([m for m in sys.modules if 'cuda' in m], open('/proc/self/maps').read().count('libcuda'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "0"]
