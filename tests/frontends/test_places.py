"""Errors at run time name the line of the recording at hand, also where the same program was recorded somewhere else before."""

import inspect
import re

import pytest

import duo
from duo import nn
from tests.frontends.eager_modes import POLICIES, flush_policy


@pytest.fixture(params=list(POLICIES))
def policy(request):
    with flush_policy(request.param):
        yield request.param


def line_of(function, marker):
    """The line of `function` that a comment marks."""
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, text in enumerate(lines) if f"# {marker}" in text)


def lines_in(error):
    return [int(n) for n in re.findall(r"test_places\.py:(\d+)", str(error))]


def both(program, kind, marker="HERE"):
    """Runs the program, which goes one of two ways, each way several times in turns; each error must name the line of its own way."""
    for _ in range(3):
        for way in (0, 1):
            with pytest.raises(kind) as info:
                program(way)
            assert lines_in(info.value) == [line_of(program, f"{marker}{way}")], str(info.value)


def test_index_out_of_range(policy):
    def program(way):
        table = duo.ones(4, 2)
        i = duo.tensor([0, 9])
        if way:
            rows = table[i]  # HERE1
        else:
            rows = table[i]  # HERE0
        (rows * 2).tolist()

    both(program, IndexError)


def test_index_out_of_range_in_a_layer(policy):
    table = nn.Embedding(5, 3)

    def program(way):
        i = duo.tensor([1, 5])
        if way:
            h = table(i)  # HERE1
        else:
            h = table(i)  # HERE0
        h.sum().item()

    both(program, IndexError)


def test_a_second_index_out_of_range(policy):
    def program(way):
        table, good, bad = duo.ones(4, 2), duo.tensor([0, 1]), duo.tensor([4, 0])
        x = table[good] + 1
        if way:
            y = table[bad]  # HERE1
        else:
            y = table[bad]  # HERE0
        (x + y).sum().item()

    both(program, IndexError)


def test_the_first_nan():
    def program(way):
        x = duo.tensor([1.0, -1.0])
        y = x * 2
        if way:
            z = y.log()  # HERE1
        else:
            z = y.log()  # HERE0
        (z + 1).tolist()

    with duo.debug.check_nan():
        both(program, FloatingPointError)


def test_freed(policy):
    def program(way):
        x = duo.tensor([1.0, 2.0], requires_grad=True)
        if way:
            y = x * x  # HERE1
        else:
            y = x * x  # HERE0
        loss = y.sum()
        loss.backward()
        loss.backward()

    both(program, RuntimeError)


def test_freed_before_a_look(policy):
    def program(way):
        x = duo.tensor([1.0, 2.0], requires_grad=True)
        if way:
            y = x.exp() * x  # HERE1
        else:
            y = x.exp() * x  # HERE0
        loss = y.sum()
        loss.backward()
        loss.item()
        loss.backward()

    both(program, RuntimeError)


def test_freed_after_a_look(policy):
    def program(way):
        x = duo.tensor([1.0, 2.0], requires_grad=True)
        if way:
            y = x * x  # HERE1
        else:
            y = x * x  # HERE0
        loss = y.sum()
        loss.item()
        loss.backward()
        loss.backward()

    both(program, RuntimeError)


def test_overwritten(policy):
    def program(way):
        x = duo.tensor([1.0, 2.0], requires_grad=True)
        y = x * 1
        if way:
            z = y * y  # HERE1
        else:
            z = y * y  # HERE0
        y.add_(1)
        z.sum().backward()

    both(program, RuntimeError)


def test_overwritten_after_a_look(policy):
    def program(way):
        x = duo.tensor([1.0, 2.0], requires_grad=True)
        y = duo.tensor([1.0, 2.0])
        if way:
            z = nn.functional.linear(x, y)  # HERE1
        else:
            z = nn.functional.linear(x, y)  # HERE0
        z.item()
        y.add_(1)
        z.backward()

    both(program, RuntimeError)


def test_overwritten_by_a_step(policy):
    def program(way):
        x = duo.tensor([1.0, 2.0], requires_grad=True)
        if way:
            y = (x**3).sum()  # HERE1
        else:
            y = (x**3).sum()  # HERE0
        y.backward(retain_graph=True)
        duo.optim.SGD([x], lr=0.1).step()
        y.backward()

    both(program, RuntimeError)


def test_places_are_no_part_of_a_program():
    """The same path from two lines is one node, and one executable."""

    def here():
        return ((duo.tensor([1.0, 2.0], requires_grad=True) * 3).exp() * 2).detach()

    def there():
        return ((duo.tensor([1.0, 2.0], requires_grad=True) * 3).exp() * 2).detach()

    for _ in range(3):
        here().tolist()
    compiled = duo.debug.statistics().compiled
    for _ in range(3):
        assert there().tolist() == here().tolist()
    assert duo.debug.statistics().compiled == compiled
