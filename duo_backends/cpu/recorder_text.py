"""LLVM text of the recorder: what an eager op does before anything runs, for steps that have been seen before.

It is `duo/eager/trace.py`'s recording without Python code in between, an eighth of its time. Whatever is not the common case (a new
step, a view that must be read again, a trace that is full) is left to the Python functions it stands for, which do all from the start. Objects
and the offsets of their slots come from the frontend. `trace_text.py` finds the trace and the operands' numbers in it, `lane_text.py` flushes,
`share_text.py` looks at values; `object_text.py` says what the words mean that are not LLVM's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from duo_backends.cpu import lane_text, object_text, share_text, trace_text
from duo_backends.cpu.lane_text import LANE, LANE_WORDS

MAX_OPERANDS = 8
_OBJECTS = ("empty", "float", "bool", "tuple", "tensor", "hooks", "record", "elsewhere")
_SLOTS = (
    "tensor._chain", "tensor._leaf", "hooks.busy", "node.key", "node.special", "node.stop", "node.depth", "node.lasti", "node.code", "node.info", "node.infos",
)  # fmt: skip
# Objects that the frontend names, beside the bodies of operators.
OBJECTS = (*trace_text.OBJECTS, *_OBJECTS, *lane_text.OBJECTS, *share_text.OBJECTS)
SLOTS = (*trace_text.SLOTS, *_SLOTS, *lane_text.SLOTS, *share_text.SLOTS)

_RECORDER = """
; Whether attributes are those of a step's key, or tuples of the same plain objects and equal ints.
define internal i1 @duo.same(ptr %a, ptr %b, i64 %depth) nounwind {
entry:
  %one = icmp eq ptr %a, %b
  br i1 %one, label %yes, label %classes
classes:
  %class = call ptr @duo.class(ptr %a)
  %class.b = call ptr @duo.class(ptr %b)
  %alike = icmp eq ptr %class, %class.b
  br i1 %alike, label %kind, label %no
kind:
  %int = const int
  %is.int = icmp eq ptr %class, %int
  br i1 %is.int, label %ints, label %tuple
ints:
  %equal = call i32 @PyObject_RichCompareBool(ptr %a, ptr %b, i32 2)
  %yes.int = icmp eq i32 %equal, 1
  ret i1 %yes.int
tuple:
  %tuple.class = const tuple
  %is.tuple = icmp eq ptr %class, %tuple.class
  %shallow = icmp ult i64 %depth, 3
  %both = and i1 %is.tuple, %shallow
  br i1 %both, label %sizes, label %no
sizes:
  %n = call i64 @PyTuple_Size(ptr %a)
  %m = call i64 @PyTuple_Size(ptr %b)
  %deeper = add i64 %depth, 1
  %long = icmp eq i64 %n, %m
  br i1 %long, label %next, label %no
next:
  %k = phi i64 [ 0, %sizes ], [ %k2, %one.more ]
  %more = icmp ult i64 %k, %n
  br i1 %more, label %item, label %yes
item:
  %ia = call ptr @PyTuple_GetItem(ptr %a, i64 %k)
  %ib = call ptr @PyTuple_GetItem(ptr %b, i64 %k)
  %same.item = call i1 @duo.same(ptr %ia, ptr %ib, i64 %deeper)
  br i1 %same.item, label %one.more, label %no
one.more:
  %k2 = add i64 %k, 1
  br label %next
yes:
  ret i1 true
no:
  ret i1 false
}

