"""duo.functional against PyTorch: values and gradients of every function on SSA values, run by the reference interpreter."""

import math

import numpy as np
import pytest

from duo import functional as F
from duo.functional.indexing import getitem
from duo.functional.shape import matrix_transpose, reverse_dims
from duo_ir.errors import DuoError
from tests.frontends.functional_support import b, f, flat, gradients, i, p, run

torch = pytest.importorskip("torch")
TF = torch.nn.functional


def case(name, ours, theirs, *arrays, grad=True, tol=1e-9):
    return pytest.param(ours, theirs, [np.asarray(a) for a in arrays], grad, tol, id=name)


def simple(name, *arrays, of=torch, **kwargs):
    """A function with the same name and positional arguments in both."""
    return case(name, getattr(F, name), getattr(of, name), *arrays, **kwargs)


def attrs(name, *arrays, of=torch, grad=True, tol=1e-9, **kw):
    """The same keyword arguments in both."""
    ours, theirs = getattr(F, name), getattr(of, name)
    label = ",".join(f"{k}={v}" for k, v in kw.items())
    return case(f"{name}({label})", lambda *a: ours(*a, **kw), lambda *a: theirs(*a, **kw), *arrays, grad=grad, tol=tol)


UNARY = ["exp", "exp2", "expm1", "sin", "cos", "tan", "atan", "sinh", "cosh", "tanh", "sigmoid", "erf", "erfc", "abs", "sign", "square", "reciprocal", "floor", "ceil", "trunc", "round", "frac", "neg"]  # fmt: skip
POSITIVE = ["log", "log1p", "log2", "log10", "sqrt", "rsqrt", "asin", "acos", "erfinv"]
BINARY = [
    "add",
    "sub",
    "mul",
    "div",
    "true_divide",
    "floor_divide",
    "remainder",
    "fmod",
    "maximum",
    "minimum",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
]
X, Y = f(3, 4), f(4)
INTS, SMALL = i(-9, 9, 3, 4), i(1, 5, 4)
POOL = f(4, 5, 6)

ELEMENTWISE = [
    *[simple(n, f(3, 4) * 1.5) for n in UNARY],
    *[simple(n, p(3, 4)) for n in POSITIVE],
    *[simple(n, X, Y, grad=n != "floor_divide") for n in BINARY],
    *[simple(n, INTS, SMALL) for n in BINARY if n not in ("div", "true_divide")],
    *[attrs("div", a, c, rounding_mode=m) for m in ("trunc", "floor") for a, c in ((X, Y), (INTS, -SMALL))],
    attrs("add", X, Y, alpha=2), attrs("sub", X, Y, alpha=0.5),
    case("maximum ties", F.maximum, torch.maximum, np.array([1.0, 2.0, np.nan]), np.array([1.0, 3.0, 2.0])),
    *[case(f"pow {n}", lambda x, n=n: F.pow(x, n), lambda x, n=n: torch.pow(x, n), f(5)) for n in (0, 1, 2, 3, -1, -2, 7)],
    case("pow float", lambda x: F.pow(x, 2.5), lambda x: torch.pow(x, 2.5), p(5)),
    case("pow tensor", F.pow, torch.pow, p(3, 4), f(4)),
    case("pow of number", lambda x: F.pow(2.0, x), lambda x: torch.pow(2.0, x), f(5)),
    case("pow int", lambda x: F.pow(x, 3), lambda x: torch.pow(x, 3), INTS),
    case("pow 100", lambda x: F.pow(x, 100), lambda x: torch.pow(x, 100), p(5)),
    attrs("clamp", f(9), min=-0.5, max=0.5), attrs("clamp", f(9), min=0.1), attrs("clamp", f(9), max=0.1),
    case("clamp on bounds", lambda x: F.clamp(x, -1.0, 1.0), lambda x: torch.clamp(x, -1.0, 1.0), np.array([-1.0, 1, 0])),
    attrs("clamp", np.array([np.nan, 2.0]), min=-1.0, max=1.0, grad=False),
    case("clamp tensors", lambda x, lo, hi: F.clamp(x, lo, hi), torch.clamp, f(3, 4), np.full(4, -0.5), np.full(4, 0.3)),
    simple("lerp", f(3, 4), f(3, 4), p(3, 4)), attrs("addcmul", f(3), f(3), f(3), value=0.5),
    attrs("addcdiv", f(3), f(3), p(3), value=0.5),
    *[simple(n, b(3, 4), b(4)) for n in ("logical_and", "logical_or", "logical_xor")], simple("logical_not", INTS),
    *[simple(n, a, c) for n in ("bitwise_and", "bitwise_or", "bitwise_xor") for a, c in ((INTS, SMALL), (b(3, 4), b(4)))],
    simple("bitwise_not", INTS), simple("bitwise_left_shift", INTS, SMALL), simple("bitwise_right_shift", INTS, SMALL),
    *[simple(n, np.array([1.0, np.nan, np.inf, -np.inf])) for n in ("isnan", "isinf", "isfinite", "nan_to_num")],
    attrs("nan_to_num", np.array([1.0, np.nan, np.inf, -np.inf]), nan=1.0, posinf=2.0, neginf=3.0),
    *[simple(n, INTS) for n in ("isnan", "isinf", "isfinite", "sign", "abs", "square", "floor")],
    simple("isclose", np.array([1.0, 2, np.inf, np.nan]), np.array([1.0, 2.1, np.inf, np.nan])),
    attrs("isclose", np.array([1.0, np.nan]), np.array([1.0, np.nan]), equal_nan=True),
    simple("where", b(3, 4), f(3, 4), f(4)),
    case("where number", lambda c, x: F.where(c, x, 0.0), lambda c, x: torch.where(c, x, 0.0), b(3, 4), f(3, 4)),
    case("where numbers", lambda c: F.where(c, 1, 0), lambda c: torch.where(c, 1, 0), b(3, 4)),
    case("masked_fill", lambda x, m: F.masked_fill(x, m, -1.0), lambda x, m: x.masked_fill(m, -1.0), f(3, 4), b(4)),
    attrs("round", f(9) * 100, decimals=1), attrs("round", f(9) * 1000, decimals=-2),
    case("sum of mixed", lambda x, y: F.add(x, y), torch.add, INTS, f(4)),
    case("bool arithmetic", lambda x, y: F.add(F.mul(x, y), x), lambda x, y: x * y + x, b(6), b(6)),
]  # fmt: skip

