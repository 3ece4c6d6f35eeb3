"""The models whose training must give the same bits however it is run: an MLP with dropout, a small transformer, a small CNN."""

from __future__ import annotations

import numpy as np

import duo
import duo.graph as tf
import duo.nn as nn
import duo.nn.functional as F


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(20, 33), nn.ReLU(), nn.Dropout(0.25), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 5)
        )

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x):
        batch, time, width = x.shape
        parts = self.qkv(self.norm1(x)).split(width, 2)
        q, k, v = (z.reshape(batch, time, self.heads, width // self.heads).transpose(1, 2) for z in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, words: int = 11, width: int = 12, time: int = 7, heads: int = 3) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, width), nn.Parameter(duo.randn(time, width) * 0.1)
        self.block, self.norm, self.head = Block(width, heads), nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, tokens):
        return self.head(self.norm(self.block(self.embed(tokens) + self.place)))


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6, momentum=None)
        self.drop, self.head = nn.Dropout2d(0.2), nn.Linear(6 * 4, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 3, 2, 1)
        x = F.avg_pool2d(F.relu(self.norm2(self.conv2(x))), 2, 1)
        return self.head(self.drop(x).flatten(1))


def mlp_data(batch: int = 9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((batch, 20)).astype(np.float32), rng.integers(0, 5, batch)


def transformer_data(batch: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    return rng.integers(0, 11, (batch, 7)), rng.integers(0, 11, (batch, 7))


def cnn_data(batch: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.standard_normal((batch, 2, 11, 10)).astype(np.float32), rng.integers(0, 4, batch)


def loss_of(model, x, y):
    out = model(x)
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


MODELS = {"mlp": (MLP, mlp_data), "transformer": (Transformer, transformer_data), "cnn": (CNN, cnn_data)}
SEED = 5


def make(name: str):
    """(model, optimiser, batch) in the state every run starts from."""
    duo.manual_seed(SEED)
    cls, data = MODELS[name]
    model = cls()
    return model, duo.optim.Adam(model.parameters(), lr=3e-3), data()


def weights(model) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}


def gradients(model) -> dict[str, np.ndarray]:
    return {k: p.grad.detach().numpy().copy() for k, p in model.named_parameters()}


def train_eager(name: str, steps: int, look: bool = False):
    """(losses, last gradients, weights) of eager training. `look` reads the loss before backward."""
    model, optimizer, (x, y) = make(name)
    x, y = duo.tensor(x), duo.tensor(y)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        if look:
            losses.append(loss.item())
        loss.backward()
        optimizer.step()
        if not look:
            losses.append(loss.item())
    return np.array(losses, np.float32), gradients(model), weights(model)


def graph_of(model, optimizer, x, y):
    """(loss, train op, placeholders) of the model in a fresh default graph."""
    kind = tf.float32 if x.dtype == np.float32 else tf.int64
    inputs = tf.placeholder(kind, [None, *x.shape[1:]], name="x")
    labels = tf.placeholder(tf.int64, [None, *y.shape[1:]], name="y")
    loss = loss_of(model, inputs, labels)
    return loss, optimizer.minimize(loss), (inputs, labels)


def train_graph(name: str, steps: int):
    """(losses, last gradients, weights) of graph-mode training of the same module by the same optimiser."""
    model, optimizer, (x, y) = make(name)
    losses = []
    with tf.Graph().as_default(), tf.Session() as session:
        loss, train, (inputs, labels) = graph_of(model, optimizer, x, y)
        parameters = dict(model.named_parameters())
        grads = tf.gradients(loss, list(parameters.values()))
        feed = {inputs: x, labels: y}
        for _ in range(steps):
            value, _, last = session.run([loss, train, grads], feed)
            losses.append(value)
    return np.array(losses, np.float32), dict(zip(parameters, last)), weights(model)


def train_compiled(name: str, steps: int):
    """(losses, last gradients, weights) of training by a compiled step."""
    model, optimizer, (x, y) = make(name)
    x, y = duo.tensor(x), duo.tensor(y)

    @duo.compile
    def step(x, y):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        return loss

    losses = [step(x, y).item() for _ in range(steps)]
    return np.array(losses, np.float32), gradients(model), weights(model)


def assert_same(a, b) -> None:
    """Equal to the bit: losses, gradients, weights."""
    assert np.array_equal(a[0], b[0]), f"losses differ from step {np.flatnonzero(a[0] != b[0])[0]}"
    for mine, other in ((a[1], b[1]), (a[2], b[2])):
        assert mine.keys() == other.keys()
        for key in mine:
            assert np.array_equal(mine[key], other[key]), key