; What comes after the entry of a special node: whether it was recorded on the line of its node, or else what Python does then. 1: there is an error.
define internal i32 @duo.place(ptr %trace, ptr %node, ptr %made) nounwind {
entry:
  %arguments = alloca [5 x ptr]
  %depth.object = get node.depth %node
  %depth = call i64 @PyLong_AsLongLong(ptr %depth.object)
  %current = call ptr @PyEval_GetFrame()
  %alone = icmp eq ptr %current, null
  br i1 %alone, label %right, label %walk
right:
  ret i32 0
walk:
  call void @Py_IncRef(ptr %current)
  call void @Py_IncRef(ptr %current)
  br label %next
next:
  %frame = phi ptr [ %current, %walk ], [ %back, %outward ]
  %k = phi i64 [ 1, %walk ], [ %k2, %outward ]
  %k2 = add i64 %k, 1
  %more = icmp slt i64 %k, %depth
  br i1 %more, label %out, label %found
out:
  %back = call ptr @PyFrame_GetBack(ptr %frame)
  %outermost = icmp eq ptr %back, null
  br i1 %outermost, label %found, label %outward
outward:
  call void @Py_DecRef(ptr %frame)
  br label %next
found:
  %lasti = call i32 @PyFrame_GetLasti(ptr %frame)
  %code = call ptr @PyFrame_GetCode(ptr %frame)
  %node.lasti.object = get node.lasti %node
  %node.lasti = call i64 @PyLong_AsLongLong(ptr %node.lasti.object)
  %node.code = get node.code %node
  %wide = sext i32 %lasti to i64
  %same.place = icmp eq i64 %wide, %node.lasti
  %same.code = icmp eq ptr %code, %node.code
  %same = and i1 %same.place, %same.code
  call void @Py_DecRef(ptr %code)
  br i1 %same, label %good, label %elsewhere
good:
  br label %end
elsewhere:
  store ptr %trace, ptr %arguments
  %a1 = getelementptr ptr, ptr %arguments, i64 1
  store ptr %node, ptr %a1
  %a2 = getelementptr ptr, ptr %arguments, i64 2
  store ptr %made, ptr %a2
  %a3 = getelementptr ptr, ptr %arguments, i64 3
  store ptr %current, ptr %a3
  %a4 = getelementptr ptr, ptr %arguments, i64 4
  store ptr %frame, ptr %a4
  %elsewhere.python = const elsewhere
  %done = call ptr @PyObject_Vectorcall(ptr %elsewhere.python, ptr %arguments, i64 5, ptr null)
  %error = icmp eq ptr %done, null
  drop %done
  br label %end
end:
  %failed = phi i1 [ false, %good ], [ %error, %elsewhere ]
  call void @Py_DecRef(ptr %frame)
  call void @Py_DecRef(ptr %current)
  %result = zext i1 %failed to i32
  ret i32 %result
}