REDUCE = [
    *[attrs(n, POOL, dim=d, keepdim=k) for n in ("sum", "mean", "amax", "amin", "var", "std", "logsumexp")
      for d, k in ((1, False), ((0, 2), True), (-1, True))],
    *[simple(n, POOL) for n in ("sum", "mean", "prod", "var", "std", "amax", "amin", "max", "min", "argmax", "argmin")],
    *[attrs("prod", f(3, 4, 5), dim=d, keepdim=k) for d, k in ((1, False), (-1, True))],
    simple("sum", INTS), simple("prod", i(1, 4, 5)), simple("sum", b(5)), attrs("sum", INTS, dim=0), simple("max", INTS),
    attrs("sum", b(3, 4), dim=1),
    *[case(f"{n} dim", lambda x, n=n: tuple(getattr(F, n)(x, 1)), lambda x, n=n: tuple(getattr(torch, n)(x, 1)), POOL)
      for n in ("max", "min")],
    case("max keepdim", lambda x: tuple(F.max(x, dim=-1, keepdim=True)), lambda x: tuple(torch.max(x, dim=-1, keepdim=True)),
         np.array([[1.0, 3.0, 3.0], [np.nan, 1, 2]])),
    simple("max", X, f(3, 4)),
    attrs("argmax", POOL, dim=1), attrs("argmax", POOL, dim=-1, keepdim=True), attrs("argmin", POOL, dim=0),
    case("argmax keepdim", lambda x: F.argmax(x, keepdim=True), lambda x: torch.argmax(x, keepdim=True), POOL),
    simple("any", b(3, 4)), attrs("any", b(3, 4), dim=1), attrs("all", b(3, 4), dim=0, keepdim=True), simple("all", INTS),
    attrs("var", POOL, dim=1, correction=0), attrs("std", POOL, dim=(0, 1), unbiased=False),
    case("var older form", lambda x: F.var(x, False), lambda x: torch.var(x, unbiased=False), POOL),
    case("std flat", lambda x: F.std(x, 0), lambda x: torch.std(x, 0), np.ones((4, 3))),
    simple("var_mean", POOL), attrs("std_mean", POOL, dim=1),
    *[case(f"norm {q} {d}", lambda x, q=q, d=d: F.norm(x, q, d), lambda x, q=q, d=d: torch.linalg.vector_norm(x, q, d), f(4, 5))
      for q in (1, 2, 3, 0.5, math.inf, -math.inf, 0) for d in (None, 1)],
    case("norm at 0", F.norm, torch.linalg.vector_norm, np.zeros(4)),
    *[attrs(n, POOL, dim=1) for n in ("softmax", "log_softmax", "cumsum")], attrs("cumsum", INTS, dim=0),
    case("softmax inf", lambda x: F.softmax(x, -1), lambda x: torch.softmax(x, -1), np.array([[-np.inf, 1.0], [1e4, -1e4]])),
    case("logsumexp inf", lambda x: F.logsumexp(x, -1), lambda x: torch.logsumexp(x, -1),
         np.array([[-np.inf, -np.inf], [np.inf, 1], [1e4, 1e4]]), grad=False),
    simple("count_nonzero", INTS), attrs("count_nonzero", INTS, dim=1), attrs("sum", f(0, 3), dim=0),
    case("0-d sum", lambda x: F.sum(x, 0), lambda x: torch.sum(x, 0), np.float64(3.0)),
    case("0-d softmax", lambda x: F.softmax(x, 0), lambda x: torch.softmax(x, 0), np.float64(3.0)),
]  # fmt: skip


