"""Programs with some of their named sizes replaced by ints or by other polynomials."""

from __future__ import annotations

from collections.abc import Mapping

from duo_ir.core import Builder, Function, Value
from duo_ir.types import Dim, DimLike, TensorType, substitute

Sizes = Mapping[str, DimLike]


def sized_type(type: TensorType, sizes: Sizes) -> TensorType:
    """The type with named sizes replaced."""
    return TensorType(type.dtype, tuple([substitute(d, sizes) for d in type.shape]))


def sized(attribute: object, sizes: Sizes) -> object:
    """An op's attribute with named sizes replaced, in tuples and nested functions too."""
    if isinstance(attribute, Dim):
        return substitute(attribute, sizes)
    if isinstance(attribute, tuple):
        return tuple([sized(a, sizes) for a in attribute])
    if isinstance(attribute, Function):
        return with_sizes(attribute, sizes)
    return attribute


def with_sizes(function: Function, sizes: Sizes) -> Function:
    """The same program with named sizes replaced by ints or other Dims; every type is inferred again."""
    builder = Builder(function.name)
    env: dict[Value, Value] = {}
    with builder:
        for p, name in zip(function.params, function.names):
            env[p] = builder.parameter(sized_type(p.type, sizes), name)
        for op in function.ops:
            builder.loc = op.loc
            attrs = {k: sized(v, sizes) for k, v in op.attrs.items()}
            env.update(zip(op.results, builder.emit(op.definition, tuple([env[v] for v in op.operands]), attrs)))
    return builder.build([env[r] for r in function.results])
