"""How eager tensors print: PyTorch's form, by NumPy's formatter."""

from __future__ import annotations

from typing import Any

import numpy as np

from duo_ir.types import bool_, f32, i64

_options: dict[str, Any] = {"precision": 4, "threshold": 1000, "edgeitems": 3, "max_line_width": 80}
_IMPLIED = (f32, i64, bool_)


def set_printoptions(
    precision: int | None = None,
    threshold: int | None = None,
    edgeitems: int | None = None,
    linewidth: int | None = None,
) -> None:
    """Digits after the point, number of elements from which a tensor is abridged, elements kept at each edge, width of a line."""
    given = {"precision": precision, "threshold": threshold, "edgeitems": edgeitems, "max_line_width": linewidth}
    _options.update({k: v for k, v in given.items() if v is not None})


def format_tensor(tensor: Any) -> str:
    array = tensor._array(share=False)
    type_ = tensor._type
    if type_.dtype.is_float and array.dtype not in (np.float32, np.float64, np.float16):
        array = array.astype(np.float32)
    if array.dtype.kind == "f":
        body = np.array2string(array, separator=", ", prefix="tensor(", floatmode="maxprec_equal", **_options)
    else:
        body = np.array2string(array, separator=", ", prefix="tensor(", **_options)
    notes = []
    if 0 in array.shape:
        notes.append(f"size={array.shape}")
    if type_.dtype not in _IMPLIED or (array.size == 0 and type_.dtype is not f32):
        notes.append(f"dtype={type_.dtype!r}")
    if tensor.is_cuda:
        notes.insert(0, f"device='{tensor.device}'")
    if tensor._leaf is not None and tensor.requires_grad:
        notes.append("requires_grad=True")
    elif tensor.requires_grad:
        notes.append("grad_fn=<recorded>")
    return f"tensor({', '.join([body, *notes])})"
