"""LLVM text for arguments that are cells: how the runner reads, and overwrites, the values that the frontends hold.

Parameters and optimiser state are read and written in one call that executes no Python code, so that no interrupt and no other thread
comes between: a value is whole, the old or the new one, at every moment. Offsets of the slots come from the frontend (`CELL_LAYOUT`).
"""

from __future__ import annotations

from duo_backends.cells import ANY, CELL_LAYOUT, GRADIENT, GRADIENT_READ, READ, SAME

# Kinds of cells are those of `duo_backends/cells.py`. All of a call's are looked at, and the program run, without executing Python
# code: no interrupt and no other thread comes between.
_CELLS = """
declare void @Py_IncRef(ptr)
declare void @Py_DecRef(ptr)

define internal ptr @duo.place(ptr %layout, ptr %object, i64 %word) alwaysinline nounwind {
  %at = getelementptr i64, ptr %layout, i64 %word
  %offset = load i64, ptr %at
  %place = getelementptr i8, ptr %object, i64 %offset
  ret ptr %place
}
define internal ptr @duo.slot(ptr %layout, ptr %object, i64 %word) alwaysinline nounwind {
  %place = call ptr @duo.place(ptr %layout, ptr %object, i64 %word)
  %held = load ptr, ptr %place
  ret ptr %held
}
; Whether one reference to the object exists (the count is its first word).
define internal i1 @duo.single(ptr %object) alwaysinline nounwind {
  %count = load i32, ptr %object
  %one = icmp eq i32 %count, 1
  ret i1 %one
}
; Whether one reference to the object exists, and `others`.
define internal i1 @duo.counted(ptr %object, i64 %others) alwaysinline nounwind {
  %count = load i32, ptr %object
  %mine = add i64 %others, 1
  %narrow = trunc i64 %mine to i32
  %all = icmp eq i32 %count, %narrow
  ret i1 %all
}
; Puts `new` in the place of `old`.
define internal void @duo.put(ptr %place, ptr %new, ptr %old) nounwind {
  call void @Py_IncRef(ptr %new)
  store ptr %new, ptr %place
  call void @Py_DecRef(ptr %old)
  ret void
}

; The address of a cell's memory, or null when it is refused. saved: gets its buffer, and its value if that is overwritten.
define internal ptr @duo.cell(ptr %given, i64 %kind, ptr %spec, ptr %layout, ptr %saved) nounwind {
entry:
  %saved.buffer = getelementptr ptr, ptr %saved, i64 1
  %none.word = load ptr, ptr %layout
  %read.grad = icmp eq i64 %kind, GRADIENT_READ
  %own.grad = icmp eq i64 %kind, GRADIENT
  %held = or i1 %read.grad, %own.grad
  br i1 %held, label %gradient, label %cell
gradient:
  %grad = call ptr @duo.slot(ptr %layout, ptr %given, i64 GRAD)
  %no.grad = icmp eq ptr %grad, %none.word
  br i1 %no.grad, label %refused, label %class
class:
  %class.at = getelementptr ptr, ptr %grad, i64 1
  %found.class = load ptr, ptr %class.at
  %type.at = getelementptr ptr, ptr %layout, i64 1
  %type = load ptr, ptr %type.at
  %right = icmp eq ptr %found.class, %type
  %alone = call i1 @duo.single(ptr %grad)
  %may = or i1 %alone, %read.grad
  %both = and i1 %right, %may
  br i1 %both, label %plain, label %refused
plain:
  %leaf = call ptr @duo.slot(ptr %layout, ptr %grad, i64 LEAF)
  %no.leaf = icmp eq ptr %leaf, %none.word
  br i1 %no.leaf, label %cell, label %refused
cell:
  %cell.object = phi ptr [ %given, %entry ], [ %grad, %plain ]
  %value = call ptr @duo.slot(ptr %layout, ptr %cell.object, i64 VALUE)
  %storage.at = call ptr @duo.place(ptr %layout, ptr %cell.object, i64 STORAGE)
  %storage = load ptr, ptr %storage.at
  %bare = icmp eq ptr %storage, %none.word
  %any = icmp eq i64 %kind, ANY
  %skip = or i1 %bare, %any
  br i1 %skip, label %check, label %stored
stored: ; a storage that no other tensor shares any more says nothing: the cell goes on without
  %lone = call i1 @duo.single(ptr %storage)
  %base = call ptr @duo.slot(ptr %layout, ptr %storage, i64 STORAGE_VAL)
  %is.base = icmp eq ptr %base, %value
  ; or another value of the same memory, up to date and without a view between: what a parameter has whose `data` was set
  %chain = call ptr @duo.slot(ptr %layout, ptr %cell.object, i64 CHAIN)
  %empty.at = getelementptr ptr, ptr %layout, i64 2
  %empty = load ptr, ptr %empty.at
  %viewless = icmp eq ptr %chain, %empty
  %version = call ptr @duo.slot(ptr %layout, ptr %storage, i64 STORAGE_VERSION)
  %seen.version = call ptr @duo.slot(ptr %layout, ptr %cell.object, i64 SEEN)
  %current = icmp eq ptr %version, %seen.version
  %base.buffer = call ptr @duo.slot(ptr %layout, ptr %base, i64 BUF)
  %value.buffer = call ptr @duo.slot(ptr %layout, ptr %value, i64 BUF)
  %one.memory = icmp eq ptr %base.buffer, %value.buffer
  %base.extra = call ptr @duo.slot(ptr %layout, ptr %base, i64 EXTRA)
  %historyless = icmp eq ptr %base.extra, %none.word
  %e1 = and i1 %viewless, %current
  %e2 = and i1 %one.memory, %historyless
  %e = and i1 %e1, %e2
  %up.to.date = or i1 %is.base, %e
  %shared = call ptr @duo.slot(ptr %layout, ptr %storage, i64 STORAGE_SHARED)
  %unshared = icmp eq ptr %shared, %none.word
  %l1 = and i1 %lone, %up.to.date
  %l2 = and i1 %l1, %unshared
  br i1 %l2, label %drop, label %refused
drop:
  call void @duo.put(ptr %storage.at, ptr %none.word, ptr %storage)
  br label %check
check:
  %info = call ptr @duo.slot(ptr %layout, ptr %value, i64 INFO)
  %info.at = getelementptr ptr, ptr %spec, i64 4
  %wanted.info = load ptr, ptr %info.at
  %fixed = icmp eq i64 %kind, SAME
  %found = select i1 %fixed, ptr %value, ptr %info
  %c1 = icmp eq ptr %found, %wanted.info
  %extra = call ptr @duo.slot(ptr %layout, ptr %value, i64 EXTRA)
  %extra.at = getelementptr ptr, ptr %spec, i64 5
  %wanted.extra = load ptr, ptr %extra.at
  %c2a = icmp eq ptr %wanted.extra, null
  %c2b = icmp eq ptr %extra, %wanted.extra
  %c2 = or i1 %c2a, %c2b
  %buffer = call ptr @duo.slot(ptr %layout, ptr %value, i64 BUF)
  %c3 = icmp ne ptr %buffer, %none.word
  %c12 = and i1 %c1, %c2
  %c = and i1 %c12, %c3
  br i1 %c, label %own, label %refused
own:
  %reads = icmp eq i64 %kind, READ
  %only.any = or i1 %reads, %any
  %only.fixed = or i1 %only.any, %fixed
  %only = or i1 %only.fixed, %read.grad
  br i1 %only, label %reading, label %sole
reading:
  store ptr %buffer, ptr %saved.buffer
  br label %address
sole:
  %others.at = getelementptr i64, ptr %spec, i64 6
  %others = load i64, ptr %others.at
  %o1 = call i1 @duo.counted(ptr %value, i64 %others)
  %o2 = call i1 @duo.counted(ptr %buffer, i64 %others)
  %seen = call ptr @duo.slot(ptr %layout, ptr %buffer, i64 BUFFER_SHARED)
  %o3 = icmp eq ptr %seen, null
  %home = call ptr @duo.slot(ptr %layout, ptr %buffer, i64 HOME)
  %o4 = icmp ne ptr %home, %none.word
  %stamp = call ptr @duo.slot(ptr %layout, ptr %value, i64 STAMP)
  %o5 = icmp eq ptr %stamp, %none.word
  %o15 = and i1 %o1, %o5
  %o12 = and i1 %o15, %o2
  %o34 = and i1 %o3, %o4
  %o = and i1 %o12, %o34
  br i1 %o, label %mine, label %refused
mine:
  store ptr %value, ptr %saved
  store ptr %buffer, ptr %saved.buffer
  br label %address
address:
  %number = call ptr @duo.slot(ptr %layout, ptr %buffer, i64 PTR)
  %memory = call ptr @PyLong_AsVoidPtr(ptr %number)
  ret ptr %memory
refused:
  ret ptr null
}
"""

