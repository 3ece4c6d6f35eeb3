"""The verifier: one broken Function per rule, each with its message; and what is right passes."""

from __future__ import annotations

import pytest

import duo_ir.ops as ops
from duo_ir.core import Builder, Function, Loc, Op, Value, function_of
from duo_ir.errors import VerifyError
from duo_ir.types import Dim, TensorType, bool_, f32, f64, i64
from duo_ir.verify import verify

B, T = Dim.symbol("b"), Dim.symbol("t")
S = TensorType(f32)
V = TensorType(f32, (3,))


def param(type=V, index=0):
    return Value(type, None, index)


def raw(definition, operands, attrs, types, loc=None):
    """An op that nothing has checked."""
    return Op(definition, tuple(operands), attrs, types, loc)


def use_before_definition():
    x = param()
    late = raw(ops.neg, [x], {}, [V])
    return Function([x], [raw(ops.neg, [late.result], {}, [V]), late], [])


def foreign_operand():
    return Function([param()], [raw(ops.neg, [param()], {}, [V])], [])


def captured():
    x = param()
    region = Function([], [], [x])
    flag = param(TensorType(bool_), 1)
    return Function([x, flag], [raw(ops.cond, [flag], {"then": region, "orelse": region}, [V])], [])


def twice_the_op():
    x = param()
    op = raw(ops.neg, [x], {}, [V])
    return Function([x], [op, op], [])


def stolen_result():
    x = param()
    op, other = raw(ops.neg, [x], {}, [V]), raw(ops.neg, [x], {}, [V])
    op.results = other.results
    return Function([x], [op], [])


def same_parameter_twice():
    x = param()
    return Function([x, x], [], [])


def result_as_parameter():
    x = param()
    return Function([raw(ops.neg, [x], {}, [V]).result], [], [])


def undefined_result():
    return Function([param()], [], [param()])


def wrong_type():
    x = param()
    return Function([x], [raw(ops.neg, [x], {}, [TensorType(f64, (3,))])], [])


def type_rule_refuses():
    x, y = param(), param(TensorType(f32, (4,)), 1)
    return Function([x, y], [raw(ops.add, [x, y], {}, [V])], [])


def too_many_operands():
    x = param()
    return Function([x], [raw(ops.neg, [x, x], {}, [V])], [])


def missing_attribute():
    x = param()
    return Function([x], [raw(ops.sum, [x], {}, [S])], [])


def unknown_attribute():
    x = param()
    return Function([x], [raw(ops.neg, [x], {"axis": 1}, [V])], [])


def list_attribute():
    x = param()
    return Function([x], [raw(ops.sum, [x], {"axes": [0]}, [S])], [])


def object_in_tuple():
    x = param()
    return Function([x], [raw(ops.sum, [x], {"axes": (0, object())}, [S])], [])


def attribute_of_another_kind():
    x = param()
    return Function([x], [raw(ops.cast, [x], {"dtype": 3}, [V])], [])


def negative_size():
    return Function([param(TensorType(f32, (3, -1)))], [], [])


def size_that_is_no_size():
    forged = object.__new__(TensorType)
    forged.dtype, forged.shape, forged._hash = f32, (3, 2.0), 0
    return Function([param(forged)], [], [])


def no_type():
    return Function([param("f32[3]")], [], [])


def unbound_size():
    with Builder() as b:
        x = b.parameter(S)
        y = ops.broadcast(x, shape=(B,))
    return b.build([y])


def unbound_size_in_attribute():
    with Builder() as b:
        b.parameter(TensorType(f32, (B * T, B)))
        y = ops.size(dim=T)
    return b.build([y])


def names_and_parameters_differ():
    return Function([param()], [], [], names=["a", "b"])


def broken_branch():
    x, flag = param(), param(TensorType(bool_), 1)
    bad = use_before_definition()
    bad = Function(bad.params, bad.ops, [bad.ops[0].result])
    return Function([x, flag], [raw(ops.cond, [flag, x], {"then": bad, "orelse": bad}, [V])], [])


