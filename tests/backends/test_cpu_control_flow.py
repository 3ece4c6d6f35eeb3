"""Random programs with nested Cond and While on the CPU runtime, against a direct interpreter of the same Program."""

from __future__ import annotations

import random

import numpy as np
import pytest
from test_cpu_runtime import INC, LESS, Codes, S, values

from duo_ir.kernels.program import Cond, Copy, Program, Step, Temp, While
from duo_ir.types import TensorType, bool_, i64

ADD2 = """
  %x = load i64, ptr %a0
  %y = load i64, ptr %a1
  %z = add i64 %x, %y
  store i64 %z, ptr %a2"""
FLAG = TensorType(bool_)


def interpret(program, inputs, meaning):
    """The results of a program on Python ints, slot by slot."""
    slots = dict(enumerate(inputs))
    for item in program.items:
        if isinstance(item, Step):
            slots[item.slots[-1]] = meaning[item.kernel](*[slots[s] for s in item.slots[:-1]])
        elif isinstance(item, Copy):
            slots[item.target] = slots[item.source]
        elif isinstance(item, Cond):
            branch = item.then if slots[item.predicate] else item.orelse
            slots.update(zip(item.outputs, interpret(branch, [slots[s] for s in item.inputs], meaning)))
        else:
            carried = [slots[s] for s in item.initial]
            constants = [slots[s] for s in item.constants]
            while interpret(item.test, carried + constants, meaning)[0]:
                carried = interpret(item.body, carried + constants, meaning)
            slots.update(zip(item.outputs, carried))
    return [slots[s] for s in program.results]


class Maker:
    """Builds random programs; input `limit` of each is a small number and input `zero` is 0."""

    def __init__(self, backend, seed):
        self.rng = random.Random(seed)
        self.inc = backend.kernel(INC, ["i64", "i64"])
        self.less = backend.kernel(LESS, ["i64", "i64", "bool"])
        self.add = backend.kernel(ADD2, ["i64", "i64", "i64"])
        self.meaning = {self.inc: lambda x: x + 1, self.less: lambda x, y: x < y, self.add: lambda x, y: x + y}

    def program(self, depth, inputs, limit, zero, results, counter=None):
        """With `counter`, result 0 is that input plus one (a loop's body)."""
        rng, items, temps = self.rng, [], []
        outputs = rng.randint(1, 3) if counter is None else 1 + rng.randint(0, 2)
        known = list(range(inputs))
        free = [inputs + k for k in range(outputs)]
        if counter is not None:
            items.append(Step(self.inc, (counter, free[0])))
            known.append(free.pop(0))

        def fresh(t=8):
            temps.append(t)
            return inputs + outputs + len(temps) - 1

        def pick():
            return rng.choice(known)

        def target():
            return free.pop(0) if free and rng.random() < 0.5 else fresh()

        for _ in range(rng.randint(1, 4)) if not free else range(len(free) + rng.randint(0, 3)):
            kind = rng.choice(["inc", "add", "copy"] + ["cond", "while"] * (depth > 0))
            if kind == "inc":
                made = [target()]
                items.append(Step(self.inc, (pick(), made[0])))
            elif kind == "add":
                made = [target()]
                items.append(Step(self.add, (pick(), pick(), made[0])))
            elif kind == "copy":
                made = [target()]
                items.append(Copy(pick(), made[0]))
            elif kind == "cond":
                flag = fresh(1)
                items.append(Step(self.less, (pick(), pick(), flag)))
                given = [limit, zero, pick(), pick()]
                made = [target() for _ in range(rng.randint(1, 3))]
                then, orelse = (self.program(depth - 1, 4, 0, 1, len(made)) for _ in range(2))
                items.append(Cond(flag, then, orelse, tuple(given), tuple(made)))
            else:
                carried = 1 + rng.randint(0, 2)
                constants = [limit, zero, pick()]
                made = [target() for _ in range(carried)]
                total = carried + len(constants)
                test = Program((S,) * total, (FLAG,), (), (Step(self.less, (0, carried, total)),), (total,))
                body = self.program(depth - 1, total, carried, carried + 1, carried, counter=0)
                items.append(
                    While(test, body, (zero, *[pick() for _ in range(carried - 1)]), tuple(constants), tuple(made))
                )
            known += made
        while free:
            items.append(Copy(rng.choice(known), free.pop(0)))
        chosen = [rng.randrange(inputs + outputs) for _ in range(results)]
        if counter is not None:
            chosen[0] = inputs
        lives = [Temp(n, *self.life(items, inputs + outputs + k)) for k, n in enumerate(temps)]
        return Program((S,) * inputs, (S,) * outputs, tuple(lives), tuple(items), tuple(chosen))

    def life(self, items, slot):
        touched = [i for i, item in enumerate(items) if slot in self.touches(item)]
        return touched[0], touched[-1]

    def touches(self, item):
        if isinstance(item, Step):
            return item.slots
        if isinstance(item, Copy):
            return item.source, item.target
        if isinstance(item, Cond):
            return item.predicate, *item.inputs, *item.outputs
        return *item.initial, *item.constants, *item.outputs


@pytest.fixture(scope="module")
def backend():
    return Codes()


@pytest.mark.parametrize("seed", range(60))
def test_random_control_flow(backend, seed):
    maker = Maker(backend, seed)
    program = maker.program(3, 4, 0, 1, 4)
    bound = backend.compile(program, scalars=range(4)).bind()
    for limit in (0, 1, 2, 3):
        inputs = [limit, 0, 5, -7]
        expected = np.array(interpret(program, inputs, maker.meaning)).astype(object)
        got = [int(values(b, i64)[0]) for b in bound.run(inputs)]
        assert [(int(e) + 2**63) % 2**64 - 2**63 for e in expected] == got
