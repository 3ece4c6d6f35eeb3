"""Memory of the CPU shared with NumPy and PyTorch by DLPack: the same addresses, writes seen by both, results asked for before left alone."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import duo
from duo_backends import dlpack
from duo_ir.errors import ArgumentError, DTypeError, GradientError

ALL = ["float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]


class Array(np.ndarray):
    """An array that can be watched."""


def watched(n: int = 4) -> Array:
    return np.arange(n, dtype="f4").view(Array)


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 1, 3), (0, 3)])
def test_numpy_shares(shape):
    x = duo.ones(shape)
    array = np.from_dlpack(x)
    assert array.shape == shape and array.dtype == np.float32 and (array == 1).all()
    if array.size:
        assert array.ctypes.data == x.numpy().ctypes.data
        y = x * 2
        x += 4
        assert (array == 5).all() and (y.numpy() == 2).all()


def test_duo_shares_memory_of_numpy():
    array = np.arange(6, dtype="f4").reshape(2, 3)
    x = duo.from_dlpack(array)
    y = x + 1
    array[0, 0] = 50
    assert x[0, 0].item() == 50 and y[0, 0].item() == 1
    x[1, 2] = -1
    assert array[1, 2] == -1 and x.numpy().ctypes.data == array.ctypes.data
    assert duo.as_tensor(array.T).tolist() == array.T.tolist() == duo.from_dlpack(array.T).tolist()
    assert duo.from_dlpack(array[:, ::-2]).tolist() == array[:, ::-2].tolist()
    own = duo.from_dlpack(array, copy=True)
    array[0, 1] = 9
    assert own[0, 1].item() == 1


def test_what_must_not_be_written_is_copied():
    array = np.arange(4, dtype="f4")
    array.flags.writeable = False
    try:
        x = duo.from_dlpack(array)
    except BufferError:
        pytest.skip("this NumPy does not export arrays that are not to be written")
    x += 1
    assert array.tolist() == [0, 1, 2, 3] and x.tolist() == [1, 2, 3, 4]


def test_memory_lives_as_long_as_anybody_has_it():
    array = watched()
    alive = weakref.ref(array)
    x = duo.from_dlpack(array)
    y = x[1:] + 0
    del array
    gc.collect()
    assert alive() is not None and x.tolist() == [0, 1, 2, 3]
    del x
    assert y.tolist() == [1, 2, 3]
    del y
    gc.collect()
    assert alive() is None
    x = duo.ones(3)
    array = np.from_dlpack(x)
    del x
    gc.collect()
    assert array.tolist() == [1, 1, 1]


def test_a_capsule_that_nobody_takes_lets_go():
    gc.collect()
    dlpack.sweep()
    before = len(dlpack._exported)
    for version in (None, (1, 0), (2, 0)):
        capsule = duo.ones(3).__dlpack__(max_version=version)
        assert len(dlpack._exported) == before + 1
        del capsule
        dlpack.sweep()
        assert len(dlpack._exported) == before


def test_a_consumer_that_refuses_says_why():
    x = duo.ones(3).to(duo.bfloat16)
    with pytest.raises((BufferError, RuntimeError), match=r"(?i)dtype"):
        np.from_dlpack(x)  # NumPy has no bfloat16
    assert x.tolist() == [1, 1, 1]


def test_errors():
    x = duo.ones(3)
    with pytest.raises(GradientError, match=r"\.detach\(\)"):
        x.clone().requires_grad_().__dlpack__()
    with pytest.raises(ArgumentError, match="stream=None"):
        x.__dlpack__(stream=1)
    with pytest.raises(BufferError, match=r"move it by \.to\(\)"):
        x.__dlpack__(dl_device=(2, 0))
    with pytest.raises(ArgumentError, match="no DLPack capsule"):
        duo.from_dlpack(3)
    capsule = x.__dlpack__()
    assert duo.from_dlpack(capsule).tolist() == [1, 1, 1]
    with pytest.raises(ArgumentError, match="taken already"):
        duo.from_dlpack(capsule)
    with pytest.raises(DTypeError, match="code 5, 128 bits"):
        duo.from_dlpack(np.zeros(3, "complex128"))
    with pytest.raises(DTypeError, match="code 1, 32 bits"):
        duo.from_dlpack(np.zeros(3, "u4"))
    assert x.__dlpack_device__() == (1, 0) and not hasattr(x, "__cuda_array_interface__")


@pytest.mark.parametrize("name", ALL)
def test_torch_both_ways(name):
    torch = pytest.importorskip("torch")
    t = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(getattr(torch, name))
    x = duo.from_dlpack(t)
    assert str(x.dtype).endswith(name) and x.tolist() == t.tolist()
    back = torch.from_dlpack(x)
    assert back.data_ptr() == t.data_ptr() and back.dtype is t.dtype and back.shape == t.shape
    assert duo.as_tensor(t.T).tolist() == t.T.tolist()


def test_torch_and_duo_write_to_one_memory():
    torch = pytest.importorskip("torch")
    t = torch.arange(4.0)
    x = duo.as_tensor(t)
    y = (x * x).sum()
    t.mul_(10)
    assert y.item() == 14 and x.tolist() == [0, 10, 20, 30]
    x.sub_(1)
    assert t.tolist() == [-1, 9, 19, 29]
    w = duo.nn.Parameter(x.clone())
    (w * x).sum().backward()
    assert torch.from_dlpack(w.grad).tolist() == t.tolist() and torch.from_dlpack(w.detach()).tolist() == t.tolist()
    with pytest.raises(GradientError):
        torch.from_dlpack(w)


def test_views_are_copies():
    torch = pytest.importorskip("torch")
    x = duo.arange(6.0).reshape(2, 3)
    row = torch.from_dlpack(x[1])
    row[0] = 99
    assert row.tolist() == [99, 4, 5] and x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.from_dlpack(x.T).tolist() == x.T.tolist()