def sized(name, *args):
    """The method of a torch tensor with the same name and arguments."""
    return case(f"{name}{args}", lambda x: getattr(F, name)(x, *args), lambda x: getattr(x, name)(*args), f(2, 3, 4))


SHAPE = [
    sized("reshape", 6, 4), sized("reshape", (3, -1)), sized("reshape", -1), sized("view", 4, 6), sized("flatten"),
    sized("flatten", 1), sized("flatten", 0, 1), sized("unflatten", 2, (2, -1)), sized("unsqueeze", 0), sized("unsqueeze", -1),
    sized("transpose", 0, -1), sized("permute", 2, 0, 1), sized("permute", (1, 0, 2)), sized("movedim", 0, -1),
    sized("movedim", (0, 1), (2, 0)), sized("expand", 5, -1, 3, 4), sized("repeat", 2, 1, 3), sized("repeat", 2, 1, 1, 2),
    sized("tile", 2, 2), sized("narrow", 1, 1, 2), sized("narrow", 2, -3, 2), sized("select", 1, -1), sized("split", 2, 2),
    sized("split", 3, 2), sized("split", [1, 2], 1), sized("chunk", 3, 2), sized("chunk", 2, 1), sized("unbind", 1),
    sized("tensor_split", 3, 2), sized("tensor_split", (1, 3), 2),
    sized("flip", 0), sized("flip", (0, 2)), sized("roll", 1, 0), sized("roll", (1, -2), (0, 2)), sized("roll", 5),
    sized("repeat_interleave", 2, 1), sized("repeat_interleave", 2), sized("tril"), sized("triu", 1), sized("tril", -1),
    sized("diagonal", 0, 1, 2), sized("diagonal", 1, 0, 2), sized("diagonal", -1, 1, 2),
    case("squeeze", F.squeeze, torch.squeeze, f(1, 3, 1, 2)), case("squeeze 2", lambda x: F.squeeze(x, 2), lambda x: x.squeeze(2), f(1, 3, 1)),
    case("squeeze several", lambda x: F.squeeze(x, (0, 1)), lambda x: x.squeeze((0, 1)), f(1, 3, 1)),
    case("flatten 0-d", F.flatten, torch.flatten, np.float64(2.0)),
    case("T", reverse_dims, lambda x: x.permute(2, 1, 0), f(2, 3, 4)), case("mT", matrix_transpose, lambda x: x.mT, f(2, 3, 4)),
    case("t", F.t, torch.t, f(2, 3)), case("expand_as", F.expand_as, lambda x, y: x.expand_as(y), f(1, 4), f(3, 4)),
    case("cat", lambda *x: F.cat(x, 1), lambda *x: torch.cat(x, 1), f(2, 3), f(2, 1), f(2, 0)),
    case("cat mixed", lambda *x: F.cat(x), lambda *x: torch.cat(x), f(2, 3), i(0, 9, 1, 3)),
    *[case(f"stack {d}", lambda *x, d=d: F.stack(x, d), lambda *x, d=d: torch.stack(x, d), f(2, 3), f(2, 3)) for d in (0, 1, -1)],
    case("hstack", lambda *x: F.hstack(x), lambda *x: torch.hstack(x), f(2, 3), f(2, 1)),
    case("vstack", lambda *x: F.vstack(x), lambda *x: torch.vstack(x), f(3), f(2, 3)),
    case("meshgrid", lambda *x: F.meshgrid(*x, indexing="xy"), lambda *x: torch.meshgrid(*x, indexing="xy"), f(2), f(3)),
    case("meshgrid ij", lambda *x: F.meshgrid(*x, indexing="ij"), lambda *x: torch.meshgrid(*x, indexing="ij"), f(2), f(3), f(1)),
    case("one_hot", lambda x: F.one_hot(x, 5), lambda x: TF.one_hot(x, 5), i(0, 5, 2, 3)),
    case("diag", F.diag, torch.diag, f(3)), case("diag 1", lambda x: F.diag(x, 1), lambda x: torch.diag(x, 1), f(3)),
    case("diag -2", lambda x: F.diag(x, -2), lambda x: torch.diag(x, -2), f(4, 5)), simple("trace", f(3, 5)),
    *[case(f"pad {a} {m}", lambda x, a=a, m=m: F.pad(x, a, m), lambda x, a=a, m=m: TF.pad(x, a, m), f(2, 3, 4, 5))
      for a, m in (((1, 2), "constant"), ((1, 2, 0, 1), "constant"), ((-1, 2, 1, -2), "constant"), ((1, 2, 2, 1), "reflect"),
                   ((1, 2, 2, 0), "replicate"), ((1, 2, 0, 3), "circular"))],
    case("pad value", lambda x: F.pad(x, (1, 1), value=2.5), lambda x: TF.pad(x, (1, 1), value=2.5), f(3)),
]  # fmt: skip

