"""duo.save and duo.load: structures, dtypes, and files that are not what they say."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest

import duo
from duo import nn
from duo_ir.errors import ArgumentError, DuoError, FormatError
from tests.frontends.eager_modes import numbers


def round_trip(obj, path):
    duo.save(obj, path)
    return duo.load(path)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]
)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (5, 7)])
def test_every_dtype_and_shape(tmp_path, dtype, shape):
    x = duo.tensor(numbers(*shape, dtype=np.float64, low=0, high=100)).to(getattr(duo, dtype))
    for obj in ({"x": x}, [x], x):
        y = round_trip(obj, tmp_path / "f")
        y = y["x"] if isinstance(y, dict) else y[0] if isinstance(y, list) else y
        assert y.dtype is x.dtype and y.shape == x.shape and np.array_equal(y.numpy(), x.numpy())


def test_structures(tmp_path):
    obj = {
        "model": {"a.b": duo.ones(2), "c": duo.zeros(1, dtype=duo.bfloat16)},
        "list": [1, -2.5, "text", None, True, [duo.arange(3)], ()],
        "tuple": (1, (2, duo.full((1,), 3.0))),
        7: {"int key": float("inf")},
        "nan": float("nan"),
        "tiny": 5e-324,
        "big": 2**80,
        "numpy": np.arange(4, dtype=np.int16),
        "scalar": np.float32(0.1),
        "empty": {},
        "unicode é": "ü\n\0",
    }
    got = round_trip(obj, tmp_path / "f")
    assert list(got) == list(obj) and got["tuple"][1][1].item() == 3 and isinstance(got["tuple"], tuple)
    assert (
        got["list"][:5] == [1, -2.5, "text", None, True]
        and got["list"][5][0].tolist() == [0, 1, 2]
        and got["list"][6] == ()
    )
    assert (
        got[7] == {"int key": float("inf")}
        and got["nan"] != got["nan"]
        and got["tiny"] == 5e-324
        and got["big"] == 2**80
    )
    assert got["numpy"].dtype is duo.int16 and got["scalar"] == float(np.float32(0.1)) and got["empty"] == {}
    assert got["model"]["c"].dtype is duo.bfloat16 and got["unicode é"] == "ü\n\0"


def test_names_that_meet(tmp_path):
    """Two places whose dotted names are equal keep their own tensors."""
    obj = {"a": {"b": duo.ones(1)}, "a.b": [duo.zeros(1)], "x": [duo.full((1,), 2.0)], "x.0": duo.full((1,), 3.0)}
    got = round_trip(obj, tmp_path / "f")
    assert (
        got["a"]["b"].item() == 1 and got["a.b"][0].item() == 0 and got["x"][0].item() == 2 and got["x.0"].item() == 3
    )


def test_training_state(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    opt = duo.optim.AdamW(model.parameters(), lr=0.1)
    model(duo.ones(2, 3)).sum().backward()
    opt.step()
    got = round_trip({"model": model.state_dict(), "opt": opt.state_dict(), "epoch": 3}, tmp_path / "f")
    other = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    other.load_state_dict(got["model"])
    again = duo.optim.AdamW(other.parameters(), lr=9.0)
    again.load_state_dict(got["opt"])
    assert all((a == b).all() for a, b in zip(model.parameters(), other.parameters()))
    assert again.param_groups[0]["lr"] == 0.1 and again.param_groups[0]["betas"] == (0.9, 0.999) and got["epoch"] == 3


def test_a_state_dict_is_plain_safetensors(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    model = nn.Linear(3, 2)
    duo.save(model.state_dict(), tmp_path / "f")
    arrays = numpy.load_file(tmp_path / "f")
    assert set(arrays) == {"weight", "bias"} and np.array_equal(arrays["bias"], model.bias.detach().numpy())
    numpy.save_file({"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}, tmp_path / "g")
    model.load_state_dict(duo.load(tmp_path / "g"))
    assert model.weight.sum().item() == 6


def test_what_was_loaded_is_apart(tmp_path):
    x = duo.ones(3)
    duo.save({"x": x}, tmp_path / "f")
    x += 1
    a, b = duo.load(tmp_path / "f")["x"], duo.load(tmp_path / "f")["x"]
    a += 5
    assert b.tolist() == [1, 1, 1]


def test_parameters_and_views(tmp_path):
    w = nn.Parameter(duo.arange(6).float().view(2, 3))
    got = round_trip([w, w.t(), w[0], w * 2], tmp_path / "f")
    assert (
        got[1].tolist() == [[0, 3], [1, 4], [2, 5]]
        and got[3].tolist() == [[0, 2, 4], [6, 8, 10]]
        and not got[0].requires_grad
    )


def test_what_cannot_be_saved(tmp_path):
    for bad in (object(), {"f": print}, {1.5: duo.ones(1)}, [{1, 2}], 3j):
        with pytest.raises(ArgumentError):
            duo.save(bad, tmp_path / "f")
    assert os.listdir(tmp_path) == []


def test_a_failed_save_keeps_the_old_file(tmp_path):
    duo.save({"x": duo.ones(1)}, tmp_path / "f")
    with pytest.raises(ArgumentError):
        duo.save({"x": object()}, tmp_path / "f")
    assert duo.load(tmp_path / "f")["x"].item() == 1 and os.listdir(tmp_path) == ["f"]


def file_of(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


T4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
    "empty": b"",
    "short": b"abc",
    "zeros": b"\0" * 64,
    "huge header": file_of({"x": T4}, b"\0" * 4, size=1 << 62),
    "header beyond the end": file_of({"x": T4}, b"\0" * 4, size=1000),
    "not json": file_of(b"{not json", b"\0" * 4),
    "not utf-8": file_of(b'{"\xff": 1}', b"\0" * 4),
    "a list": file_of([1, 2]),
    "data cut off": file_of({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8),
    "data too long": file_of({"x": T4}, b"\0" * 400),
    "size and shape differ": file_of({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
    "overflowing shape": file_of(
        {"x": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "negative shape": file_of({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "offsets backwards": file_of({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"\0" * 4),
    "overlap": file_of({"x": T4, "y": T4}, b"\0" * 4),
    "gap": file_of({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
    "unknown dtype": file_of({"x": {"dtype": "Q99", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "dtype that duo lacks": file_of({"x": {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8),
    "structure is no json": file_of({"__metadata__": {"duo.structure": "{"}, "x": T4}, b"\0" * 4),
    "structure names nothing": file_of({"__metadata__": {"duo.structure": '{"tensor": "y"}'}, "x": T4}, b"\0" * 4),
    "structure of unknown kind": file_of({"__metadata__": {"duo.structure": '{"code": "1+1"}'}, "x": T4}, b"\0" * 4),
    "structure is a number": file_of({"__metadata__": {"duo.structure": "3"}, "x": T4}, b"\0" * 4),
    "structure too deep": file_of(
        {"__metadata__": {"duo.structure": '{"list": [' * 50000 + "]}" * 50000}, "x": T4}, b"\0" * 4
    ),
    "bad float": file_of({"__metadata__": {"duo.structure": '{"float": "xyz"}'}, "x": T4}, b"\0" * 4),
    "unhashable key": file_of(
        {"__metadata__": {"duo.structure": '{"dict": [[[1], {"value": 1}]]}'}, "x": T4}, b"\0" * 4
    ),
    "metadata is a list": file_of({"__metadata__": [1], "x": T4}, b"\0" * 4),
    "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, name):
    path = tmp_path / "f"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(FormatError, match="f'"):
        duo.load(path)


def test_every_truncation(tmp_path):
    path = tmp_path / "f"
    duo.save({"a": duo.ones(3), "b": [duo.arange(2), "text", 2.0]}, path)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(FormatError):
            duo.load(path)


def test_flipped_bytes_raise_format_errors_or_load(tmp_path):
    path = tmp_path / "f"
    duo.save({"a": duo.ones(3), "b": [duo.arange(2), "text", 2.0]}, path)
    whole = bytearray(path.read_bytes())
    for n in range(len(whole)):
        for flip in (0x01, 0x20, 0x80):
            broken = bytearray(whole)
            broken[n] ^= flip
            path.write_bytes(broken)
            try:
                duo.load(path)
            except FormatError:
                pass


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        duo.load(tmp_path / "nothing")
    with pytest.raises((FileNotFoundError, DuoError)):
        duo.save({"x": duo.ones(1)}, tmp_path / "no" / "folder")


def test_bfloat16_bits(tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    got = round_trip({"x": duo.from_numpy(bits)}, tmp_path / "f")["x"].numpy()
    assert np.array_equal(got.view(np.uint16), bits.view(np.uint16))
