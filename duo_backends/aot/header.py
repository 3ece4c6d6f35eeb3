"""The C header of an artefact's library: plain C99, also for C++ (`extern "C"`)."""

from __future__ import annotations

import textwrap

from duo_backends.aot import runtime
from duo_backends.aot.source import ProgramSource, Source
from duo_ir.types import Dim, DimLike, TensorType

_TYPES = {
    "f32": "float", "f64": "double", "f16": "uint16_t", "bf16": "uint16_t", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t",
    "i64": "int64_t", "u8": "uint8_t", "bool": "uint8_t",
}  # fmt: skip
# Keywords of C and C++, and what parameters are called anyway.
_WORDS = frozenset(keyword for line in (
    "auto break case char const continue default do double else enum extern float for goto if inline int long register restrict return",
    "short signed sizeof static struct switch typedef union unsigned void volatile while alignas alignof bool catch class constexpr delete",
    "explicit export false friend mutable namespace new noexcept nullptr operator private protected public template this throw true try",
    "typeid typename using virtual and or not xor asm model options",
) for keyword in line.split())  # fmt: skip
_RESULTS = (
    (runtime.OK, "OK", "done"),
    (runtime.NULL_ARGUMENT, "NULL_ARGUMENT", "a pointer is NULL that must not be"),
    (runtime.BAD_SIZE, "BAD_SIZE", "a size is negative or one that the program is not for, or they are too large together"),
    (runtime.NO_MEMORY, "NO_MEMORY", "there is not enough memory"),
    (runtime.BAD_INDEX, "BAD_INDEX", "an index among the inputs is out of range; nothing has been changed but outputs"),
    (runtime.SMALL_SCRATCH, "SMALL_SCRATCH", "the scratch memory is too small for these sizes"),
    (runtime.WRONG_CPU, "WRONG_CPU", "this CPU lacks what the code was made for"),
    (runtime.BAD_OPTION, "BAD_OPTION", "an option is not possible"),
    (runtime.BAD_FILE, "BAD_FILE", "a file cannot be read or written, or is not what it should be"),
)


def c_name(name: str) -> str:
    """A name that C and C++ take for a parameter."""
    plain = "".join(ch if ch.isascii() and (ch.isalnum() or ch == "_") else "_" for ch in name)
    if not plain or plain[0].isdigit():
        plain = "_" + plain
    return plain + "_" if plain in _WORDS else plain


def header_text(source: Source, target: str, producer: str) -> str:
    """The header of lib`source.name`."""
    name, upper = source.name, source.name.upper()
    parts = [
        f"/* {name}: made by {producer} for {target}. Link with -l{name}; it needs the C library alone.",
        "",
        _wrapped(
            f"A {name} is a model with memory of its own, for one call at a time; different ones may be used by different threads at once. Arrays are "
            "contiguous, the last axis first in memory; outputs must not overlap inputs. After an error, "
            f"{name}_message tells what was wrong. Results are the same bits for any number of threads, and as in Python. End all models "
            "before the library is unloaded. A forked child may go on with its copies of models; one that another thread was training at that moment needs "
            "its states set anew."
        ),
        "*/",
        f"#ifndef {upper}_H",
        f"#define {upper}_H",
        "",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"typedef struct {name} {name};",
        "",
        "enum {",
        *[f"    {upper}_{word} = {code},{' ' * (14 - len(word))}/* {what} */" for code, word, what in _RESULTS],
        "};",
        "",
        "typedef struct {",
        "    int64_t threads; /* at most so many run at once; 0: as many as the process may use cores */",
        "    void *(*allocate)(size_t bytes, size_t alignment, void *user); /* NULL, as release: the C library's */",
        "    void (*release)(void *memory, void *user);",
        "    void *user;",
        f"    const void *weights; /* NULL: those in the library; else the contents of {name}.weights, aligned to 64 bytes */",
        f"}} {name}_options;",
        "",
        "/* A new model. options may be NULL. */",
        f"int {name}_create(const {name}_options *options, {name} **model);",
        f"void {name}_destroy({name} *model); /* NULL is fine */",
        "",
        "/* What the last error of the model was; lives as long as the model. Of NULL: what a CPU lacks for which create gives WRONG_CPU. */",
        f"const char *{name}_message(const {name} *model);",
        "",
        "/* Uses the caller's memory, aligned to 64 bytes, for temporaries from now on (NULL: the model's own). */",
        f"int {name}_set_scratch({name} *model, void *memory, int64_t bytes);",
    ]
    parts += [
        "",
        "/* Where a state lies (a weight that training changes, say), NULL if there is none of that name; its size is stored at bytes unless that is NULL.",
        "   It moves with every call of a program that changes it. */",
        f"void *{name}_state({name} *model, const char *name, int64_t *bytes);",
    ]
    if source.training is not None:
        parts += [
            "",
            "/* All as at the start, with weights drawn anew from this seed. */",
            f"int {name}_init({name} *model, int64_t seed);",
            "",
            "/* Checkpoints, safetensors that Python's duo.save and duo.load write and read too. A file that is not one of this model changes nothing. */",
            f"int {name}_save({name} *model, const char *path);",
            f"int {name}_load({name} *model, const char *path);",
        ]
    for p in source.public:
        parts += ["", *_program(name, p)]
    parts += ["", "#ifdef __cplusplus", "}", "#endif", "", "#endif", ""]
    return "\n".join(parts)


def _program(name: str, p: ProgramSource) -> list[str]:
    inputs, outputs = p.ports("input"), p.ports("output")
    dims = [c_name(d) for d in p.function.dims]
    arguments = [f"{name} *model", *[f"int64_t {d}" for d in dims]]
    lines = []
    for kind, ports, const in (("inputs", inputs, "const "), ("outputs", outputs, "")):
        for port, type in ports:
            arguments.append(f"{const}{_TYPES[type.dtype.name]} *{c_name(port.name)}")
        shown = ", ".join(f"{c_name(port.name)} {_shape(type)}" for port, type in ports)
        lines.append(f"{kind} {shown or '(none)'}")
    call = f"int {name}_{p.name}({', '.join(arguments)});"
    sizes = ", ".join([f"{name} *model", *[f"int64_t {d}" for d in dims]])
    return [
        f"/* {'; '.join(lines)}. */",
        *textwrap.wrap(call, 120, subsequent_indent="    ", break_long_words=False),
        "/* Bytes of temporaries that it needs with these sizes; negative: an error's code, with its sign changed. */",
        f"int64_t {name}_{p.name}_scratch_bytes({sizes});",
    ]


def _shape(type: TensorType) -> str:
    note = {"f16": " as the bits of an f16", "bf16": " as the bits of a bf16", "bool": " of 0 and 1"}.get(
        type.dtype.name, ""
    )
    return f"[{', '.join(_size(d) for d in type.shape)}]{note}"


def _size(d: DimLike) -> str:
    if isinstance(d, Dim):
        return "+".join("*".join([str(c)] * (c != 1 or not names) + [c_name(n) for n in names]) for names, c in d.terms)
    return str(d)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, initial_indent="   ", subsequent_indent="   ")