_I = i(-3, 3, 5)
INDEXING = [
    *[case(f"getitem {n}", lambda x, k=k: getitem(x, k), lambda x, k=k: x[k], f(4, 5, 6)) for n, k in enumerate((
        0, -1, slice(None), slice(1, 3), slice(None, None, 2), slice(1, None, 3), slice(-2, None), slice(9, 2), slice(-9, 9),
        None, Ellipsis, (0, 1), (slice(None), 2), (Ellipsis, -1), (None, 0, Ellipsis, slice(2)), (1, 2, 3), (0, None, slice(1, 4, 2)),
        (slice(1, 2), Ellipsis, None)))],
    case("getitem tensor", lambda x, j: getitem(x, j), lambda x, j: x[j], f(4, 5, 6), _I),
    case("getitem tensor 2-d", lambda x, j: getitem(x, j), lambda x, j: x[j], f(4, 5, 6), i(0, 4, 2, 3)),
    case("getitem axis 1", lambda x, j: getitem(x, (slice(1, 3), j)), lambda x, j: x[1:3, j], f(4, 5, 6), _I),
    case("getitem pair", lambda x, j, k: getitem(x, (slice(None), j, k)), lambda x, j, k: x[:, j, k], f(4, 5, 6), _I, i(0, 6, 2, 1)),
    case("getitem apart", lambda x, j, k: getitem(x, (j, slice(None), k)), lambda x, j, k: x[j, :, k], f(4, 5, 6), _I, _I),
    case("getitem int and tensor", lambda x, j: getitem(x, (0, slice(None), j)), lambda x, j: x[0, :, j], f(4, 5, 6), _I),
    case("getitem tensor, new", lambda x, j: getitem(x, (Ellipsis, j, None)), lambda x, j: x[..., j, None], f(4, 5, 6), _I),
    case("getitem 0-d", lambda x, j: getitem(x, (slice(None), j)), lambda x, j: x[:, j], f(4, 5), np.int64(2)),
    case("gather", lambda x, j: F.gather(x, 1, j), lambda x, j: x.gather(1, j), f(4, 5), i(0, 5, 3, 7)),
    case("gather 0", lambda x, j: F.gather(x, 0, j), lambda x, j: x.gather(0, j), f(4, 5), i(0, 4, 2, 3)),
    case("scatter", lambda x, j, s: F.scatter(x, 1, j, s), lambda x, j, s: x.scatter(1, j, s), f(3, 5),
         np.array([[0, 2, 4], [1, 0, 3]]), f(2, 3)),
    case("scatter part", lambda x, j, s: F.scatter(x, 1, j, s), lambda x, j, s: x.scatter(1, j, s), f(3, 5),
         np.array([[0, 2, 4], [1, 0, 3]]), f(3, 4), grad=False),
    case("scatter value", lambda x, j: F.scatter(x, 0, j, 2.0), lambda x, j: x.scatter(0, j, 2.0), f(3, 5), i(0, 3, 1, 5)),
    case("scatter_add", lambda x, j, s: F.scatter_add(x, 0, j, s), lambda x, j, s: x.scatter_add(0, j, s), f(3, 5), i(0, 3, 4, 5), f(4, 5)),
    case("index_select", lambda x, j: F.index_select(x, 1, j), lambda x, j: x.index_select(1, j), f(3, 5, 2), i(0, 5, 4)),
    case("index_add", lambda x, j, s: F.index_add(x, 1, j, s), lambda x, j, s: x.index_add(1, j, s), f(3, 5), i(0, 5, 4), f(3, 4)),
    case("index_add alpha", lambda x, j, s: F.index_add(x, 0, j, s, alpha=2.0), lambda x, j, s: x.index_add(0, j, s, alpha=2.0),
         f(3, 5), i(0, 3, 4), f(4, 5)),
    case("index_copy", lambda x, j, s: F.index_copy(x, 0, j, s), lambda x, j, s: x.index_copy(0, j, s), f(4, 5), np.array([2, 0]), f(2, 5)),
    case("index_fill", lambda x, j: F.index_fill(x, 1, j, 3.0), lambda x, j: x.index_fill(1, j, 3.0), f(4, 5), np.array([2, 0])),
    case("take", F.take, torch.take, f(3, 4), i(-12, 12, 2, 2)),
    case("take_along_dim", lambda x, j: F.take_along_dim(x, j, 1), lambda x, j: torch.take_along_dim(x, j, 1), f(3, 4), i(0, 4, 1, 6)),
    case("index_put", lambda x, j, v: F.index_put(x, (j,), v), lambda x, j, v: x.index_put((j,), v), f(4, 5), np.array([2, 0]), f(2, 5)),
    case("index_put add", lambda x, j, v: F.index_put(x, (j,), v, True), lambda x, j, v: x.index_put((j,), v, True), f(4, 5), _I, f(5)),
    case("embedding", F.embedding, TF.embedding, i(0, 7, 2, 3), f(7, 4)),
    case("embedding padding", lambda j, w: F.embedding(j, w, -2), lambda j, w: TF.embedding(j, w, -2), i(0, 7, 9), f(7, 4)),
]  # fmt: skip

