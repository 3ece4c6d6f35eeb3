"""LLVM text of the thread pool: fork-join over pthreads that spin for a while, then sleep.

One caller at a time owns the pool (`@duo.lock`); its task is a phase of a kernel, cut into chunks that are dealt to the threads before
they start: each finds most of its memory in the cache of the core that used it last. A thread takes its own chunks from the front, then
other threads' from the back. What is left of a thread's chunks is a word that only thieves contend for (epoch, end and next in one, so
that a thread that slept through a task cannot claim from it with what it read of another), and what it has done is counted beside it: a
cache line that two cores write takes 0.1 to 0.4 us a time, and here few do. Each run goes through memory in the same order: of what is too
large for a cache, caches then keep more than where every second run goes the other way round. The caller works too and waits only until every chunk
is done, not for threads that are still waking up. A sleeper announces itself in `sleepers` (or `waiting`) *before* it looks at its word a last
time, and a waker changes the word before it looks for sleepers, all sequentially consistent: no wake-up is lost.
Workers start on first use, which is also how they come back after fork.
"""

from __future__ import annotations

MAX_THREADS = 256
STATUS_BYTES = 64  # each chunk's status words have a cache line of their own
CHUNKS_PER_THREAD = 4  # so that a thread that comes late or is interrupted holds up little

# Per architecture: a hint to the core that this is a spin loop, and reading and setting the floating-point
# environment. The default one rounds to nearest and keeps denormals: MXCSR 0x1F80 (Intel SDM 10.2.3; the low six bits
# are sticky flags), FPCR 0 (Arm ARM, FPCR).
_X86 = """
declare void @llvm.x86.sse2.pause()
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
define internal void @duo.relax() alwaysinline nounwind {
  call void @llvm.x86.sse2.pause()
  ret void
}
define internal i64 @duo.enter_fp() nounwind {
  %cell = alloca i32
  call void @llvm.x86.sse.stmxcsr(ptr %cell)
  %old = load i32, ptr %cell
  %modes = and i32 %old, 65472
  %same = icmp eq i32 %modes, 8064
  br i1 %same, label %done, label %set
set:
  store i32 8064, ptr %cell
  call void @llvm.x86.sse.ldmxcsr(ptr %cell)
  br label %done
done:
  %wide = zext i32 %old to i64
  ret i64 %wide
}
define internal void @duo.leave_fp(i64 %old) nounwind {
  %cell = alloca i32
  %narrow = trunc i64 %old to i32
  store i32 %narrow, ptr %cell
  call void @llvm.x86.sse.ldmxcsr(ptr %cell)
  ret void
}
"""
_AARCH64 = """
declare void @llvm.aarch64.hint(i32)
declare i64 @llvm.aarch64.get.fpcr()
declare void @llvm.aarch64.set.fpcr(i64)
define internal void @duo.relax() alwaysinline nounwind {
  call void @llvm.aarch64.hint(i32 1)
  ret void
}
define internal i64 @duo.enter_fp() nounwind {
  %old = call i64 @llvm.aarch64.get.fpcr()
  call void @llvm.aarch64.set.fpcr(i64 0)
  ret i64 %old
}
define internal void @duo.leave_fp(i64 %old) nounwind {
  call void @llvm.aarch64.set.fpcr(i64 %old)
  ret void
}
"""
_OTHER = """
define internal void @duo.relax() alwaysinline nounwind {
  ret void
}
define internal i64 @duo.enter_fp() nounwind {
  ret i64 0
}
define internal void @duo.leave_fp(i64 %old) nounwind {
  ret void
}
"""

