"""The order of a program's items: as they come, except that what frees memory runs as soon as it can, and that an update in place waits for whoever
else reads the old value.

Frontends build a backward pass first and the updates of parameters after it, so that every gradient's operands would live to the end. Here an
item that ends the life of as many bytes of temporaries as it makes goes before what only comes earlier in the program. Chosen is the
order with the smaller largest live set. In a backward pass a weight's gradient may come before the gradient that reads the weight: fused with the update, it could
not overwrite the weight. No order changes a bit.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Mapping, Sequence

from duo_ir.kernels.checks import failing
from duo_ir.kernels.program import Item, reads_writes, touched

WORTH = 1 << 20  # bytes of temporaries from which an order is looked for
_LITTLE = 64  # bytes: what takes no more goes first, for others wait for it
_NEAREST = 64  # items that could run next and are looked at


def reorder(
    items: Sequence[Item], nbytes: Mapping[int, int], outputs: range, in_place: Sequence[tuple[int, int]]
) -> list[Item]:
    """`items` in an order that needs no more memory. nbytes: of each temporary slot; outputs: the slots of outputs; in_place: pairs (output slot, input
    slot) that may share memory where an input is given away and the item that writes one is the last that reads the other: wherever that can be it is
    so afterwards."""
    needs = _dependencies(items, outputs, in_place)
    waits = _wait_for_readers(items, needs, in_place)
    before = largest_live_set(items, nbytes)
    if before >= WORTH:
        found = _greedy(items, nbytes, needs)
        after = largest_live_set(found, nbytes)
        if after < before or (waits and after == before):
            return found
    return _greedy(items, {}, needs) if waits else list(items)


def largest_live_set(items: Sequence[Item], nbytes: Mapping[int, int]) -> int:
    """The most bytes of temporaries that are in use at one item."""
    left = Counter([slot for item in items for slot in set(touched(item))])
    alive: set[int] = set()
    now = most = 0
    for item in items:
        slots = set(touched(item)) & nbytes.keys()
        now += sum(nbytes[slot] for slot in slots - alive)
        alive |= slots
        most = max(most, now)
        left.subtract(slots)
        now -= sum(nbytes[slot] for slot in slots if left[slot] == 0)
    return most


def _dependencies(items: Sequence[Item], outputs: range, in_place: Sequence[tuple[int, int]]) -> list[set[int]]:
    """For each item those that must run before it."""
    readers: dict[int, list[int]] = {}
    writers: dict[int, list[int]] = {}
    overwritten: dict[int, list[int]] = {}
    for output, given in in_place:
        overwritten.setdefault(output, []).append(given)
    fails = set(failing(items))
    failed: list[int] = []
    out: list[set[int]] = []
    for n, item in enumerate(items):
        reads, writes = reads_writes(item)
        needs: set[int] = set()
        for slot in reads:
            needs.update(writers.get(slot, ()))
        for slot in writes:
            needs.update(writers.get(slot, ()))
            needs.update(readers.get(slot, ()))
            for given in overwritten.get(slot, ()):
                needs.update(readers.get(given, ()))
        if n in fails or any(slot in outputs for slot in writes):
            needs.update(
                failed[-1:]
            )  # what fails leaves inputs whole, and the first to fail is the first in the program
        if n in fails:
            failed.append(n)
        for slot in reads:
            readers.setdefault(slot, []).append(n)
        for slot in writes:
            writers.setdefault(slot, []).append(n)
        out.append(needs)
    return out


def _wait_for_readers(items: Sequence[Item], needs: list[set[int]], in_place: Sequence[tuple[int, int]]) -> bool:
    """Adds to `needs` that the writers of outputs come after the later readers of the inputs that they could overwrite, unless those need them
    first. Tells whether anything was added."""
    readers: dict[int, list[int]] = {}
    writers: dict[int, int] = {}
    for n, item in enumerate(items):
        reads, writes = reads_writes(item)
        for slot in reads:
            readers.setdefault(slot, []).append(n)
        for slot in writes:
            writers.setdefault(slot, n)
    added = False
    pairs = {(writers[output], n) for output, given in in_place for n in readers.get(given, ())}
    for writer, reader in sorted(pairs):
        if reader > writer and not _needs(needs, reader, writer):
            needs[writer].add(reader)
            added = True
    return added


def _needs(needs: list[set[int]], item: int, other: int) -> bool:
    """Whether the item can only run after the other."""
    seen, todo = {item}, [item]
    while todo:
        new = needs[todo.pop()] - seen
        if other in new:
            return True
        seen |= new
        todo += new
    return False


def _greedy(items: Sequence[Item], nbytes: Mapping[int, int], needs: list[set[int]]) -> list[Item]:
    waiting = [len(before) for before in needs]
    after: list[list[int]] = [[] for _ in items]
    for n, before in enumerate(needs):
        for k in before:
            after[k].append(n)
    slots = [set(touched(item)) & nbytes.keys() for item in items]
    left = Counter([slot for each in slots for slot in each])
    alive: set[int] = set()
    ready = [n for n, count in enumerate(waiting) if count == 0]
    out: list[Item] = []

    def growth(n: int) -> int:
        made = sum(nbytes[slot] for slot in slots[n] if slot not in alive)
        return made - sum(nbytes[slot] for slot in slots[n] if left[slot] == 1)

    while ready:
        place = next((k for k, n in enumerate(ready[:_NEAREST]) if growth(n) <= _LITTLE), 0)
        n = ready.pop(place)
        out.append(items[n])
        alive |= slots[n]
        left.subtract(slots[n])
        for k in after[n]:
            waiting[k] -= 1
            if waiting[k] == 0:
                insort(ready, k)
    return out
