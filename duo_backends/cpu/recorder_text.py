"""LLVM text of the recorder: what an eager op does before anything runs, for steps that have been seen before.

It is `duo/eager/trace.py`'s recording without Python code in between, an eighth of its time. Whatever is not the common case (a new
step, a view that must be read again, a trace that is full) is left to the Python functions it stands for, which do all from the start. Objects
and the offsets of their slots come from the frontend. Python code, a garbage collection's finalisers, can run only where something is
allocated, so that is done first: from the look at the last entry to the commit nothing comes between.

Lines may say `%x = get OWNER.SLOT %object`, `%x = const NAME`, `set OWNER.SLOT %object %value` (of a new object; takes a reference),
`give OWNER.SLOT %object %value` (hands one over) and `swap OWNER.SLOT %object %value` (a new reference for the old one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from duo_backends.cpu import lane_text, share_text
from duo_backends.cpu.lane_text import LANE, LANE_WORDS

MAX_OPERANDS = 8
PYTHON = (
    "PyObject_GetAttr", "PyThreadState_Get", "PyThreadState_GetID", "PyObject_Vectorcall", "PyList_New", "PyList_SetItem", "PyDict_New", "PyObject_RichCompareBool", "PyType_GenericAlloc", "PyType_IsSubtype", "PyList_Size",
    "PyList_GetItem", "PyList_Append", "PyDict_GetItem", "PyDict_SetItem", "PyTuple_New", "PyTuple_Size", "PyTuple_GetItem", "PyTuple_SetItem",
    *lane_text.PYTHON, *share_text.PYTHON, "PyLong_AsLongLong", "PyLong_FromLongLong", "PyErr_Clear", "PyEval_GetFrame", "PyFrame_GetBack", "PyFrame_GetCode", "PyFrame_GetLasti", "PyErr_Occurred", "Py_IncRef", "Py_DecRef",
)  # fmt: skip
# Objects that the frontend names, beside the bodies of operators.
OBJECTS = (
    "none", "true", "cpu", "empty", "zero", "float", "int", "bool", "tuple", "Val", "Node", "Trace", "tensor", "state", "dict_name", "trace_name", "END", "LEAF", "hooks",
    "record", "false", "grad_name", "root_grad", "root_plain", "RLock", "forks", "full", "NOTHING", "elsewhere", *lane_text.OBJECTS, *share_text.OBJECTS,
)  # fmt: skip
SLOTS = (
    "trace.entries", "trace.leaves", "trace.leaf_numbers", "trace.links", "trace.hooked", "trace.lock", "trace.born", "trace.node", "trace.done",
    "trace.device", "trace.placed", "trace.program", "trace.call", "stamp.overwritten", "stamp.trace", "stamp.numbers", "value.trace", "value.index", "value.node", "value.info", "value.buf", "value.scalars", "value.extra",
    "value.stamp", "node.hot", "node.key", "node.op", "node.left", "node.right", "node.special", "node.stop", "node.depth", "node.lasti", "node.code", "node.info", "node.infos",
    "info.requires_grad", "tensor._val", "tensor._storage", "tensor._chain", "tensor._seen", "tensor._leaf", "storage.shared",
    "storage.version", "hooks.busy", *lane_text.SLOTS, *share_text.SLOTS,
)  # fmt: skip

_DECLARATIONS = """
declare ptr @PyObject_GetAttr(ptr, ptr)
declare ptr @PyThreadState_Get()
declare i64 @PyThreadState_GetID(ptr)
declare ptr @PyList_New(i64)
declare i32 @PyList_SetItem(ptr, i64, ptr)
declare ptr @PyDict_New()
declare ptr @PyObject_Vectorcall(ptr, ptr, i64, ptr)
declare i32 @PyObject_RichCompareBool(ptr, ptr, i32)
declare ptr @PyType_GenericAlloc(ptr, i64)
declare i32 @PyType_IsSubtype(ptr, ptr)
declare i64 @PyList_Size(ptr)
declare ptr @PyList_GetItem(ptr, i64)
declare i32 @PyList_Append(ptr, ptr)
declare ptr @PyDict_GetItem(ptr, ptr)
declare i32 @PyDict_SetItem(ptr, ptr, ptr)
declare ptr @PyTuple_New(i64)
declare i64 @PyTuple_Size(ptr)
declare ptr @PyTuple_GetItem(ptr, i64)
declare i32 @PyTuple_SetItem(ptr, i64, ptr)
declare i64 @PyLong_AsLongLong(ptr)
declare ptr @PyLong_FromLongLong(i64)
declare ptr @PyEval_GetFrame()
declare ptr @PyFrame_GetBack(ptr)
declare ptr @PyFrame_GetCode(ptr)
declare i32 @PyFrame_GetLasti(ptr)
declare void @PyErr_Clear()
declare ptr @PyErr_Occurred()
declare void @Py_IncRef(ptr)
declare void @Py_DecRef(ptr)

