"""The text form: golden page, round trips, exact attributes, errors with line numbers."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

import duo_ir.ops as ops
from duo_ir.core import Builder, Function, Loc, function_of
from duo_ir.errors import TextError
from duo_ir.opdef import REGISTRY, Generate, OpDef
from duo_ir.text import parse, to_text
from duo_ir.types import DTYPES, Dim, TensorType, bool_, f32, i64

B = Dim.symbol("b")


@pytest.fixture(scope="module")
def anything():
    """An op that takes any operands and any attributes, and gives f32[]."""
    op = OpDef("test_anything", lambda *types, **attrs: TensorType(f32), Generate(lambda s, *a, **k: None))
    yield op
    del REGISTRY["test_anything"]


def sample() -> Function:
    builder = Builder("main")
    with builder:
        x = builder.parameter(TensorType(f32, (B, 784)), "x")
        w = builder.parameter(TensorType(f32, (784, 512)), "w")
        builder.loc = Loc.of("/home/someone/train.py", 14)
        h = ops.matmul(x, w)
        builder.loc = Loc.of("/home/someone/train.py", 15)
        zero = ops.broadcast(ops.constant(value=-0.0, dtype=f32), shape=(B, 512))
        y = ops.maximum(h, zero)
        total = ops.sum(y, axes=(0, 1))
        builder.loc = None
        positive = ops.gt(total, ops.constant(value=math.inf, dtype=f32))
        branch = lambda f: function_of(f, TensorType(f32), name=f.__name__)  # noqa: E731

        def double(v):
            return ops.add(v, v)

        def keep(v):
            return v

        out = ops.cond(positive, total, then=branch(double), orelse=branch(keep))
    return builder.build([out, y])


def test_golden(golden):
    golden("sample.txt", to_text(sample()))


def test_round_trip_keeps_structure_names_and_places():
    f = sample()
    g = parse(to_text(f))
    assert g.key() == f.key() and g.hash == f.hash and g.names == f.names and g.name == f.name
    assert to_text(g) == to_text(f) == str(f)
    assert (g.ops[0].loc.file, g.ops[0].loc.line) == ("train.py", 14) and g.ops[-1].loc is None
    assert "train.py" not in to_text(f, locations=False)
    assert parse(to_text(f, locations=False)).key() == f.key()


def test_names_that_are_not_unique_or_not_names_become_numbers():
    t = TensorType(f32)
    f = function_of(lambda *v: v, *[t] * 6, names=["a", "a", "3x", "b c", "layer.0.weight", ""], name="<lambda>")
    text = to_text(f)
    assert text.startswith(
        'func @"<lambda>"(%0: f32[], %1: f32[], %2: f32[], %3: f32[], %layer.0.weight: f32[], %5: f32[])'
    )
    assert parse(text).key() == f.key() and parse(text).name == "<lambda>"


def test_no_parameters_and_no_results():
    empty = Function([], [], [])
    assert to_text(empty) == "func @main() -> () {\n  return\n}\n"
    assert parse(to_text(empty)).key() == empty.key()


scalars = st.one_of(
    st.floats(), st.integers(-(2**64), 2**64), st.booleans(), st.none(), st.text(max_size=8),
    st.sampled_from(list(DTYPES.values())),
    st.sampled_from([B, 2 * B + 1, B * Dim.symbol("t"), -B, B - 3, Dim.symbol("f32"), Dim.symbol("nan") * 2, Dim.symbol("dim")]),
)  # fmt: skip
attributes = st.recursive(scalars, lambda s: st.lists(s, max_size=3).map(tuple), max_leaves=8)


@given(st.dictionaries(st.sampled_from(["value", "axes", "dtype", "f32", "x1"]), attributes, max_size=3))
def test_attributes_are_exact(anything, attrs):
    builder = Builder()
    with builder:
        anything(**attrs)
    f = builder.build(builder.ops[0].results)
    g = parse(to_text(f))
    assert g.key() == f.key()
    assert repr(dict(sorted(attrs.items()))) == repr(g.ops[0].attrs)


@given(st.floats(width=64))
def test_floats_keep_every_bit(anything, x):
    builder = Builder()
    with builder:
        anything(value=x)
    (op,) = parse(to_text(builder.build([]))).ops
    y = op.attrs["value"]
    assert (math.isnan(x) and math.isnan(y)) or struct.pack("<d", x) == struct.pack("<d", y)


def test_nested_functions_nest(anything):
    inner = function_of(lambda x: ops.neg(x), TensorType(f32), name="inner")
    middle = Builder("middle")
    with middle:
        v = middle.parameter(TensorType(f32), "v")
        middle.loc = Loc.of("a file.py", 3)
        r = anything(v, body=inner, s="# not a comment: 3 {", t=(inner, 1))
    outer = Builder()
    with outer:
        p = outer.parameter(TensorType(f32, (B,)), "p")
        anything(p, body=middle.build([r]))
    f = outer.build([p])
    g = parse(to_text(f))
    assert g.key() == f.key() and to_text(g) == to_text(f)
    assert g.ops[0].attrs["body"].ops[0].loc.file == "a file.py"


def test_text_may_be_written_by_hand():
    f = parse("""
    # a comment
    func @main(%x: f32[b,2*b-1+t], %0: i64[]) -> f32[b,2*b+t-1] {

      %y: f32[b,2*b+t-1] = neg %x     # no location: 3 apples
      # another
      return %y
    }
    """)
    assert [op.definition.name for op in f.ops] == ["neg"] and f.ops[0].loc is None and f.names == ("x", "")


ERRORS = [
    ("fun @main() -> () {", 1, "expected 'func'"),
    ("func main() -> () {", 1, "a function's name"),
    ("func @main(%x: f33[]) -> () {", 1, "'f33' is not a dtype"),
    ("func @main(%x f32[]) -> () {", 1, "expected ':'"),
    ("func @main(%x: f32[], %x: f32[]) -> () {", 1, "defined twice"),
    ("func @main(%x: f32[1.5]) -> () {", 1, "a size is an integer"),
    ("func @main(%x: f32[?]) -> () {", 1, "unexpected character '?'"),
    ("func @main() -> () {\n  return\n", 3, "expected '}', found the end of the text"),
    ("func @main() -> () {\n  return\n}\nfunc", 4, "expected the end of the text"),
    ("func @main() -> f32[] {\n  return\n}", 2, "returns (), but the function's head says (f32[])"),
    ("func @main() -> f32[] {\n  return %x\n}", 2, "%x is used before it is defined"),
    ("func @main(%x: f32[]) -> () {\n\n  %1: f32[] = nix %x\n  return\n}", 3, "there is no op 'nix'"),
    ("func @main(%x: f32[]) -> () {\n  %1: f64[] = neg %x\n  return\n}", 2, "the line says f64[], but neg gives f32[]"),
    ("func @main(%x: f32[]) -> () {\n  %1: f32[] = neg %x, %x\n  return\n}", 2, "neg"),
    ("func @main(%x: bool[]) -> () {\n  %1: bool[] = neg %x\n  return\n}", 2, "neg(bool[])"),
    ("func @main(%x: f32[]) -> () {\n  %1: f32[] = neg %2\n  return\n}", 2, "%2 is used before"),
    ("func @main(%x: f32[]) -> () {\n  %x: f32[] = neg %x\n  return\n}", 2, "%x is defined twice"),
    ("func @main(%x: f32[]) -> () {\n  %1: f32[] = neg %x %x\n  return\n}", 2, "the end of the line"),
    ("func @main() -> () {\n  %0: f32[] = constant {value=}\n  return\n}", 2, "an attribute's value"),
    ("func @main() -> () {\n  %0: f32[] = constant {value=" + "(" * 9999 + "\n", 2, "nested more than"),
    ("func @main(%x: f32[" + "9" * 5000 + "]) -> () {", 1, "a number of 5000 digits"),
    ('func @main() -> () {\n  %0: f32[] = constant {value="\\q"}', 2, "not a string"),
    ("func @main() -> () {\n  %0: f32[] = constant {value=(1,), dtype=None}\n", 2, "constant"),
    ("func @main(%x: f32[]) -> () {\n  %1: f32[] = cast %x {dtype=3}\n", 2, "DType"),
    ("func @main() -> () {\n  %0: f32[] = constant {value=1.0, value=2.0}\n  return\n}", 2, "given twice"),
]


@pytest.mark.parametrize("text, line, message", ERRORS)
def test_errors_name_line_and_expectation(text, line, message):
    with pytest.raises(TextError) as caught:
        parse(text)
    assert f"line {line}: " in str(caught.value) and message in str(caught.value)
    assert [*text.split("\n"), ""][line - 1].strip() in str(caught.value)


@given(st.text(alphabet='func @main(%x: f32[b]) -> {return}= neg"#,\n-1.5e', max_size=60))
def test_any_text_is_a_function_or_an_error(text):
    for candidate in (text, "func @main(%x: f32[]) -> f32[] {\n" + text + "\n return %x\n}"):
        try:
            parse(candidate)
        except TextError:
            pass


def test_types_print_as_they_read():
    f = function_of(lambda *v: v, TensorType(bool_, (0, 1)), TensorType(i64, (B - 3, 2 * B)))
    assert parse(to_text(f)).param_types == f.param_types
