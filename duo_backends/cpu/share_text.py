"""LLVM text of looking at an eager tensor's values: `detach`, and `numpy` and `__array__`, which give an array on the tensor's own memory.

The common case of what `duo/eager/tensor.py` and `sharing.py` do: a whole tensor that no gradient goes back from, whose memory nobody else
holds. Objects are made first; what is looked at, and the setting of what depends on it, have no Python code in between.
"""

from __future__ import annotations

# NumPy's C interface, names and places in its table (numpy/_core/code_generators/numpy_api.py); they never change.
ARRAYS = {"PyArray_NewFromDescr": 94, "PyArray_SetBaseObject": 282}
OBJECTS = ("Storage", "Sharers", "detached", "minus_one", "ndarray", "python.detach", "python.numpy", "python.__array__", "blocks", "append_name")
SLOTS = (
    "storage.base", "storage.leaf", "storage.val", "buffer._shared", "info.array", "info.device", "info.shape", "sharers.arrays", "sharers.first",
    "blocks.append",
)  # fmt: skip
METHODS = {"detach": "duo.detached", "numpy": "duo.shown", "__array__": "duo.look"}
MAX_DIMS = 16

SHARE = """
declare ptr @PyArray_NewFromDescr(ptr, ptr, i32, ptr, ptr, ptr, i32, ptr)
declare i32 @PyArray_SetBaseObject(ptr, ptr)

; Whether a function that is being compiled forbids looking, or that cannot be found out.
define internal i1 @duo.captured() nounwind {
entry:
  %none = const none
  %state = call ptr @duo.state()
  %failed = icmp eq ptr %state, null
  br i1 %failed, label %clear, label %find
clear:
  call void @PyErr_Clear()
  ret i1 true
find:
  %name = const capture_name
  %capture = call ptr @PyDict_GetItem(ptr %state, ptr %name)
  %some = icmp ne ptr %capture, %none
  ret i1 %some
}
; A new Storage of a tensor that has none yet, not yet the tensor's; null if it cannot be made.
define internal ptr @duo.storage(ptr %tensor) nounwind {
entry:
  %class = const Storage
  %storage = call ptr @PyType_GenericAlloc(ptr %class, i64 0)
  %reference = call ptr @PyWeakref_NewRef(ptr %tensor, ptr null)
  %s = missing %storage %reference
  br i1 %s, label %failed, label %fill
fill:
  %none = const none
  %zero = const zero
  %val = get tensor._val %tensor
  %leaf = get tensor._leaf %tensor
  give storage.base %storage %reference
  set storage.val %storage %val
  set storage.leaf %storage %leaf
  set storage.version %storage %zero
  set storage.shared %storage %none
  ret ptr %storage
failed:
  call void @PyErr_Clear()
  drop %storage %reference
  ret ptr null
}
; Gives the tensor a storage if it has none; whether it has one.
define internal i1 @duo.stored(ptr %tensor) nounwind {
entry:
  %none = const none
  %zero = const zero
  %before = get tensor._storage %tensor
  %bare = icmp eq ptr %before, %none
  br i1 %bare, label %make, label %yes
make:
  %made = call ptr @duo.storage(ptr %tensor)
  %failed = icmp eq ptr %made, null
  br i1 %failed, label %no, label %again
again: ; what was allocated may have run code that gave it one
  %now = get tensor._storage %tensor
  %val.now = get tensor._val %tensor
  %val = get storage.val %made
  %bare.still = icmp eq ptr %now, %none
  %same.val = icmp eq ptr %val.now, %val
  %still = and i1 %bare.still, %same.val
  br i1 %still, label %keep, label %drop
keep:
  swap tensor._seen %tensor %zero
  swap tensor._storage %tensor %made
  call void @Py_DecRef(ptr %made)
  br label %yes
drop:
  call void @Py_DecRef(ptr %made)
  br label %no
yes:
  ret i1 true
no:
  ret i1 false
}

; `detach`; null: not the common case.
define internal ptr @duo.detached(ptr %self) nounwind {
entry:
  %none = const none
  %true = const true
  %empty = const empty
  %chain = get tensor._chain %self
  %whole = icmp eq ptr %chain, %empty
  %captured = call i1 @duo.captured()
  %free = xor i1 %captured, true
  %go = and i1 %whole, %free
  br i1 %go, label %make, label %no
make:
  %tensor.class = const tensor
  %out = call ptr @PyType_GenericAlloc(ptr %tensor.class, i64 0)
  %failed = icmp eq ptr %out, null
  br i1 %failed, label %clear, label %stored
clear:
  call void @PyErr_Clear()
  br label %no
stored:
  %has = call i1 @duo.stored(ptr %self)
  br i1 %has, label %look, label %drop
look:
  %storage = get tensor._storage %self
  %val = get storage.val %storage
  %info = get value.info %val
  %tracked = get info.requires_grad %info
  %extra = get value.extra %val
  %stamp = get value.stamp %val
  %d1 = icmp eq ptr %tracked, %true
  %d2 = icmp ne ptr %extra, %none
  %d = or i1 %d1, %d2
  br i1 %d, label %drop, label %stamped
stamped:
  %unstamped = icmp eq ptr %stamp, %none
  br i1 %unstamped, label %fill, label %version
version:
  %overwritten = get stamp.overwritten %stamp
  %gone = icmp eq ptr %overwritten, %true
  br i1 %gone, label %drop, label %fill
fill:
  %detached = const detached
  %seen = get storage.version %storage
  set tensor._val %out %val
  set tensor._storage %out %storage
  set tensor._chain %out %detached
  set tensor._seen %out %seen
  set tensor._leaf %out %none
  ret ptr %out
drop:
  call void @Py_DecRef(ptr %out)
  br label %no
no:
  ret ptr null
}

; An array on the memory of a value's buffer, which it keeps alive; null if it cannot be made.
define internal ptr @duo.array(ptr %val) nounwind {
entry:
  %dims = alloca [MAX_DIMS x i64]
  %none = const none
  %info = get value.info %val
  %descr = get info.array %info
  %shape = get info.shape %info
  %rank = call i64 @PyTuple_Size(ptr %shape)
  %high = icmp ugt i64 %rank, MAX_DIMS
  br i1 %high, label %no, label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k2, %dim ]
  %more = icmp ult i64 %k, %rank
  br i1 %more, label %dim, label %make
dim:
  %k2 = add i64 %k, 1
  %item = call ptr @PyTuple_GetItem(ptr %shape, i64 %k)
  %size = call i64 @PyLong_AsLongLong(ptr %item)
  %at = getelementptr i64, ptr %dims, i64 %k
  store i64 %size, ptr %at
  br label %next
make:
  %buffer = get value.buf %val
  %number = get buffer.ptr %buffer
  %address = call i64 @PyLong_AsLongLong(ptr %number)
  %data = inttoptr i64 %address to ptr
  %nd = trunc i64 %rank to i32
  %class = const ndarray
  call void @Py_IncRef(ptr %buffer)
  call void @Py_IncRef(ptr %descr)
  %array = call ptr @PyArray_NewFromDescr(ptr %class, ptr %descr, i32 %nd, ptr %dims, ptr null, ptr %data, i32 ARRAY_FLAGS, ptr null)
  %failed = icmp eq ptr %array, null
  br i1 %failed, label %drop, label %hold
hold:
  %held = call i32 @PyArray_SetBaseObject(ptr %array, ptr %buffer)
  %unheld = icmp ne i32 %held, 0
  br i1 %unheld, label %drop.array, label %done
done:
  ret ptr %array
drop.array:
  call void @Py_DecRef(ptr %array)
  br label %clear
drop:
  call void @Py_DecRef(ptr %buffer)
  br label %clear
clear:
  call void @PyErr_Clear()
  br label %no
no:
  ret ptr null
}

; Whether a value that no gradient goes back from has memory of the CPU of its own, now that what is pending has been run by a lane.
define internal i1 @duo.there(ptr %val) nounwind {
entry:
  %none = const none
  %true = const true
  %info = get value.info %val
  %tracked = get info.requires_grad %info
  %is.tracked = icmp eq ptr %tracked, %true
  %device = get info.device %info
  %cpu = const cpu
  %is.away = icmp ne ptr %device, %cpu ; memory of a GPU
  %b = or i1 %is.tracked, %is.away
  br i1 %b, label %no, label %settle
settle:
  %buf = get value.buf %val
  %pending = icmp eq ptr %buf, %none
  br i1 %pending, label %flush, label %memory
flush:
  %trace = get value.trace %val
  %trace.class = const Trace
  %class = call ptr @duo.class(ptr %trace)
  %ordinary = icmp eq ptr %class, %trace.class
  br i1 %ordinary, label %lane, label %no
lane:
  call void @Py_IncRef(ptr %trace)
  %flushed = call i1 @duo.lane(ptr %trace)
  call void @Py_DecRef(ptr %trace)
  br i1 %flushed, label %memory, label %no
memory:
  %block = get value.buf %val
  %block.class = call ptr @duo.class(ptr %block)
  %buffer.class = const Buffer
  %plain.memory = icmp eq ptr %block.class, %buffer.class
  ret i1 %plain.memory
no:
  ret i1 false
}

; `numpy` of a tensor that only the caller's stack holds, `f(x).numpy()`, whose memory is the array's alone from then on: no tensor is left that would
; have to know of it (but for `__self__` of a bound method, by which nobody writes). Null: not the common case.
define internal ptr @duo.last.look(ptr %self) nounwind {
entry:
  %none = const none
  %true = const true
  %empty = const empty
  %leaf = get tensor._leaf %self
  %chain = get tensor._chain %self
  %storage = get tensor._storage %self
  %held.once = call i1 @duo.alone(ptr %self)
  %unleaf = icmp eq ptr %leaf, %none
  %plain = icmp eq ptr %chain, %empty
  %bare = icmp eq ptr %storage, %none
  %captured = call i1 @duo.captured()
  %free = xor i1 %captured, true
  %g1 = and i1 %unleaf, %plain
  %g2 = and i1 %bare, %free
  %g3 = and i1 %g1, %g2
  %g = and i1 %g3, %held.once
  br i1 %g, label %begin, label %no
begin:
  %val = get tensor._val %self
  call void @Py_IncRef(ptr %val)
  %there = call i1 @duo.there(ptr %val)
  br i1 %there, label %make, label %leave
make:
  %array = call ptr @duo.array(ptr %val)
  %unmade = icmp eq ptr %array, null
  br i1 %unmade, label %leave, label %check
check: ; what was allocated may have run code that found the tensor
  %val.now = get tensor._val %self
  %storage.now = get tensor._storage %self
  %leaf.now = get tensor._leaf %self
  %still.alone = call i1 @duo.alone(ptr %self)
  %c1 = icmp eq ptr %val.now, %val
  %c2 = icmp eq ptr %storage.now, %none
  %c3 = icmp eq ptr %leaf.now, %none
  %c12 = and i1 %c1, %c2
  %c34 = and i1 %c3, %still.alone
  %buffer = get value.buf %val
  %references = load i32, ptr %val
  %sole = icmp eq i32 %references, 2 ; the tensor and this function
  %buffer.references = load i32, ptr %buffer
  %sole.buffer = icmp eq i32 %buffer.references, 2 ; the value and the array
  %home = get buffer._home %buffer
  %owned = icmp ne ptr %home, %none
  %s1 = and i1 %sole, %sole.buffer
  %s2 = and i1 %s1, %owned
  %s3 = and i1 %c12, %c34
  %s = and i1 %s2, %s3
  br i1 %s, label %share, label %drop
share:
  %old.mark = get buffer._shared %buffer
  set buffer._shared %buffer %true
  drop %old.mark
  call void @Py_DecRef(ptr %val)
  ret ptr %array
drop:
  call void @Py_DecRef(ptr %array)
  br label %leave
leave:
  call void @Py_DecRef(ptr %val)
  br label %no
no:
  ret ptr null
}
; `numpy` as a method.
define internal ptr @duo.shown(ptr %self) nounwind {
entry:
  %array = call ptr @duo.last.look(ptr %self)
  %made = icmp ne ptr %array, null
  br i1 %made, label %done, label %look
look:
  %shared = call ptr @duo.look(ptr %self)
  ret ptr %shared
done:
  ret ptr %array
}

; `numpy`; null: not the common case.
define internal ptr @duo.look(ptr %self) nounwind {
entry:
  %pair = alloca ptr
  %none = const none
  %true = const true
  %empty = const empty
  %detached = const detached
  %leaf = get tensor._leaf %self
  %chain = get tensor._chain %self
  %unleaf = icmp eq ptr %leaf, %none
  %plain = icmp eq ptr %chain, %empty
  %cut = icmp eq ptr %chain, %detached
  %whole = or i1 %plain, %cut
  %captured = call i1 @duo.captured()
  %free = xor i1 %captured, true
  %g1 = and i1 %unleaf, %whole
  %g = and i1 %g1, %free
  br i1 %g, label %stored, label %no
stored:
  %has = call i1 @duo.stored(ptr %self)
  br i1 %has, label %begin, label %no
begin:
  %storage = get tensor._storage %self
  call void @Py_IncRef(ptr %storage)
  %val = get storage.val %storage
  call void @Py_IncRef(ptr %val)
  %shared = get storage.shared %storage
  %seen.already = icmp ne ptr %shared, %none
  br i1 %seen.already, label %leave, label %settle
settle:
  %there = call i1 @duo.there(ptr %val)
  br i1 %there, label %make, label %leave

make: ; first what allocates
  %array = call ptr @duo.array(ptr %val)
  %sharers.class = const Sharers
  %sharers = call ptr @PyType_GenericAlloc(ptr %sharers.class, i64 0)
  %list = call ptr @PyList_New(i64 0)
  %m = missing %array %sharers %list
  br i1 %m, label %drop, label %refer
refer:
  %reference = call ptr @PyWeakref_NewRef(ptr %array, ptr null)
  %no.reference = icmp eq ptr %reference, null
  br i1 %no.reference, label %drop, label %listed
listed:
  %added = call i32 @PyList_Append(ptr %list, ptr %reference)
  call void @Py_DecRef(ptr %reference)
  %unadded = icmp ne i32 %added, 0
  br i1 %unadded, label %drop, label %check
check: ; nothing else may read the memory: of the value, the storage and the tensors know, of the buffer the value
  %storage.now = get tensor._storage %self
  %val.now = get storage.val %storage
  %shared.now = get storage.shared %storage
  %leaf.now = get tensor._leaf %self
  %chain.now = get tensor._chain %self
  %c1 = icmp eq ptr %storage.now, %storage
  %c2 = icmp eq ptr %val.now, %val
  %c3 = icmp eq ptr %shared.now, %none
  %c4 = icmp eq ptr %leaf.now, %none
  %c5 = icmp eq ptr %chain.now, %chain
  %c12 = and i1 %c1, %c2
  %c34 = and i1 %c3, %c4
  %c14 = and i1 %c12, %c34
  %c = and i1 %c14, %c5
  br i1 %c, label %base, label %drop
base:
  %base.reference = get storage.base %storage
  %no.base = icmp eq ptr %base.reference, %none
  br i1 %no.base, label %count, label %based
based:
  %base.tensor = call ptr @PyObject_Vectorcall(ptr %base.reference, ptr null, i64 0, ptr null)
  %base.failed = icmp eq ptr %base.tensor, null
  br i1 %base.failed, label %drop, label %base.found
base.found:
  %base.dead = icmp eq ptr %base.tensor, %none
  %base.self = icmp eq ptr %base.tensor, %self
  %base.none = or i1 %base.dead, %base.self
  br i1 %base.none, label %base.done, label %base.other
base.other:
  %base.val = get tensor._val %base.tensor
  %base.holds = icmp eq ptr %base.val, %val
  br label %base.done
base.done:
  %base.holder = phi i1 [ false, %base.found ], [ %base.holds, %base.other ]
  call void @Py_DecRef(ptr %base.tensor)
  br label %count
count:
  %by.base = phi i1 [ false, %base ], [ %base.holder, %base.done ]
  %my.val = get tensor._val %self
  %by.me = icmp eq ptr %my.val, %val
  %h1 = zext i1 %by.base to i32
  %h2 = zext i1 %by.me to i32
  %h12 = add i32 %h1, %h2
  %holders = add i32 %h12, 2 ; the storage and this function
  %references = load i32, ptr %val
  %sole = icmp eq i32 %references, %holders
  %buffer = get value.buf %val
  %buffer.references = load i32, ptr %buffer
  %sole.buffer = icmp eq i32 %buffer.references, 2 ; the value and the array
  %both = and i1 %sole, %sole.buffer
  br i1 %both, label %share, label %drop
share:
  %home = get buffer._home %buffer
  %borrowed = icmp eq ptr %home, %none
  br i1 %borrowed, label %note, label %mark
mark:
  %old.mark = get buffer._shared %buffer
  set buffer._shared %buffer %true
  drop %old.mark
  br label %note
note:
  give sharers.arrays %sharers %list
  set sharers.first %sharers %none
  %old.shared = get storage.shared %storage
  give storage.shared %storage %sharers
  call void @Py_DecRef(ptr %old.shared)
  br i1 %plain, label %done, label %update
update: ; a tensor whose views are all of the memory has what the storage has
  %minus.one = const minus_one
  swap tensor._seen %self %minus.one
  swap tensor._val %self %val
  br label %done
done:
  call void @Py_DecRef(ptr %val)
  call void @Py_DecRef(ptr %storage)
  ret ptr %array
drop:
  call void @PyErr_Clear()
  drop %array %sharers %list
  br label %leave
leave:
  call void @Py_DecRef(ptr %val)
  call void @Py_DecRef(ptr %storage)
  br label %no
no:
  ret ptr null
}

define internal ptr @duo.general(ptr %function, ptr %self, ptr %args, i64 %nargs, ptr %names) nounwind {
entry:
  %keywords = icmp ne ptr %names, null
  br i1 %keywords, label %count, label %fill
count:
  %named = call i64 @PyTuple_Size(ptr %names)
  br label %fill
fill:
  %more = phi i64 [ 0, %entry ], [ %named, %count ]
  %all = add i64 %nargs, %more
  %size = add i64 %all, 1
  %full = alloca ptr, i64 %size
  store ptr %self, ptr %full
  %rest = getelementptr ptr, ptr %full, i64 1
  %bytes = shl i64 %all, 3
  call void @llvm.memcpy.p0.p0.i64(ptr %rest, ptr %args, i64 %bytes, i1 false)
  %given = add i64 %nargs, 1
  %result = call ptr @PyObject_Vectorcall(ptr %function, ptr %full, i64 %given, ptr %names)
  ret ptr %result
}
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
"""