# The task: what threads below its number of parts share, and last its epoch, in one cache line: to see a new task is to have it. Then each
# thread's line: what is left of its chunks, and how many chunks it has done. Status words of chunk c lie at status + 64 c.
_TASK = """
%duo.task.t = type { ptr, ptr, ptr, i64, ptr, ptr, i16, i16, i32 }
%duo.line.t = type { i64, i32, [116 x i8] }
@duo.task = internal global %duo.task.t zeroinitializer, align 128
@duo.lines = internal global [MAX_THREADS x %duo.line.t] zeroinitializer, align 128
@duo.ended = internal global i32 0, align 128
@duo.waiting = internal global i32 0, align 128
@duo.sleepers = internal global i32 0, align 128
define internal void @duo.share(i64 %tid, i32 %epoch) nounwind {
entry:
  %fn = load atomic ptr, ptr @duo.task monotonic, align 8
  %args = load atomic ptr, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 1) monotonic, align 8
  %dims = load atomic ptr, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 2) monotonic, align 8
  %units = load atomic i64, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 3) monotonic, align 8
  %scratch = load atomic ptr, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 4) monotonic, align 8
  %words = load atomic ptr, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 5) monotonic, align 8
  %chunks16 = load atomic i16, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 6) monotonic, align 2
  %parts16 = load atomic i16, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 7) monotonic, align 2
  fence acquire
  %chunks = zext i16 %chunks16 to i64
  %parts = zext i16 %parts16 to i64
  %done.at = getelementptr [MAX_THREADS x %duo.line.t], ptr @duo.lines, i64 0, i64 %tid, i32 1
  %called = icmp ult i64 %tid, %parts
  br i1 %called, label %visit, label %exit
visit:
  %whose = phi i64 [ %tid, %entry ], [ %following, %onward ]
  %visits = phi i64 [ 1, %entry ], [ %visits2, %onward ]
  %line = getelementptr [MAX_THREADS x %duo.line.t], ptr @duo.lines, i64 0, i64 %whose
  %own = icmp eq i64 %whose, %tid
  %change = select i1 %own, i64 1, i64 -65536
  br label %look
look:
  %claim = load atomic i64, ptr %line acquire, align 8
  %next = and i64 %claim, 65535
  %high = lshr i64 %claim, 16
  %end.of = and i64 %high, 65535
  %tag64 = lshr i64 %claim, 32
  %tag = trunc i64 %tag64 to i32
  %current = icmp eq i32 %tag, %epoch
  %left = icmp ult i64 %next, %end.of
  %some = and i1 %current, %left
  br i1 %some, label %try, label %onward
try:
  %changed = add i64 %claim, %change
  %last.of = sub i64 %end.of, 1
  %chunk = select i1 %own, i64 %next, i64 %last.of
  %got = cmpxchg ptr %line, i64 %claim, i64 %changed acq_rel monotonic
  %ok = extractvalue { i64, i1 } %got, 1
  br i1 %ok, label %work, label %look
work:
  %b0 = mul i64 %units, %chunk
  %begin = udiv i64 %b0, %chunks
  %e0 = add i64 %b0, %units
  %end = udiv i64 %e0, %chunks
  %status.at = shl i64 %chunk, 6
  %status = getelementptr i8, ptr %words, i64 %status.at
  call void %fn(ptr %args, ptr %dims, i64 %begin, i64 %end, i64 %tid, ptr %scratch, ptr %status)
  %d = atomicrmw add ptr %done.at, i32 1 seq_cst
  %w = load atomic i32, ptr @duo.waiting seq_cst, align 4
  %blocked = icmp ne i32 %w, 0
  br i1 %blocked, label %notify, label %look
notify:
  %n = atomicrmw add ptr @duo.ended, i32 1 seq_cst
  call void @duo.wake(ptr @duo.ended)
  br label %look
onward:
  %beside = add i64 %whose, 1
  %past = icmp eq i64 %beside, %parts
  %following = select i1 %past, i64 0, i64 %beside
  %visits2 = add i64 %visits, 1
  %more = icmp ule i64 %visits2, %parts
  br i1 %more, label %visit, label %exit
exit:
  ret void
}
; The caller, who is there first, has the longest part.
define internal i64 @duo.first_chunk(i64 %part, i64 %chunks, i64 %parts) alwaysinline nounwind {
  %n0 = mul i64 %part, %chunks
  %n1 = add i64 %n0, %parts
  %n2 = sub i64 %n1, 1
  %first = udiv i64 %n2, %parts
  ret i64 %first
}
"""

