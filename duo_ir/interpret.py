"""The reference interpreter: runs a Function on NumPy arrays, op by op, to the bit of the numerics contract.

It is what every backend is compared with. Elementwise ops and running folds run their recipes on the NumPy evaluator, the others their references;
control flow runs its regions.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from duo_ir.core import Function, Op, Value, bind_dims
from duo_ir.errors import DuoError, NanError
from duo_ir.opdef import Control, Cumulative, Elementwise, Generate, compute_dtype
from duo_ir.ops.reference import narrow, widen
from duo_ir.scalar.numpy_eval import NumpyScalar
from duo_ir.types import Dim, TensorType

_SCALAR = NumpyScalar()


def interpret(function: Function, *arrays: Any) -> list[np.ndarray]:
    """The results of `function` on `arrays`, one per parameter, each a fresh array.

    An array must have its parameter's dtype and shape (named sizes take what they meet), else DuoError; an error of an op
    names the op's source line.
    """
    if len(arrays) != len(function.params):
        raise DuoError(f"{function.name} takes {len(function.params)} arrays, got {len(arrays)}")
    given = [np.asarray(a) for a in arrays]
    for n, (p, a) in enumerate(zip(function.params, given)):
        if a.dtype != p.type.dtype.numpy:
            raise DuoError(f"argument {n} has dtype {a.dtype}, but the program takes {p.type}; convert it with astype")
    sizes = bind_dims(function.param_types, [a.shape for a in given])
    return [np.array(r, order="C") for r in _run(function, given, sizes)]


def interpret_checked(function: Function, *arrays: Any) -> list[np.ndarray]:
    """`interpret`, but the op that makes the first NaN, or the first infinity from finite operands, raises NanError with its line."""
    before = _watch.on
    _watch.on = True
    try:
        return interpret(function, *arrays)
    finally:
        _watch.on = before


class _Watch(threading.local):
    on = False


_watch = _Watch()


def _find_nan(op: Op, arrays: Sequence[np.ndarray], results: Sequence[Any]) -> None:
    """Raises NanError if `op` makes a NaN, or an infinity out of finite operands. Constants may be infinite (masks are)."""
    if isinstance(op.definition.kind, Generate):
        return
    for value, result in zip(op.results, results):
        if not value.type.dtype.is_float:
            continue
        operands = [a for v, a in zip(op.operands, arrays) if v.type.dtype.is_float]
        wide = np.asarray(result).astype(np.float64)
        nan = np.isnan(wide).any() and not any(np.isnan(a.astype(np.float64)).any() for a in operands)
        if nan or (np.isinf(wide).any() and all(np.isfinite(a.astype(np.float64)).all() for a in operands)):
            bad = ~np.isfinite(wide)
            where = ", ".join(map(str, np.argwhere(bad)[0])) if wide.ndim else ""
            raise NanError(
                f"{op.definition.name}({', '.join(str(v.type) for v in op.operands)}) made "
                f"{'NaN' if nan else 'infinity'}: {int(bad.sum())} of {wide.size} elements, the first at [{where}]"
            )


def _run(function: Function, arrays: Sequence[np.ndarray], sizes: Mapping[str, int]) -> list[np.ndarray]:
    env: dict[Value, np.ndarray] = dict(zip(function.params, arrays))
    for op in function.ops:
        try:
            operands = [env[v] for v in op.operands]
            results = _apply(op, operands, sizes)
            if _watch.on:
                _find_nan(op, operands, results)
        except DuoError as error:
            if op.loc is None or getattr(error, "located", False):
                raise
            located = type(error)(f"{error}\n  at {op.loc.full()}")
            located.located = True  # type: ignore[attr-defined]  # an enclosing op's line does not go on top of it
            raise located from None
        for value, array in zip(op.results, results, strict=True):
            env[value] = _checked(op, value.type, array, sizes)
    return [env[r] for r in function.results]


def _checked(op: Op, type: TensorType, array: Any, sizes: Mapping[str, int]) -> np.ndarray:
    """`array`, once it is sure that the definition's meaning agrees with its type rule."""
    out = np.asarray(array)
    shape = type.static_shape(sizes)
    if out.dtype != type.dtype.numpy or out.shape != shape:
        raise DuoError(
            f"{op.definition.name} gave {out.dtype}{list(out.shape)}, but its type is {type}: a fault of its definition"
        )
    return out


