"""The library's own functions, in the subset of Python that `subset.py` writes as LLVM text: making a model, calling a program of it, ending it.

A model is one block of memory: a header, the text of the last error, a record for each program, and what these point to. Offsets are in bytes.
`module.py` writes what differs between artefacts: tables, `bind` and `check` of each program, and the functions that C sees.
A model serves one call at a time; different models may be called from different threads at once. A forked child goes on with copies of its parent's
models, also of one that was in a call: what a call prepares counts as prepared only when it is.
"""

from __future__ import annotations

from duo_backends.aot.subset import c, invoke, load64, native, store64
from duo_backends.cpu.pool_text import CHUNKS_PER_THREAD, STATUS_BYTES
from duo_backends.cpu.runner_text import CODE_WORDS, FRAME_HEADER, HAS_PARALLEL, PHASE

# ---- results of the library's functions
OK, NULL_ARGUMENT, BAD_SIZE, NO_MEMORY, BAD_INDEX, SMALL_SCRATCH, WRONG_CPU, BAD_OPTION, BAD_FILE = range(9)

# ---- the header of a model
THREADS, ALLOCATE, RELEASE, USER, WEIGHTS, STATES = 0, 8, 16, 24, 32, 40
# FRAME_USER: the record whose words lie in the frame; 0 during a call
FRAME, FRAME_BYTES, FRAME_OWNED, FRAME_USER = 48, 56, 64, 72
BLOCK, STARTED = 80, 88  # memory of states; whether the model has been trained
MESSAGE, MESSAGE_BYTES = 128, 384
HEADER = 512

# ---- the record of a program; the first part and FLAGS are written by `bind` and `call`, the second by `describe`
CODE, DIMS, WORDS, BYTES, SIZES, BOUND, NEED = 0, 8, 16, 24, 32, 40, 48
ARENA, SCRATCH = 56, 64  # side by side, as `bind` writes them
TEMPLATE, CODE_COUNT, DIM_COUNT, WORD_COUNT, SIZE_COUNT, ARGUMENT_COUNT = 72, 80, 88, 96, 104, 112
KINDS, STARTS, PATCHES, BIND, CHECK, FLAGS, NOTE, NAME = 120, 128, 136, 144, 152, 160, 168, 176
COPIES, COPY_COUNT, SWAPS, SWAP_COUNT, SMALL_SIZE = 184, 192, 200, 208, 216
RECORD = 256

# ---- where the address of a program's argument comes from
GIVEN, WEIGHT, STATE, NEXT = 0, 1, 2, 3
LINE = 64
MOST_THREADS = 256
STATUS = CHUNKS_PER_THREAD * STATUS_BYTES  # bytes for each thread

# ---- the options of `create`
O_THREADS, O_ALLOCATE, O_RELEASE, O_USER, O_WEIGHTS = 0, 8, 16, 24, 32

# ---- a state in the table of states: where its first value lies among the weights, bytes, whether it has two places
STATE_WORDS = 3


def up(n: int) -> int:
    return (n + LINE - 1) // LINE * LINE


def frame_bytes(words: int, arena: int, scratch: int, threads: int) -> int:
    """All temporary memory of a call: a header with the pointer words, the arena, status words and scratch of `threads`."""
    return up(FRAME_HEADER + 8 * words) + up(arena) + STATUS * threads + up(scratch)


def allocate(model: int, nbytes: int) -> int:
    """Aligned memory from whom the model has it; 0: there is none."""
    if load64(model + ALLOCATE):
        return invoke(load64(model + ALLOCATE), up(nbytes), LINE, load64(model + USER))
    return c("aligned_alloc", LINE, up(nbytes))


def release(model: int, memory: int) -> int:
    if memory == 0:
        return 0
    if load64(model + RELEASE):
        invoke(load64(model + RELEASE), memory, load64(model + USER))
    else:
        c("free", memory)
    return 0


