"""What each instruction of CPython does to the shadow stack of `observe.py`.

An instruction of `_OPAQUE` empties the shadow, which is always right: below the known part of the stack everything is unknown. One that has
no line here may read or change the world outside without a guard: it makes a recording unfit for replay.

Sources: the `dis` module's documentation of each version, and `dis.stack_effect`, with which a test compares the shadow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

from duo.eager.tensor import EagerTensor
from duo.jit import guards
from duo.jit.observe import _HANDLERS, FRESH, MADE, NULL, PLAIN, UNKNOWN, Observer, _Frame, _Mark
from duo.nn.module import Module

Handler = Callable[[Observer, _Frame, Any, Any], None]
# What the versions of CPython do differently under one name. The others differ in the names of their instructions.
_FUSED = sys.version_info >= (3, 12)  # LOAD_ATTR also loads methods
_CALLABLE_BELOW = sys.version_info >= (3, 13)  # calls find the callable below, self or NULL above it
_PLAIN_FUNCTIONS = sys.version_info >= (3, 13)  # MAKE_FUNCTION takes only code; SET_FUNCTION_ATTRIBUTE gives the rest


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        for name in names:
            _HANDLERS[name] = function
        return function

    return register


@handles("RESUME", "NOP", "PRECALL", "CACHE", "EXTENDED_ARG", "COPY_FREE_VARS", "MAKE_CELL", "KW_NAMES", "JUMP_FORWARD", "JUMP_BACKWARD",
         "DELETE_FAST", "JUMP_BACKWARD_NO_INTERRUPT", "SETUP_ANNOTATIONS")  # fmt: skip
def _nothing(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    pass


@handles("PUSH_NULL")
def _null(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.push(NULL)


@handles("POP_TOP", "POP_JUMP_FORWARD_IF_FALSE", "POP_JUMP_FORWARD_IF_TRUE", "POP_JUMP_BACKWARD_IF_FALSE", "POP_JUMP_BACKWARD_IF_TRUE",
         "POP_JUMP_FORWARD_IF_NONE", "POP_JUMP_FORWARD_IF_NOT_NONE", "POP_JUMP_BACKWARD_IF_NONE", "POP_JUMP_BACKWARD_IF_NOT_NONE",
         "POP_JUMP_IF_FALSE", "POP_JUMP_IF_TRUE", "POP_JUMP_IF_NONE", "POP_JUMP_IF_NOT_NONE")  # fmt: skip
def _pop(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.pop()


@handles("COPY")
def _copy(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.push(f.stack[-i.arg] if len(f.stack) >= i.arg else UNKNOWN)


@handles("SWAP")
def _swap(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    while len(f.stack) < i.arg:
        f.stack.insert(0, UNKNOWN)
    f.stack[-1], f.stack[-i.arg] = f.stack[-i.arg], f.stack[-1]


@handles("LOAD_CONST")
def _const(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.push(i.argval)


@handles("RETURN_CONST")
def _return_const(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.stack.clear()


@handles("RETURN_VALUE", "YIELD_VALUE", "RETURN_GENERATOR")
def _return(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.stack[:] = f.stack[-1:]


@handles("LOAD_FAST", "LOAD_FAST_CHECK")
def _fast(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.push(_local(o, f, frame, i.argval))


@handles("LOAD_FAST_LOAD_FAST")
def _fast_fast(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    for name in i.argval:
        f.push(_local(o, f, frame, name))


@handles("LOAD_FAST_AND_CLEAR")
def _set_aside(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    """A comprehension uses the name of a local, which is stored again after it."""
    f.push(FRESH if i.argval in f.fresh else UNKNOWN)
    f.fresh.discard(i.argval)


@handles("STORE_FAST")
def _store_fast(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    _stored(f, i.argval, f.pop())


@handles("STORE_FAST_STORE_FAST")
def _store_store(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    for name in i.argval:
        _stored(f, name, f.pop())


@handles("STORE_FAST_LOAD_FAST")
def _store_load(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    _stored(f, i.argval[0], f.pop())
    f.push(UNKNOWN if i.argval[0] == i.argval[1] else _local(o, f, frame, i.argval[1]))


def _stored(f: _Frame, name: str, value: Any) -> None:
    if value is FRESH:
        f.fresh.add(name)
    else:
        f.fresh.discard(name)


def _local(o: Observer, f: _Frame, frame: Any, name: str) -> Any:
    code = frame.f_code
    if name in code.co_freevars or name in code.co_cellvars:  # a cell: Python 3.13 has no LOAD_CLOSURE of its own
        return _cell(o, f, frame, name)
    return o.local(f, frame, name)


def _cell(o: Observer, f: _Frame, frame: Any, name: str) -> Any:
    """A cell for a function that is made here. One of the enclosing function is read by that function: a guard for what it holds."""
    if name in frame.f_code.co_freevars and not f.inner:
        o.deref(f, frame, name)
        o.lent.add(name)
    return UNKNOWN


@handles("LOAD_CLOSURE")
def _closure(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.push(_cell(o, f, frame, i.argval))


@handles("LOAD_DEREF", "LOAD_CLASSDEREF")
def _deref(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    value = o.deref(f, frame, i.argval)
    if i.argval in f.fresh and value is not UNKNOWN:
        o.fresh[id(value)] = value
    f.push(value)


@handles("LOAD_FROM_DICT_OR_DEREF")
def _deref_in_class(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.pop()
    _deref(o, f, frame, i)


@handles("DELETE_DEREF")
def _delete_deref(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    if _from_outside(o, f, frame, i.argval):
        o.culprit(f"{i.argval!r} of the enclosing function is deleted", frame)


def _from_outside(o: Observer, f: _Frame, frame: Any, name: str) -> bool:
    """Whether a cell may be one that was there before."""
    return name in frame.f_code.co_freevars and (not f.inner or name in o.lent)


@handles("STORE_DEREF")
def _store_deref(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    _stored(f, i.argval, f.pop())
    if _from_outside(o, f, frame, i.argval):
        o.culprit(f"{i.argval!r} of the enclosing function is assigned", frame)


@handles("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME", "DELETE_NAME")
def _store_global(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    if i.opname.startswith("STORE"):
        f.pop()
    if i.opname.endswith("GLOBAL") or frame.f_locals is frame.f_globals:
        o.culprit(f"global {i.argval!r} is assigned", frame)


@handles("LOAD_GLOBAL")
def _global(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    value = o.global_(frame, i.argval)
    if i.arg & 1:
        _push_callable(f, value)
    else:
        f.push(value)


def _push_callable(f: _Frame, value: Any) -> None:
    """For a call without self."""
    for x in (value, NULL) if _CALLABLE_BELOW else (NULL, value):
        f.push(x)


@handles("LOAD_FROM_DICT_OR_GLOBALS")
def _global_in_class(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.pop()
    f.push(o.global_(frame, i.argval))


@handles("LOAD_NAME")
def _name(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    value = frame.f_locals.get(i.argval, UNKNOWN)
    f.push(value if value is not UNKNOWN else o.global_(frame, i.argval))


@handles("LOAD_ATTR")
def _attr(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    owner = f.pop()
    _loaded(o, f, owner, o.attribute(owner, i.argval, frame), _FUSED and bool(i.arg & 1))


def _loaded(o: Observer, f: _Frame, owner: Any, value: Any, method: bool) -> None:
    """Pushes what an attribute read gives, as a callable for methods; a property's value is known when its code has returned."""
    push = (lambda x: _push_callable(f, x)) if method else f.push
    if value is UNKNOWN and (owner.__class__ is not _Mark):

        def after(offset: int) -> None:
            push(f.returned)

        f.after = after
        return
    bound = isinstance(value, FunctionType) and not isinstance(owner, (type, ModuleType, _Mark))
    if bound and not any(v is value for v in getattr(owner, "__dict__", {}).values()):
        value = MethodType(value, owner)
    push(value)