# Both walk over what `duo.cell` saved of each cell.
_EACH = """
define internal void @NAME(ptr %saved, i64 %count, ptr %layout, ptr %flight) nounwind {
entry:
  %none = load ptr, ptr %layout
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k2, %done ]
  %more = icmp ult i64 %k, %count
  br i1 %more, label %one, label %end
one:
  %k2 = add i64 %k, 1
  %at = getelementptr [2 x ptr], ptr %saved, i64 %k
  %value = load ptr, ptr %at
  %buffer.at = getelementptr ptr, ptr %at, i64 1
  %buffer = load ptr, ptr %buffer.at
  %unowned = icmp eq ptr %value, null
  br i1 %unowned, label %read, label %owned
read:
  call void @WHEN_READ(ptr %buffer)
  br label %done
owned:
  %buf.at = call ptr @duo.place(ptr %layout, ptr %value, i64 BUF)
  %trace.at = call ptr @duo.place(ptr %layout, ptr %value, i64 TRACE)
  WHEN_OWNED
  br label %done
done:
  br label %next
end:
  ret void
}
"""
# While other threads run, the values that are being overwritten are pending: whoever wants one waits for `flight`. What is read is kept alive.
_HIDE = """
  call void @Py_IncRef(ptr %value)
  call void @Py_IncRef(ptr %none)
  store ptr %none, ptr %buf.at
  call void @duo.put(ptr %trace.at, ptr %flight, ptr %none)
"""
_SHOW = """
  store ptr %buffer, ptr %buf.at
  call void @Py_DecRef(ptr %none)
  call void @duo.put(ptr %trace.at, ptr %none, ptr %flight)
  call void @Py_DecRef(ptr %value)
"""


