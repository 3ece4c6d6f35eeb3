"""Free sizes as numbers of a program: the same program as an artefact, in a graph with None, and compiled, for sizes of every kind."""

from __future__ import annotations

import os
import shutil
import sys

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import nn
from duo.aot.capture import source_of
from duo_backends.aot.special import with_special
from duo_ir.errors import ArgumentError, DuoError, ShapeError
from tests.aot.models import floats
from tests.aot.programs import Library, same_bits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux")
F = nn.functional
SIZES = ((3, 5), (2, 4), (5, 2), (1, 7), (7, 1), (1, 1), (0, 3), (3, 0))


class Gpt(nn.Module):
    """A causal block over a free length; positions of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(17, 16), nn.Embedding(12, 16)
        self.table = nn.Parameter(duo.randn(1, 12, 16))
        self.register_buffer("waves", duo.randn(12, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)

    def forward(self, index):
        _, t = index.shape
        x = self.words(index) + self.places(duo.arange(t)) + self.table[:, :t] + self.waves[:t]
        return self.block(x, is_causal=True)[:, -1]


def by_hand(x):
    """Attention in its parts."""
    _, t, d = x.shape
    scores = (x @ x.transpose(1, 2)) * (1.0 / d**0.5)
    scores = scores.masked_fill(duo.ones(t, t).tril() == 0, float("-inf"))
    return scores.softmax(-1) @ x


def _modules():
    duo.manual_seed(0)
    return {
        "lstm": nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True).eval(), "gru": nn.GRU(5, 4).eval(),
        "rnn": nn.RNN(5, 1).eval(), "gpt": Gpt().eval(), "line": nn.Linear(5, 1), "batch": nn.BatchNorm1d(5).eval(),
    }  # fmt: skip


M = _modules()
PROGRAMS = {
    "times": (lambda x: x * x.shape[1], "f32[n,m]"),
    "left": (lambda x: x.shape[0] - x.shape[1] * x, "f32[n,m]"),
    "over": (lambda x: x / x.shape[0], "f32[n,m]"),
    "mean by hand": (lambda x: x.sum() / x.numel() + x.sum(0) / len(x.shape), "f32[n,m]"),
    "under": (lambda x: x * (1 / (x.shape[1] + 1)), "f32[n,m]"),
    "root": (lambda x: x / x.shape[1] ** 0.5 + x.shape[0] ** 2, "f32[n,m]"),
    "whole": (lambda x: x + (x.shape[0] // 2) * 3 - x.shape[1] % 3, "f32[n,m]"),
    "integers": (lambda x: x * x.shape[0] + x.shape[1] / 2, "i32[n,m]"),
    "wide": (lambda x: x * x.shape[1] + x.shape[0] / 3, "f64[n,m]"),
    "narrow": (lambda x: x * x.shape[1] + x.shape[0] / 3, "f16[n,m]"),
    "mean": (lambda x: (x.mean(0), x.mean(), x.var(0, correction=0)), "f32[n,m]"),
    "positions": (lambda x: x + duo.arange(x.shape[1]) * x.shape[0], "f32[n,m]"),
    "last": (lambda x: x[:, -1] + x[:, x.shape[1] - 1], "f32[n,m]"),
    "flat": (lambda x: x.reshape(x.shape[0], -1) * x.size(1), "f32[n,m,3]"),
    "rows": (lambda x: x.view(x.shape[0] * x.shape[1], x.shape[2]).sum(0), "f32[n,m,3]"),
    "mask": (lambda x: x * duo.ones(x.shape[0], x.shape[1]).tril() + x.triu(1), "f32[n,m]"),
    "full": (lambda x: duo.full((x.shape[0],), x.shape[1]), "f32[n,m]"),
    "tensor": (lambda x: x + duo.tensor([x.shape[0], x.shape[1] * 2]).sum() + duo.tensor(x.shape[0] / 2), "f32[n,m]"),
    "where": (lambda x: duo.where(x > x.shape[0] - 2, x, x.shape[1]).clamp(max=x.shape[0]), "f32[n,m]"),
    "even": (lambda x: x + duo.linspace(-1, 2, x.shape[1]), "f32[n,m]"),
    "repeat": (lambda x: duo.ones(1, 3).repeat(x.shape[0], 1).expand(x.shape[1], -1, -1) * x.sum(), "f32[n,m]"),
    "entropy": (lambda x, y: F.cross_entropy(x, y), "f32[n,4]", "i64[n]"),
    "pool": (lambda x: F.adaptive_avg_pool2d(x, 1), "f32[1,2,n,m]"),
    "loop": (lambda x: duo.while_loop(lambda k, s: k < 3, lambda k, s: (k + 1, s * x.shape[0] / 4), (duo.tensor(0) * x.shape[0], x.sum(0)))[1], "f32[n,m]"),
    "attention": (by_hand, "f32[n,m,4]"),
    "gram": (lambda x: x @ x.T, "f32[n,m]"),
    "lstm": (lambda x: M["lstm"](x)[0], "f32[n,m,5]"),
    "states": (lambda x: M["lstm"](x)[1], "f32[n,m,5]"),
    "gru": (lambda x: M["gru"](x)[0], "f32[n,m,5]"),
    "rnn": (lambda x: M["rnn"](x)[0], "f32[n,m,5]"),
    "gpt": (M["gpt"], "i64[n,m]"),
    "line": (M["line"], "f32[n,5]"),
    "norm": (lambda x: M["batch"](x.reshape(-1, 5)), "f32[n,m,5]"),
}  # fmt: skip


def data(specs, n: int, m: int) -> list[np.ndarray]:
    rng = np.random.default_rng(100 * n + m)
    out = []
    for text in specs:
        s = duo.spec(text)
        shape = [{"n": n, "m": m}.get(d, d) for d in s.shape]
        values = rng.standard_normal(shape) if s.dtype.is_float else rng.integers(0, 4, shape)
        out.append(values.astype(s.dtype.numpy))
    return out


def arrays(out) -> list[np.ndarray]:
    listed = out if isinstance(out, (tuple, list)) else [out]
    return [np.asarray(t.detach().numpy() if isinstance(t, duo.Tensor) else t) for t in listed]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(map(same_bits, a, b))


def wanted(program, given):
    """What eager mode says; None where it refuses."""
    try:
        return arrays(program(*map(duo.tensor, given)))
    except (DuoError, ZeroDivisionError):
        return None


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_artefact(tmp_path, name):
    program, *specs = PROGRAMS[name]
    duo.export(program, *specs, path=tmp_path / "p.duo")
    loaded = duo.load_executable(tmp_path / "p.duo")
    seen = 0
    for n, m in SIZES:
        given = data(specs, n, m)
        want = wanted(program, given)
        try:
            got = arrays(loaded(*given))
        except ShapeError as error:
            assert want is None, (n, m, str(error))
            continue
        assert want is not None or 0 in (n, m), (n, m)
        assert want is None or same(got, want), (n, m, got, want)
        seen += want is not None
    assert seen >= 3


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_graph_and_a_compiled_function(name):
    program, *specs = PROGRAMS[name]
    with tf.Graph().as_default(), tf.Session() as session:
        forms = [duo.spec(s) for s in specs]
        inputs = [tf.placeholder(s.dtype, [None if isinstance(d, str) else d for d in s.shape]) for s in forms]
        out = program(*inputs)
        compiled = duo.compile(program)
        for n, m in SIZES:
            given = data(specs, n, m)
            want = wanted(program, given)
            if want is None:
                continue
            assert same(arrays(session.run(out, dict(zip(inputs, given)))), want), (n, m)
            assert same(arrays(compiled(*map(duo.tensor, given))), want), (n, m)


def test_a_program_that_divides_by_a_size_is_for_no_size_of_zero(tmp_path):
    duo.export(lambda x: x.sum() * (1 / x.shape[0]) + x.shape[1] // (x.shape[0] + 1), "f32[n,m]", path=tmp_path / "p.duo")
    loaded = duo.load_executable(tmp_path / "p.duo")
    assert loaded(floats(0, 1, 3)) == duo.tensor(floats(0, 1, 3)).sum().item() + 1
    with pytest.raises(ShapeError, match="n is 0; this program needs 1 at least"):
        loaded(floats(0, 0, 3))
    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [None])
        y = x.sum() * (1 / x.shape[0])
        assert session.run(y, {x: [2.0, 4.0]}) == 3
        with pytest.raises(ShapeError, match="divides by a size that is 0"):
            session.run(y, {x: []})


def test_a_table_that_is_shorter_than_a_free_size_names_the_line(tmp_path):
    duo.export(M["gpt"], "i64[n,m]", path=tmp_path / "p.duo")
    loaded = duo.load_executable(tmp_path / "p.duo")
    assert loaded(np.zeros((2, 12), "i8")).shape == (2, 16)
    with pytest.raises(IndexError, match=r"test_free_sizes\.py:\d+: index 12 is out of range for axis \d, which has 12"):
        loaded(np.zeros((2, 13), "i8"))


def test_decisions_are_refused_at_the_line(tmp_path):
    def branch(x):
        if x.shape[0] > 3:
            return x * 2
        return x

    def steps(x):
        return sum(x[i] for i in range(x.shape[0]))

    cases = {
        branch: r"branch cannot be exported as it is at test_free_sizes\.py:\d+: n > 3 is known only when.*n is free.*as a number.*duo\.where",
        steps: r"test_free_sizes\.py:\d+: the number n is known only",
        lambda x: x if x.shape[0] == x.shape[1] else -x: "n == m is known only when the program runs: m and n are free",
        lambda x: x * (2 if x.shape[0] % 2 else 1): r"n % 2 != 0 is known",
        lambda x: x * float(x.shape[0]): r"float\(n\) is known.*n \*\* 0\.5",
        lambda x: x[:, : x.shape[1] // 2]: r"the number m // 2 is known",
        lambda x: x ** x.shape[0]: "the exponent n is a free size",
        lambda x: x * x.shape[0] ** -1: r"write 1 / n \*\* 0\.5",
        lambda x: x * (x.shape[0] / (x.shape[1] // 2)): "which may be 0",
    }  # fmt: skip
    for program, match in cases.items():
        with pytest.raises((ArgumentError, ShapeError), match=match):
            duo.export(program, "f32[n,m]", path=tmp_path / "no.duo")
    with pytest.raises(ZeroDivisionError):
        duo.export(lambda x: x * (x.shape[0] // 0), "f32[n,m]", path=tmp_path / "no.duo")


def test_decisions_that_are_the_same_for_all_sizes(tmp_path):
    def program(x):
        assert x.shape[0] >= 0 and x.shape[0] == x.shape[0] and x.shape[1] + 1 > 0 and x.shape[0] > -1
        assert not (x.shape[0] < 0 or x.shape[1] != x.shape[1] or x.shape[0] == -1)
        return x + x.shape[0] * 0 + (x.shape[1] - x.shape[1])

    duo.export(program, "f32[n,m]", path=tmp_path / "p.duo")
    x = floats(0, 3, 2)
    assert (duo.load_executable(tmp_path / "p.duo")(x) == x).all()


# name -> a program with products of one column at some sizes, specs, the sizes of special programs
COLUMNS = {
    "one": (lambda x: x @ x.T, ["f32[n,m]"], [{"n": 1}]),
    "turned": (lambda x, y: (y @ x.T).T * 2, ["f32[n,37]", "f32[4,37]"], [{"n": 1}]),
    "rows": (lambda x, y: (x @ y.T).T * 2, ["f32[n,37]", "f32[4,37]"], []),
    "two": (lambda x: (x @ x.T).sum() + (x.T @ x).sum(), ["f32[n,m]"], [{"n": 1}, {"m": 1}, {"n": 1, "m": 1}]),
    "product": (lambda x: duo.ones(3, 5) @ x.reshape(-1, 5).T, ["f32[n,m,5]"], [{"n": 1, "m": 1}]),
    "rest": (lambda x: x.T @ x[:, 1:], ["f32[n,m]"], [{"m": 2}]),
    "whole": (lambda x: x @ x.T, ["i32[n,m]"], []),
    "inside": (lambda x: duo.cond(x.sum() > 0, lambda: x @ x.T, lambda: x @ x.T * 2), ["f32[n,m]"], [{"n": 1}]),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_sizes_at_which_a_product_has_one_column(tmp_path, monkeypatch, name):
    """They have a program of their own, whose bits are Python's, also where the file's code does not fit the CPU."""
    program, specs, sizes = COLUMNS[name]
    made, _ = with_special(source_of(program, specs, "p"))
    assert {frozenset(p.special.sizes) for p in made.programs[1:]} == {frozenset(s.items()) for s in sizes}
    duo.export(program, *specs, path=tmp_path / "p.duo")
    for target in (None, "compiled here"):
        loaded = duo.load_executable(tmp_path / "p.duo")
        for n, m in (*SIZES, (1, 2), (2, 1), (37, 2), (1, 33), (4, 1)):
            given = data(specs, n, m)
            want = wanted(program, given)
            if want is None or (name == "rest" and m == 0):  # a slice of nothing: an array of a negative size
                continue
            assert same(arrays(loaded(*given)), want), (target, n, m)
        monkeypatch.setattr("duo.executable.has_features", lambda needs: False)


SMALL = {
    "padded": (lambda x: F.pad(x, (0, 0, 0, 2))[:2], "f32[n,m]"),
    "inside": (lambda x: F.pad(x.T.exp(), (1, 3))[:, 1:4] + 1, "f32[n,m]"),
    "joined": (lambda x, y: duo.cat([x * 2, y])[1:3], "f32[n,3]", "f32[4,3]"),
    "both": (lambda x: F.pad(x, (0, 2, 0, 2))[:2, :2], "f32[n,m]"),
    "rolled": (lambda x: x.roll(1, 1).flip(0), "f32[n,m]"),
    "taken": (lambda x: x[duo.tensor([1, 0])] * x.shape[1], "f32[n,m]"),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_kernels_that_lean_on_sizes_of_two(tmp_path, name):
    """A mask that is always true for sizes of 2 and more is none for 0 and 1: nothing is read beyond an array."""
    program, *specs = SMALL[name]
    library = Library.of(source_of(program, specs, "p"), tmp_path)
    duo.export(program, *specs, path=tmp_path / "p.duo")
    loaded = duo.load_executable(tmp_path / "p.duo")
    jobs = []
    for n, m in ((4, 5), (2, 2), (1, 3), (3, 1), (1, 1), (0, 3), (3, 0), (0, 0), (1, 0)):
        given = data(specs, n, m)
        want = wanted(program, given)
        try:
            got = arrays(loaded(*given))
        except (ShapeError, IndexError):
            assert want is None or min(n, m) == 0, (n, m)
            continue
        assert same(got, want), (n, m)
        jobs.append((1, {"n": n, "m": m}, given, want))
    assert len(jobs) >= (3 if name == "taken" else 5)
    for (_, sizes, _, want), got in zip(jobs, library.run([job[:3] for job in jobs])):
        assert same(got, want), sizes


def test_columns_of_too_many_sizes_are_refused(tmp_path):
    def program(x, y, z):
        rows = duo.cat([x, y, z])
        return rows @ rows.T

    duo.export(program, "f32[a,3]", "f32[b,3]", "f32[c,3]", path=tmp_path / "p.duo")
    loaded = duo.load_executable(tmp_path / "p.duo")
    given = [floats(k, 1, 3) for k in range(3)]
    assert same([loaded(*given)], wanted(program, given))
    with pytest.raises(ShapeError, match="one column, which is added up in another order; export the program for that size"):
        loaded(given[0], given[1][:0], given[2][:0])


def test_special_programs_share_weights(tmp_path):
    duo.manual_seed(0)
    layer = nn.Linear(256, 256)

    def program(x):
        y = layer(x)
        return y @ y.T

    sizes = {}
    for spec in ("f32[n,256]", "f32[3,256]"):
        duo.export(program, spec, path=tmp_path / "p.duo")
        sizes[spec] = (tmp_path / "p.duo").stat().st_size
    assert sizes["f32[n,256]"] - sizes["f32[3,256]"] < layer.weight.nbytes / 2


def test_a_training_step_with_free_sizes(tmp_path):
    """Batch and length free, sizes among the operands, a program of its own where the length is 1."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(11, 8), nn.Parameter(duo.randn(6, 8) * 0.1)
            self.head = nn.Linear(8, 11)

        def forward(self, index):
            x = self.words(index) + self.places[: index.shape[1]]
            return self.head(by_hand(x) * index.shape[1] ** 0.5) / index.shape[0]

    def loss(model, x, y):
        return F.cross_entropy(model(x).reshape(-1, 11), y.reshape(-1))

    def start():
        duo.manual_seed(4)
        model = Model()
        return model, duo.optim.Adam(model.parameters(), lr=0.01)

    model, optimizer = start()
    duo.export_training(model, loss, optimizer, "x: i64[b,t]", "y: i64[b,t]", path=tmp_path / "t.duo")
    loaded = duo.load_executable(tmp_path / "t.duo")
    rng = np.random.default_rng(0)
    for b, t in ((3, 4), (2, 6), (1, 4), (2, 1), (1, 1), (5, 3)):
        x, y = rng.integers(0, 11, (2, b, t))
        optimizer.zero_grad()
        value = loss(model, duo.tensor(x), duo.tensor(y))
        value.backward()
        optimizer.step()
        assert loaded.train_step(x, y) == value.item(), (b, t)
        for name, p in model.named_parameters():
            assert (loaded.get_state(f"model.{name}") == p.detach().numpy()).all(), (b, t, name)
        assert loaded.forward(x).tobytes() == model(duo.tensor(x)).detach().numpy().tobytes(), (b, t)