@handles("LOAD_SUPER_ATTR")
def _super_attr(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.drop(3)
    if i.arg & 1:
        _push_callable(f, UNKNOWN)
    else:
        f.push(UNKNOWN)


@handles("LOAD_METHOD")
def _method(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    owner = f.pop()
    _loaded(o, f, owner, o.attribute(owner, i.argval, frame), True)


@handles("STORE_ATTR")
def _store_attr(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    owner = f.pop()
    f.pop()
    if (
        isinstance(owner, EagerTensor)
        and hasattr(owner, "__dict__")
        and not isinstance(getattr(type(owner), i.argval, None), property)
    ):
        o.culprit(f"attribute {i.argval!r} of a tensor is set", frame)
    o._store(owner, i.argval, frame)


@handles("DELETE_ATTR")
def _delete_attr(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    o._store(f.pop(), i.argval, frame)


@handles("CALL")
def _call(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    arguments = f.drop(i.arg)
    upper, lower = f.pop(), f.pop()
    if _CALLABLE_BELOW:
        function, me = lower, upper
    elif lower is NULL:
        function, me = upper, NULL
    else:
        function, me = lower, upper
    o.call(f, frame, function, arguments if me is NULL else [me, *arguments])


@handles("CALL_KW")
def _call_keywords(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.pop()  # the names
    _call(o, f, frame, i)


@handles("CALL_FUNCTION_EX")
def _call_ex(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    if i.arg & 1:
        f.pop()
    f.pop()
    upper, lower = f.pop(), f.pop()
    o.call(f, frame, lower if _CALLABLE_BELOW else upper, [UNKNOWN])


@handles("BINARY_OP")
def _binary(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    left, right = f.drop(2)
    if i.argrepr.endswith("=") and isinstance(left, (list, dict, set)) and id(left) not in o.fresh:
        o.culprit(f"a {type(left).__name__} that was there before is changed by {i.argrepr}", frame)
    if any(isinstance(x, guards.IMMUTABLE) or x is PLAIN for x in (left, right)) and not any(
        isinstance(x, EagerTensor) or x is UNKNOWN for x in (left, right)
    ):
        f.push(PLAIN)
        return
    o.result(f)


@handles(
    "COMPARE_OP", "CONTAINS_OP", "UNARY_NEGATIVE", "UNARY_POSITIVE", "UNARY_INVERT", "IS_OP", "UNARY_NOT", "TO_BOOL"
)
def _compare(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    operands = f.drop(2 if i.opname.endswith("OP") else 1)
    if i.opname in ("IS_OP", "CONTAINS_OP", "UNARY_NOT", "TO_BOOL") or not any(
        isinstance(x, EagerTensor) or x is UNKNOWN for x in operands
    ):
        f.push(PLAIN)
        return
    o.result(f)


@handles("BINARY_SUBSCR")
def _subscript(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    container, key = f.drop(2)
    if isinstance(container, (list, tuple, dict, str, range)) and isinstance(key, (int, str, float, tuple)) and type(container).__getitem__ in (
        list.__getitem__, tuple.__getitem__, dict.__getitem__, str.__getitem__, range.__getitem__,
    ):  # fmt: skip
        try:
            f.push(container[key])  # type: ignore[index]
        except Exception:
            f.push(UNKNOWN)
        return
    o.result(f, _subscripted_in_python(container))


def _subscripted_in_python(container: Any) -> bool:
    return isinstance(container, (EagerTensor, Module)) or hasattr(
        getattr(type(container), "__getitem__", None), "__code__"
    )


@handles("BINARY_SLICE")
def _slice(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    container = f.drop(3)[0]
    o.result(f, _subscripted_in_python(container))


@handles("STORE_SLICE")
def _store_slice(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    _changed(o, f.drop(4)[1], frame)


@handles("STORE_SUBSCR")
def _store_subscript(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    _, container, _ = f.drop(3)
    _changed(o, container, frame)


@handles("DELETE_SUBSCR")
def _delete_subscript(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    container, _ = f.drop(2)
    _changed(o, container, frame)


def _changed(o: Observer, container: Any, frame: Any) -> None:
    if isinstance(container, EagerTensor) or container is FRESH or id(container) in o.fresh:
        return
    if hasattr(getattr(type(container), "__setitem__", None), "__code__") and container.__class__ is not _Mark:
        return  # Python code, which is seen
    kind = (
        "a value that is not known"
        if container.__class__ is _Mark
        else f"a {type(container).__name__} that was there before"
    )
    o.culprit(f"an element of {kind} is set", frame)


def _makes(outcome: Any, count: Callable[[Any], int]) -> Handler:
    def handler(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
        f.drop(count(i))
        f.push(outcome)

    return handler


_HANDLERS.update(
    {
        "BUILD_LIST": _makes(FRESH, lambda i: i.arg),
        "BUILD_SET": _makes(FRESH, lambda i: i.arg),
        "BUILD_MAP": _makes(FRESH, lambda i: 2 * i.arg),
        "BUILD_CONST_KEY_MAP": _makes(FRESH, lambda i: i.arg + 1),
        "BUILD_STRING": _makes(PLAIN, lambda i: i.arg),
        "BUILD_SLICE": _makes(PLAIN, lambda i: i.arg),
        "FORMAT_VALUE": _makes(PLAIN, lambda i: 2 if i.arg & 4 else 1),
        "FORMAT_SIMPLE": _makes(PLAIN, lambda i: 1),
        "FORMAT_WITH_SPEC": _makes(PLAIN, lambda i: 2),
        "CONVERT_VALUE": _makes(PLAIN, lambda i: 1),
        "GET_LEN": _makes(PLAIN, lambda i: 0),
    }
)


@handles("LIST_APPEND", "SET_ADD", "LIST_EXTEND", "SET_UPDATE", "DICT_UPDATE", "DICT_MERGE")
def _grow(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.pop()


@handles("MAP_ADD")
def _map_add(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.drop(2)


@handles("LIST_TO_TUPLE")
def _to_tuple(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.pop()
    f.push(UNKNOWN)


@handles("BUILD_TUPLE")
def _tuple(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    parts = f.drop(i.arg)
    f.push(PLAIN if any(p.__class__ is _Mark for p in parts) else tuple(parts))


@handles("UNPACK_SEQUENCE")
def _unpack(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    value = f.pop()
    if isinstance(value, (tuple, list)) and len(value) == i.arg:
        for x in reversed(value):
            f.push(x)
        return
    for _ in range(i.arg):
        f.push(UNKNOWN)


@handles("GET_ITER")
def _iter(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.pop()
    f.push(UNKNOWN)


@handles("FOR_ITER")
def _for(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    following = f.last

    def after(offset: int) -> None:
        if offset == following:
            f.push(UNKNOWN)
        else:
            f.pop()

    f.after = after


@handles("JUMP_IF_TRUE_OR_POP", "JUMP_IF_FALSE_OR_POP")
def _jump_or_pop(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    following = f.last

    def after(offset: int) -> None:
        if offset == following:
            f.pop()

    f.after = after


@handles("MAKE_FUNCTION")
def _function(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    code = f.pop()
    if hasattr(code, "co_code"):
        o.made_codes.add(code)
    if not _PLAIN_FUNCTIONS:
        f.drop(bin(i.arg).count("1"))
    f.push(MADE)


@handles("SET_FUNCTION_ATTRIBUTE")
def _function_attribute(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    function, _ = f.pop(), f.pop()
    f.push(function)


@handles("CALL_INTRINSIC_1")
def _intrinsic(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    operand = f.pop()
    if i.argrepr == "INTRINSIC_UNARY_POSITIVE" and (isinstance(operand, EagerTensor) or operand is UNKNOWN):
        o.result(f)
    else:
        f.push(PLAIN if i.argrepr == "INTRINSIC_UNARY_POSITIVE" else UNKNOWN)


@handles("IMPORT_NAME")
def _import(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.drop(2)
    f.push(UNKNOWN)


@handles("IMPORT_FROM")
def _import_from(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    o.culprit(f"{i.argval!r} is imported inside; import it at the top of the file", frame)
    f.push(UNKNOWN)


@handles("LOAD_ASSERTION_ERROR", "LOAD_BUILD_CLASS")
def _constant(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.push(UNKNOWN)


@handles("MATCH_CLASS")
def _match_class(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    o.culprit("a class pattern of a match statement reads attributes", frame)
    f.stack.clear()


# They read nothing that has no guard by then, and change nothing that was there before.
_OPAQUE = (
    "BEFORE_WITH", "WITH_EXCEPT_START", "PUSH_EXC_INFO", "CHECK_EXC_MATCH", "CHECK_EG_MATCH", "PREP_RERAISE_STAR", "POP_EXCEPT", "RAISE_VARARGS",
    "RERAISE", "CLEANUP_THROW", "CALL_INTRINSIC_2", "MATCH_KEYS", "MATCH_MAPPING", "MATCH_SEQUENCE", "UNPACK_EX", "SEND", "END_SEND", "END_FOR",
    "GET_YIELD_FROM_ITER", "LOAD_LOCALS",
)  # fmt: skip


@handles(*_OPAQUE)
def _opaque(o: Observer, f: _Frame, frame: Any, i: Any) -> None:
    f.stack.clear()
