"""LLVM text of the program runner: the Python entry point, and the interpreter of a bound program's code table.

`duo_entry` is a METH_FASTCALL function whose `self` is an int, the address of a plan (layout below, written by
`table.py`). It takes one argument per program input (an address, or a Python number for a scalar input), one address per
output, and last the address of a frame: all memory that one call needs, so that calls of one program may overlap.

Plan, i64 words:   0 arguments  1 code  2 argument specs  3 patches  4 flags (1: release the GIL, 2: has parallel phases)
                   5 layout of cells (`cells_text.py`)  6 the object that a value says it waits for while it is overwritten
Argument spec:     0 kind  1 scalar cell (frame offset)  2, 3 range in patches: frame offsets that get the address
                   4, 5 of a cell: the `info` and `extra` that its value must have (0: any)  6 references that others have to what is overwritten
Frame header:      0 threads it has scratch for  1 scratch  2 status words (64 bytes a chunk)  3 set to 1 when a run has ended well
Code, 8 words:     PHASE fn, args (frame offset), dims, units, threads, threads while no worker sleeps | BRANCH cell, target if false | JUMP target | END
Profile:           while one is set, each phase appends an event to it: 64 bytes of header (events so far, room for how many), then
                   per event the address of its code row, start and end in nanoseconds, threads
Result:            0; position + 1 of the phase whose bounds check failed; or a negative code about an argument
"""

from __future__ import annotations

from duo_backends.cpu.cells_text import cells_text
from duo_backends.cpu.pool_text import CHUNKS_PER_THREAD

PHASE, BRANCH, JUMP, END = 0, 1, 2, 3
CODE_WORDS, SPEC_WORDS = 8, 8
RELEASE_GIL, HAS_PARALLEL = 1, 2
FRAME_HEADER = 64
DONE_AT = 24  # bytes
NULL_ARGUMENT, OUT_OF_RANGE, WRONG_COUNT, REFUSED = 0, 1 << 32, 1 << 48, 1 << 49
# Argument kinds. BITS16 is an f16 or bf16 given as the int of its bits.
F64, F32, I64, I32, I16, I8, U8, BOOL, BITS16 = range(1, 10)  # after POINTER

SYMBOLS = ("duo_entry", "duo_copy", "duo_set_profile")
PROFILE_HEADER, EVENT_WORDS = 64, 4
LARGE_COPY = 32 << 20  # bytes that no cache keeps, as in `stream.py`
PYTHON = (
    "PyLong_AsVoidPtr", "PyLong_AsLongLong", "PyLong_FromLongLong", "PyFloat_AsDouble", "PyObject_IsTrue",
    "PyErr_Occurred", "PyEval_SaveThread", "PyEval_RestoreThread", "Py_IncRef", "Py_DecRef",
)  # fmt: skip