def _apply(op: Op, arrays: list[np.ndarray], sizes: Mapping[str, int]) -> Sequence[Any]:
    definition, kind = op.definition, op.definition.kind
    if isinstance(kind, Control):
        return _control(kind, op, arrays, sizes)
    attrs = {name: _concrete(value, sizes) for name, value in op.attrs.items()}
    if isinstance(kind, Elementwise):
        return _elementwise(kind, op, arrays, attrs, sizes)
    if isinstance(kind, Generate):
        return (_generate(kind, op, arrays, attrs, sizes),)
    if isinstance(kind, Cumulative):
        return _running(kind, op, arrays, attrs["axis"])
    if definition.reference is None:
        raise DuoError(f"{definition.name} has no reference")
    out = definition.reference(*arrays, **attrs)
    return out if isinstance(out, tuple) else (out,)


def _concrete(attribute: Any, sizes: Mapping[str, int]) -> Any:
    """An attribute with its symbolic sizes replaced by numbers."""
    if isinstance(attribute, Dim):
        return attribute.evaluate(sizes)
    if isinstance(attribute, tuple):
        return tuple([_concrete(a, sizes) for a in attribute])
    return attribute


def _fitted(value: Any, type: TensorType, shape: tuple[int, ...]) -> np.ndarray:
    """A recipe's outcome as the result: rounded to f16 or bf16, spread to its shape where it did not depend on all operands."""
    out = np.asarray(value)
    if type.dtype.is_narrow_float:
        out = narrow(out, type.dtype.numpy)
    return np.broadcast_to(out, shape)


def _elementwise(
    kind: Elementwise, op: Op, arrays: list[np.ndarray], attrs: dict[str, Any], sizes: Mapping[str, int]
) -> list[np.ndarray]:
    operands = [widen(a) for a in arrays] if kind.widen else arrays
    out = kind.recipe(_SCALAR, *operands, **attrs)
    values = out if isinstance(out, tuple) else (out,)
    return [_fitted(v, r.type, r.type.static_shape(sizes)) for v, r in zip(values, op.results, strict=True)]


def _generate(
    kind: Generate, op: Op, arrays: list[np.ndarray], attrs: dict[str, Any], sizes: Mapping[str, int]
) -> np.ndarray:
    shape = op.result.type.static_shape(sizes)
    indices = list(np.indices(shape, np.int64, sparse=True))
    linear = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int64).reshape(shape)
    return _fitted(kind.recipe(_SCALAR, indices, linear, *arrays, **attrs), op.result.type, shape)


def _running(kind: Cumulative, op: Op, arrays: list[np.ndarray], axis: int) -> list[np.ndarray]:
    """The steps one after another, each for all points beside the axis."""
    elements = [np.moveaxis(widen(a), axis, 0) for a in arrays]
    length, *points = elements[0].shape
    start = kind.start(compute_dtype(op.operands[0].type.dtype))
    state: tuple[Any, ...] = tuple([np.full(points, number, d.numpy) for d, number in start])
    out = [np.empty((length, *points), d.numpy) for d, _ in start]
    for k in range(length):
        state = kind.step(_SCALAR, state, tuple([x[k] for x in elements]), np.asarray(k, np.int64))
        for whole, part in zip(out, state):
            whole[k] = part
    return [narrow(np.moveaxis(o, 0, axis), r.type.dtype.numpy) for o, r in zip(out, op.results, strict=True)]


def _control(kind: Control, op: Op, arrays: list[np.ndarray], sizes: Mapping[str, int]) -> Sequence[np.ndarray]:
    if kind.name == "cond":
        return _run(op.attrs["then" if arrays[0] else "orelse"], arrays[1:], sizes)
    test, body, carried = op.attrs["test"], op.attrs["body"], op.attrs["carried"]
    state, constants = arrays[:carried], arrays[carried:]
    while _run(test, [*state, *constants], sizes)[0]:
        state = _run(body, [*state, *constants], sizes)
    return state
