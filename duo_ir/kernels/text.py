"""Kernels and Programs as text for people: `duo look`, `DUO_DUMP`, and the tests' golden files.

kernel(a0: f32[32], a1: f32[32] out) for i0 < 4
  stage for j0 < 8
    %0 = load a0[8*i0 + j0]
    max %0 -> r0.0
"""

from __future__ import annotations

from collections.abc import Sequence

from duo_ir.kernels.kernel import (
    Access,
    Affine,
    Arg,
    AttentionKernel,
    Body,
    ContractKernel,
    ConvKernel,
    Instr,
    Kernel,
    LoopKernel,
    Reduce,
    ScanKernel,
    ScatterKernel,
    SortKernel,
    Store,
)  # fmt: skip
from duo_ir.kernels.program import Cond, Copy, Item, Program, Step
from duo_ir.types import DimLike, DType


def print_program(program: Program) -> str:
    """The whole program: its memory, then its items, each kernel printed where it is first used."""
    lines: list[str] = []
    for n, t in enumerate(program.inputs):
        lines.append(f"s{n}: {t} input")
    for n, t in enumerate(program.outputs):
        given = [i for out, i in program.donations if out == n]
        donated = f", may take the memory of {' or '.join([f's{i}' for i in given])}" if given else ""
        lines.append(f"s{len(program.inputs) + n}: {t} output{donated}")
    start = len(program.inputs) + len(program.outputs)
    for n, temp in enumerate(program.temps):
        lines.append(f"s{start + n}: {temp.nbytes} bytes, items {temp.first} to {temp.last}")
    seen: dict[Kernel, int] = {}
    for n, item in enumerate(program.items):
        lines += [f"{n}: {line}" if k == 0 else f"   {line}" for k, line in enumerate(_item(item, seen))]
    lines.append(f"return {', '.join(f's{s}' for s in program.results)}")
    return "\n".join(lines) + "\n"


def _slots(slots: Sequence[int]) -> str:
    return ", ".join(f"s{s}" for s in slots)


def _item(item: Item, seen: dict[Kernel, int]) -> list[str]:
    if isinstance(item, Step):
        where = f"   # {item.where}" if item.where else ""
        if item.sizes:
            where = f" with {', '.join([f'{name} = {size}' for name, size in item.sizes])}{where}"
        known = seen.get(item.kernel)
        if known is not None:
            return [f"run k{known}({_slots(item.slots)}){where}"]
        seen[item.kernel] = number = len(seen)
        return [f"run k{number}({_slots(item.slots)}){where}", *print_kernel(item.kernel, f"k{number} = ").splitlines()]
    if isinstance(item, Copy):
        return [f"copy s{item.source} to s{item.target}"]
    if isinstance(item, Cond):
        head = f"{_slots(item.outputs)} = cond s{item.predicate} ({_slots(item.inputs)})"
        return [head, "then", *_nested(item.then), "else", *_nested(item.orelse)]
    head = f"{_slots(item.outputs)} = while ({_slots(item.initial)}; {_slots(item.constants)})"
    return [head, "test", *_nested(item.test), "body", *_nested(item.body)]


def _nested(program: Program) -> list[str]:
    return ["  " + line for line in print_program(program).splitlines()]