define void @duo_recorder_objects(ptr %objects) nounwind {
entry:
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k2, %one ]
  %more = icmp ult i64 %k, COUNT
  br i1 %more, label %one, label %end
one:
  %from = getelementptr ptr, ptr %objects, i64 %k
  %object = load ptr, ptr %from
  %to = getelementptr ptr, ptr @duo.objects, i64 %k
  store ptr %object, ptr %to
  %k2 = add i64 %k, 1
  br label %next
end:
  ret void
}
"""

_RECORDER = """
define internal ptr @duo.class(ptr %object) alwaysinline nounwind {
  %at = getelementptr ptr, ptr %object, i64 1
  %class = load ptr, ptr %at
  ret ptr %class
}
; The attributes of this thread's state, or null with an error. Those of the thread that asked last are at hand; threads' numbers are never used again.
@duo.thread = internal global i64 -1, align 64
@duo.thread.state = internal global ptr null
define internal ptr @duo.state() nounwind {
entry:
  %thread = call ptr @PyThreadState_Get()
  %id = call i64 @PyThreadState_GetID(ptr %thread)
  %last.id = load i64, ptr @duo.thread
  %same = icmp eq i64 %id, %last.id
  br i1 %same, label %known, label %ask
known:
  %kept = load ptr, ptr @duo.thread.state
  ret ptr %kept
ask:
  %state = const state
  %name = const dict_name
  %dict = call ptr @PyObject_GetAttr(ptr %state, ptr %name)
  %failed = icmp eq ptr %dict, null
  br i1 %failed, label %no, label %keep
keep:
  %before = load ptr, ptr @duo.thread.state
  store i64 %id, ptr @duo.thread
  store ptr %dict, ptr @duo.thread.state
  call void @duo.drop(ptr %before)
  ret ptr %dict
no:
  ret ptr null
}
; The last entry of a list of entries, or null.
define internal ptr @duo.last(ptr %entries) nounwind {
  %count = call i64 @PyList_Size(ptr %entries)
  %at = sub i64 %count, 1
  %last = call ptr @PyList_GetItem(ptr %entries, i64 %at)
  ret ptr %last
}
; Whether `key`, an item of a step's key, is the number.
define internal i1 @duo.is.number(ptr %key, i64 %number) nounwind {
entry:
  %class = call ptr @duo.class(ptr %key)
  %int = const int
  %exact = icmp eq ptr %class, %int
  br i1 %exact, label %compare, label %no
compare:
  %found = call i64 @PyLong_AsLongLong(ptr %key)
  %same = icmp eq i64 %found, %number
  ret i1 %same
no:
  ret i1 false
}
; A new value, the next of the trace whose last is given; null if it cannot be made.
define internal ptr @duo.value(ptr %made, ptr %trace, ptr %last, ptr %node, ptr %info, ptr %buf, ptr %scalars, ptr %extra) nounwind {
entry:
  %none = const none
  %before.object = get value.index %last
  %before = call i64 @PyLong_AsLongLong(ptr %before.object)
  %number = add i64 %before, 1
  %index = call ptr @PyLong_FromLongLong(i64 %number)
  give value.index %made %index
  set value.trace %made %trace
  set value.node %made %node
  set value.info %made %info
  set value.buf %made %buf
  set value.scalars %made %scalars
  set value.extra %made %extra
  set value.stamp %made %none
  ret ptr %index
}