def create(
    options: int, out: int, nbytes: int, programs: int, describe: int, weights: int, states: int, state_count: int
) -> int:
    """A model in `nbytes`: header, records and their arrays. `states`: the table of states."""
    if out == 0:
        return NULL_ARGUMENT
    store64(out, 0)
    if native("duo.cpu_lacks") != 0:
        return WRONG_CPU
    threads = 0
    give = 0
    take = 0
    user = 0
    if options:
        threads = load64(options + O_THREADS)
        give = load64(options + O_ALLOCATE)
        take = load64(options + O_RELEASE)
        user = load64(options + O_USER)
        if load64(options + O_WEIGHTS):
            weights = load64(options + O_WEIGHTS)
    if threads < 0 or (give == 0) != (take == 0) or weights == 0 or weights % LINE != 0:
        return BAD_OPTION
    if threads == 0:
        threads = native("duo.cores")
    if threads > MOST_THREADS:
        threads = MOST_THREADS
    model = 0
    if give:
        model = invoke(give, up(nbytes), LINE, user)
    else:
        model = c("aligned_alloc", LINE, up(nbytes))
    if model == 0:
        return NO_MEMORY
    c("memset", model, 0, nbytes)
    store64(model + THREADS, threads)
    store64(model + ALLOCATE, give)
    store64(model + RELEASE, take)
    store64(model + USER, user)
    store64(model + WEIGHTS, weights)
    at = model + HEADER + programs * RECORD
    k = 0
    while k < programs:
        record = model + HEADER + k * RECORD
        invoke(describe, k, record)
        store64(record + CODE, at)
        c("memcpy", at, load64(record + TEMPLATE), 8 * load64(record + CODE_COUNT))
        at += up(8 * load64(record + CODE_COUNT))
        store64(record + DIMS, at)
        at += up(8 * load64(record + DIM_COUNT))
        store64(record + WORDS, at)
        at += up(8 * load64(record + WORD_COUNT))
        store64(record + BYTES, at)
        at += up(8 * load64(record + ARGUMENT_COUNT))
        store64(record + SIZES, at)
        at += up(8 * load64(record + SIZE_COUNT))
        k += 1
    store64(model + STATES, at)
    if state_count:
        bad = make_states(model, states, state_count)
        if bad:
            release(model, model)
            return bad
    native("duo.join")
    store64(out, model)
    return OK


def make_states(model: int, states: int, count: int) -> int:
    """Memory for the states, with their first values in it."""
    total = 0
    k = 0
    while k < count:
        row = states + 8 * STATE_WORDS * k
        total += up(load64(row + 8)) * (1 + load64(row + 16))
        k += 1
    at = allocate(model, total + LINE)
    if at == 0:
        return NO_MEMORY
    store64(model + BLOCK, at)
    k = 0
    while k < count:
        row = states + 8 * STATE_WORDS * k
        cell = load64(model + STATES) + 16 * k
        nbytes = load64(row + 8)
        store64(cell, at)
        at += up(nbytes)
        if load64(row + 16):
            store64(cell + 8, at)
            at += up(nbytes)
        k += 1
    return start_states(model, states, count)


def init(model: int, states: int, count: int, generator: int, program: int, seed: int) -> int:
    """States as they were at first, then drawn anew by a program (-1: none) from a generator (-1: none) that starts with `seed`."""
    if model == 0:
        return NULL_ARGUMENT
    start_states(model, states, count)
    store64(model + STARTED, 0)
    if generator >= 0:
        place = load64(load64(model + STATES) + 16 * generator)
        store64(place, seed)
        store64(place + 8, 0)
    if program < 0:
        return OK
    return call(model, program, 0, 0)


def train(model: int, first: int, later: int, sizes: int, given: int) -> int:
    """Runs the program of a training step: `first` in a model that has not been trained."""
    if model == 0:
        return NULL_ARGUMENT
    bad = call(model, later if load64(model + STARTED) else first, sizes, given)
    if bad == OK:
        store64(model + STARTED, 1)
    return bad


def state(model: int, name: int, nbytes: int, table: int, texts: int, states: int, count: int) -> int:
    """The address of the state of that name, whose size is stored at `nbytes`; 0: there is none. `table`: offset and length of each name."""
    if model == 0 or name == 0:
        return 0
    k = 0
    while k < count:
        length = load64(table + 16 * k + 8)
        if c("strlen", name) == length and c("memcmp", name, texts + load64(table + 16 * k), length) == 0:
            if nbytes:
                store64(nbytes, load64(states + 8 * STATE_WORDS * k + 8))
            return load64(load64(model + STATES) + 16 * k)
        k += 1
    return 0


def start_states(model: int, states: int, count: int) -> int:
    """Gives every state its first value."""
    k = 0
    while k < count:
        row = states + 8 * STATE_WORDS * k
        place = load64(load64(model + STATES) + 16 * k)
        c("memcpy", place, load64(model + WEIGHTS) + load64(row), load64(row + 8))
        k += 1
    return OK


def destroy(model: int) -> int:
    if model == 0:
        return 0
    native("duo.leave")
    if load64(model + FRAME_OWNED):
        release(model, load64(model + FRAME))
    release(model, load64(model + BLOCK))
    release(model, model)
    return 0


