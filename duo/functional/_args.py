"""What the functions of `duo.functional` do to their arguments before any op is built: dims, shapes and dtypes in normal form.

Everything here works on types alone, so a mistake is reported at the call, with the function's name and the shape at hand.
"""

from __future__ import annotations

import operator
from typing import Any

from duo.symbolic import FreeSizeError, plain
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.types import Dim, DimLike, DType, TensorType, exact_div, product, shape_str
from duo_ir.types import dtype as dtype_of


class DimensionError(ArgumentError, IndexError):
    """A dim that the tensor does not have."""


def type_of(x: Any) -> TensorType:
    """The type of a tensor of any kind."""
    if x.__class__ is Value:
        return x.type
    try:
        found = x._type
    except AttributeError:
        found = None
    if found is None:
        raise DTypeError(f"expected a tensor, got {x!r:.60} ({type(x).__name__}); make one with duo.tensor")
    return found


def is_tensor(x: Any) -> bool:
    return x.__class__ is Value or getattr(x, "_type", None) is not None


def integer(name: str, what: str, value: Any) -> int:
    """`value` as an int (NumPy integers too, bools not)."""
    if value.__class__ is int:
        return value  # type: ignore[no-any-return]
    if isinstance(value, bool):
        raise ArgumentError(f"{name}: {what} is an int, not {value!r}")
    try:
        return operator.index(value)
    except FreeSizeError:
        raise
    except TypeError:
        raise ArgumentError(f"{name}: {what} is an int, not {value!r}") from None


def one_axis(name: str, dim: Any, rank: int) -> int:
    """`dim` counted from the front. A 0-d tensor takes 0 and -1."""
    d = dim if dim.__class__ is int else integer(name, "dim", dim)
    limit = rank or 1
    if not -limit <= d < limit:
        raise DimensionError(f"{name}: dim {d} is out of range for {rank} dimensions; it takes {-limit} to {limit - 1}")
    return d + limit if d < 0 else d


def some_axes(name: str, dim: Any, rank: int) -> tuple[int, ...]:
    """The axes `dim` names (an int, several, or None and () for all), ascending. Those of a 0-d tensor are ()."""
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return tuple(range(rank))
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    axes = sorted(one_axis(name, d, rank) for d in dims)
    if len(set(axes)) != len(axes):
        raise ArgumentError(f"{name}: dims {tuple(dims)} name an axis twice")
    return tuple(axes) if rank else ()


def size_args(name: str, values: Any) -> tuple[DimLike, ...]:
    """A shape given as f(2, 3), f((2, 3)) or f([2, 3]), as a tuple of ints and Dims; -1 and others pass unjudged."""
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        values = values[0]
    for v in values:
        if v.__class__ is not int:
            break
    else:
        return tuple(values)
    return tuple([plain(v) if isinstance(v, Dim) else integer(name, "a size", v) for v in values])


def maybe_dtype(dtype: Any) -> DType | None:
    return None if dtype is None else dtype_of(dtype)


def choice(name: str, what: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ArgumentError(f"{name}: {what} is one of {', '.join(map(repr, allowed))}, not {value!r}")
    return value


def need_rank(name: str, what: str, t: TensorType, *ranks: int) -> None:
    if t.rank not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise ShapeError(f"{name}: {what} needs {wanted} dimensions, got {t}")


def infer_size(name: str, shape: tuple[DimLike, ...], source: tuple[DimLike, ...]) -> tuple[DimLike, ...]:
    """`shape` with its -1 replaced so that it holds the elements of `source`."""
    from_front = [i for i, d in enumerate(shape) if isinstance(d, int) and d < 0]
    if not from_front:
        return shape
    if len(from_front) > 1 or shape[from_front[0]] != -1:
        raise ShapeError(f"{name}: shape {shape_str(shape)} may hold one -1 and no other negative size")
    at = from_front[0]
    missing = _quotient(source, (*shape[:at], *shape[at + 1 :]))
    if missing is None:
        raise ShapeError(f"{name}: {shape_str(source)} has no shape {shape_str(shape)}: its size is not a multiple")
    return (*shape[:at], missing, *shape[at + 1 :])


def _quotient(over: tuple[DimLike, ...], under: tuple[DimLike, ...]) -> DimLike | None:
    """product(over) / product(under); factors that both hold cancel first, so that Dims with several terms divide too."""
    left, rest = list(over), []
    for d in under:
        if d in left and d != 0:
            left.remove(d)
        else:
            rest.append(d)
    return exact_div(product(left), product(rest))


def frozen(value: Any) -> Any:
    """A list as a tuple, so that it can be a key; anything else as it is."""
    return tuple(value) if value.__class__ is list else value


def per_axis(name: str, what: str, value: Any, n: int, least: int = 1) -> tuple[int, ...]:
    """`value`, an int or one for each of n spatial dims, as n ints of at least `least`."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * n
    if len(values) == 1:
        values *= n
    if len(values) != n:
        raise ArgumentError(f"{name}: {what} is an int or {n} of them, not {value!r}")
    ints = tuple([integer(name, what, v) for v in values])
    if ints and min(ints) < least:
        raise ArgumentError(f"{name}: {what} is at least {least}, not {min(ints)}")
    return ints