_POOL = """
@duo.lock = internal global i32 0, align 128
@duo.size = internal global i64 1, align 128
@duo.wanted = internal global i64 1, align 8
@duo.spins = internal global i64 2000, align 8
@duo.stopping = internal global i32 0, align 4
@duo.handles = internal global [MAX_THREADS x i64] zeroinitializer
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_join(i64, ptr)
declare i32 @pthread_sigmask(i32, ptr, ptr)
declare i32 @sigfillset(ptr)

define internal ptr @duo.worker(ptr %packed) nounwind {
entry:
  %fp = call i64 @duo.enter_fp()
  %bits = ptrtoint ptr %packed to i64
  %tid = and i64 %bits, 65535
  %start = lshr i64 %bits, 32
  %first = trunc i64 %start to i32
  br label %idle
idle:
  %last = phi i32 [ %first, %entry ], [ %now, %run ]
  %spins = load i64, ptr @duo.spins
  br label %spin
spin:
  %i = phi i64 [ 0, %idle ], [ %next, %again ]
  %seen = load atomic i32, ptr EPOCH acquire, align 4
  %new = icmp ne i32 %seen, %last
  br i1 %new, label %work, label %again
again:
  call void @duo.relax()
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %spins
  br i1 %more, label %spin, label %drowsy
drowsy:
  %s0 = atomicrmw add ptr @duo.sleepers, i32 1 seq_cst
  br label %asleep
asleep:
  %later = load atomic i32, ptr EPOCH seq_cst, align 4
  %called = icmp ne i32 %later, %last
  br i1 %called, label %awake, label %sleep
sleep:
  call void @duo.wait(ptr EPOCH, i32 %last)
  br label %asleep
awake:
  %s1 = atomicrmw sub ptr @duo.sleepers, i32 1 seq_cst
  br label %work
work:
  %now = phi i32 [ %seen, %spin ], [ %later, %awake ]
  %stopping = load i32, ptr @duo.stopping
  %stop = icmp ne i32 %stopping, 0
  br i1 %stop, label %exit, label %run
run:
  call void @duo.share(i64 %tid, i32 %now)
  br label %idle
exit:
  ret ptr null
}

define internal void @duo.call_workers() nounwind {
  %e = atomicrmw add ptr EPOCH, i32 1 seq_cst
  %s = load atomic i32, ptr @duo.sleepers seq_cst, align 4
  %some = icmp ne i32 %s, 0
  br i1 %some, label %wake, label %done
wake:
  call void @duo.wake(ptr EPOCH)
  br label %done
done:
  ret void
}

; Runs the task of @duo.task in `chunks` chunks on `parts` threads and returns when all are done.
define internal void @duo.fork(i64 %chunks, i64 %parts) nounwind {
entry:
  %chunks16 = trunc i64 %chunks to i16
  store atomic i16 %chunks16, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 6) monotonic, align 2
  %parts16 = trunc i64 %parts to i16
  store atomic i16 %parts16, ptr getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 7) monotonic, align 2
  %w = load atomic i32, ptr @duo.waiting monotonic, align 4
  %was = icmp ne i32 %w, 0
  br i1 %was, label %settle, label %begin
settle:
  store atomic i32 0, ptr @duo.waiting monotonic, align 4
  br label %begin
begin:
  %e = load i32, ptr EPOCH
  %epoch = add i32 %e, 1
  %e64 = zext i32 %epoch to i64
  %high = shl i64 %e64, 32
  br label %deal
deal:
  %t = phi i64 [ 0, %begin ], [ %t2, %deal ]
  %t2 = add i64 %t, 1
  %first = call i64 @duo.first_chunk(i64 %t, i64 %chunks, i64 %parts)
  %behind = call i64 @duo.first_chunk(i64 %t2, i64 %chunks, i64 %parts)
  %middle = shl i64 %behind, 16
  %range = or i64 %middle, %first
  %claim = or i64 %high, %range
  %done.at = getelementptr [MAX_THREADS x %duo.line.t], ptr @duo.lines, i64 0, i64 %t, i32 1
  store atomic i32 0, ptr %done.at monotonic, align 4
  %line = getelementptr [MAX_THREADS x %duo.line.t], ptr @duo.lines, i64 0, i64 %t
  store atomic i64 %claim, ptr %line release, align 8
  %another = icmp ult i64 %t2, %parts
  br i1 %another, label %deal, label %dealt
dealt:
  call void @duo.call_workers()
  call void @duo.share(i64 0, i32 %epoch)
  %all = trunc i64 %chunks to i32
  %spins = load i64, ptr @duo.spins
  br label %spin
spin:
  %i = phi i64 [ 0, %dealt ], [ %next, %again ]
  %d = call i32 @duo.count(i64 %parts)
  %finished = icmp eq i32 %d, %all
  br i1 %finished, label %exit, label %again
again:
  call void @duo.relax()
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %spins
  br i1 %more, label %spin, label %block
block:
  store atomic i32 1, ptr @duo.waiting seq_cst, align 4
  br label %blocked
blocked:
  %ended = load atomic i32, ptr @duo.ended seq_cst, align 4
  %d2 = call i32 @duo.count(i64 %parts)
  %finished2 = icmp eq i32 %d2, %all
  br i1 %finished2, label %exit, label %sleep
sleep:
  call void @duo.wait(ptr @duo.ended, i32 %ended)
  br label %blocked
exit:
  ret void
}
; How many chunks are done.
define internal i32 @duo.count(i64 %parts) nounwind {
entry:
  br label %next
next:
  %t = phi i64 [ 0, %entry ], [ %t2, %next ]
  %sum = phi i32 [ 0, %entry ], [ %sum2, %next ]
  %done.at = getelementptr [MAX_THREADS x %duo.line.t], ptr @duo.lines, i64 0, i64 %t, i32 1
  %d = load atomic i32, ptr %done.at seq_cst, align 4
  %sum2 = add i32 %sum, %d
  %t2 = add i64 %t, 1
  %more = icmp ult i64 %t2, %parts
  br i1 %more, label %next, label %exit
exit:
  ret i32 %sum2
}

; Takes the pool if nobody has it, and sees to it that its workers run. Returns the number of threads, 0 if busy.
define internal i64 @duo.acquire() nounwind {
  %got = cmpxchg ptr @duo.lock, i32 0, i32 1 seq_cst seq_cst
  %ok = extractvalue { i32, i1 } %got, 1
  br i1 %ok, label %mine, label %busy
busy:
  ret i64 0
mine:
  %size = load i64, ptr @duo.size
  %wanted = load i64, ptr @duo.wanted
  %enough = icmp uge i64 %size, %wanted
  br i1 %enough, label %ready, label %start
start:
  call void @duo.start(i64 %wanted)
  br label %ready
ready:
  %now = load i64, ptr @duo.size
  ret i64 %now
}

define internal void @duo.release() nounwind {
  store atomic i32 0, ptr @duo.lock release, align 4
  ret void
}

; Workers 1..n-1, all signals blocked in them. Where the system refuses a thread the pool stays smaller.
define internal void @duo.start(i64 %n) nounwind {
entry:
  %all = alloca [128 x i8], align 16
  %old = alloca [128 x i8], align 16
  %r0 = call i32 @sigfillset(ptr %all)
  %r1 = call i32 @pthread_sigmask(i32 SIG_SETMASK, ptr %all, ptr %old)
  store i32 0, ptr @duo.stopping
  %e = load i32, ptr EPOCH
  %e64 = zext i32 %e to i64
  %high = shl i64 %e64, 32
  %from = load i64, ptr @duo.size
  br label %next
next:
  %i = phi i64 [ %from, %entry ], [ %i2, %made ]
  %more = icmp ult i64 %i, %n
  br i1 %more, label %make, label %exit
make:
  %bits = or i64 %high, %i
  %packed = inttoptr i64 %bits to ptr
  %handle = getelementptr i64, ptr @duo.handles, i64 %i
  %rc = call i32 @pthread_create(ptr %handle, ptr null, ptr @duo.worker, ptr %packed)
  %failed = icmp ne i32 %rc, 0
  br i1 %failed, label %exit, label %made
made:
  %i2 = add i64 %i, 1
  br label %next
exit:
  store i64 %i, ptr @duo.size
  store i64 %i, ptr @duo.wanted
  %r2 = call i32 @pthread_sigmask(i32 SIG_SETMASK, ptr %old, ptr null)
  ret void
}

; Waits for the pool, ends its workers, and sets how many threads the next region has. Gives up after `patience` looks.
define void @duo_resize(i64 %n, i64 %patience) nounwind {
entry:
  br label %try
try:
  %looks = phi i64 [ 0, %entry ], [ %looks2, %again ]
  %got = cmpxchg ptr @duo.lock, i32 0, i32 1 seq_cst seq_cst
  %ok = extractvalue { i32, i1 } %got, 1
  br i1 %ok, label %mine, label %again
again:
  call void @duo.relax()
  %looks2 = add i64 %looks, 1
  %patient = icmp ult i64 %looks2, %patience
  br i1 %patient, label %try, label %gone
gone:
  ret void
mine:
  store i32 1, ptr @duo.stopping
  call void @duo.call_workers()
  %size = load i64, ptr @duo.size
  br label %next
next:
  %i = phi i64 [ 1, %mine ], [ %i2, %join ]
  %more = icmp ult i64 %i, %size
  br i1 %more, label %join, label %exit
join:
  %slot = getelementptr i64, ptr @duo.handles, i64 %i
  %handle = load i64, ptr %slot
  %rc = call i32 @pthread_join(i64 %handle, ptr null)
  %i2 = add i64 %i, 1
  br label %next
exit:
  store i64 1, ptr @duo.size
  store i64 %n, ptr @duo.wanted
  call void @duo.release()
  ret void
}

; In a forked child: its workers do not exist, and nobody owns the pool.
define void @duo_forget() nounwind {
  store i64 1, ptr @duo.size
  store i32 0, ptr @duo.sleepers
  store i32 0, ptr @duo.waiting
  store i32 0, ptr @duo.lock
  ret void
}

define void @duo_set_spins(i64 %n) nounwind {
  store i64 %n, ptr @duo.spins
  ret void
}

define void @duo_relax_times(i64 %n) nounwind {
entry:
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %i2, %loop ]
  call void @duo.relax()
  %i2 = add i64 %i, 1
  %more = icmp ult i64 %i2, %n
  br i1 %more, label %loop, label %exit
exit:
  ret void
}
"""

