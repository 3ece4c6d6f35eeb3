"""Same program: both frontends lower a model, its gradients and its update to the same canonical text and hash."""

from __future__ import annotations

import numpy as np
import pytest

import duo
import duo.graph as tf
import duo.nn as nn
from tests.frontends.models import MODELS, loss_of, make

LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "layer norm": lambda: nn.LayerNorm(6),
    "dropout": lambda: nn.Dropout(0.3),
    "flatten": lambda: nn.Flatten(),
    "relu": lambda: nn.ReLU(),
    "gelu": lambda: nn.GELU(),
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "tanh": lambda: nn.Tanh(),
    "sigmoid": lambda: nn.Sigmoid(),
    "softmax": lambda: nn.Softmax(-1),
    "sequential": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)),
    "list": lambda: Listed(),
}
IMAGE_LAYERS = {
    "conv": lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2),
    "transposed conv": lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "average pool": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "batch norm": lambda: nn.BatchNorm2d(2),
    "batch norm in evaluation": lambda: nn.BatchNorm2d(2).eval(),
    "group norm": lambda: nn.GroupNorm(2, 2),
    "dropout of channels": lambda: nn.Dropout2d(0.3),
    "upsampling": lambda: nn.Upsample(scale_factor=2),
}
LAYERS.update(IMAGE_LAYERS)
LOSSES = {
    "mse": nn.MSELoss,
    "l1": nn.L1Loss,
    "smooth l1": nn.SmoothL1Loss,
    "bce with logits": nn.BCEWithLogitsLoss,
    "cross entropy with probabilities": nn.CrossEntropyLoss,
}
OPTIMIZERS = {
    "sgd": lambda p: duo.optim.SGD(p, lr=0.1),
    "sgd with momentum": lambda p: duo.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "sgd, nesterov, decay": lambda p: duo.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: duo.optim.Adam(p, lr=0.1),
    "adam, amsgrad, decay": lambda p: duo.optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.01),
    "adamw": lambda p: duo.optim.AdamW(p, lr=0.1),
    "adagrad": lambda p: duo.optim.Adagrad(p, lr=0.1, lr_decay=0.1),
    "rmsprop": lambda p: duo.optim.RMSprop(p, lr=0.1),
    "rmsprop, centered, momentum": lambda p: duo.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.9),
}


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def forward(self, x):
        for part in self.parts:
            x = part(x).tanh()
        return x


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default():
        yield


def placeholder(array: np.ndarray):
    return tf.placeholder(tf.float32 if array.dtype == np.float32 else tf.int64, array.shape)


def assert_same_text(eager, graph) -> None:
    assert eager.key() == graph.key(), f"\n{eager}\n\n{graph}"
    assert eager.hash == graph.hash


def x_data(name: str = "") -> np.ndarray:
    shape = (3, 2, 6, 5) if name in IMAGE_LAYERS else (3, 6)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    module, x = LAYERS[name](), x_data(name)
    feed = placeholder(x)
    assert_same_text(duo.lower(module, duo.tensor(x)), tf.lower([module(feed)], [feed]))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_layers(name):
    module, x = LAYERS[name](), x_data(name)
    parameters = list(module.parameters())

    def eager(x):
        x = x.requires_grad_() if not x.requires_grad else x
        loss = module(x).square().sum()
        return duo.autograd.grad(loss, [x, *parameters])

    feed = placeholder(x)
    gradients = tf.gradients(module(feed).square().sum(), [feed, *parameters])
    assert_same_text(duo.lower(eager, duo.tensor(x).requires_grad_()), tf.lower(gradients, [feed]))


def test_embedding_and_cross_entropy():
    module = nn.Sequential(nn.Embedding(7, 5), nn.Flatten(0, 1))
    loss, index, target = nn.CrossEntropyLoss(), np.arange(6).reshape(2, 3), np.arange(6) % 5

    def eager(index, target):
        return duo.autograd.grad(loss(module(index), target), list(module.parameters()))

    feeds = placeholder(index), placeholder(target)
    gradients = tf.gradients(loss(module(feeds[0]), feeds[1]), list(module.parameters()))
    assert_same_text(duo.lower(eager, duo.tensor(index), duo.tensor(target)), tf.lower(gradients, feeds))


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    module, x, y = LOSSES[name](), x_data(), np.abs(x_data())
    feeds = placeholder(x), placeholder(y)
    assert_same_text(duo.lower(module, duo.tensor(x), duo.tensor(y)), tf.lower([module(*feeds)], feeds))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates(name):
    x = x_data()

    def build():
        duo.manual_seed(1)
        module = nn.Linear(6, 4)
        return module, OPTIMIZERS[name](module.parameters())

    module, optimizer = build()

    def step(x):
        optimizer.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(2):  # the first update differs from those that follow
        eager = duo.lower(step, duo.tensor(x))
        with tf.Graph().as_default():
            feed = placeholder(x)
            loss = module(feed).square().mean()
            train = optimizer.minimize(loss)
            optimizer.zero_grad()
            assert_same_text(eager, tf.lower([loss, train], [feed]))
        step(duo.tensor(x))


@pytest.mark.parametrize("name", list(MODELS))
def test_models(name):
    model, _, (x, y) = make(name)
    feeds = placeholder(x), placeholder(y)
    eager = duo.lower(lambda x, y: loss_of(model, x, y), duo.tensor(x), duo.tensor(y))
    assert_same_text(eager, tf.lower([loss_of(model, *feeds)], feeds))


@pytest.mark.parametrize("name", list(MODELS))
def test_training_steps_of_models(name):
    model, optimizer, (x, y) = make(name)
    x, y = duo.tensor(x), duo.tensor(y)

    def step(x, y):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        return loss

    step(x, y)
    eager = duo.lower(step, x, y)
    feeds = placeholder(x.numpy()), placeholder(y.numpy())
    loss = loss_of(model, *feeds)
    train = optimizer.minimize(loss)
    assert_same_text(eager, tf.lower([loss, train], feeds))