def bind(model: int, record: int, sizes: int) -> int:
    """Makes the record ready for these sizes, if it is not."""
    count = load64(record + SIZE_COUNT)
    kept = load64(record + SIZES)
    same = load64(record + BOUND)
    k = 0
    while same and k < count:
        if load64(sizes + 8 * k) != load64(kept + 8 * k):
            same = 0
        k += 1
    if same:
        return OK
    bad = invoke(load64(record + CHECK), sizes)
    if bad > 0:
        said = invoke(load64(record + SMALL_SIZE), bad - 1)
        c("snprintf", model + MESSAGE, MESSAGE_BYTES, said, load64(sizes + 8 * (bad - 1)))
        return BAD_SIZE
    if bad == -3:
        c(
            "snprintf",
            model + MESSAGE,
            MESSAGE_BYTES,
            "with these sizes a matrix product has one column, which is added up in another order; export the program for that size",
        )
        return BAD_SIZE
    if bad < -1:
        c(
            "snprintf",
            model + MESSAGE,
            MESSAGE_BYTES,
            "with these sizes an array of the program would have a negative size",
        )
        return BAD_SIZE
    if bad < 0:
        c("snprintf", model + MESSAGE, MESSAGE_BYTES, "these sizes need more memory than there can be")
        return BAD_SIZE
    threads = load64(model + THREADS)
    code = load64(record + CODE)
    dims = load64(record + DIMS)
    store64(record + BOUND, 0)
    where = load64(record + BIND)
    invoke(where, sizes, threads, code, dims, load64(record + WORDS), load64(record + BYTES), record + ARENA)
    k = 0
    while k < count:
        store64(kept + 8 * k, load64(sizes + 8 * k))
        k += 1
    store64(record + NEED, frame_bytes(load64(record + WORD_COUNT), load64(record + ARENA), load64(record + SCRATCH), threads))
    wide = 0  # whether any phase is worth a second thread
    k = code
    while k < code + 8 * load64(record + CODE_COUNT):
        if load64(k) == PHASE and load64(k + 48) > 1:
            wide = HAS_PARALLEL
        k += 8 * CODE_WORDS
    store64(record + FLAGS, wide)
    store64(model + FRAME_USER, 0)
    store64(record + BOUND, 1)
    return OK


def reserve(model: int, record: int) -> int:
    """Sees to it that the frame is large enough and holds the record's words."""
    need = load64(record + NEED)
    if load64(model + FRAME_BYTES) < need:
        if load64(model + FRAME) and load64(model + FRAME_OWNED) == 0:
            form = "the scratch memory has %lld bytes; these sizes need %lld"
            c("snprintf", model + MESSAGE, MESSAGE_BYTES, form, load64(model + FRAME_BYTES), need)
            return SMALL_SCRATCH
        small = load64(model + FRAME)
        store64(model + FRAME_USER, 0)
        store64(model + FRAME_BYTES, 0)
        store64(model + FRAME, 0)
        release(model, small)
        frame = allocate(model, need)
        if frame == 0:
            c("snprintf", model + MESSAGE, MESSAGE_BYTES, "there is no memory for %lld bytes of temporaries", need)
            return NO_MEMORY
        store64(model + FRAME_OWNED, 1)
        store64(model + FRAME, frame)
        store64(model + FRAME_BYTES, need)
    if load64(model + FRAME_USER) == record:
        return OK
    store64(model + FRAME_USER, 0)
    frame = load64(model + FRAME)
    threads = load64(model + THREADS)
    count = load64(record + WORD_COUNT)
    words = load64(record + WORDS)
    arena = frame + up(FRAME_HEADER + 8 * count)
    status = arena + up(load64(record + ARENA))
    c("memset", frame, 0, FRAME_HEADER)
    store64(frame, threads)
    store64(frame + 8, status + STATUS * threads)
    store64(frame + 16, status)
    k = 0
    while k < count:
        store64(frame + FRAME_HEADER + 8 * k, arena + load64(words + 8 * k))
        k += 1
    c("memset", status, 0, STATUS * threads)
    store64(model + FRAME_USER, record)
    return OK


def address(model: int, kind: int, value: int, given: int) -> int:
    """Where an argument lies."""
    if kind == GIVEN:
        return load64(given + 8 * value)
    if kind == WEIGHT:
        return load64(model + WEIGHTS) + value
    return load64(load64(model + STATES) + 16 * value + 8 * (kind == NEXT))