LINALG = [
    *[case(f"matmul {s} {t}", F.matmul, torch.matmul, f(*s), f(*t)) for s, t in (
        ((4,), (4,)), ((4,), (4, 3)), ((2, 4), (4,)), ((2, 4), (4, 3)), ((5, 2, 4), (4, 3)), ((5, 2, 4), (4,)), ((4,), (5, 4, 3)),
        ((5, 2, 4), (5, 4, 3)), ((6, 1, 2, 4), (5, 4, 3)), ((2, 4), (5, 4, 3)), ((2, 0), (0, 3)))],
    simple("mm", f(2, 3), f(3, 4)), simple("bmm", f(5, 2, 3), f(5, 3, 4)), simple("mv", f(2, 3), f(3)), simple("dot", f(3), f(3)),
    simple("outer", f(3), f(4)), attrs("addmm", f(4), f(2, 3), f(3, 4), beta=0.5, alpha=2.0), simple("addmm", f(4), f(2, 3), f(3, 4)),
    attrs("baddbmm", f(5, 2, 4), f(5, 2, 3), f(5, 3, 4), beta=0.5), simple("addmv", f(2), f(2, 3), f(3)),
    simple("linear", f(2, 5, 3), f(4, 3), f(4), of=TF), simple("linear", f(3), f(4, 3), of=TF),
    simple("bilinear", f(2, 3), f(2, 4), f(5, 3, 4), f(5), of=TF),
    *[case(f"einsum {e}", lambda *x, e=e: F.einsum(e, *x), lambda *x, e=e: torch.einsum(e, *x), *[f(*s) for s in shapes])
      for e, *shapes in (("ij,jk->ik", (2, 3), (3, 4)), ("bij,bkj->bik", (2, 3, 4), (2, 5, 4)), ("ij->ji", (2, 3)), ("ij->", (2, 3)),
                         ("ii->i", (3, 3)), ("ii", (3, 3)), ("i,j->ij", (2,), (3,)), ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 3, 6, 5)),
                         ("...ij,...jk->...ik", (2, 3, 4), (4, 5)), ("ij,jk,kl->il", (2, 3), (3, 4), (4, 5)), ("ij,ij->i", (2, 3), (2, 3)),
                         ("abc,cd->abd", (2, 3, 4), (4, 5)), ("bi,oij,bj->bo", (2, 3), (4, 3, 5), (2, 5)), ("ij,k->ik", (2, 3), (4,)),
                         ("ij,jk", (2, 3), (3, 4)), ("i...->...", (2, 3)))],
    *[case(f"tensordot {d}", lambda x, y, d=d: F.tensordot(x, y, d), lambda x, y, d=d: torch.tensordot(x, y, d), f(2, 3, 4), f(3, 4, 5)) for d in (2, ([1], [0]))],
]  # fmt: skip

_KINKS = np.array([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0])


def activation(name, **kw):
    smooth = np.concatenate([f(12) * 3, [30.0, -30.0]])
    return [attrs(name, smooth, of=TF, tol=1e-8, **kw)]


