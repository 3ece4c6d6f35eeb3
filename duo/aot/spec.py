"""`duo.spec("f32[batch,784]")`: what an input of an exported program is. A size that is a name is free; equal names are equal sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.types import Dim, DType, TensorType, dtype

_FORM = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)\s*:)?\s*(?P<dtype>\w+)\s*(?:\[(?P<shape>[^\[\]]*)\])?\s*")
_TAKEN = frozenset({"threads", "model", "sizes", "given"})  # names that the library's own code has


@dataclass(frozen=True)
class Spec:
    """dtype, sizes (ints or names), and the input's name ("": the function's own parameter's)."""

    dtype: DType
    shape: tuple[int | str, ...]
    name: str = ""

    @property
    def type(self) -> TensorType:
        """The type, with a Dim for each name."""
        return TensorType(self.dtype, tuple([Dim.symbol(d) if isinstance(d, str) else d for d in self.shape]))

    def __str__(self) -> str:
        text = f"{self.dtype.name}[{','.join(map(str, self.shape))}]"
        return f"{self.name}: {text}" if self.name else text


def spec(text: Any, name: str = "") -> Spec:
    """A Spec from `"f32[batch,784]"` or `"x: f32[batch,784]"`, or of a tensor or array (all sizes fixed).

    A size that is a name is free: any number from 0 on for which the program is one, and the same wherever the name stands. In the program
    `x.shape[0]` is a number then: beside a tensor what Python's int would be (`x / x.shape[0]`, `x * (1 / x.shape[1] ** 0.5)`), in a shape or slice a
    size where it is a sum or product of sizes (`x.view(b * t, d)`, `table[:t]`, `duo.arange(t)`). A decision on it (`if x.shape[0] > 3`) is an error.

    Raises ArgumentError or ShapeError for what is neither, DTypeError for a dtype that duo does not have."""
    if isinstance(text, Spec):
        return text if not name else Spec(text.dtype, text.shape, name)
    if not isinstance(text, str):
        if not hasattr(text, "shape") or not hasattr(text, "dtype"):
            raise ArgumentError(f"spec takes text such as 'f32[batch,784]', or a tensor, not {text!r}")
        return Spec(dtype(text.dtype), tuple([int(d) for d in text.shape]), name)
    found = _FORM.fullmatch(text)
    if found is None:
        raise ArgumentError(f"{text!r} is not a spec; one is 'f32[batch,784]' or 'x: f32[batch,784]'")
    shape: list[int | str] = []
    for part in (found["shape"] or "").split(",") if (found["shape"] or "").strip() else ():
        part = part.strip()
        if part.isdigit():
            shape.append(int(part))
        elif part.isidentifier() and part.isascii() and part not in _TAKEN:
            shape.append(part)
        else:
            raise ShapeError(
                f"{part!r} is not a size in {text!r}; a size is a number, or a name (not {', '.join(sorted(_TAKEN))})"
            )
    return Spec(dtype(found["dtype"]), tuple(shape), name or found["name"] or "")
