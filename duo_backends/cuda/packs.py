"""Bodies over several consecutive points of one thread: what lies side by side in memory is read and written as vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from duo_backends.cuda.body import Emitter, Scope, Value, in_memory
from duo_backends.cuda.code import memory
from duo_ir.kernels.kernel import Access, Affine, Arg, Body, Instr, Store
from duo_ir.types import DimLike, bool_, exact_div

_VECTOR_BYTES = 16


def pack_width(args: Sequence[Arg], bodies: Sequence[tuple[Body, Sequence[Store]]], last: DimLike, flat: bool) -> int:
    """How many points make every access along the last axis one of at most 16 bytes, where those are aligned. `last`: the size of that axis, of
    which the width must be a divisor unless the nest is `flat` and the caller takes care of the rest."""
    near = [a for body, stores in bodies for a in _accesses(body, stores) if _steps_by_one(a)]
    if not near or (isinstance(last, int) and last < 4):
        return 1
    width = min(8, _VECTOR_BYTES // max(args[a.buffer].dtype.itemsize for a in near))
    while width > 1:
        whole = flat or exact_div(last, width) is not None
        if whole and all(_aligned(a.at, width) for a in near):
            return width
        width //= 2
    return 1


def _accesses(body: Body, stores: Sequence[Store]) -> list[Access]:
    return [i.attr for i in body if i.op == "load"] + [s.access for s in stores]  # type: ignore[misc, return-value]


def _steps_by_one(access: Access) -> bool:
    return access.at.strides[-1] == 1 and not access.guards and not access.index_strides


def _aligned(at: Affine, width: int) -> bool:
    return all(exact_div(d, width) is not None for d in (at.offset, *at.strides[:-1]))


def emit_points(
    e: Emitter,
    body: Body,
    stores: Sequence[Store],
    indices: tuple[str, ...],
    width: int,
    point: str,
    acc: Value | None = None,
    reduced: Callable[[int, int], Value] | None = None,
    each: Callable[[list[Value]], None] | None = None,
) -> None:
    """`width` points from `indices` on, along the last axis: vectors are read, each point is computed, vectors are written. `point`: the
    number of the first. `acc`: the contraction's value at point number l, an expression in `l`. `reduced`: see `Scope`. `each`: emits what else is
    done with the values of point number l."""
    w = e.w
    first = indices[-1] if indices[-1].isidentifier() else f"({indices[-1]})"
    scope = (*indices[:-1], first)
    packs: dict[int, tuple[str, Instr]] = {}
    for number, instr in enumerate(body):
        if instr.op == "load" and _steps_by_one(instr.attr):  # type: ignore[arg-type]
            name = w.name("p")
            pack = f"Pack<{memory(instr.dtype)}, {width}>"
            address = e.address(instr.attr, scope)  # type: ignore[arg-type]
            w.put(f"const {pack} {name} = *(const {pack} *)(a{instr.attr.buffer} + {address});")  # type: ignore[attr-defined]
            packs[number] = name, instr
    results: dict[int, tuple[str, str]] = {}
    for number, store in enumerate(stores):
        if _steps_by_one(store.access):
            pack = f"Pack<{memory(e.args[store.access.buffer].dtype)}, {width}>"
            results[number] = w.name("r"), pack
            w.put(f"{pack} {results[number][0]};")
    w.put("#pragma unroll")
    with w.block(f"for (int l = 0; l < {width}; ++l)"):
        w.put(f"const {e.index_type} at = {first} + l;")
        loaded = {number: _element(name, instr) for number, (name, instr) in packs.items()}
        inner = Scope((*indices[:-1], "at"), f"(long long){point} + l", loaded, reduced, acc)
        values = e.emit(body, inner)
        if each is not None:
            each(values)
        for number, store in enumerate(stores):
            if number in results:
                w.put(f"{results[number][0]}.v[l] = {in_memory(values[store.value])};")
            else:
                e.store(store, values, inner)
    for number, (name, pack) in results.items():
        access = stores[number].access
        w.put(f"*({pack} *)(a{access.buffer} + {e.address(access, scope)}) = {name};")


def _element(name: str, instr: Instr) -> Value:
    return Value(f"({name}.v[l] != 0)" if instr.dtype is bool_ else f"{name}.v[l]", instr.dtype)