# ---------------------------------------------------------------------------------------------------------- kernels
def print_kernel(kernel: Kernel, head: str = "") -> str:
    """One kernel. Buffers are a0, a1...; outer loops i0, i1...; a stage's loops j0, j1..."""
    args = ", ".join(_arg(n, a) for n, a in enumerate(kernel.args))
    if isinstance(kernel, LoopKernel):
        names = _names("i", len(kernel.axes))
        lines = [f"{head}kernel({args}){_loops(names, kernel.axes)}"]
        for n, stage in enumerate(kernel.stages):
            scope = names + _names("j", len(stage.axes))
            lines.append(f"  stage {n}{_loops(scope[len(names) :], stage.axes)}")
            lines += _body(stage.body, stage.stores, scope)
            lines += [f"    {_reduce(r)} -> r{n}.{k}" for k, r in enumerate(stage.reduces)]
    elif isinstance(kernel, ContractKernel):
        names = _names("b", len(kernel.batch))
        sizes = _loops([*names, "m", "n", "k"], (*kernel.batch, kernel.m, kernel.n, kernel.k))
        a, b = _access(kernel.a, [*names, "m", "k"]), _access(kernel.b, [*names, "k", "n"])
        lines = [f"{head}contract({args}){sizes}", f"  {a} * {b} in {kernel.acc.name} to {kernel.result.name}"]
        lines += _body(kernel.body, kernel.stores, [*names, "m", "n"])
    elif isinstance(kernel, ConvKernel):
        lines = _conv(kernel, f"{head}conv({args})")
    elif isinstance(kernel, ScanKernel):
        names = [*_names("i", len(kernel.axes)), "l"]
        lines = [f"{head}scan({args}){_loops(names, (*kernel.axes, kernel.length))}"]
        lines.append("  state " + ", ".join(f"{dtype.name} {number}" for dtype, number in kernel.start))
        lines += _body(kernel.body, kernel.stores, names)
        lines.append("    next " + ", ".join(f"%{n}" for n in kernel.following))
    elif isinstance(kernel, SortKernel):
        lines = _sort(kernel, f"{head}sort({args})")
    elif isinstance(kernel, AttentionKernel):
        lines = _attention(kernel, f"{head}attention{' gradient' if kernel.backward else ''}({args})")
    else:
        lines = _scatter(kernel, f"{head}scatter {kernel.mode}({args})")
    return "\n".join(lines) + "\n"


def _conv(kernel: ConvKernel, head: str) -> list[str]:
    spatial = len(kernel.windows)
    q, t, p = _names("q", spatial), _names("t", spatial), _names("p", spatial)
    names = ["image", *q, "group", "n"]
    sizes = _loops([*names, *t, "c"], (*kernel.axes, *[w.taps for w in kernel.windows], kernel.c))
    a, b = _access(kernel.a, ["image", *p, "group", "c"]), _access(kernel.b, [*t, "group", "c", "n"])
    lines = [f"{head}{sizes}", f"  {a} * {b} in {kernel.acc.name} to {kernel.result.name}"]
    for k, w in enumerate(kernel.windows):
        at = _affine(Affine(w.offset, (w.stride, w.dilation)), [q[k], t[k]])
        lines.append(f"  {p[k]} = {at}, zero unless 0 <= {p[k]} < {w.bound}")
    return [*lines, *_body(kernel.body, kernel.stores, names)]


def _attention(kernel: AttentionKernel, head: str) -> list[str]:
    batch = _names("b", len(kernel.batch))
    sizes = (*kernel.batch, kernel.queries, kernel.keys, kernel.width, kernel.value_width)
    shapes = ("td", "sd", "se", "te")
    rows = [*batch, "t"]
    reads = [_access(a, [*batch, *shape]) for a, shape in zip(kernel.reads, shapes)]
    lines = [f"{head}{_loops([*batch, 't', 's', 'd', 'e'], sizes)}"]
    lines.append(f"  q {reads[0]}, k {reads[1]}, v {reads[2]}, scale {kernel.scale}{', causal' if kernel.causal else ''} in {kernel.acc.name}")
    if kernel.mask is not None:
        lines.append(f"  mask {_access(kernel.mask, [*batch, 't', 's'])}")
    if kernel.sums is not None:
        return [*lines, f"  {_access(kernel.writes[0], [*batch, *'te'])} = result, {_access(kernel.sums, rows)} = lse"]
    lse, delta = (_access(a, rows) for a in kernel.rows)
    lines.append(f"  g {reads[3]}, lse {lse}, delta {delta}")
    writes = [_access(a, [*batch, *shape]) for a, shape in zip(kernel.writes, shapes)]
    return [*lines, f"  {writes[0]} = dq, {writes[1]} = dk, {writes[2]} = dv"]


