"""`duo.set_numerics`, `duo.numerics`, `duo.compile(numerics=)`: what belongs to which mode, on an (emulated) GPU and on the CPU."""

from __future__ import annotations

import pytest

import duo
from duo import runtime
from duo_ir import errors
from tests.cuda_emulator.support import needs_emulator
from tests.frontends.cuda_support import gpu  # noqa: F401

FINE = 1.0 + 2.0**-13  # f32 holds it, tf32 makes it 1


def operands(device: str = "cuda") -> tuple[duo.Tensor, duo.Tensor]:
    return duo.full((8, 16), FINE, device=device), duo.eye(16, device=device)


@pytest.fixture(autouse=True)
def strict_again():
    yield
    duo.set_numerics("strict")


@needs_emulator
@pytest.mark.usefixtures("gpu")
class TestOnAGpu:
    def test_blocks_and_the_default(self):
        x, y = operands()
        assert duo.get_numerics() == "strict" and (x @ y == FINE).all()
        with duo.numerics("fast"):
            assert duo.get_numerics() == "fast"
            z = x @ y + 1.0
            with duo.numerics("strict"):
                w = x @ y
            v = x @ y
        assert (z == 2.0).all() and (w == FINE).all() and (v == 1.0).all()  # looked at outside: the mode is that of recording
        duo.set_numerics("fast")
        assert (x @ y == 1.0).all()
        duo.set_numerics("strict")
        assert (x @ y == FINE).all()

        @duo.numerics("fast")
        def f(x):
            return x @ y

        assert (f(x) == 1.0).all() and (x @ y == FINE).all()

    def test_gradients_follow_the_mode_they_are_taken_in(self):
        x, y = operands()
        x.requires_grad_()
        with duo.numerics("fast"):
            (x @ (y * FINE)).sum().backward()
        assert (x.grad == 1.0).all()
        x.grad = None
        (x @ (y * FINE)).sum().backward()
        assert (x.grad == FINE).all()

    def test_compiled_functions_follow_the_mode(self):
        f = duo.compile(lambda x, y: x @ y)
        x, y = operands()
        for _ in range(2):
            assert (f(x, y) == FINE).all()
            with duo.numerics("fast"):
                assert (f(x, y) == 1.0).all()
        assert f.recordings == 2
        assert "in fast numerics" in f.explain() and "numerics changed strict -> fast" in f.explain()

    def test_compiled_functions_with_a_mode_of_their_own(self):
        x, y = operands()

        @duo.compile(numerics="fast")
        def f(x, y):
            return x @ y

        module = duo.nn.Linear(16, 8, bias=False, device="cuda")
        with duo.no_grad():
            module.weight.fill_(FINE)
        quick = duo.compile(module, numerics="fast")
        one = duo.ones(8, 16, device="cuda")
        for _ in range(3):
            assert (f(x, y) == 1.0).all() and (quick(one) == 16.0).all()
        assert f.recordings == 1 and (module(one) == 16 * FINE).all()
        strict = duo.compile(lambda x, y: x @ y, numerics="strict")
        with duo.numerics("fast"):
            assert (strict(x, y) == FINE).all()

    def test_one_program_has_one_mode(self):
        x, y = operands()

        @duo.compile
        def f(x, y):
            z = x @ y
            with duo.numerics("fast"):
                return z @ y

        with pytest.raises(errors.TraceError, match=r"(?s)strict numerics, which change at .*test_numerics.py.*duo.compile\(numerics=\)"):
            f(x, y)
        assert duo.get_numerics() == "strict" and (x @ y == FINE).all()


def test_on_the_cpu_nothing_changes():
    x, y = operands("cpu")
    f = duo.compile(lambda x, y: x @ y)
    for _ in range(3):
        assert (x @ y).tolist() == f(x, y).tolist() == [[FINE] * 16] * 8
    compiled = runtime.statistics.compiled
    with duo.numerics("fast"):
        assert (x @ y).tolist() == f(x, y).tolist() == [[FINE] * 16] * 8
    assert runtime.statistics.compiled == compiled and f.recordings == 1
    assert duo.compile(lambda x, y: x @ y, numerics="fast")(x, y).tolist() == [[FINE] * 16] * 8


def test_names():
    for use in (duo.set_numerics, duo.numerics, lambda mode: duo.compile(abs, numerics=mode)):
        with pytest.raises(errors.ArgumentError, match="'quick' are not known; there are 'strict' and 'fast'"):
            use("quick")