_INTERPRETER = """
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare i64 @llvm.umin.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

; A copy as a kernel: one unit is 256 KiB, dims[0] the number of bytes. What no cache keeps goes past them.
define void @duo_copy(ptr %args, ptr %dims, i64 %begin, i64 %end, i64 %tid, ptr %scratch, ptr %status) nounwind {
entry:
  %source = load ptr, ptr %args
  %to = getelementptr ptr, ptr %args, i64 1
  %target = load ptr, ptr %to
  %nbytes = load i64, ptr %dims
  %b = shl i64 %begin, 18
  %e0 = shl i64 %end, 18
  %e = call i64 @llvm.umin.i64(i64 %e0, i64 %nbytes)
  %address = ptrtoint ptr %target to i64
  %low = and i64 %address, 63
  %aligned = icmp eq i64 %low, 0
  %large = icmp uge i64 %nbytes, BEYOND
  %past = and i1 %aligned, %large
  %whole = and i64 %e, -64
  %some = icmp ult i64 %b, %whole
  %go = and i1 %past, %some
  br i1 %go, label %line, label %rest
line:
  %i = phi i64 [ %b, %entry ], [ %i2, %line ]
  %s.at = getelementptr i8, ptr %source, i64 %i
  %t.at = getelementptr i8, ptr %target, i64 %i
  %ahead = getelementptr i8, ptr %s.at, i64 4096
  call void @llvm.prefetch.p0(ptr %ahead, i32 0, i32 3, i32 1)
  %v = load <16 x i32>, ptr %s.at, align 1
  store <16 x i32> %v, ptr %t.at, align 64, !nontemporal !{i32 1}
  %i2 = add i64 %i, 64
  %more = icmp ult i64 %i2, %whole
  br i1 %more, label %line, label %ordered
ordered:
  fence seq_cst ; such stores are ordered by nothing else
  br label %rest
rest:
  %from = phi i64 [ %b, %entry ], [ %whole, %ordered ]
  %n = sub i64 %e, %from
  %s = getelementptr i8, ptr %source, i64 %from
  %t = getelementptr i8, ptr %target, i64 %from
  call void @llvm.memcpy.p0.p0.i64(ptr %t, ptr %s, i64 %n, i1 false)
  ret void
}

@duo.profile = internal global ptr null, align 8
define void @duo_set_profile(ptr %memory) nounwind {
  store atomic ptr %memory, ptr @duo.profile seq_cst, align 8
  ret void
}
define internal void @duo.note(ptr %profile, ptr %row, i64 %start, i64 %threads) noinline nounwind {
entry:
  %end = call i64 @duo.now()
  %number = atomicrmw add ptr %profile, i64 1 monotonic
  %room.at = getelementptr i64, ptr %profile, i64 1
  %room = load i64, ptr %room.at
  %fits = icmp ult i64 %number, %room
  br i1 %fits, label %write, label %done
write:
  %events = getelementptr i8, ptr %profile, i64 PROFILE_HEADER
  %event = getelementptr [EVENT_WORDS x i64], ptr %events, i64 %number
  store ptr %row, ptr %event
  %e1 = getelementptr i64, ptr %event, i64 1
  store i64 %start, ptr %e1
  %e2 = getelementptr i64, ptr %event, i64 2
  store i64 %end, ptr %e2
  %e3 = getelementptr i64, ptr %event, i64 3
  store i64 %threads, ptr %e3
  br label %done
done:
  ret void
}

; Only the calling thread walks the code; workers see phases. Stops at the first phase that reports a failed check and
; leaves that report (of the lowest chunk, so that it does not depend on timing) in the first status words.
; Short phases do not wake workers, except each sixteenth that would have liked to: a program called again and again gets its threads.
@duo.missed = internal global i64 0, align 128
define internal i64 @duo.interpret(ptr %frame, ptr %code, i64 %threads) nounwind {
entry:
  %scratch.at = getelementptr i64, ptr %frame, i64 1
  %scratch = load ptr, ptr %scratch.at
  %status.at = getelementptr i64, ptr %frame, i64 2
  %status = load ptr, ptr %status.at
  br label %fetch
fetch:
  %pc = phi i64 [ 0, %entry ], [ %step, %onward ], [ %where, %branch ], [ %a, %fetch ]
  %ip = getelementptr [8 x i64], ptr %code, i64 %pc
  %step = add i64 %pc, 1
  %op = load i64, ptr %ip
  %ip1 = getelementptr i64, ptr %ip, i64 1
  %a = load i64, ptr %ip1
  %ip2 = getelementptr i64, ptr %ip, i64 2
  %b = load i64, ptr %ip2
  switch i64 %op, label %end [ i64 0, label %phase
                               i64 1, label %branch
                               i64 2, label %fetch ]
branch:
  %cell = getelementptr i8, ptr %frame, i64 %a
  %flag.at = load ptr, ptr %cell
  %flag = load i8, ptr %flag.at
  %true = icmp ne i8 %flag, 0
  %where = select i1 %true, i64 %step, i64 %b
  br label %fetch
end:
  %done.at = getelementptr i64, ptr %frame, i64 3
  store i64 1, ptr %done.at
  ret i64 0
phase:
  %fn = inttoptr i64 %a to ptr
  %args = getelementptr i8, ptr %frame, i64 %b
  %ip3 = getelementptr i64, ptr %ip, i64 3
  %dims = load ptr, ptr %ip3
  %ip4 = getelementptr i64, ptr %ip, i64 4
  %units = load i64, ptr %ip4
  %ip5 = getelementptr i64, ptr %ip, i64 5
  %patient = load i64, ptr %ip5
  %ip6 = getelementptr i64, ptr %ip, i64 6
  %eager = load i64, ptr %ip6
  %sleepers = load atomic i32, ptr @duo.sleepers monotonic, align 4
  %none = icmp eq i32 %sleepers, 0
  %wished = icmp ugt i64 %eager, %patient
  %asleep = icmp ne i32 %sleepers, 0
  %missed = and i1 %wished, %asleep
  %count0 = load atomic i64, ptr @duo.missed monotonic, align 8
  %one.more = zext i1 %missed to i64
  %count = add i64 %count0, %one.more
  store atomic i64 %count, ptr @duo.missed monotonic, align 8
  %turn = and i64 %count, 15
  %full = icmp eq i64 %turn, 0
  %call = and i1 %missed, %full
  %awake = or i1 %none, %call
  %most = select i1 %awake, i64 %eager, i64 %patient
  %parts = call i64 @llvm.umin.i64(i64 %most, i64 %threads)
  %profile = load atomic ptr, ptr @duo.profile monotonic, align 8
  %profiled = icmp ne ptr %profile, null
  br i1 %profiled, label %clock, label %begin
clock:
  %now = call i64 @duo.now()
  br label %begin
begin:
  %start = phi i64 [ 0, %phase ], [ %now, %clock ]
  %serial = icmp ult i64 %parts, 2
  br i1 %serial, label %alone, label %together
alone:
  call void %fn(ptr %args, ptr %dims, i64 0, i64 %units, i64 0, ptr %scratch, ptr %status)
  %bad = load i64, ptr %status
  %ok = icmp eq i64 %bad, 0
  br i1 %ok, label %following, label %failed
together:
  %cut = mul i64 %parts, CHUNKS_PER_THREAD
  %chunks = call i64 @llvm.umin.i64(i64 %cut, i64 %units)
  fence release
  store atomic ptr %fn, ptr @duo.task monotonic, align 8
  store atomic ptr %args, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 1) monotonic, align 8
  store atomic ptr %dims, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 2) monotonic, align 8
  store atomic i64 %units, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 3) monotonic, align 8
  store atomic ptr %scratch, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 4) monotonic, align 8
  store atomic ptr %status, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 5) monotonic, align 8
  call void @duo.fork(i64 %chunks, i64 %parts)
  br label %merge
merge:
  %t = phi i64 [ 0, %together ], [ %t2, %fine ]
  %line = shl i64 %t, 6
  %words = getelementptr i8, ptr %status, i64 %line
  %report = load i64, ptr %words
  %good = icmp eq i64 %report, 0
  br i1 %good, label %fine, label %found
fine:
  %t2 = add i64 %t, 1
  %more = icmp ult i64 %t2, %chunks
  br i1 %more, label %merge, label %following
found:
  %first = icmp eq i64 %t, 0
  br i1 %first, label %failed, label %move
move:
  call void @llvm.memcpy.p0.p0.i64(ptr %status, ptr %words, i64 32, i1 false)
  br label %failed
failed:
  ret i64 %step
following:
  br i1 %profiled, label %note, label %onward
note:
  call void @duo.note(ptr %profile, ptr %ip, i64 %start, i64 %parts)
  br label %onward
onward:
  br label %fetch
}

define internal i64 @duo.run(ptr %frame, ptr %code, i64 %flags) nounwind {
  %fp = call i64 @duo.enter_fp()
  %p = and i64 %flags, 2
  %par = icmp ne i64 %p, 0
  %room = load i64, ptr %frame
  %wide = icmp ugt i64 %room, 1
  %try = and i1 %par, %wide
  br i1 %try, label %ask, label %serial
ask:
  %got = call i64 @duo.acquire()
  %busy = icmp eq i64 %got, 0
  br i1 %busy, label %serial, label %parallel
parallel:
  %threads = call i64 @llvm.umin.i64(i64 %got, i64 %room)
  %r1 = call i64 @duo.interpret(ptr %frame, ptr %code, i64 %threads)
  call void @duo.release()
  br label %done
serial:
  %r2 = call i64 @duo.interpret(ptr %frame, ptr %code, i64 1)
  br label %done
done:
  %r = phi i64 [ %r1, %parallel ], [ %r2, %serial ]
  call void @duo.leave_fp(i64 %fp)
  ret i64 %r
}
"""