ACTIVATION = [
    *[c for n in ["relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardtanh", "hardsigmoid", "hardswish", "logsigmoid", "softsign", "tanhshrink", "hardshrink", "softshrink"] for c in activation(n)],
    *activation("gelu", approximate="tanh"), *activation("leaky_relu", negative_slope=0.3), *activation("elu", alpha=2.0),
    *activation("celu", alpha=2.0), *activation("softplus", beta=2.0, threshold=5.0), *activation("threshold", threshold=0.2, value=-3.0),
    *[simple(n, _KINKS, of=TF) for n in ("relu", "relu6", "leaky_relu", "hardtanh", "hardsigmoid", "elu", "softplus", "logsigmoid", "gelu")],
    *[simple(n, np.array([np.nan, np.inf, -np.inf, 0.0]), of=TF, grad=False) for n in ["relu", "relu6", "leaky_relu", "elu", "selu", "celu", "softplus", "hardtanh", "hardsigmoid", "logsigmoid", "softsign", "hardshrink", "gelu"]],
    simple("prelu", f(2, 3, 4), f(3), of=TF), simple("prelu", f(5), f(1), of=TF), attrs("glu", f(2, 6), of=TF, dim=1),
    attrs("glu", f(4, 3), of=TF, dim=0),
]  # fmt: skip

_N = f(4, 6, 5)


def batch_norm(x, mean, var, w, bias):
    mean, var = mean.clone(), var.clone()
    return TF.batch_norm(x, mean, var, w, bias, True, 0.2, 1e-3), mean, var


NORMALIZATION = [
    case("layer_norm", lambda x, w, v: F.layer_norm(x, (6, 5), w, v), lambda x, w, v: TF.layer_norm(x, (6, 5), w, v), _N, f(6, 5), f(6, 5)),
    case("layer_norm plain", lambda x: F.layer_norm(x, 5, eps=1e-2), lambda x: TF.layer_norm(x, (5,), eps=1e-2), _N),
    case("layer_norm no weight", lambda x, v: F.layer_norm(x, [5], None, v), lambda x, v: TF.layer_norm(x, (5,), None, v), _N, f(5)),
    case("rms_norm", lambda x, w: F.rms_norm(x, (5,), w), lambda x, w: TF.rms_norm(x, (5,), w), _N, f(5)),
    case("rms_norm eps", lambda x: F.rms_norm(x, (5,), eps=0.1), lambda x: TF.rms_norm(x, (5,), eps=0.1), _N),
    case("group_norm", lambda x, w, v: F.group_norm(x, 3, w, v), lambda x, w, v: TF.group_norm(x, 3, w, v), _N, f(6), f(6)),
    case("instance_norm", lambda x, w, v: F.instance_norm(x, w, v), lambda x, w, v: TF.instance_norm(x, weight=w, bias=v), _N, f(6), f(6)),
    case("batch_norm plain", F.batch_norm_train, lambda x: TF.batch_norm(x, None, None, training=True), _N),
    case("batch_norm eval", F.batch_norm_eval, lambda x, m, v, *a: TF.batch_norm(x, m.detach(), v.detach(), *a), _N, f(6), p(6), f(6), f(6), grad=False),
    case("batch_norm train", lambda x, w, v: F.batch_norm_train(x, None, None, w, v), lambda x, w, v: TF.batch_norm(x, None, None, w, v, True), f(7, 6), f(6), f(6)),
    case("batch_norm running", lambda *a: F.batch_norm_train(*a, momentum=0.2, eps=1e-3), batch_norm, _N, f(6), p(6), f(6), f(6), grad=False),
    case("normalize", F.normalize, TF.normalize, f(3, 4)), attrs("normalize", f(3, 4), of=TF, p=1.0, dim=0),
]  # fmt: skip

_LOGITS, _LABELS = f(7, 5), i(0, 5, 7)
_LABELS_IGNORED = np.where(np.arange(7) % 3 == 0, -100, _LABELS)
_MAP, _MAP_LABELS = f(2, 5, 3, 4), i(0, 5, 2, 3, 4)


def losses(name, *arrays, **kw):
    return [attrs(name, *arrays, of=TF, reduction=r, **kw) for r in ("mean", "sum", "none")]


