"""LLVM text of lanes: the flush of a short path that has been flushed before, as `duo/eager/lane.py` writes it in Python, without Python code.

A lane's words, i64:  0 program  1 entry  2 list of frames  3, 4, 5 how many checks, inputs and outputs  6 whether inputs may be overwritten
                      7, 8 its Keeper (`duo/eager/keeping.py`) or 0, and where its counts are  9 how many constants
then of each check:   number of an entry, whether it must be alive
of each input:        number of an entry, which of its Python numbers or -1; or an address (an int object), -2
of each output:       number of an entry, bytes (an int object), size class, its list of free blocks
of each constant:     number of an entry, the buffer that it must have
Where something is kept of the values that a trace has, the words are those of the Kept; all but the entry, inputs and constants are the same.

Everything that may run Python code (what allocates, a garbage collection's finalisers) comes before the trace is closed or after its values are
there; the trace's lock is held, as other threads may run during a long program.
"""

LANE_WORDS = 10
OBJECTS = ("FlushPlan", "Kept", "Buffer", "capture_name", "acquire", "release", "flush")
SLOTS = ("node.memo", "plan.address", "mark.kept", "kept.address", "value.kept", "buffer.ptr", "buffer.nbytes", "buffer._home")

LANE = """

define internal i64 @duo.word(ptr %words, i64 %k) alwaysinline nounwind {
  %at = getelementptr i64, ptr %words, i64 %k
  %word = load i64, ptr %at
  ret i64 %word
}
define internal ptr @duo.held(ptr %words, i64 %k) alwaysinline nounwind {
  %word = call i64 @duo.word(ptr %words, i64 %k)
  %object = inttoptr i64 %word to ptr
  ret ptr %object
}
; Takes the last item of a list: a reference of the caller's, or null.
define internal ptr @duo.pop(ptr %list) nounwind {
entry:
  %size = call i64 @PyList_Size(ptr %list)
  %none = icmp eq i64 %size, 0
  br i1 %none, label %empty, label %take
empty:
  ret ptr null
take:
  %at = sub i64 %size, 1
  %item = call ptr @PyList_GetItem(ptr %list, i64 %at)
  call void @Py_IncRef(ptr %item)
  %cut = call i32 @PyList_SetSlice(ptr %list, i64 %at, i64 %size, ptr null)
  ret ptr %item
}
; Whether what is alive is what the lane gives, and no input could be overwritten instead.
define internal i1 @duo.lane.fits(ptr %words, ptr %trace, ptr %entries) nounwind {
entry:
  %position = alloca i64
  %key = alloca ptr
  %value = alloca ptr
  %checks = call i64 @duo.word(ptr %words, i64 3)
  br label %next
next:
  %k = phi i64 [ 0, %entry ], [ %k2, %check ]
  %more = icmp ult i64 %k, %checks
  br i1 %more, label %check, label %inputs
check:
  %k2 = add i64 %k, 1
  %twice = shl i64 %k, 1
  %at = add i64 %twice, LANE_WORDS
  %at.live = add i64 %at, 1
  %number = call i64 @duo.word(ptr %words, i64 %at)
  %live = call i64 @duo.word(ptr %words, i64 %at.live)
  %entry.val = call ptr @PyList_GetItem(ptr %entries, i64 %number)
  %alone = call i1 @duo.alone(ptr %entry.val)
  %wanted = icmp ne i64 %live, 0
  %right = xor i1 %alone, %wanted
  br i1 %right, label %next, label %no
inputs:
  %givable = call i64 @duo.word(ptr %words, i64 6)
  %never = icmp eq i64 %givable, 0
  br i1 %never, label %yes, label %leaves
leaves:
  store i64 0, ptr %position
  %dict = get trace.leaves %trace
  br label %next.leaf
next.leaf:
  %found = call i32 @PyDict_Next(ptr %dict, ptr %position, ptr %key, ptr %value)
  %any = icmp ne i32 %found, 0
  br i1 %any, label %leaf, label %yes
leaf:
  %val = load ptr, ptr %key
  %mine = call i1 @duo.alone(ptr %val)
  br i1 %mine, label %no, label %next.leaf
yes:
  ret i1 true
no:
  ret i1 false
}

; The value outside that entry `number` of the trace is of, or null.
define internal ptr @duo.outside(ptr %trace, i64 %number) nounwind {
entry:
  %position = alloca i64
  %key = alloca ptr
  %value = alloca ptr
  store i64 0, ptr %position
  %dict = get trace.leaves %trace
  br label %next
next:
  %found = call i32 @PyDict_Next(ptr %dict, ptr %position, ptr %key, ptr %value)
  %any = icmp ne i32 %found, 0
  br i1 %any, label %leaf, label %no
leaf:
  %index = load ptr, ptr %value
  %entry.number = call i64 @PyLong_AsLongLong(ptr %index)
  %right = icmp eq i64 %entry.number, %number
  br i1 %right, label %yes, label %next
yes:
  %val = load ptr, ptr %key
  ret ptr %val
no:
  ret ptr null
}
; The words to run with: those of what is kept of the values that the trace has, which then is put into `held`; else the lane's own, which counts as a
; call of its Keeper's. Null: that is for Python to find out.
define internal ptr @duo.words(ptr %words, ptr %trace, ptr %entries, ptr %held) nounwind {
entry:
  store ptr null, ptr %held
  %keeper = call ptr @duo.held(ptr %words, i64 7)
  %none = icmp eq ptr %keeper, null
  br i1 %none, label %own, label %anchor
anchor:
  %counts = call ptr @duo.held(ptr %words, i64 8)
  %number = call i64 @duo.word(ptr %counts, i64 1)
  %nothing = icmp eq i64 %number, 0
  br i1 %nothing, label %count, label %find
find:
  %val = call ptr @duo.outside(ptr %trace, i64 %number)
  %lost = icmp eq ptr %val, null
  br i1 %lost, label %count, label %value
value:
  %dict = get value.kept %val
  %bare = icmp eq ptr %dict, null
  br i1 %bare, label %count, label %look
look:
  %mark = call ptr @PyDict_GetItem(ptr %dict, ptr %keeper)
  %unmarked = icmp eq ptr %mark, null
  br i1 %unmarked, label %count, label %class
class:
  %found = get mark.kept %mark
  %kept.class = const Kept
  %found.class = call ptr @duo.class(ptr %found)
  %is.kept = icmp eq ptr %found.class, %kept.class
  br i1 %is.kept, label %there, label %count
there:
  %address.object = get kept.address %found
  %address = call i64 @PyLong_AsLongLong(ptr %address.object)
  %kept.words = inttoptr i64 %address to ptr
  %general = icmp eq i64 %address, 0
  br i1 %general, label %python, label %constants
constants:
  %checks = call i64 @duo.word(ptr %kept.words, i64 3)
  %inputs = call i64 @duo.word(ptr %kept.words, i64 4)
  %outputs = call i64 @duo.word(ptr %kept.words, i64 5)
  %total = call i64 @duo.word(ptr %kept.words, i64 9)
  %pairs = add i64 %checks, %inputs
  %pair.words = shl i64 %pairs, 1
  %output.words = shl i64 %outputs, 2
  %before = add i64 %pair.words, %output.words
  %start = add i64 %before, LANE_WORDS
  br label %next
next:
  %k = phi i64 [ 0, %constants ], [ %k2, %constant ]
  %more = icmp ult i64 %k, %total
  br i1 %more, label %constant, label %keep
constant:
  %k2 = add i64 %k, 1
  %twice = shl i64 %k, 1
  %row = add i64 %start, %twice
  %row1 = add i64 %row, 1
  %entry.number = call i64 @duo.word(ptr %kept.words, i64 %row)
  %wanted = call ptr @duo.held(ptr %kept.words, i64 %row1)
  %entry.val = call ptr @PyList_GetItem(ptr %entries, i64 %entry.number)
  %buffer = get value.buf %entry.val
  %same = icmp eq ptr %buffer, %wanted
  br i1 %same, label %next, label %python
keep:
  call void @Py_IncRef(ptr %found)
  store ptr %found, ptr %held
  ret ptr %kept.words
count:
  %left = call i64 @duo.word(ptr %counts, i64 0)
  %fewer = sub i64 %left, 1
  %due = icmp slt i64 %fewer, 1
  br i1 %due, label %python, label %counted
counted:
  store i64 %fewer, ptr %counts
  br label %own
own:
  ret ptr %words
python:
  ret ptr null
}

; Flushes the trace if it is at the end of a lane and nothing stands against it.
define internal i1 @duo.lane(ptr %trace) nounwind {
entry:
  %none = const none
  %true = const true
  %false = const false
  %end = const END
  %done = get trace.done %trace
  %was.done = icmp eq ptr %done, %true
  %call.object = get trace.call %trace
  %called = icmp ne ptr %call.object, %none
  %hooked = get trace.hooked %trace
  %hook.count = call i64 @PyList_Size(ptr %hooked)
  %hooks.there = icmp ne i64 %hook.count, 0
  %forks = const forks
  %fork = call ptr @PyList_GetItem(ptr %forks, i64 0)
  %born = get trace.born %trace
  %foreign = icmp ne ptr %fork, %born
  %e1 = or i1 %was.done, %called
  %e2 = or i1 %hooks.there, %foreign
  %e = or i1 %e1, %e2
  br i1 %e, label %no, label %find
find:
  %entries = get trace.entries %trace
  %last = call ptr @duo.last(ptr %entries)
  %node = get value.node %last
  %memo = get node.memo %node
  %memo.class = call ptr @duo.class(ptr %memo)
  %plan.class = const FlushPlan
  %planned = icmp eq ptr %memo.class, %plan.class
  br i1 %planned, label %plan, label %no
plan:
  %address.object = get plan.address %memo
  %address = call i64 @PyLong_AsLongLong(ptr %address.object)
  %no.lane = icmp eq i64 %address, 0
  br i1 %no.lane, label %no, label %capture
capture:
  %words = inttoptr i64 %address to ptr
  %capturing = call i1 @duo.captured()
  br i1 %capturing, label %no, label %acquire
clear:
  call void @PyErr_Clear()
  br label %no
acquire:
  %lock = get trace.lock %trace
  %kept.at = alloca ptr
  %pair = alloca [2 x ptr]
  store ptr %lock, ptr %pair
  %second = getelementptr ptr, ptr %pair, i64 1
  store ptr %false, ptr %second
  %acquire.function = const acquire
  %acquired = call ptr @PyObject_Vectorcall(ptr %acquire.function, ptr %pair, i64 2, ptr null)
  %unheld = icmp ne ptr %acquired, %true
  drop %acquired
  br i1 %unheld, label %clear, label %fit
fit:
  %fits = call i1 @duo.lane.fits(ptr %words, ptr %trace, ptr %entries)
  br i1 %fits, label %choose, label %leave
choose:
  %chosen = call ptr @duo.words(ptr %words, ptr %trace, ptr %entries, ptr %kept.at)
  %general = icmp eq ptr %chosen, null
  br i1 %general, label %leave, label %run
run:
  %ran = call i1 @duo.lane.run(ptr %chosen, ptr %trace)
  %kept = load ptr, ptr %kept.at
  drop %kept
  br label %leave
leave:
  %result = phi i1 [ false, %fit ], [ false, %choose ], [ %ran, %run ]
  %release = const release
  %released = call ptr @PyObject_Vectorcall(ptr %release, ptr %pair, i64 1, ptr null)
  drop %released
  ret i1 %result
no:
  ret i1 false
}

; Leaves END alone among the entries of a trace that has run, which the caller holds: they refer to the trace. Whoever else holds their list keeps it.
define internal void @duo.empty(ptr %trace, ptr %entries) nounwind {
entry:
  %holders = load i32, ptr %entries
  %private = icmp eq i32 %holders, 2
  br i1 %private, label %cut, label %replace
cut:
  %count = call i64 @PyList_Size(ptr %entries)
  %last = sub i64 %count, 1
  %done = call i32 @PyList_SetSlice(ptr %entries, i64 0, i64 %last, ptr null)
  br label %clear
replace:
  %end = const END
  %list = call ptr @PyList_New(i64 1)
  %failed = icmp eq ptr %list, null
  br i1 %failed, label %clear, label %put
put:
  call void @Py_IncRef(ptr %end)
  %set = call i32 @PyList_SetItem(ptr %list, i64 0, ptr %end)
  swap trace.entries %trace %list
  call void @Py_DecRef(ptr %list)
  br label %end.it
clear: ; without memory they stay
  call void @PyErr_Clear()
  br label %end.it
end.it:
  ret void
}

; Runs a lane's program and publishes; false: it has not run.
define internal i1 @duo.lane.run(ptr %words, ptr %trace) nounwind {
entry:
  %none = const none
  %true = const true
  %end = const END
  %checks = call i64 @duo.word(ptr %words, i64 3)
  %inputs = call i64 @duo.word(ptr %words, i64 4)
  %outputs = call i64 @duo.word(ptr %words, i64 5)
  %check.words = shl i64 %checks, 1
  %inputs.at = add i64 %check.words, LANE_WORDS
  %input.words = shl i64 %inputs, 1
  %outputs.at = add i64 %inputs.at, %input.words
  %arguments = add i64 %inputs, %outputs
  %nargs = add i64 %arguments, 1
  %args = alloca ptr, i64 %nargs
  %made = alloca ptr, i64 %nargs
  %buffer.class = const Buffer
  br label %next.new
next.new:
  %n = phi i64 [ 0, %entry ], [ %n2, %new ]
  %bad = phi i1 [ false, %entry ], [ %bad2, %new ]
  %more.new = icmp ult i64 %n, %outputs
  br i1 %more.new, label %new, label %allocated
new:
  %n2 = add i64 %n, 1
  %buffer.new = call ptr @PyType_GenericAlloc(ptr %buffer.class, i64 0)
  %new.at = getelementptr ptr, ptr %made, i64 %n
  store ptr %buffer.new, ptr %new.at
  %no.buffer = icmp eq ptr %buffer.new, null
  %bad2 = or i1 %bad, %no.buffer
  br label %next.new
allocated:
  br i1 %bad, label %drop, label %still
still: ; from here to the run nothing executes Python code
  %entries = get trace.entries %trace
  %last = call ptr @duo.last(ptr %entries)
  %done = get trace.done %trace
  %was.done = icmp eq ptr %done, %true
  %was.closed = icmp eq ptr %last, %end
  %gone = or i1 %was.done, %was.closed
  br i1 %gone, label %drop, label %frame
frame:
  %frames = call ptr @duo.held(ptr %words, i64 2)
  %frame.now = call ptr @duo.pop(ptr %frames)
  %no.frame = icmp eq ptr %frame.now, null
  br i1 %no.frame, label %drop, label %next.block
next.block:
  %b = phi i64 [ 0, %frame ], [ %b2, %fill ]
  %more.blocks = icmp ult i64 %b, %outputs
  br i1 %more.blocks, label %block, label %next.input
block:
  %b2 = add i64 %b, 1
  %b4 = shl i64 %b, 2
  %row = add i64 %outputs.at, %b4
  %row1 = add i64 %row, 1
  %row2 = add i64 %row, 2
  %row3 = add i64 %row, 3
  %free = call ptr @duo.held(ptr %words, i64 %row3)
  %block.number = call ptr @duo.pop(ptr %free)
  %no.block = icmp eq ptr %block.number, null
  br i1 %no.block, label %give.back, label %fill
fill:
  %nbytes = call ptr @duo.held(ptr %words, i64 %row1)
  %home = call ptr @duo.held(ptr %words, i64 %row2)
  %made.at = getelementptr ptr, ptr %made, i64 %b
  %buffer = load ptr, ptr %made.at
  give buffer.ptr %buffer %block.number
  set buffer.nbytes %buffer %nbytes
  set buffer._home %buffer %home
  %out.place = add i64 %inputs, %b
  %out.at = getelementptr ptr, ptr %args, i64 %out.place
  store ptr %block.number, ptr %out.at
  br label %next.block
next.input:
  %i = phi i64 [ 0, %next.block ], [ %i2, %input.done ]
  %more.inputs = icmp ult i64 %i, %inputs
  br i1 %more.inputs, label %input, label %call
input:
  %i2 = add i64 %i, 1
  %i.twice = shl i64 %i, 1
  %in.row = add i64 %inputs.at, %i.twice
  %in.row1 = add i64 %in.row, 1
  %number = call i64 @duo.word(ptr %words, i64 %in.row)
  %scalar = call i64 @duo.word(ptr %words, i64 %in.row1)
  %is.fixed = icmp eq i64 %scalar, -2
  br i1 %is.fixed, label %an.address, label %an.entry
an.address:
  %address = inttoptr i64 %number to ptr
  br label %input.done
an.entry:
  %val = call ptr @PyList_GetItem(ptr %entries, i64 %number)
  %is.buffer = icmp slt i64 %scalar, 0
  br i1 %is.buffer, label %a.buffer, label %a.scalar
a.buffer:
  %in.buffer = get value.buf %val
  %in.ptr = get buffer.ptr %in.buffer
  br label %input.done
a.scalar:
  %scalars = get value.scalars %val
  %scalar.object = call ptr @PyTuple_GetItem(ptr %scalars, i64 %scalar)
  br label %input.done
input.done:
  %argument = phi ptr [ %address, %an.address ], [ %in.ptr, %a.buffer ], [ %scalar.object, %a.scalar ]
  %in.at = getelementptr ptr, ptr %args, i64 %i
  store ptr %argument, ptr %in.at
  br label %next.input
call:
  %closing = call i32 @PyList_Append(ptr %entries, ptr %end)
  %unclosed = icmp ne i32 %closing, 0
  br i1 %unclosed, label %give.back, label %go
go:
  call void @Py_IncRef(ptr %entries)
  %frame.ptr = get buffer.ptr %frame.now
  %frame.at = getelementptr ptr, ptr %args, i64 %arguments
  store ptr %frame.ptr, ptr %frame.at
  %entry.function = call ptr @duo.held(ptr %words, i64 1)
  %code = call ptr @PyObject_Vectorcall(ptr %entry.function, ptr %args, i64 %nargs, ptr null)
  %raised = icmp eq ptr %code, null
  br i1 %raised, label %bad.run, label %code.known
code.known:
  %number.of.code = call i64 @PyLong_AsLongLong(ptr %code)
  call void @Py_DecRef(ptr %code)
  %ran = icmp eq i64 %number.of.code, 0
  br i1 %ran, label %keep.frame, label %bad.run
bad.run:
  call void @Py_DecRef(ptr %entries)
  br label %give.back
keep.frame:
  %kept = call i32 @PyList_Append(ptr %frames, ptr %frame.now)
  call void @Py_DecRef(ptr %frame.now)
  br label %next.result
next.result:
  %r = phi i64 [ 0, %keep.frame ], [ %r2, %result ]
  %more.results = icmp ult i64 %r, %outputs
  br i1 %more.results, label %result, label %finish
result: ; the buffer first: another thread may take a value up from when it waits for no trace
  %r2 = add i64 %r, 1
  %r4 = shl i64 %r, 2
  %result.row = add i64 %outputs.at, %r4
  %result.number = call i64 @duo.word(ptr %words, i64 %result.row)
  %result.val = call ptr @PyList_GetItem(ptr %entries, i64 %result.number)
  %result.at = getelementptr ptr, ptr %made, i64 %r
  %result.buffer = load ptr, ptr %result.at
  swap value.buf %result.val %result.buffer
  swap value.trace %result.val %none
  call void @Py_DecRef(ptr %result.buffer)
  br label %next.result
finish:
  %program = call ptr @duo.held(ptr %words, i64 0)
  swap trace.program %trace %program
  swap trace.done %trace %true
  call void @duo.unstamp(ptr %trace)
  %leaves = get trace.leaves %trace
  call void @PyDict_Clear(ptr %leaves)
  %leaf.numbers = get trace.leaf_numbers %trace
  call void @PyDict_Clear(ptr %leaf.numbers)
  call void @duo.empty(ptr %trace, ptr %entries)
  call void @Py_DecRef(ptr %entries)
  ret i1 true
give.back:
  %frame.back = call i32 @PyList_Append(ptr %frames, ptr %frame.now)
  call void @Py_DecRef(ptr %frame.now)
  br label %drop
drop:
  call void @PyErr_Clear()
  br label %next.drop
next.drop:
  %d = phi i64 [ 0, %drop ], [ %d2, %dropped ]
  %more.drops = icmp ult i64 %d, %outputs
  br i1 %more.drops, label %dropped, label %no
dropped:
  %d2 = add i64 %d, 1
  %drop.at = getelementptr ptr, ptr %made, i64 %d
  %drop.buffer = load ptr, ptr %drop.at
  drop %drop.buffer
  br label %next.drop
no:
  ret i1 false
}

; `flush(trace)`.
define ptr @duo_flush(ptr %self, ptr %args, i64 %nargs) nounwind {
entry:
  %none = const none
  %one = icmp eq i64 %nargs, 1
  br i1 %one, label %take, label %python
take:
  %trace = load ptr, ptr %args
  %class = call ptr @duo.class(ptr %trace)
  %trace.class = const Trace
  %right = icmp eq ptr %class, %trace.class
  br i1 %right, label %try, label %python
try:
  %flushed = call i1 @duo.lane(ptr %trace)
  br i1 %flushed, label %done, label %python
python:
  %general = const flush
  %result = call ptr @PyObject_Vectorcall(ptr %general, ptr %args, i64 %nargs, ptr null)
  ret ptr %result
done:
  call void @Py_IncRef(ptr %none)
  ret ptr %none
}
"""
