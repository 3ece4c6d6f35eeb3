"""Random tensors. Every run draws anew: from the process's generator (which eager mode draws from too), after `set_random_seed`
from one that each Session starts at that seed, with `seed=` from one of the op's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duo.functional import random as samples
from duo.graph.arrays import shape_of
from duo.graph.graph import Graph, get_default_graph
from duo.graph.tensor import convert_to_tensor, named
from duo.random import default_generator
from duo.tracing import innermost
from duo_ir.core import Value
from duo_ir.errors import TraceError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import indexing
from duo_ir.types import dtype as as_dtype
from duo_ir.types import f32, f64, i64


def set_random_seed(seed: int) -> None:
    """Seeds the default graph: random ops made from now on draw from a generator that each Session starts at this seed."""
    graph = get_default_graph()
    graph.seed, graph._seeded = int(seed), None


def draw(graph: Graph, body: Callable[..., Any], tensors: tuple, attrs: tuple, seed: int | None = None) -> Any:
    """The sample of `body(state, *tensors, *attrs) -> (sample, new state)`; the generator moves on when the graph runs."""
    around = innermost()
    if around is not None:
        raise TraceError(f"a random op of a graph cannot be inside {around.where}; draw before and pass the result in")
    state = graph.share(default_generator.state) if seed is None else graph.seeded(int(seed))
    source = graph.wrap(graph.read(state))
    sample, after = graph.apply(body, (source, *tensors), attrs)
    graph.update(state, after)
    return sample


def _sampled(
    type: str,
    name: str | None,
    body: Callable[..., Any],
    numbers: tuple,
    attrs: tuple,
    shape: Any,
    dtype: Any,
    seed: Any,
) -> Any:
    graph = get_default_graph()
    wanted = as_dtype(dtype)

    def make() -> Any:
        given = tuple([x if isinstance(x, (int, float)) else convert_to_tensor(x, wanted) for x in numbers])
        return draw(graph, body, given, (*attrs, shape_of(shape), wanted), seed)

    return named(graph, type, name, make)


def random_normal(
    shape: Any, mean: Any = 0.0, stddev: Any = 1.0, dtype: Any = f32, seed: int | None = None, name: str | None = None
) -> Any:
    """Normal samples with that mean and standard deviation."""
    return _sampled("random_normal", name, samples._normal_of, (mean, stddev), (), shape, dtype, seed)


def truncated_normal(
    shape: Any, mean: Any = 0.0, stddev: Any = 1.0, dtype: Any = f32, seed: int | None = None, name: str | None = None
) -> Any:
    """Normal samples within two standard deviations of the mean."""
    return _sampled(
        "truncated_normal", name, samples._truncated_normal, (mean, stddev), (-2.0, 2.0), shape, dtype, seed
    )


def random_uniform(
    shape: Any, minval: Any = 0, maxval: Any = None, dtype: Any = f32, seed: int | None = None, name: str | None = None
) -> Any:
    """Uniform samples in [minval, maxval); integers need a maxval."""
    wanted = as_dtype(dtype)
    if wanted.is_integer:
        return _sampled("random_uniform", name, samples._randint, (minval, maxval), (), shape, wanted, seed)
    low, high = (float(x) if isinstance(x, int) else x for x in (minval, 1.0 if maxval is None else maxval))
    return _sampled("random_uniform", name, samples._uniform_between, (low, high), (), shape, wanted, seed)


def multinomial(logits: Any, num_samples: int, seed: int | None = None, name: str | None = None) -> Any:
    """Class numbers drawn in proportion to exp(logits): [batch, classes] -> i64[batch, num_samples]."""
    x = convert_to_tensor(logits)
    return named(x.graph, "multinomial", name, lambda: draw(x.graph, _categories, (x,), (num_samples,), seed))


def _categories(state: Value, logits: Value, num_samples: int) -> tuple[Value, Value]:
    batch, classes = logits.type.shape
    wide = nd.broadcast_to(nd.expand_dims(logits, 1), (batch, num_samples, classes))
    return samples._categorical(state, wide)


def random_shuffle(value: Any, seed: int | None = None, name: str | None = None) -> Any:
    """The rows of `value` in a random order: that of one random key for each (ties by position)."""
    x = convert_to_tensor(value)
    return named(x.graph, "random_shuffle", name, lambda: draw(x.graph, _shuffled, (x,), (), seed))


def _shuffled(state: Value, x: Value) -> tuple[Value, Value]:
    n = x.type.shape[0]
    keys, after = samples._uniform(state, (n,), f64)
    ours, theirs = nd.reshape(keys, (n, 1)), nd.reshape(keys, (1, n))
    earlier = nd.lt(nd.iota((n, n), 1), nd.iota((n, n), 0))
    before = nd.or_(nd.lt(theirs, ours), nd.and_(nd.eq(theirs, ours), earlier))
    rank = nd.sum(nd.cast_to(before, i64), 1)
    return indexing.scatter(nd.zeros_like(x), x, rank, axes=(0,), mode="set"), after


def dropout(x: Any, rate: Any, seed: int | None) -> Any:
    """x / (1 - rate) with probability 1 - rate, else 0."""
    graph = x.graph
    return draw(graph, samples._dropout, (x, rate), (), seed)


__all__ = ["multinomial", "random_normal", "random_shuffle", "random_uniform", "set_random_seed", "truncated_normal"]