; Records body(*operands, *attrs) and gives the tensor; null without an error: nothing was recorded. attrs: null if there are none.
define internal ptr @duo.record(ptr %body, ptr %operands, i64 %count, ptr %attrs) nounwind {
entry:
  %numbers = alloca [MAX_OPERANDS x i64]
  %classes = alloca [MAX_OPERANDS x ptr]
  %none = const none
  %true = const true
  %hooks = const hooks
  %busy = get hooks.busy %hooks
  %is.busy = icmp eq ptr %busy, %true
  %many = icmp ugt i64 %count, MAX_OPERANDS
  %r0 = or i1 %is.busy, %many
  br i1 %r0, label %never, label %find.trace
never:
  ret ptr null
find.trace:
  %state = call ptr @duo.state()
  %no.state = icmp eq ptr %state, null
  br i1 %no.state, label %never, label %find.current
find.current:
  %trace.name = const trace_name
  %current = call ptr @PyDict_GetItem(ptr %state, ptr %trace.name)
  %lost = icmp eq ptr %current, null
  br i1 %lost, label %never, label %is.open
is.open:
  call void @Py_IncRef(ptr %current)
  %trace.class = const Trace
  %current.class = call ptr @duo.class(ptr %current)
  %ordinary = icmp eq ptr %current.class, %trace.class
  br i1 %ordinary, label %is.open.still, label %foreign
foreign:
  call void @Py_DecRef(ptr %current)
  br label %never
is.open.still:
  %current.entries = get trace.entries %current
  %current.last = call ptr @duo.last(ptr %current.entries)
  %end = const END
  %is.closed = icmp eq ptr %current.last, %end
  br i1 %is.closed, label %open, label %opened
open:
  %device = get trace.device %current
  %cpu = const cpu
  %on.cpu = icmp eq ptr %device, %cpu
  br i1 %on.cpu, label %open.again, label %foreign
open.again:
  %again = call i1 @duo.reopen(ptr %current)
  br i1 %again, label %opened, label %open.new
open.new:
  call void @Py_DecRef(ptr %current)
  %fresh = call ptr @duo.open()
  %unopened = icmp eq ptr %fresh, null
  br i1 %unopened, label %never, label %opened
opened:
  %trace = phi ptr [ %current, %is.open.still ], [ %current, %open.again ], [ %fresh, %open.new ]
  %float = const float
  %int = const int
  %bool = const bool
  %tensor = const tensor
  br label %next.operand
next.operand:
  %k = phi i64 [ 0, %opened ], [ %k2, %operand.done ]
  %scalar.count = phi i64 [ 0, %opened ], [ %scalar.count2, %operand.done ]
  %more = icmp ult i64 %k, %count
  br i1 %more, label %operand, label %allocate
operand:
  %operand.at = getelementptr ptr, ptr %operands, i64 %k
  %object = load ptr, ptr %operand.at
  %class = call ptr @duo.class(ptr %object)
  %class.at = getelementptr ptr, ptr %classes, i64 %k
  %number.at = getelementptr i64, ptr %numbers, i64 %k
  %is.tensor = icmp eq ptr %class, %tensor
  br i1 %is.tensor, label %a.tensor, label %other
other:
  %is.float = icmp eq ptr %class, %float
  %is.int = icmp eq ptr %class, %int
  %is.bool = icmp eq ptr %class, %bool
  %n1 = or i1 %is.float, %is.int
  %n2 = or i1 %n1, %is.bool
  br i1 %n2, label %a.number, label %derived
derived:
  %subtype = call i32 @PyType_IsSubtype(ptr %class, ptr %tensor)
  %is.derived = icmp ne i32 %subtype, 0
  br i1 %is.derived, label %a.tensor, label %refuse
a.number:
  store ptr %class, ptr %class.at
  %scalar.more = add i64 %scalar.count, 1
  br label %operand.done
a.tensor:
  store ptr null, ptr %class.at
  %number = call i64 @duo.number(ptr %trace, ptr %object)
  store i64 %number, ptr %number.at
  %unknown = icmp eq i64 %number, 0
  br i1 %unknown, label %refuse, label %operand.done
operand.done:
  %scalar.count2 = phi i64 [ %scalar.more, %a.number ], [ %scalar.count, %a.tensor ]
  %k2 = add i64 %k, 1
  br label %next.operand

allocate:
  %value.class = const Val
  %made = call ptr @PyType_GenericAlloc(ptr %value.class, i64 0)
  %out = call ptr @PyType_GenericAlloc(ptr %tensor, i64 0)
  %has.scalars = icmp ne i64 %scalar.count, 0
  br i1 %has.scalars, label %new.scalars, label %allocated
new.scalars:
  %tuple = call ptr @PyTuple_New(i64 %scalar.count)
  br label %allocated
allocated:
  %scalars = phi ptr [ %none, %allocate ], [ %tuple, %new.scalars ]
  %lacking = missing %made %out %scalars
  br i1 %lacking, label %memory, label %look
look:
  %entries = get trace.entries %trace
  %last = call ptr @duo.last(ptr %entries)
  %closed = icmp eq ptr %last, %end
  br i1 %closed, label %drop, label %step
step:
  %parent = get value.node %last
  %node = get node.hot %parent
  %found.class = call ptr @duo.class(ptr %node)
  %node.class = const Node
  %is.node = icmp eq ptr %found.class, %node.class
  br i1 %is.node, label %key, label %drop
key:
  %stop = get node.stop %node
  %stops = icmp eq ptr %stop, %true
  %infos = get node.infos %node
  %results = call i64 @PyTuple_Size(ptr %infos)
  %several = icmp ne i64 %results, 1
  %key.tuple = get node.key %node
  %key.size = call i64 @PyTuple_Size(ptr %key.tuple)
  %bare = icmp eq ptr %attrs, null
  %extra.items = select i1 %bare, i64 1, i64 3
  %size = add i64 %count, %extra.items
  %other.size = icmp ne i64 %key.size, %size
  %key.body = call ptr @PyTuple_GetItem(ptr %key.tuple, i64 0)
  %other.body = icmp ne ptr %key.body, %body
  %d1 = or i1 %stops, %several
  %d2 = or i1 %other.size, %other.body
  %d = or i1 %d1, %d2
  br i1 %d, label %drop, label %next.ref
next.ref:
  %j = phi i64 [ 0, %key ], [ %j2, %ref.same ]
  %j2 = add i64 %j, 1
  %more.refs = icmp ult i64 %j, %count
  br i1 %more.refs, label %ref, label %attributes
ref:
  %item = call ptr @PyTuple_GetItem(ptr %key.tuple, i64 %j2)
  %ref.class.at = getelementptr ptr, ptr %classes, i64 %j
  %ref.class = load ptr, ptr %ref.class.at
  %is.ref = icmp eq ptr %ref.class, null
  br i1 %is.ref, label %ref.number, label %ref.scalar
ref.scalar:
  %same.class = icmp eq ptr %item, %ref.class
  br i1 %same.class, label %ref.same, label %drop
ref.number:
  %ref.at = getelementptr i64, ptr %numbers, i64 %j
  %wanted = load i64, ptr %ref.at
  %same.number = call i1 @duo.is.number(ptr %item, i64 %wanted)
  br i1 %same.number, label %ref.same, label %drop
ref.same:
  br label %next.ref
attributes:
  br i1 %bare, label %fill.scalars, label %compare.attributes
compare.attributes:
  %attrs.at = add i64 %count, 1
  %key.attrs = call ptr @PyTuple_GetItem(ptr %key.tuple, i64 %attrs.at)
  %same.attrs = call i1 @duo.same(ptr %key.attrs, ptr %attrs, i64 0)
  br i1 %same.attrs, label %fill.scalars, label %drop

fill.scalars:
  br label %next.scalar
next.scalar:
  %i = phi i64 [ 0, %fill.scalars ], [ %i2, %scalar.done ]
  %place = phi i64 [ 0, %fill.scalars ], [ %place2, %scalar.done ]
  %more.scalars = icmp ult i64 %place, %scalar.count
  br i1 %more.scalars, label %maybe.scalar, label %fill
maybe.scalar:
  %i2 = add i64 %i, 1
  %scalar.class.at = getelementptr ptr, ptr %classes, i64 %i
  %scalar.class = load ptr, ptr %scalar.class.at
  %no.scalar = icmp eq ptr %scalar.class, null
  br i1 %no.scalar, label %scalar.done, label %a.scalar
a.scalar:
  %scalar.at = getelementptr ptr, ptr %operands, i64 %i
  %scalar = load ptr, ptr %scalar.at
  call void @Py_IncRef(ptr %scalar)
  %put = call i32 @PyTuple_SetItem(ptr %scalars, i64 %place, ptr %scalar)
  %place.next = add i64 %place, 1
  br label %scalar.done
scalar.done:
  %place2 = phi i64 [ %place, %maybe.scalar ], [ %place.next, %a.scalar ]
  br label %next.scalar

fill:
  %info = get node.info %node
  %index = call ptr @duo.value(ptr %made, ptr %trace, ptr %last, ptr %node, ptr %info, ptr %none, ptr %scalars, ptr %none)
  %no.index = icmp eq ptr %index, null
  br i1 %no.index, label %memory, label %commit
commit:
  %empty = const empty
  %zero = const zero
  give tensor._val %out %made
  set tensor._storage %out %none
  set tensor._chain %out %empty
  set tensor._seen %out %zero
  set tensor._leaf %out %none
  %added = call i32 @PyList_Append(ptr %entries, ptr %made)
  br i1 %has.scalars, label %release, label %recorded
release:
  call void @Py_DecRef(ptr %scalars)
  br label %recorded
recorded:
  %not.added = icmp ne i32 %added, 0
  br i1 %not.added, label %undone, label %line.wanted
line.wanted:
  %special = get node.special %node
  %is.special = icmp eq ptr %special, %true
  br i1 %is.special, label %line, label %done
line:
  %unplaced = call i32 @duo.place(ptr %trace, ptr %node, ptr %made)
  %placed = icmp eq i32 %unplaced, 0
  br i1 %placed, label %done, label %undone
undone:
  call void @Py_DecRef(ptr %out)
  br label %refuse
done:
  call void @Py_DecRef(ptr %trace)
  ret ptr %out

memory:
  call void @PyErr_Clear()
  br label %drop
drop:
  drop %made %out
  br i1 %has.scalars, label %drop.scalars, label %refuse
drop.scalars:
  drop %scalars
  br label %refuse
refuse:
  call void @Py_DecRef(ptr %trace)
  ret ptr null
}