; `Stamp.add`, of a version that nobody has written over.
define internal void @duo.stamp(ptr %stamp, ptr %trace, i64 %number) nounwind {
entry:
  %true = const true
  %overwritten = get stamp.overwritten %stamp
  %gone = icmp eq ptr %overwritten, %true
  br i1 %gone, label %end, label %add
add:
  call void @Py_IncRef(ptr %stamp)
  %index = call ptr @PyLong_FromLongLong(i64 %number)
  %home = get stamp.trace %stamp
  %here = icmp eq ptr %home, %trace
  br i1 %here, label %append, label %begin
append:
  %numbers = get stamp.numbers %stamp
  %appended = call i32 @PyList_Append(ptr %numbers, ptr %index)
  call void @duo.drop(ptr %index)
  br label %added
begin:
  %new = call ptr @PyList_New(i64 1)
  %no.new = icmp eq ptr %new, null
  br i1 %no.new, label %failed, label %replace
failed:
  call void @PyErr_Clear()
  call void @duo.drop(ptr %index)
  br label %added
replace:
  %put = call i32 @PyList_SetItem(ptr %new, i64 0, ptr %index)
  %old.numbers = get stamp.numbers %stamp
  %old.trace = get stamp.trace %stamp
  give stamp.numbers %stamp %new
  set stamp.trace %stamp %trace
  call void @Py_DecRef(ptr %old.numbers)
  call void @Py_DecRef(ptr %old.trace)
  br label %added
added:
  call void @Py_DecRef(ptr %stamp)
  br label %end
end:
  ret void
}

; `open_trace` of a thread whose trace, on the CPU, has been closed; null where that is to be left to Python.
define internal ptr @duo.open() nounwind {
entry:
  %none = const none
  %true = const true
  %false = const false
  %full.list = const full
  %full = call ptr @PyList_GetItem(ptr %full.list, i64 0)
  %is.full = icmp eq ptr %full, %true
  br i1 %is.full, label %refuse, label %mode
mode:
  %state = call ptr @duo.state()
  %no.state = icmp eq ptr %state, null
  br i1 %no.state, label %unset, label %look
look:
  %grad.name = const grad_name
  %grad = call ptr @PyDict_GetItem(ptr %state, ptr %grad.name)
  %no.grad = icmp eq ptr %grad, null
  br i1 %no.grad, label %refuse, label %make
make:
  %is.grad = icmp eq ptr %grad, %true
  %root.grad = const root_grad
  %root.plain = const root_plain
  %node = select i1 %is.grad, ptr %root.grad, ptr %root.plain
  %trace.class = const Trace
  %value.class = const Val
  %lock.class = const RLock
  %trace = call ptr @PyType_GenericAlloc(ptr %trace.class, i64 0)
  %root = call ptr @PyType_GenericAlloc(ptr %value.class, i64 0)
  %entries = call ptr @PyList_New(i64 1)
  %hooked = call ptr @PyList_New(i64 0)
  %leaves = call ptr @PyDict_New()
  %numbers = call ptr @PyDict_New()
  %links = call ptr @PyDict_New()
  %lock = call ptr @PyObject_Vectorcall(ptr %lock.class, ptr null, i64 0, ptr null)
  %x1 = icmp eq ptr %trace, null
  %x2 = icmp eq ptr %root, null
  %x3 = icmp eq ptr %entries, null
  %x4 = icmp eq ptr %hooked, null
  %x5 = icmp eq ptr %leaves, null
  %x6 = icmp eq ptr %numbers, null
  %x7 = icmp eq ptr %links, null
  %x8 = icmp eq ptr %lock, null
  %x12 = or i1 %x1, %x2
  %x34 = or i1 %x3, %x4
  %x56 = or i1 %x5, %x6
  %x78 = or i1 %x7, %x8
  %x14 = or i1 %x12, %x34
  %x58 = or i1 %x56, %x78
  %x = or i1 %x14, %x58
  br i1 %x, label %failed, label %fill
fill:
  %nothing = const NOTHING
  %zero = const zero
  set value.trace %root %trace
  set value.index %root %zero
  set value.node %root %node
  set value.info %root %nothing
  set value.buf %root %none
  set value.scalars %root %none
  set value.extra %root %none
  set value.stamp %root %none
  %put = call i32 @PyList_SetItem(ptr %entries, i64 0, ptr %root)
  %forks = const forks
  %born = call ptr @PyList_GetItem(ptr %forks, i64 0)
  give trace.entries %trace %entries
  give trace.leaves %trace %leaves
  give trace.leaf_numbers %trace %numbers
  give trace.links %trace %links
  give trace.hooked %trace %hooked
  give trace.lock %trace %lock
  %cpu = const cpu
  set trace.device %trace %cpu
  set trace.born %trace %born
  set trace.node %trace %none
  set trace.done %trace %false
  set trace.placed %trace %false
  set trace.program %trace %none
  set trace.call %trace %none
  %trace.name = const trace_name
  %state.now = call ptr @duo.state() ; what was allocated may have let another thread run
  %no.state.now = icmp eq ptr %state.now, null
  br i1 %no.state.now, label %lose, label %store
store:
  %stored = call i32 @PyDict_SetItem(ptr %state.now, ptr %trace.name, ptr %trace)
  %unstored = icmp ne i32 %stored, 0
  br i1 %unstored, label %lose, label %done
done:
  ret ptr %trace
lose:
  call void @Py_DecRef(ptr %trace)
  br label %unset
failed:
  call void @duo.drop(ptr %trace)
  call void @duo.drop(ptr %root)
  call void @duo.drop(ptr %entries)
  call void @duo.drop(ptr %hooked)
  call void @duo.drop(ptr %leaves)
  call void @duo.drop(ptr %numbers)
  call void @duo.drop(ptr %links)
  call void @duo.drop(ptr %lock)
  br label %unset
unset:
  call void @PyErr_Clear()
  br label %refuse
refuse:
  ret ptr null
}

