"""Gradients that a training step leaves behind, and the weights that it updates, in programs larger than the caches: the products that make them send
them past the caches.

Such a product updates states in place and leaves its sum for the caller, who looks at it, if at all, when it has left every cache; until then its lines
would only drive out what the next kernels read. A weight's lines are in the caches of all cores that have read it for other products: to take them
back one by one costs more than to write memory. What this product alone reads (an optimiser's moments) the same core updates again in the next step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from duo_backends.cpu.stream import beyond
from duo_ir.kernels.kernel import ContractKernel
from duo_ir.kernels.program import Program, Step, reads_writes


def mark_results(program: Program) -> Program:
    """The program, with `Arg.last` set for results that nothing in it reads, of products that update inputs in place, where all that it touches is more
    than caches hold; and `Arg.shared` for what else these products read that others read too."""
    sizes = [*(t.nbytes for t in (*program.inputs, *program.outputs)), *(t.nbytes for t in program.temps)]
    known = [n for n in sizes if isinstance(n, int)]
    if len(known) < len(sizes) or sum(known) < beyond():
        return program
    read = Counter([slot for item in program.items for slot in set(reads_writes(item)[0])])
    outputs = range(len(program.inputs), len(program.inputs) + len(program.outputs))
    updates = {(len(program.inputs) + output, given) for output, given in program.donations}
    items = list(program.items)
    for number, item in enumerate(items):
        if not isinstance(item, Step) or not isinstance(item.kernel, ContractKernel) or item.sizes:
            continue
        reads, writes = reads_writes(item)
        if not any((w, r) in updates for w in writes for r in reads):
            continue
        args = tuple([
            replace(arg, last=slot in outputs and slot not in read) if arg.output else replace(arg, shared=read[slot] > 1)
            for arg, slot in zip(item.kernel.args, item.slots)
        ])  # fmt: skip
        if args != item.kernel.args:
            items[number] = replace(item, kernel=replace(item.kernel, args=args))
    return replace(program, items=tuple(items))