; `apply(body, operands, attrs)`, whose first operand is a tensor.
define ptr @duo_record(ptr %self, ptr %args, i64 %nargs) nounwind {
entry:
  %at1 = getelementptr ptr, ptr %args, i64 1
  %few = icmp ult i64 %nargs, 2
  br i1 %few, label %python, label %take
take:
  %body = load ptr, ptr %args
  %operands = load ptr, ptr %at1
  %class = call ptr @duo.class(ptr %operands)
  %tuple = const tuple
  %right = icmp eq ptr %class, %tuple
  br i1 %right, label %attributes, label %python
attributes:
  %three = icmp eq i64 %nargs, 3
  br i1 %three, label %given, label %bare
given:
  %at2 = getelementptr ptr, ptr %args, i64 2
  %attrs = load ptr, ptr %at2
  %empty = const empty
  %none = icmp eq ptr %attrs, %empty
  br i1 %none, label %bare, label %record
bare:
  br label %record
record:
  %static = phi ptr [ %attrs, %given ], [ null, %bare ]
  %count = call i64 @PyTuple_Size(ptr %operands)
  %items = getelementptr i8, ptr %operands, i64 TUPLE_ITEMS
  %out = call ptr @duo.record(ptr %body, ptr %items, i64 %count, ptr %static)
  br label %rest
python:
  br label %rest
rest:
  %found = phi ptr [ %out, %record ], [ null, %python ]
  %general = const record
  %result = call ptr @duo.or.python(ptr %found, ptr %general, ptr %args, i64 %nargs)
  ret ptr %result
}