STEPS = [
    lambda x: x * x.shape[0] - x.shape[1],
    lambda x: x / (x.shape[1] + 1) + x.shape[0] ** 0.5,
    lambda x: x + x.shape[0] // 2 * (x.shape[1] % 3),
    lambda x: x - x.mean(0),
    lambda x: x - x.sum(1, keepdim=True) / x.shape[1],
    lambda x: x.T,
    lambda x: x @ x.T,
    lambda x: x.T @ (x * x.shape[0]),
    lambda x: duo.cat([x, duo.zeros(x.shape[0], 1), x[:, -1:]], 1),
    lambda x: duo.cat([x, duo.full((1, x.shape[1]), x.shape[0])]),
    lambda x: x + duo.arange(x.shape[1]) * duo.tensor(x.shape[0]),
    lambda x: x[:, 1:] * x.shape[1],
    lambda x: x.reshape(-1).flip(0).view(x.shape[1], x.shape[0]),
    lambda x: duo.where(x > x.shape[0], x, x.shape[1] / 2).clamp(max=x.shape[1]),
    lambda x: x * duo.ones(x.shape[0], x.shape[1]).tril(),
    lambda x: x.cumsum(0) * duo.linspace(0, 1, x.shape[1]),
    lambda x: duo.while_loop(lambda k, s: k < x.shape[1], lambda k, s: (k + 1, s * 0.5 + k), (duo.tensor(0) * x.shape[0], x))[1],
    lambda x: (x.unsqueeze(0).expand(x.shape[1], -1, -1) * x.T.unsqueeze(-1)).sum(0),
    lambda x: x.softmax(-1) * x.numel(),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(int(os.environ.get("DUO_EXAMPLES", "16"))))
def test_random_programs(tmp_path, seed):
    """Steps with sizes among their operands, one after the other: eager mode, the file, a graph."""
    rng = np.random.default_rng(seed)
    steps = [STEPS[k] for k in rng.integers(0, len(STEPS), 4)]

    def program(x):
        for step in steps:
            x = step(x)
        return x

    duo.export(program, "f32[n,m]", path=tmp_path / "p.duo")
    loaded = duo.load_executable(tmp_path / "p.duo", threads=1 + seed % 2)
    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [None, None])
        out, seen = program(x), 0
        for n, m in SIZES:
            given = data(["f32[n,m]"], n, m)
            want = wanted(program, given)
            if want is None:
                continue
            for run in (lambda: session.run(out, {x: given[0]}), lambda: loaded(*given)):  # noqa: B023
                try:
                    got = run()
                except ShapeError as error:  # what Python's slices clamp, say
                    assert min(n, m) < 2, (n, m, str(error))
                    continue
                assert same([got], want), (n, m)
                seen += 1
    assert seen >= 6