def call(model: int, number: int, sizes: int, given: int) -> int:
    """Runs a program. `sizes`: its dims; `given`: the addresses that the caller has passed."""
    if model == 0:
        return NULL_ARGUMENT
    record = model + HEADER + number * RECORD
    bad = bind(model, record, sizes)
    if bad:
        return bad
    kinds = load64(record + KINDS)
    nbytes = load64(record + BYTES)
    count = load64(record + ARGUMENT_COUNT)
    k = 0
    while k < count:
        needed = load64(kinds + 16 * k) == GIVEN and load64(nbytes + 8 * k) > 0
        if needed and load64(given + 8 * load64(kinds + 16 * k + 8)) == 0:
            name = invoke(load64(record + NAME), k)
            c("snprintf", model + MESSAGE, MESSAGE_BYTES, "%s is NULL", name)
            return NULL_ARGUMENT
        k += 1
    copies = load64(record + COPIES)  # what is a result twice, or an input as it is: number of an argument, where to
    k = 0
    while k < load64(record + COPY_COUNT):
        target = address(model, load64(copies + 24 * k + 8), load64(copies + 24 * k + 16), given)
        if target == 0 and load64(nbytes + 8 * load64(copies + 24 * k)) > 0:
            c("snprintf", model + MESSAGE, MESSAGE_BYTES, "an output is NULL")
            return NULL_ARGUMENT
        k += 1
    bad = reserve(model, record)
    if bad:
        return bad
    frame = load64(model + FRAME)
    starts = load64(record + STARTS)
    patches = load64(record + PATCHES)
    k = 0
    while k < count:
        place = address(model, load64(kinds + 16 * k), load64(kinds + 16 * k + 8), given)
        n = load64(starts + 8 * k)
        while n < load64(starts + 8 * k + 8):
            store64(frame + FRAME_HEADER + 8 * load64(patches + 8 * n), place)
            n += 1
        k += 1
    flags = load64(record + FLAGS)
    if flags and native("duo.own", load64(model + THREADS)) == 0:
        flags = 0
    store64(model + FRAME_USER, 0)
    row = native("duo.walk", frame, load64(record + CODE), flags)
    if row:
        return failed(model, record, frame, row)
    store64(model + FRAME_USER, record)
    k = 0
    while k < load64(record + COPY_COUNT):
        n = load64(copies + 24 * k)
        source = address(model, load64(kinds + 16 * n), load64(kinds + 16 * n + 8), given)
        target = address(model, load64(copies + 24 * k + 8), load64(copies + 24 * k + 16), given)
        if load64(nbytes + 8 * n) > 0:
            c("memcpy", target, source, load64(nbytes + 8 * n))
        k += 1
    swaps = load64(record + SWAPS)  # states whose next value lies in the other place
    k = 0
    while k < load64(record + SWAP_COUNT):
        cell = load64(model + STATES) + 16 * load64(swaps + 8 * k)
        other = load64(cell + 8)
        store64(cell + 8, load64(cell))
        store64(cell, other)
        k += 1
    return OK


def failed(model: int, record: int, frame: int, row: int) -> int:
    """An index was out of range: says which."""
    status = load64(frame + 16)
    form = invoke(load64(record + NOTE), row - 1, load64(status))
    c("snprintf", model + MESSAGE, MESSAGE_BYTES, form, load64(status + 8), load64(status + 16))
    return BAD_INDEX  # status words are no longer zero, so nobody has the frame


def scratch(model: int, number: int, sizes: int) -> int:
    """Bytes that a call with these sizes needs; negative: a result code with its sign changed."""
    if model == 0:
        return -NULL_ARGUMENT
    record = model + HEADER + number * RECORD
    bad = bind(model, record, sizes)
    if bad:
        return -bad
    return load64(record + NEED)


def train_scratch(model: int, first: int, later: int, sizes: int) -> int:
    """As `scratch`, for the first step and later ones."""
    a = scratch(model, first, sizes)
    b = scratch(model, later, sizes)
    if a < 0 or b < 0:
        return b if b < 0 else a
    return a if a > b else b


def set_scratch(model: int, memory: int, nbytes: int) -> int:
    """Uses the caller's memory for temporaries from now on; NULL: its own again."""
    if model == 0:
        return NULL_ARGUMENT
    if nbytes < 0 or memory % LINE != 0:
        c("snprintf", model + MESSAGE, MESSAGE_BYTES, "scratch memory must be aligned to 64 bytes")
        return BAD_OPTION
    if load64(model + FRAME_OWNED):
        release(model, load64(model + FRAME))
    store64(model + FRAME, memory)
    store64(model + FRAME_BYTES, nbytes if memory else 0)
    store64(model + FRAME_OWNED, 0)
    store64(model + FRAME_USER, 0)
    return OK


def message(model: int) -> int:
    """The text of the last error of a model; without one, why there may be none."""
    if model == 0:
        return native("duo.needs") if native("duo.cpu_lacks") else text("there is no model: it is NULL")
    return model + MESSAGE


def text(constant: int | str) -> int:
    """The address of a constant string."""
    return constant  # type: ignore[return-value]


FUNCTIONS = (
    up, frame_bytes, allocate, release, create, make_states, start_states, init, train, state, destroy, bind, reserve, address, call, failed, scratch, train_scratch, set_scratch, message, text,
)  # fmt: skip