LOSS = [
    *[c for n in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss") for c in losses(n, f(3, 4), f(3, 4))],
    *losses("smooth_l1_loss", f(3, 4), f(3, 4), beta=0.3), *losses("smooth_l1_loss", f(3, 4), f(3, 4), beta=0.0),
    *losses("huber_loss", f(3, 4), f(3, 4), delta=0.3),
    *losses("cross_entropy", _LOGITS, _LABELS), *losses("cross_entropy", _MAP, _MAP_LABELS), *losses("cross_entropy", _LOGITS, _LABELS_IGNORED),
    *losses("cross_entropy", _LOGITS, _LABELS_IGNORED, label_smoothing=0.1), *losses("cross_entropy", _LOGITS, _LABELS, ignore_index=2),
    *[case(f"cross_entropy weight {r} {s}", lambda x, t, w, r=r, s=s: F.cross_entropy(x, t, F.stop_gradient(w), reduction=r, label_smoothing=s),
           lambda x, t, w, r=r, s=s: TF.cross_entropy(x, t, w.detach(), reduction=r, label_smoothing=s), _LOGITS, _LABELS_IGNORED, p(5), grad=s == 0)
      for r in ("mean", "sum", "none") for s in (0.0, 0.2)],
    *losses("cross_entropy", _LOGITS, np.exp(f(7, 5))), *losses("cross_entropy", _MAP, p(2, 5, 3, 4), label_smoothing=0.1),
    case("cross_entropy 1-d", F.cross_entropy, TF.cross_entropy, f(5), np.int64(3)),
    case("cross_entropy ignored", lambda x, t: F.cross_entropy(x, t), TF.cross_entropy, _LOGITS, np.full(7, -100), grad=False),
    case("cross_entropy large", F.cross_entropy, TF.cross_entropy, np.array([[1e4, -1e4], [0, 800.0]]), np.array([1, 0])),
    *losses("nll_loss", np.log(p(7, 5)), _LABELS), *losses("nll_loss", f(2, 5, 3), i(0, 5, 2, 3)),
    *losses("binary_cross_entropy", p(3, 4), p(3, 4)), *losses("binary_cross_entropy_with_logits", f(3, 4) * 4, p(3, 4)),
    case("bce at the ends", F.binary_cross_entropy, TF.binary_cross_entropy, np.array([0.0, 1.0, 0.0]), np.array([1.0, 0, 0]), grad=False),
    case("bce weight", F.binary_cross_entropy, lambda x, t, w: TF.binary_cross_entropy(x, t, w.detach()), p(3, 4), p(3, 4), p(4), grad=False),
    case("bce logits pos_weight", lambda x, t, w: F.binary_cross_entropy_with_logits(x, t, pos_weight=w),
         lambda x, t, w: TF.binary_cross_entropy_with_logits(x, t, pos_weight=w.detach()), np.array([[0.0, 1, -2], [300, -300, 0]]), p(2, 3), p(3), grad=False),
    simple("binary_cross_entropy_with_logits", np.array([0.0, -300, 300]), np.array([1.0, 0.5, 0.0]), of=TF),
    *losses("kl_div", np.log(p(3, 4)), p(3, 4)), *losses("kl_div", np.log(p(3, 4)), np.log(p(3, 4)), log_target=True),
    attrs("kl_div", np.log(p(3, 4)), p(3, 4), of=TF, reduction="batchmean"),
    case("kl_div zero", lambda x, t: F.kl_div(x, t), lambda x, t: TF.kl_div(x, t), np.log(p(3)), np.array([0.0, 1, 0.5]), grad=False),
    simple("cosine_similarity", f(3, 4), f(3, 4), of=TF), attrs("cosine_similarity", f(3, 4), f(4), of=TF, dim=-1),
    attrs("margin_ranking_loss", f(5), f(5), np.sign(f(5)), of=TF, margin=0.3),
    simple("triplet_margin_loss", f(5, 3), f(5, 3), f(5, 3), of=TF),
]  # fmt: skip

CONV = [
    attrs("conv1d", f(2, 4, 9), f(6, 4, 3), f(6), of=TF, padding=1, stride=2),
    attrs("conv1d", f(2, 4, 9), f(6, 2, 3), of=TF, padding="same", groups=2, dilation=2),
    attrs("conv1d", f(2, 4, 9), f(6, 4, 4), of=TF, padding="same"),
    simple("conv2d", f(2, 3, 5, 6), f(4, 3, 3, 3), f(4), of=TF),
    simple("conv2d", f(3, 5, 6), f(4, 3, 3, 2), f(4), of=TF),
    attrs("conv2d", f(2, 3, 7, 6), f(4, 3, 3, 2), f(4), of=TF, stride=(2, 3), padding=(2, 1)),
    attrs("conv2d", f(2, 4, 7, 9), f(4, 1, 3, 3), f(4), of=TF, groups=4, padding=1, dilation=(1, 2)),
    attrs("conv2d", f(1, 4, 7, 9), f(1, 4, 7, 9), of=TF, padding="valid"),
    attrs("conv3d", f(1, 2, 4, 5, 3), f(3, 2, 2, 3, 1), f(3), of=TF, stride=(1, 2, 1), padding=(1, 0, 2)),
    attrs("conv_transpose1d", f(2, 4, 5), f(4, 3, 3), f(3), of=TF, stride=2, padding=1, output_padding=1),
    simple("conv_transpose2d", f(2, 3, 4, 5), f(3, 4, 3, 3), of=TF),
    attrs("conv_transpose2d", f(4, 4, 5), f(4, 3, 3, 2), f(6), of=TF, stride=(2, 3), padding=(1, 0), groups=2, dilation=(2, 1)),
    attrs("conv_transpose3d", f(1, 2, 2, 3, 2), f(2, 3, 2, 3, 1), f(3), of=TF, stride=2, output_padding=(0, 1, 1)),
]  # fmt: skip

_Q, _K, _V = f(2, 3, 4, 8), f(2, 3, 5, 8), f(2, 3, 5, 6)
_SDPA = TF.scaled_dot_product_attention
ATTENTION = [
    case("attention", F.scaled_dot_product_attention, _SDPA, _Q, _K, _V),
    case("attention causal", lambda *a: F.scaled_dot_product_attention(*a, is_causal=True), lambda *a: _SDPA(*a, is_causal=True), _Q, _K, _V),
    case("attention scale", lambda *a: F.scaled_dot_product_attention(*a, scale=0.3), lambda *a: _SDPA(*a, scale=0.3), _Q, _K, _V),
    case("attention mask", F.scaled_dot_product_attention, _SDPA, _Q, _K, _V, f(4, 5)),
    case("attention bool mask", F.scaled_dot_product_attention, _SDPA, _Q, _K, _V, np.arange(20).reshape(4, 5) % 3 > 0),
    case("attention empty row", F.scaled_dot_product_attention, _SDPA, _Q, _K, _V, np.arange(4)[:, None] > np.zeros((1, 5))),
    case("attention gqa", lambda *a: F.scaled_dot_product_attention(*a, enable_gqa=True), lambda *a: _SDPA(*a, enable_gqa=True),
         f(2, 4, 3, 8), f(2, 2, 5, 8), f(2, 2, 5, 6)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "arrays", "grad", "tol"),
    ELEMENTWISE + REDUCE + SHAPE + INDEXING + LINALG + ACTIVATION + NORMALIZATION + LOSS + CONV + ATTENTION,
)
def test_like_torch(ours, theirs, arrays, grad, tol):
    tensors = [torch.tensor(a) for a in arrays]
    if grad:
        tensors = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    want = flat(theirs(*tensors))
    got = run(lambda *v: flat(ours(*v)), *arrays)
    assert len(got) == len(want)
    for g, w in zip(got, want):
        w = w.detach().numpy()
        # PyTorch answers integer true division and the like in its default float dtype, as we do.
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=tol if g.dtype == np.float64 else 1e-6, atol=tol)
    floats = [w for w in want if w.is_floating_point()]
    if not grad or not any(w.requires_grad for w in floats):
        return
    cotangents = [torch.tensor(np.random.default_rng(3).standard_normal(w.shape)) for w in floats]
    leaves = [t for t in tensors if t.requires_grad]
    live = [(w, c) for w, c in zip(floats, cotangents) if w.requires_grad]
    expected = torch.autograd.grad([w for w, _ in live], leaves, [c for _, c in live], allow_unused=True)
    actual = gradients(ours, arrays, [c.numpy().astype(w.detach().numpy().dtype) for w, c in zip(floats, cotangents)])
    assert len(actual) == len(expected)
    for g, e, leaf in zip(actual, expected, leaves):
        e = torch.zeros_like(leaf) if e is None else e
        g = np.zeros(e.shape) if g is None else g
        np.testing.assert_allclose(g, e.numpy(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: F.conv2d(x, w, stride=0), "conv2d: stride is at least 1, not 0"),
        (lambda x, w: F.conv2d(x, w, padding="full"), "'valid' or 'same', not 'full'"),
        (lambda x, w: F.conv2d(x, w, padding="same", stride=2), "'same' needs stride 1"),
        (lambda x, w: F.conv2d(x, w, padding=(1, 2, 3)), r"padding is an int or 2 of them, not \(1, 2, 3\)"),
        (lambda x, w: F.conv2d(x, w, groups=0), "groups is at least 1"),
        (lambda x, w: F.conv2d(x, w, groups=3), "the kernel reads 3 channels, in 3 groups, but the input has 3"),
        (
            lambda x, w: F.conv2d(x, w, dilation=4),
            "spatial axis 0 the kernel covers 9 elements, the padded input only 5",
        ),
        (lambda x, w: F.conv2d(x, w, bias=F.sum(w)), "bias needs 1 dimensions"),
        (lambda x, w: F.conv2d(x, w, bias=F.sum(x, (0, 1, 2))), "needs 4 elements, one for each channel"),
        (lambda x, w: F.conv1d(x, w), r"conv1d: input, \[n, c, w\] or \[c, w\], needs 3 or 2 dimensions"),
        (
            lambda x, w: F.conv_transpose2d(x, F.transpose(w, 0, 1), output_padding=1),
            "output_padding 1 must be smaller",
        ),
    ],
)
def test_mistakes_in_convolutions(call, message):
    with pytest.raises(DuoError, match=message):
        run(call, f(2, 3, 5, 6), f(4, 3, 3, 3))