def _each(name: str, when_read: str, when_owned: str) -> str:
    """A function of what was saved of the cells; each that is read, and each that is overwritten, is treated so."""
    return _EACH.replace("NAME", name).replace("WHEN_READ", when_read).replace("WHEN_OWNED", when_owned.strip())


def cells_text() -> str:
    """`duo.cell`, `duo.hide` and `duo.show`; belong in one module with the text of `runner_text.py`."""
    words = {
        "CHAIN": "cell.chain", "SEEN": "cell.seen", "STORAGE_VERSION": "storage.version",
        "STORAGE_VAL": "storage.val", "STORAGE_SHARED": "storage.shared", "BUFFER_SHARED": "buffer.shared", "STORAGE": "cell.storage",
        "VALUE": "cell.value", "LEAF": "cell.leaf", "INFO": "value.info", "EXTRA": "value.extra", "TRACE": "value.trace", "STAMP": "value.stamp",
        "BUF": "value.buf", "PTR": "buffer.ptr", "HOME": "buffer.home", "GRAD": "leaf.grad",
    }  # fmt: skip
    text = _CELLS + _each("duo.hide", "Py_IncRef", _HIDE) + _each("duo.show", "Py_DecRef", _SHOW)
    kinds = (("GRADIENT_READ", GRADIENT_READ), ("GRADIENT", GRADIENT), ("READ", READ), ("ANY", ANY), ("SAME", SAME))
    for kind, number in kinds:
        text = text.replace(f", {kind}\n", f", {number}\n")
    for word, name in words.items():
        text = text.replace(f"i64 {word})", f"i64 {CELL_LAYOUT.index(name)})")
    return text
