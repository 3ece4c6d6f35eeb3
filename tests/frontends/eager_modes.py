"""Runs a program in eager mode under every flush policy and compares: with `==` between the policies, and with PyTorch within a tolerance.

A program is a function of the library (`duo` or `torch`) that returns tensors, arrays and numbers in lists, tuples and dicts. What it needs of
randomness it takes from `numbers`, so that both libraries get the same.
"""

from __future__ import annotations

import contextlib

import numpy as np

import duo

POLICIES = {
    "lazy": {"sync": False},
    "random1": {"flush_seed": 1},
    "random2": {"flush_seed": 20},
    "sync": {"sync": True},
}


@contextlib.contextmanager
def flush_policy(name):
    """Eager mode flushes by policy `name` of POLICIES inside the block."""
    duo.synchronize()
    duo.debug.configure(**POLICIES[name])
    try:
        yield
    finally:
        duo.debug.configure(sync=False)


def numbers(*shape, seed=0, dtype=np.float32, low=None, high=None):
    """Normal numbers of that shape, or uniform ones between low and high (integers for an integer dtype)."""
    stream = np.random.default_rng([seed, *shape])
    if low is None:
        return stream.standard_normal(shape).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        return stream.integers(low, high, shape).astype(dtype)
    return stream.uniform(low, high, shape).astype(dtype)


def flat(x):
    """The arrays in a nest, in order; None counts as a value."""
    if x is None:
        return [np.array("none")]
    if isinstance(x, dict):
        return [a for k in x for a in flat(x[k])]
    if isinstance(x, (list, tuple)) and not hasattr(x, "numel"):
        return [a for y in x for a in flat(y)]
    if hasattr(x, "detach"):
        x = x.detach()
        x = x.float() if str(x.dtype) == "torch.bfloat16" else x
        x = x.numpy()
    return [np.array(x)]


def same(a, b):
    """Whether two nests are equal in type and bits (a NaN equals a NaN)."""
    a, b = flat(a), flat(b)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and bool(np.all((x == y) | ((x != x) & (y != y))))
        for x, y in zip(a, b)
    )


def in_every_mode(program):
    """The arrays that the program gives, which must be equal under every policy, the first and the second time it runs."""
    first = None
    for name in POLICIES:
        with flush_policy(name):
            for _ in range(2 if name == "lazy" else 1):
                got = flat(program(duo))
                first = got if first is None else first
                assert same(first, got), f"{name} gives other bits:\n{first}\n{got}"
    return first


def agree(program, torch, rtol=2e-5, atol=2e-6):
    """Runs the program under every policy and in PyTorch; same structure, shapes and dtypes, values within tolerance."""
    ours, theirs = in_every_mode(program), flat(program(torch))
    assert len(ours) == len(theirs)
    for i, (x, y) in enumerate(zip(ours, theirs)):
        assert x.shape == y.shape, f"result {i}: {x.shape} here, {y.shape} in PyTorch"
        assert x.dtype == y.dtype or "bfloat16" in (x.dtype.name, y.dtype.name), f"result {i}: {x.dtype}, {y.dtype}"
        if x.dtype.kind in "fV" or x.dtype.name == "bfloat16":
            np.testing.assert_allclose(
                x.astype(np.float64), y.astype(np.float64), rtol=rtol, atol=atol, err_msg=f"result {i}"
            )
        else:
            assert np.array_equal(x, y), f"result {i}: {x} here, {y} in PyTorch"