_ENTRY = """
declare ptr @PyLong_AsVoidPtr(ptr)
declare i64 @PyLong_AsLongLong(ptr)
declare ptr @PyLong_FromLongLong(i64)
declare double @PyFloat_AsDouble(ptr)
declare i32 @PyObject_IsTrue(ptr)
declare ptr @PyErr_Occurred()
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)

define ptr @duo_entry(ptr %self, ptr %args, i64 %nargs) nounwind {
entry:
  %plan = call ptr @PyLong_AsVoidPtr(ptr %self)
  %count = load i64, ptr %plan
  %count.ok = icmp eq i64 %count, %nargs
  br i1 %count.ok, label %start, label %miscounted
miscounted:
  %r.count = call ptr @PyLong_FromLongLong(i64 -WRONG_COUNT)
  ret ptr %r.count
start:
  %p1 = getelementptr i64, ptr %plan, i64 1
  %code = load ptr, ptr %p1
  %p2 = getelementptr i64, ptr %plan, i64 2
  %specs = load ptr, ptr %p2
  %p3 = getelementptr i64, ptr %plan, i64 3
  %patches = load ptr, ptr %p3
  %p4 = getelementptr i64, ptr %plan, i64 4
  %flags = load i64, ptr %p4
  %p5 = getelementptr i64, ptr %plan, i64 5
  %layout = load ptr, ptr %p5
  %p6 = getelementptr i64, ptr %plan, i64 6
  %flight = load ptr, ptr %p6
  %saved = alloca [2 x ptr], i64 %nargs
  %last = sub i64 %nargs, 1
  %frame.at = getelementptr ptr, ptr %args, i64 %last
  %frame.object = load ptr, ptr %frame.at
  %frame = call ptr @PyLong_AsVoidPtr(ptr %frame.object)
  %frame.null = icmp eq ptr %frame, null
  br i1 %frame.null, label %null, label %next
next:
  %k = phi i64 [ 0, %start ], [ %k2, %patched ]
  %any = icmp ult i64 %k, %last
  br i1 %any, label %one, label %run
one:
  %k2 = add i64 %k, 1
  %object.at = getelementptr ptr, ptr %args, i64 %k
  %object = load ptr, ptr %object.at
  %spec = getelementptr [8 x i64], ptr %specs, i64 %k
  %saved.at = getelementptr [2 x ptr], ptr %saved, i64 %k
  store [2 x ptr] zeroinitializer, ptr %saved.at
  %kind = load i64, ptr %spec
  %spec1 = getelementptr i64, ptr %spec, i64 1
  %offset = load i64, ptr %spec1
  %cell = getelementptr i8, ptr %frame, i64 %offset
  switch i64 %kind, label %pointer [ i64 1, label %float
                                     i64 2, label %float
                                     i64 8, label %bool
                                     i64 3, label %int
                                     i64 4, label %int
                                     i64 5, label %int
                                     i64 6, label %int
                                     i64 7, label %int
                                     i64 9, label %int
                                     i64 10, label %cell.given
                                     i64 11, label %cell.given
                                     i64 12, label %cell.given
                                     i64 13, label %cell.given
                                     i64 14, label %cell.given
                                     i64 15, label %cell.given
                                     i64 16, label %array.given ]
array.given:
  %data.at = getelementptr i8, ptr %object, i64 %offset
  %data = load ptr, ptr %data.at
  br label %patch
cell.given:
  %memory = call ptr @duo.cell(ptr %object, i64 %kind, ptr %spec, ptr %layout, ptr %saved.at)
  %refused = icmp eq ptr %memory, null
  br i1 %refused, label %refuse, label %patch
refuse:
  %r.refused = call ptr @PyLong_FromLongLong(i64 -REFUSED)
  ret ptr %r.refused
pointer:
  %given = call ptr @PyLong_AsVoidPtr(ptr %object)
  %given.null = icmp eq ptr %given, null
  br i1 %given.null, label %null, label %patch
float:
  %d = call double @PyFloat_AsDouble(ptr %object)
  %suspect = fcmp oeq double %d, -1.0
  br i1 %suspect, label %float.check, label %float.store
float.check:
  %float.error = call ptr @PyErr_Occurred()
  %float.ok = icmp eq ptr %float.error, null
  br i1 %float.ok, label %float.store, label %error
float.store:
  %double = icmp eq i64 %kind, 1
  br i1 %double, label %store.f64, label %store.f32
store.f64:
  store double %d, ptr %cell
  br label %patch
store.f32:
  %fp = call i64 @duo.enter_fp()
  %f = call float @duo.narrow(double %d)
  store float %f, ptr %cell
  call void @duo.leave_fp(i64 %fp)
  br label %patch
bool:
  %truth = call i32 @PyObject_IsTrue(ptr %object)
  %bool.ok = icmp sge i32 %truth, 0
  br i1 %bool.ok, label %bool.store, label %error
bool.store:
  %b = trunc i32 %truth to i8
  store i8 %b, ptr %cell
  br label %patch
int:
  %n = call i64 @PyLong_AsLongLong(ptr %object)
  %int.suspect = icmp eq i64 %n, -1
  br i1 %int.suspect, label %int.check, label %int.store
int.check:
  %int.error = call ptr @PyErr_Occurred()
  %int.ok = icmp eq ptr %int.error, null
  br i1 %int.ok, label %int.store, label %error
int.store:
  switch i64 %kind, label %store.i64 [ i64 4, label %store.i32
                                       i64 5, label %store.i16
                                       i64 6, label %store.i8
                                       i64 7, label %store.u8
                                       i64 9, label %store.u16 ]
store.i64:
  store i64 %n, ptr %cell
  br label %patch
store.i32:
  %n32 = trunc i64 %n to i32
  store i32 %n32, ptr %cell
  %b32 = sext i32 %n32 to i64
  br label %fits
store.i16:
  %n16 = trunc i64 %n to i16
  store i16 %n16, ptr %cell
  %b16 = sext i16 %n16 to i64
  br label %fits
store.i8:
  %n8 = trunc i64 %n to i8
  store i8 %n8, ptr %cell
  %b8 = sext i8 %n8 to i64
  br label %fits
store.u8:
  %u8 = trunc i64 %n to i8
  store i8 %u8, ptr %cell
  %bu8 = zext i8 %u8 to i64
  br label %fits
store.u16:
  %u16 = trunc i64 %n to i16
  store i16 %u16, ptr %cell
  %bu16 = zext i16 %u16 to i64
  br label %fits
fits:
  %back = phi i64 [ %b32, %store.i32 ], [ %b16, %store.i16 ], [ %b8, %store.i8 ], [ %bu8, %store.u8 ],
                  [ %bu16, %store.u16 ]
  %same = icmp eq i64 %back, %n
  br i1 %same, label %patch, label %unfit
patch:
  %address = phi ptr [ %given, %pointer ], [ %memory, %cell.given ], [ %data, %array.given ], [ %cell, %store.f64 ], [ %cell, %store.f32 ], [ %cell, %bool.store ],
                     [ %cell, %store.i64 ], [ %cell, %fits ]
  %spec2 = getelementptr i64, ptr %spec, i64 2
  %from = load i64, ptr %spec2
  %spec3 = getelementptr i64, ptr %spec, i64 3
  %to = load i64, ptr %spec3
  br label %patch.next
patch.next:
  %j = phi i64 [ %from, %patch ], [ %j2, %patch.one ]
  %left = icmp ult i64 %j, %to
  br i1 %left, label %patch.one, label %patched
patch.one:
  %patch.at = getelementptr i64, ptr %patches, i64 %j
  %place.offset = load i64, ptr %patch.at
  %place = getelementptr i8, ptr %frame, i64 %place.offset
  store ptr %address, ptr %place
  %j2 = add i64 %j, 1
  br label %patch.next
patched:
  br label %next
run:
  %release = trunc i64 %flags to i1
  br i1 %release, label %long, label %short
long:
  %hides = icmp ne ptr %flight, null
  br i1 %hides, label %hide, label %leave
hide:
  call void @duo.hide(ptr %saved, i64 %last, ptr %layout, ptr %flight)
  br label %leave
leave:
  %thread = call ptr @PyEval_SaveThread()
  %r.long = call i64 @duo.run(ptr %frame, ptr %code, i64 %flags)
  call void @PyEval_RestoreThread(ptr %thread)
  br i1 %hides, label %show, label %result
show:
  call void @duo.show(ptr %saved, i64 %last, ptr %layout, ptr %flight)
  br label %result
short:
  %r.short = call i64 @duo.run(ptr %frame, ptr %code, i64 %flags)
  br label %result
result:
  %r = phi i64 [ %r.long, %leave ], [ %r.long, %show ], [ %r.short, %short ]
  %r.object = call ptr @PyLong_FromLongLong(i64 %r)
  ret ptr %r.object
null:
  %which = phi i64 [ %last, %start ], [ %k, %pointer ]
  %null.error = call ptr @PyErr_Occurred()
  %null.plain = icmp eq ptr %null.error, null
  br i1 %null.plain, label %null.report, label %error
null.report:
  %nr = sub i64 -1, %which
  %nr.object = call ptr @PyLong_FromLongLong(i64 %nr)
  ret ptr %nr.object
unfit:
  %ur0 = sub i64 -1, %k
  %ur = sub i64 %ur0, OUT_OF_RANGE
  %ur.object = call ptr @PyLong_FromLongLong(i64 %ur)
  ret ptr %ur.object
error:
  ret ptr null
}

; Apart, so that the conversion cannot move to before the floating-point environment is set.
define internal float @duo.narrow(double %d) noinline nounwind {
  %f = fptrunc double %d to float
  ret float %f
}
"""


def interpreter_text() -> str:
    """`duo.run`, which walks a code table; belongs in one module with the text of `pool_text.py`."""
    text = _INTERPRETER.replace("CHUNKS_PER_THREAD", str(CHUNKS_PER_THREAD)).replace("BEYOND", str(LARGE_COPY))
    return text.replace("PROFILE_HEADER", str(PROFILE_HEADER)).replace("EVENT_WORDS", str(EVENT_WORDS))


def runner_text() -> str:
    """The runner; belongs in one module with the text of `pool_text.py`."""
    entry = _ENTRY.replace("OUT_OF_RANGE", str(OUT_OF_RANGE)).replace("WRONG_COUNT", str(WRONG_COUNT))
    return interpreter_text() + cells_text() + entry.replace("REFUSED", str(REFUSED))