; The number of `val`, which is from outside, in the trace: `Trace.enter` where the step has been seen before. 0: nothing was done.
define internal i64 @duo.enter(ptr %trace, ptr %val) nounwind {
entry:
  %none = const none
  %true = const true
  %buf = get value.buf %val
  %pending = icmp eq ptr %buf, %none
  br i1 %pending, label %no, label %make
make:
  %class = const Val
  %made = call ptr @PyType_GenericAlloc(ptr %class, i64 0)
  %failed = icmp eq ptr %made, null
  br i1 %failed, label %clear, label %look
look:
  %entries = get trace.entries %trace
  %last = call ptr @duo.last(ptr %entries)
  %end = const END
  %closed = icmp eq ptr %last, %end
  br i1 %closed, label %drop, label %step
step:
  %parent = get value.node %last
  %node = get node.hot %parent
  %found.class = call ptr @duo.class(ptr %node)
  %node.class = const Node
  %is.node = icmp eq ptr %found.class, %node.class
  br i1 %is.node, label %leaf, label %drop
leaf:
  %info = get value.info %val
  %tracked = get info.requires_grad %info
  %extra = get value.extra %val
  %is.tracked = icmp eq ptr %tracked, %true
  %has.extra = icmp ne ptr %extra, %none
  %linked = and i1 %is.tracked, %has.extra
  br i1 %linked, label %before, label %compare
before:
  %leaf.numbers = get trace.leaf_numbers %trace
  %earlier = call ptr @PyDict_GetItem(ptr %leaf.numbers, ptr %extra)
  %again = icmp ne ptr %earlier, null
  br i1 %again, label %numbered, label %compare
numbered:
  %earlier.number = call i64 @PyLong_AsLongLong(ptr %earlier)
  br label %compare
compare:
  %expected = phi i64 [ -1, %leaf ], [ -1, %before ], [ %earlier.number, %numbered ]
  %op = get node.op %node
  %left = get node.left %node
  %right = get node.right %node
  %leaf.op = const LEAF
  %c1 = icmp eq ptr %op, %leaf.op
  %c2 = icmp eq ptr %left, %info
  %c12 = and i1 %c1, %c2
  %same = call i1 @duo.is.number(ptr %right, i64 %expected)
  %c = and i1 %c12, %same
  br i1 %c, label %fill, label %drop
fill:
  %buf.now = get value.buf %val
  %index = call ptr @duo.value(ptr %made, ptr %trace, ptr %last, ptr %node, ptr %info, ptr %buf.now, ptr %none, ptr %extra)
  %no.index = icmp eq ptr %index, null
  br i1 %no.index, label %clear.drop, label %commit
commit:
  %number = call i64 @PyLong_AsLongLong(ptr %index)
  %added = call i32 @PyList_Append(ptr %entries, ptr %made)
  %unadded = icmp ne i32 %added, 0
  br i1 %unadded, label %clear.drop, label %note
note:
  %leaves = get trace.leaves %trace
  %kept = call i32 @PyDict_SetItem(ptr %leaves, ptr %val, ptr %index)
  %unkept = icmp ne i32 %kept, 0
  br i1 %unkept, label %clear.drop, label %link
link:
  br i1 %linked, label %link.before, label %stamp
link.before:
  %first = icmp slt i64 %expected, 0
  br i1 %first, label %link.leaf, label %link.both
link.both:
  %links = get trace.links %trace
  %l1 = call i32 @PyDict_SetItem(ptr %links, ptr %index, ptr %right)
  br label %link.leaf
link.leaf:
  %numbers = get trace.leaf_numbers %trace
  %l2 = call i32 @PyDict_SetItem(ptr %numbers, ptr %extra, ptr %index)
  br label %stamp
stamp:
  call void @Py_DecRef(ptr %made)
  %stamp.of = get value.stamp %val
  %stamped = icmp ne ptr %stamp.of, %none
  br i1 %stamped, label %stamps, label %entered
stamps:
  call void @duo.stamp(ptr %stamp.of, ptr %trace, i64 %number)
  br label %entered
entered:
  ret i64 %number
clear.drop:
  call void @PyErr_Clear()
  br label %drop
drop:
  call void @Py_DecRef(ptr %made)
  br label %no
clear:
  call void @PyErr_Clear()
  br label %no
no:
  ret i64 0
}