def _sort(kernel: SortKernel, head: str) -> list[str]:
    names = _names("i", len(kernel.axes))
    of = f"{_access(kernel.source, [*names, 'l'])}{', descending' if kernel.descending else ''}"
    lines = [f"{head}{_loops([*names, 'l', 'j'], (*kernel.axes, kernel.length, kernel.count))}"]
    for target, what in ((kernel.values, "values"), (kernel.positions, "positions")):
        if target is not None:
            lines.append(f"  {_access(target, [*names, 'j'])} = sorted {what} of {of}")
    return lines


def _scatter(kernel: ScatterKernel, head: str) -> list[str]:
    names = _names("i", len(kernel.axes))
    last = len(kernel.args) - 1
    return [
        f"{head}{_loops(names, kernel.axes)}, {kernel.sequential} in order",
        f"  a{last} = a0",
        *_body(kernel.body, (kernel.store,), names),
    ]


def _names(letter: str, n: int) -> list[str]:
    return [f"{letter}{k}" for k in range(n)]


def _arg(n: int, arg: Arg) -> str:
    return f"a{n}: {arg.dtype.name}[{arg.size}]" + (" out" if arg.output else "")


def _loops(names: Sequence[str], axes: Sequence[DimLike]) -> str:
    return " for " + ", ".join(f"{name} < {d}" for name, d in zip(names, axes)) if axes else ""


def _factor(d: DimLike) -> str:
    return str(d) if isinstance(d, int) or len(d.terms) == 1 else f"({d})"


def _affine(affine: Affine, names: Sequence[str]) -> str:
    terms = [name if s == 1 else f"{_factor(s)}*{name}" for s, name in zip(affine.strides, names) if s != 0]
    if affine.offset != 0 or not terms:
        terms.append(str(affine.offset))
    return " + ".join(terms)


def _access(access: Access, names: Sequence[str], indices: Sequence[int] = ()) -> str:
    terms = (
        [_affine(access.at, names)]
        if access.at.offset != 0 or any(s != 0 for s in access.at.strides) or not indices
        else []
    )
    terms += [f"%{i}" if s == 1 else f"{_factor(s)}*%{i}" for i, s in zip(indices, access.index_strides)]
    where = [
        f"0 <= {_affine(g.position, names)} < {g.bound}" + (f" step {g.step}" if g.step != 1 else "")
        for g in access.guards
    ]
    return f"a{access.buffer}[{' + '.join(terms)}]" + (f" if {' and '.join(where)}" if where else "")


def _body(body: Body, stores: Sequence[Store], names: Sequence[str]) -> list[str]:
    lines = [f"    %{n}: {i.dtype.name} = {_instr(i, names)}" for n, i in enumerate(body)]
    lines += [f"    {_access(s.access, names, s.indices)} = %{s.value}" for s in stores]
    return lines


def _instr(instr: Instr, names: Sequence[str]) -> str:
    args = ", ".join(f"%{a}" for a in instr.args)
    attr = instr.attr
    if isinstance(attr, Access):
        count = len(attr.index_strides)
        other = f" else %{instr.args[count]}" if attr.guards else ""
        return f"load {_access(attr, names, instr.args[:count])}{other}"
    if isinstance(attr, Affine):
        return f"index {_affine(attr, names)}"
    if instr.op == "reduced":
        assert isinstance(attr, tuple)
        return f"reduced r{attr[0]}.{attr[1]}"
    if instr.op == "check":
        assert isinstance(attr, tuple)
        return f"check {args} < {attr[0]} site {attr[1]}"
    if instr.op in ("const", "dim", "saved"):
        return f"{instr.op} {attr}"
    return f"{instr.op} {args}".rstrip()


def _reduce(reduce: Reduce) -> str:
    dtype: DType = reduce.dtype
    return f"{reduce.kind} {', '.join(f'%{a}' for a in reduce.args)} in {dtype.name}"