# No pthreads: nobody ever gets the pool.
_NO_POOL = """
define internal i64 @duo.acquire() nounwind {
  ret i64 0
}
define internal void @duo.release() nounwind {
  ret void
}
define internal void @duo.wake(ptr %word) nounwind {
  ret void
}
define internal void @duo.fork(i64 %chunks, i64 %parts) nounwind {
  ret void
}
define void @duo_resize(i64 %n, i64 %patience) nounwind {
  ret void
}
define void @duo_forget() nounwind {
  ret void
}
define void @duo_set_spins(i64 %n) nounwind {
  ret void
}
define void @duo_relax_times(i64 %n) nounwind {
  ret void
}
"""

SYMBOLS = ("duo_resize", "duo_forget", "duo_set_spins", "duo_relax_times")


def pool_text(arch: str, wait_text: str | None, sig_setmask: int) -> str:
    """The pool for an architecture ('x86_64', 'aarch64', other) and a system (its wait_text, None without pthreads)."""
    epoch = "getelementptr (%duo.task.t, ptr @duo.task, i64 0, i32 8)"
    machine = {"x86_64": _X86, "aarch64": _AARCH64}.get(arch, _OTHER)
    pool = _NO_POOL if wait_text is None else wait_text + _POOL
    pool = pool.replace("EPOCH", epoch).replace("MAX_THREADS", str(MAX_THREADS)).replace("SIG_SETMASK", str(sig_setmask))
    return machine + _TASK.replace("MAX_THREADS", str(MAX_THREADS)) + pool
