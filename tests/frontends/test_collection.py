"""Compilations run without automatic garbage collection, and leave it as they found it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from duo import runtime
from duo_ir import pipeline
from duo_ir.text import parse

FUNCTION = parse("func @f(%x: f32[3]) -> f32[3] {\n  %1: f32[3] = exp %x\n  return %1\n}\n")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.enable()


def seen_while_compiling(monkeypatch: pytest.MonkeyPatch, then: BaseException | None = None, children: bool = False) -> list[bool]:
    """Whether collection was on while `pipeline.compile` ran (which raises `then`), and in a child forked there."""
    real, seen = pipeline.compile, []

    def compile(*args, **options):
        seen.append(gc.isenabled())
        if children:
            pid = os.fork()
            if pid == 0:
                os._exit(17 + gc.isenabled())
            seen.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 18)
        if then is not None:
            raise then
        return real(*args, **options)

    monkeypatch.setattr(pipeline, "compile", compile)
    monkeypatch.setenv("DUO_CACHE_DIR", "off")
    if then is None:
        runtime.compile_alone(FUNCTION)
    else:
        with pytest.raises(type(then)):
            runtime.compile_alone(FUNCTION)
    return seen


@pytest.mark.parametrize("then", [None, KeyboardInterrupt()])
def test_collection_is_off_while_compiling_and_on_again(monkeypatch, then):
    assert seen_while_compiling(monkeypatch, then) == [False]
    assert gc.isenabled()


def test_collection_that_a_user_switched_off_stays_off(monkeypatch):
    gc.disable()
    assert seen_while_compiling(monkeypatch) == [False]
    assert not gc.isenabled()


def test_a_compilation_inside_another_leaves_it_off(monkeypatch):
    with runtime._Uncollected():
        assert seen_while_compiling(monkeypatch) == [False]
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_forked_meanwhile_collects(monkeypatch):
    assert seen_while_compiling(monkeypatch, children=True) == [False, True]
    assert gc.isenabled()


def test_a_pause_that_an_interrupt_kept_from_ending():
    """One that came before the end's first step: the pause ends with what is left of it."""
    assert gc.isenabled()
    pause = runtime._Uncollected()
    assert not gc.isenabled()
    with runtime._Uncollected():
        pass
    assert not gc.isenabled()
    del pause
    assert gc.isenabled()
