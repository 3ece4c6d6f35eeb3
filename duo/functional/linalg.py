"""Products of matrices and vectors, and einsum.

All contractions are the one primitive `matmul`, whose order of summation depends on the contracted size alone; what is around it
is transposes and reshapes.
"""

from __future__ import annotations

from typing import Any

from duo.dispatch import apply
from duo.functional._args import need_rank, one_axis, type_of
from duo.functional._ssa import insert_axis
from duo.functional.movement import _diagonal
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import linalg
from duo_ir.ops import reduce as red
from duo_ir.types import DimLike, product, promote


def same_dtype(*xs: Value) -> list[Value]:
    dtype = xs[0].type.dtype
    for x in xs[1:]:
        dtype = promote(dtype, x.type.dtype)
    return [nd.cast_to(x, dtype) for x in xs]


# ------------------------------------------------------------------------------------------------------------ matmul
def _matmul(a: Value, b: Value) -> Value:
    if a.type.rank > 2 and b.type.rank == 2:
        # One product with all rows of `a`: its gradient for b is then one product too, not a batch of them to be summed.
        a, b = same_dtype(a, b)
        *batch, k = a.type.shape
        rows = nd.reshape(a, (product(batch), k))
        return nd.reshape(linalg.matmul(rows, b), (*batch, b.type.shape[1]))
    return nd.matmul(a, b)


def matmul(input: Any, other: Any) -> Any:
    """The matrix product; leading dims are a batch and broadcast, a vector is a row on the left and a column on the right."""
    return apply(_matmul, (input, other))


def mm(input: Any, mat2: Any) -> Any:
    """Matrix times matrix."""
    need_rank("mm", "input", type_of(input), 2)
    need_rank("mm", "mat2", type_of(mat2), 2)
    return apply(_matmul, (input, mat2))


def bmm(input: Any, mat2: Any) -> Any:
    """A batch of matrices times a batch of matrices, of the same size."""
    a, b = type_of(input), type_of(mat2)
    need_rank("bmm", "input", a, 3)
    need_rank("bmm", "mat2", b, 3)
    if a.shape[0] != b.shape[0]:
        raise ShapeError(f"bmm: batch sizes differ: {a} and {b}; matmul broadcasts them")
    return apply(_matmul, (input, mat2))


def mv(input: Any, vec: Any) -> Any:
    """Matrix times vector."""
    need_rank("mv", "input", type_of(input), 2)
    need_rank("mv", "vec", type_of(vec), 1)
    return apply(_matmul, (input, vec))


def dot(input: Any, tensor: Any) -> Any:
    """The inner product of two vectors."""
    need_rank("dot", "input", type_of(input), 1)
    need_rank("dot", "tensor", type_of(tensor), 1)
    return apply(_matmul, (input, tensor))


def _outer(a: Value, b: Value) -> Value:
    return insert_axis(a, 1) * insert_axis(b, 0)


def outer(input: Any, vec2: Any) -> Any:
    """The matrix input[i] * vec2[j]."""
    need_rank("outer", "input", type_of(input), 1)
    need_rank("outer", "vec2", type_of(vec2), 1)
    return apply(_outer, (input, vec2))


def _add_matmul(c: Value, a: Value, b: Value) -> Value:
    return _matmul(a, b) + c


def _add_matmul_scaled(c: Value, a: Value, b: Value, beta: Any, alpha: Any) -> Value:
    return _matmul(a, b) * alpha + c * beta


def _added_product(input: Any, a: Any, b: Any, beta: Any, alpha: Any) -> Any:
    if beta.__class__ is int and alpha.__class__ is int and beta == alpha == 1:
        return apply(_add_matmul, (input, a, b))
    return apply(_add_matmul_scaled, (input, a, b, beta, alpha))


def addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """beta * input + alpha * (mat1 @ mat2)."""
    need_rank("addmm", "mat1", type_of(mat1), 2)
    need_rank("addmm", "mat2", type_of(mat2), 2)
    return _added_product(input, mat1, mat2, beta, alpha)