; The number of what a tensor holds in the trace; 0: not known here.
define internal i64 @duo.number(ptr %trace, ptr %tensor) nounwind {
entry:
  %none = const none
  %storage = get tensor._storage %tensor
  %bare = icmp eq ptr %storage, %none
  br i1 %bare, label %value, label %stored
stored:
  %shared = get storage.shared %storage
  %unshared = icmp eq ptr %shared, %none
  br i1 %unshared, label %versions, label %no
versions:
  %seen = get tensor._seen %tensor
  %version = get storage.version %storage
  %same = call i32 @PyObject_RichCompareBool(ptr %seen, ptr %version, i32 2)
  %current = icmp eq i32 %same, 1
  br i1 %current, label %value, label %no
value:
  %val = get tensor._val %tensor
  %home = get value.trace %val
  %here = icmp eq ptr %home, %trace
  br i1 %here, label %inside, label %outside
inside:
  %index = get value.index %val
  %number = call i64 @PyLong_AsLongLong(ptr %index)
  ret i64 %number
outside:
  %leaves = get trace.leaves %trace
  %known = call ptr @PyDict_GetItem(ptr %leaves, ptr %val)
  %new = icmp eq ptr %known, null
  br i1 %new, label %enter, label %entered
entered:
  %earlier = call i64 @PyLong_AsLongLong(ptr %known)
  ret i64 %earlier
enter:
  call void @Py_IncRef(ptr %val)
  %entry.number = call i64 @duo.enter(ptr %trace, ptr %val)
  call void @Py_DecRef(ptr %val)
  ret i64 %entry.number
no:
  ret i64 0
}

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
  call void @duo.drop(ptr %done)
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
  call void @Py_DecRef(ptr %current)
  br i1 %on.cpu, label %open.new, label %never
open.new:
  %fresh = call ptr @duo.open()
  %unopened = icmp eq ptr %fresh, null
  br i1 %unopened, label %never, label %opened
opened:
  %trace = phi ptr [ %current, %is.open.still ], [ %fresh, %open.new ]
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
  %no.made = icmp eq ptr %made, null
  %no.out = icmp eq ptr %out, null
  %no.scalars = icmp eq ptr %scalars, null
  %m1 = or i1 %no.made, %no.out
  %m2 = or i1 %m1, %no.scalars
  br i1 %m2, label %memory, label %look
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
  call void @duo.drop(ptr %made)
  call void @duo.drop(ptr %out)
  br i1 %has.scalars, label %drop.scalars, label %refuse
drop.scalars:
  call void @duo.drop(ptr %scalars)
  br label %refuse