# A Buffer's end: `Buffer.__del__`.
FREE = """
define ptr @duo___del__(ptr %self, ptr %args, i64 %nargs) nounwind {
entry:
  %pair = alloca [2 x ptr]
  %none = const none
  %home = get buffer._home %self
  %number = get buffer.ptr %self
  %unset = icmp eq ptr %home, null ; an interrupt came while it was being made
  %unset.number = icmp eq ptr %number, null
  %borrowed = icmp eq ptr %home, %none
  %n1 = or i1 %unset, %unset.number
  %n = or i1 %n1, %borrowed
  br i1 %n, label %nothing, label %give
nothing:
  call void @Py_IncRef(ptr %none)
  ret ptr %none
give:
  %second = getelementptr ptr, ptr %pair, i64 1
  store ptr %number, ptr %second
  %class = call ptr @duo.class(ptr %home)
  %blocks = const blocks
  %own = icmp eq ptr %class, %blocks
  br i1 %own, label %append, label %general
append:
  %function = get blocks.append %home
  %done = call ptr @PyObject_Vectorcall(ptr %function, ptr %second, i64 1, ptr null)
  ret ptr %done
general:
  store ptr %home, ptr %pair
  %name = const append_name
  %called = call ptr @PyObject_VectorcallMethod(ptr %name, ptr %pair, i64 2, ptr null)
  ret ptr %called
}
"""

_METHOD = """
define ptr @duo_NAME(ptr %self, ptr %args, i64 %nargs, ptr %names) nounwind {
entry:
  %named = icmp ne ptr %names, null
  %given = icmp ne i64 %nargs, 0
  %any = or i1 %named, %given
  br i1 %any, label %python, label %native
native:
  %out = call ptr @HOW(ptr %self)
  %made = icmp ne ptr %out, null
  br i1 %made, label %done, label %python
done:
  ret ptr %out
python:
  %function = const python.NAME
  %result = call ptr @duo.general(ptr %function, ptr %self, ptr %args, i64 %nargs, ptr %names)
  ret ptr %result
}
"""


def share_text() -> str:
    """Belongs in one module with the texts of `recorder_text.py` and `lane_text.py`."""
    flags = 0x1 | 0x100 | 0x400  # NPY_ARRAY_C_CONTIGUOUS, ALIGNED, WRITEABLE
    text = SHARE.replace("MAX_DIMS", str(MAX_DIMS)).replace("ARRAY_FLAGS", str(flags))
    for name, how in METHODS.items():
        text += _METHOD.replace("NAME", name).replace("HOW", how)
    return text + FREE