def baddbmm(input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """beta * input + alpha * (batch1 @ batch2)."""
    need_rank("baddbmm", "batch1", type_of(batch1), 3)
    need_rank("baddbmm", "batch2", type_of(batch2), 3)
    return _added_product(input, batch1, batch2, beta, alpha)


def addmv(input: Any, mat: Any, vec: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """beta * input + alpha * (mat @ vec)."""
    need_rank("addmv", "mat", type_of(mat), 2)
    need_rank("addmv", "vec", type_of(vec), 1)
    return _added_product(input, mat, vec, beta, alpha)


# ------------------------------------------------------------------------------------------------------------ linear
def _linear(x: Value, w: Value) -> Value:
    if w.type.rank not in (1, 2) or x.type.rank == 0 or x.type.shape[-1] != w.type.shape[-1]:
        raise ShapeError(f"linear: input {x.type} needs as many elements in its last dim as weight {w.type}")
    return _matmul(x, nd.transpose(w, tuple(reversed(range(w.type.rank)))))


def _linear_bias(x: Value, w: Value, b: Value) -> Value:
    return _linear(x, w) + b


def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """input @ weight.T + bias: [..., in] with weight [out, in] and bias [out] to [..., out]."""
    return apply(_linear, (input, weight)) if bias is None else apply(_linear_bias, (input, weight, bias))


def _bilinear(x: Value, y: Value, w: Value) -> Value:
    lead = x.type.shape[:-1]
    out, m, n = w.type.shape
    rows = product(lead)
    x, y = nd.reshape(x, (rows, m)), nd.reshape(y, (rows, n))
    pairs = nd.reshape(insert_axis(x, 2) * insert_axis(y, 1), (rows, m * n))
    return nd.reshape(_linear(pairs, nd.reshape(w, (out, m * n))), (*lead, out))


def _bilinear_bias(x: Value, y: Value, w: Value, b: Value) -> Value:
    return _bilinear(x, y, w) + b


def bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    """sum over i, j of input1[..., i] * weight[o, i, j] * input2[..., j], plus bias."""
    need_rank("bilinear", "weight", type_of(weight), 3)
    xs = (input1, input2, weight)
    return apply(_bilinear, xs) if bias is None else apply(_bilinear_bias, (*xs, bias))


# ------------------------------------------------------------------------------------------------------------ einsum
def parse_einsum(equation: str, ranks: tuple[int, ...]) -> tuple[tuple[str, ...], str]:
    """One label per axis of each operand, and the result's. An ellipsis becomes labels that letters cannot be."""
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise ArgumentError(f"einsum: {equation!r} names {len(terms)} operands, {len(ranks)} were given")
    dots = max([r - len(s.replace("...", "")) for s, r in zip(terms, ranks) if "..." in s], default=0)
    labels = "".join(chr(0x2080 + n) for n in range(dots))
    out = []
    for term, rank in zip(terms, ranks):
        own = rank - len(term.replace("...", ""))
        if own < 0 or (own > 0 and "..." not in term):
            raise ShapeError(f"einsum: {term!r} in {equation!r} names {len(term)} dims, but the operand has {rank}")
        out.append(term.replace("...", labels[dots - own :], 1))
    if arrow:
        result = right.replace("...", labels, 1)
    else:
        joined = "".join(out)
        result = labels + "".join(sorted(c for c in set(joined) if joined.count(c) == 1 and c not in labels))
    for c in "".join(out) + result:
        if c not in labels and not c.isalpha():
            raise ArgumentError(f"einsum: {c!r} in {equation!r} is no letter")
    unknown = sorted(set(result) - set("".join(out)))
    if unknown or len(set(result)) != len(result):
        raise ArgumentError(f"einsum: the result of {equation!r} must name labels of the operands, each once")
    return tuple(out), result


def _once(x: Value, labels: str) -> tuple[Value, str]:
    """Repeated labels of one operand read as its diagonal."""
    for c in sorted(set(labels)):
        while labels.count(c) > 1:
            first = labels.index(c)
            second = labels.index(c, first + 1)
            x = _diagonal(x, 0, first, second)
            labels = labels[:first] + labels[first + 1 : second] + labels[second + 1 :] + c
    return x, labels


def _summed(x: Value, labels: str, wanted: str) -> tuple[Value, str]:
    """Without the labels that nobody wants."""
    axes = tuple([a for a, c in enumerate(labels) if c not in wanted])
    return (red.sum(x, axes=axes) if axes else x), "".join(c for c in labels if c in wanted)


def _ordered(x: Value, labels: str, wanted: str) -> Value:
    return nd.transpose(x, tuple([labels.index(c) for c in wanted]))


def _pair(a: Value, la: str, b: Value, lb: str, wanted: str) -> tuple[Value, str]:
    """One product of two operands, which keeps the labels in `wanted`."""
    a, la = _summed(a, la, lb + wanted)
    b, lb = _summed(b, lb, la + wanted)
    sizes: dict[str, DimLike] = {}
    for c, d in [*zip(la, a.type.shape), *zip(lb, b.type.shape)]:
        if sizes.get(c, 1) == 1:
            sizes[c] = d
        elif d not in (1, sizes[c]):
            raise ShapeError(f"einsum: label {c!r} has sizes {sizes[c]} and {d}")
    batch = "".join(c for c in la if c in lb and c in wanted)
    inner = "".join(c for c in la if c in lb and c not in wanted)
    left, right = "".join(c for c in la if c not in lb), "".join(c for c in lb if c not in la)
    dims = [tuple(sizes[c] for c in s) for s in (batch, left, right, inner)]
    a = nd.broadcast_to(_ordered(a, la, batch + left + inner), (*dims[0], *dims[1], *dims[3]))
    b = nd.broadcast_to(_ordered(b, lb, batch + inner + right), (*dims[0], *dims[3], *dims[2]))
    n, m, p, k = (product(d) for d in dims)
    if inner:
        out = linalg.matmul(nd.reshape(a, (n, m, k)), nd.reshape(b, (n, k, p)))
    else:
        out = nd.reshape(a, (n, m, 1)) * nd.reshape(b, (n, 1, p))
    return nd.reshape(out, (*dims[0], *dims[1], *dims[2])), batch + left + right


def _einsum(*arguments: Any) -> Value:
    *xs, terms, result = arguments
    operands = [_once(x, labels) for x, labels in zip(same_dtype(*xs), terms)]
    x, labels = operands[0]
    for n, (y, more) in enumerate(operands[1:], 1):
        later = result + "".join(rest for _, rest in operands[n + 1 :])
        x, labels = _pair(x, labels, y, more, later)
    x, labels = _summed(x, labels, result)
    return _ordered(x, labels, result)


def einsum(equation: str, *operands: Any) -> Any:
    """Einstein's summation: einsum('bij,bjk->bik', x, y). Several operands are contracted from the left; '...' stands for leading
    dims that broadcast; a label twice in one operand is its diagonal."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    terms, result = parse_einsum(equation, tuple([type_of(x).rank for x in operands]))
    return apply(_einsum, operands, (terms, result))


def tensordot(a: Any, b: Any, dims: Any = 2) -> Any:
    """Summed over the last `dims` dims of a and the first of b, or over the two lists of dims given."""
    ra, rb = type_of(a).rank, type_of(b).rank
    if isinstance(dims, int):
        over = list(range(ra - dims, ra)), list(range(dims))
    else:
        over = [one_axis("tensordot", d, ra) for d in dims[0]], [one_axis("tensordot", d, rb) for d in dims[1]]
    if len(over[0]) != len(over[1]):
        raise ArgumentError(f"tensordot: dims {dims} must name as many dims of a as of b")
    la = [chr(97 + n) for n in range(ra)]
    lb = [chr(65 + n) for n in range(rb)]
    for p, q in zip(*over):
        lb[q] = la[p]
    result = [c for n, c in enumerate(la) if n not in over[0]] + [c for n, c in enumerate(lb) if n not in over[1]]
    return apply(_einsum, (a, b), (("".join(la), "".join(lb)), "".join(result)))