refuse:
  call void @Py_DecRef(ptr %trace)
  ret ptr null
}
define internal void @duo.drop(ptr %object) nounwind {
entry:
  %nothing = icmp eq ptr %object, null
  br i1 %nothing, label %end, label %drop
drop:
  call void @Py_DecRef(ptr %object)
  br label %end
end:
  ret void
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
  %made = icmp ne ptr %out, null
  br i1 %made, label %done, label %refused
refused:
  %error = call ptr @PyErr_Occurred()
  %failed = icmp ne ptr %error, null
  br i1 %failed, label %done, label %python
python:
  %general = const record
  %result = call ptr @PyObject_Vectorcall(ptr %general, ptr %args, i64 %nargs, ptr null)
  ret ptr %result
done:
  ret ptr %out
}
"""

_OPERATOR = """
define ptr @duo_NAME(ptr %self, ptr %args, i64 %nargs) nounwind {
entry:
  %pair = alloca [2 x ptr]
  store ptr %self, ptr %pair
  %one = icmp eq i64 %nargs, 1
  br i1 %one, label %record, label %python.alone
record:
  %other = load ptr, ptr %args
  %second = getelementptr ptr, ptr %pair, i64 1
  store ptr %other, ptr %second
  %body = const body.NAME
  %out = call ptr @duo.record(ptr %body, ptr %pair, i64 2, ptr null)
  %made = icmp ne ptr %out, null
  br i1 %made, label %done, label %refused
refused:
  %error = call ptr @PyErr_Occurred()
  %failed = icmp ne ptr %error, null
  br i1 %failed, label %done, label %python
python.alone:
  br label %python
python:
  %count = phi i64 [ 2, %refused ], [ 1, %python.alone ]
  %general = const general.NAME
  %result = call ptr @PyObject_Vectorcall(ptr %general, ptr %pair, i64 %count, ptr null)
  ret ptr %result
done:
  ret ptr %out
}
"""


def object_names(operators: Sequence[str]) -> list[str]:
    """The objects that `duo_recorder_objects` takes, in order."""
    return [*OBJECTS, *[f"{part}.{name}" for name in operators for part in ("body", "general")]]


def recorder_text(offsets: Mapping[str, int], operators: Sequence[str], tuple_items: int) -> str:
    """The text, for these offsets of slots in bytes; `tuple_items`: where a tuple's items begin."""
    names = object_names(operators)
    text = f"@duo.objects = internal global [{len(names)} x ptr] zeroinitializer, align 64\n"
    text += _DECLARATIONS.replace("COUNT", str(len(names)))
    text += _RECORDER.replace("MAX_OPERANDS", str(MAX_OPERANDS)).replace("TUPLE_ITEMS", str(tuple_items))
    text += LANE.replace("LANE_WORDS", str(LANE_WORDS)) + share_text.share_text()
    text += "".join(_OPERATOR.replace("NAME", name) for name in operators)
    places = {name: k for k, name in enumerate(names)}
    return "\n".join(_expanded(number, line, offsets, places) for number, line in enumerate(text.split("\n")))


_CONST = re.compile(r"\s+(%[\w.]+) = const ([\w.]+)$")
_GET = re.compile(r"\s+(%[\w.]+) = get ([\w.]+) (%[\w.]+)$")
_SET = re.compile(r"\s+(set|give|swap) ([\w.]+) (%[\w.]+) (%[\w.]+)$")


def _expanded(number: int, line: str, offsets: Mapping[str, int], places: Mapping[str, int]) -> str:
    """The line, or what it is short for."""
    found = _CONST.match(line)
    if found is not None:
        name, what = found.groups()
        return f"  {name} = load ptr, ptr getelementptr (ptr, ptr @duo.objects, i64 {places[what]})"
    found = _GET.match(line)
    if found is not None:
        name, slot, owner = found.groups()
        at = f"  %at.{number} = getelementptr i8, ptr {owner}, i64 {offsets[slot]}\n"
        return f"{at}  {name} = load ptr, ptr %at.{number}"
    found = _SET.match(line)
    if found is not None:
        how, slot, owner, value = found.groups()
        at = f"  %at.{number} = getelementptr i8, ptr {owner}, i64 {offsets[slot]}\n"
        store = f"{at}  store ptr {value}, ptr %at.{number}"
        if how == "give":
            return store
        counted = f"  call void @Py_IncRef(ptr {value})\n{store}"
        if how == "set":
            return counted
        old = f"  %old.{number} = load ptr, ptr %at.{number}\n  store ptr"
        return counted.replace("  store ptr", old) + f"\n  call void @Py_DecRef(ptr %old.{number})"
    return line