def branch_of_another_type():
    x, flag = param(), param(TensorType(bool_), 1)
    good = function_of(lambda v: v, TensorType(f64, (3,)))
    return Function([x, flag], [raw(ops.cond, [flag, x], {"then": good, "orelse": good}, [V])], [])


BROKEN = [
    (use_before_definition, "operands are defined before use", "is defined only later"),
    (foreign_operand, "operands are defined before use", "is not a value of this function"),
    (captured, "results are defined", "captures nothing"),
    (twice_the_op, "results belong to their op", "twice"),
    (stolen_result, "results belong to their op", "result 0 says"),
    (same_parameter_twice, "parameters are unique", "parameter 1 is there twice"),
    (result_as_parameter, "parameters are unique", "is the result of"),
    (undefined_result, "results are defined", "result 0"),
    (wrong_type, "recorded types are the inferred ones", "records (f64[3]), but its operands give (f32[3])"),
    (type_rule_refuses, "types are valid", "one shape"),
    (too_many_operands, "operands and attributes fit the definition", "cannot take 2 operands"),
    (missing_attribute, "operands and attributes fit the definition", "axes"),
    (unknown_attribute, "operands and attributes fit the definition", "axis"),
    (list_attribute, "attributes are static and hashable", "is a list"),
    (object_in_tuple, "attributes are static and hashable", "is a object"),
    (attribute_of_another_kind, "types are valid", "DType"),
    (negative_size, "types are valid", "-1 elements along axis 1"),
    (size_that_is_no_size, "types are valid", "size 2.0 along axis 1"),
    (no_type, "types are valid", "not a TensorType"),
    (unbound_size, "named sizes are axes of parameters", "size b is used"),
    (unbound_size_in_attribute, "named sizes are axes of parameters", "size t is used"),
    (names_and_parameters_differ, "names", "2 names for 1 parameters"),
    (broken_branch, "operands are defined before use", "is defined only later"),
    (branch_of_another_type, "types are valid", "cond"),
]


@pytest.mark.parametrize("make, rule, message", BROKEN, ids=[m.__name__ for m, _, _ in BROKEN])
def test_broken(make, rule, message):
    function = make()
    with pytest.raises(VerifyError) as caught:
        verify(function)
    text = str(caught.value)
    assert f"breaks the rule '{rule}'" in text and message in text and "to do: " in text


def test_message_shows_the_place(tmp_path):
    file = tmp_path / "train.py"
    file.write_text("import duo\n\nloss = model(x) + penalty\n")
    x = param()
    earlier = [raw(ops.neg, [x], {}, [V]) for _ in range(9)]
    bad = raw(ops.add, [x, earlier[3].result], {}, [TensorType(f64, (3,))], Loc.of(str(file), 3))
    later = [raw(ops.neg, [x], {}, [V]) for _ in range(9)]
    with pytest.raises(VerifyError) as caught:
        verify(Function([x], [*earlier, bad, *later], [], names=["x"]))
    lines = str(caught.value).split("\n")
    assert "  op: add(%x: f32[3], %4: f32[3]) -> f64[3]" in lines
    assert "  > %10: f64[3] = add %x, %4   # train.py:3" in lines
    assert sum("= neg" in line for line in lines) == 10
    assert f"  source: {file}:3: loss = model(x) + penalty" in lines


def test_right_functions_pass():
    def program(x, flag):
        y = ops.add(x, x)
        branch = function_of(lambda v: ops.neg(v), y.type, name="branch")
        return ops.cond(flag, y, then=branch, orelse=branch), ops.size(dim=B + 1)

    verify(function_of(program, TensorType(f32, (B, B * 2)), TensorType(bool_)))
    verify(Function([], [], []))
    verify(function_of(lambda x: x, TensorType(i64, (0,))))