; `chain(tensor, steps)`: records body(tensor, *tensors, *attrs) for each step (body, tensors, attrs, view), of which each takes the result of the one
; before. Gives the last result; or, where a step is not for native code, how many were recorded before it, and what it takes. A view shares its storage
; with what it is of, unless nobody but this function has that, which is gone then: so only such views, through which no gradient goes back, are
; recorded here.
define ptr @duo_chain(ptr %self, ptr %args, i64 %nargs) nounwind {
entry:
  %operands = alloca [MAX_OPERANDS x ptr]
  %steps.at = getelementptr ptr, ptr %args, i64 1
  %given = load ptr, ptr %args
  %steps = load ptr, ptr %steps.at
  %tensor = const tensor
  %empty = const empty
  %count = call i64 @PyTuple_Size(ptr %steps)
  call void @Py_IncRef(ptr %given)
  %class = call ptr @duo.class(ptr %given)
  %right = icmp eq ptr %class, %tensor
  br i1 %right, label %next, label %refuse
next:
  %k = phi i64 [ 0, %entry ], [ %k2, %done.step ]
  %current = phi ptr [ %given, %entry ], [ %out, %done.step ]
  %more = icmp slt i64 %k, %count
  br i1 %more, label %step, label %end
step:
  %k2 = add i64 %k, 1
  %triple = call ptr @PyTuple_GetItem(ptr %steps, i64 %k)
  %body = call ptr @PyTuple_GetItem(ptr %triple, i64 0)
  %tensors = call ptr @PyTuple_GetItem(ptr %triple, i64 1)
  %attributes = call ptr @PyTuple_GetItem(ptr %triple, i64 2)
  %others = call i64 @PyTuple_Size(ptr %tensors)
  %all = add i64 %others, 1
  %many = icmp ugt i64 %all, MAX_OPERANDS
  %view = call ptr @PyTuple_GetItem(ptr %triple, i64 3)
  %true = const true
  %none = const none
  %viewed = icmp eq ptr %view, %true
  %alone = call i1 @duo.alone(ptr %current)
  %storage = get tensor._storage %current
  %bare = icmp eq ptr %storage, %none
  %current.val = get tensor._val %current
  %current.info = get value.info %current.val
  %tracked = get info.requires_grad %current.info
  %untracked = icmp ne ptr %tracked, %true
  %lone1 = and i1 %alone, %bare
  %lone = and i1 %lone1, %untracked
  %seen.view = xor i1 %lone, true
  %aliased = and i1 %viewed, %seen.view
  %general = or i1 %many, %aliased
  store ptr %current, ptr %operands
  br i1 %general, label %refuse.step, label %next.operand
next.operand:
  %j = phi i64 [ 0, %step ], [ %j2, %operand ]
  %more.operands = icmp slt i64 %j, %others
  br i1 %more.operands, label %operand, label %record
operand:
  %j2 = add i64 %j, 1
  %item = call ptr @PyTuple_GetItem(ptr %tensors, i64 %j)
  %at = getelementptr ptr, ptr %operands, i64 %j2
  store ptr %item, ptr %at
  br label %next.operand
record:
  %unattributed = icmp eq ptr %attributes, %empty
  %static = select i1 %unattributed, ptr null, ptr %attributes
  %out = call ptr @duo.record(ptr %body, ptr %operands, i64 %all, ptr %static)
  %nothing = icmp eq ptr %out, null
  br i1 %nothing, label %refuse.step, label %done.step
done.step:
  call void @Py_DecRef(ptr %current)
  br label %next
end:
  ret ptr %current
refuse.step:
  %error = call ptr @PyErr_Occurred()
  %failed = icmp ne ptr %error, null
  br i1 %failed, label %fail, label %refuse
refuse:
  %done = phi i64 [ 0, %entry ], [ %k, %refuse.step ]
  %rest = phi ptr [ %given, %entry ], [ %current, %refuse.step ]
  %number = call ptr @PyLong_FromLongLong(i64 %done)
  %pair = call ptr @PyTuple_New(i64 2)
  %lacking = missing %number %pair
  br i1 %lacking, label %memory, label %fill
fill:
  %set0 = call i32 @PyTuple_SetItem(ptr %pair, i64 0, ptr %number)
  %set1 = call i32 @PyTuple_SetItem(ptr %pair, i64 1, ptr %rest)
  ret ptr %pair
memory:
  drop %number %pair %rest
  ret ptr null
fail:
  call void @Py_DecRef(ptr %current)
  ret ptr null
}
"""

_OPERATOR = """
define ptr @duo_NAME(ptr %self, ptr %args, i64 %nargs) nounwind {
entry:
  %pair = alloca [2 x ptr]
  store ptr %self, ptr %pair
  %one = icmp eq i64 %nargs, 1
  br i1 %one, label %record, label %alone
record:
  %other = load ptr, ptr %args
  %second = getelementptr ptr, ptr %pair, i64 1
  store ptr %other, ptr %second
  %body = const body.NAME
  %out = call ptr @duo.record(ptr %body, ptr %pair, i64 2, ptr null)
  br label %rest
alone:
  br label %rest
rest:
  %found = phi ptr [ %out, %record ], [ null, %alone ]
  %count = phi i64 [ 2, %record ], [ 1, %alone ]
  %general = const general.NAME
  %result = call ptr @duo.or.python(ptr %found, ptr %general, ptr %pair, i64 %count)
  ret ptr %result
}
"""


def object_names(operators: Sequence[str]) -> list[str]:
    """The objects that `duo_recorder_objects` takes, in order."""
    return [*OBJECTS, *[f"{part}.{name}" for name in operators for part in ("body", "general")]]


def recorder_text(offsets: Mapping[str, int], operators: Sequence[str], tuple_items: int) -> str:
    """The text, for these offsets of slots in bytes; `tuple_items`: where a tuple's items begin."""
    names = object_names(operators)
    text = object_text.basics(len(names)) + trace_text.TRACE
    text += _RECORDER.replace("MAX_OPERANDS", str(MAX_OPERANDS)).replace("TUPLE_ITEMS", str(tuple_items))
    text += LANE.replace("LANE_WORDS", str(LANE_WORDS)) + share_text.share_text()
    text += "".join(_OPERATOR.replace("NAME", name) for name in operators)
    return object_text.expanded(text, offsets, names)
