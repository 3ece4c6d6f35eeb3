"""One training program in three modes. Each mode gives a Trainer with the same interface, so that one loop drives them all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import duo
import duo.graph as tf
from duo import optim
from duo.demo.digits import Classifier, Digits
from duo.nn import functional as F


@dataclass
class Epoch:
    """Mean training loss, accuracy on the test images, seconds for the training steps."""

    loss: float
    accuracy: float
    seconds: float


@dataclass
class Trainer:
    """`step(images, labels)` trains on one batch and gives its loss; `logits(images)` evaluates."""

    name: str
    model: Classifier
    optimizer: Any
    step: Callable[[np.ndarray, np.ndarray], Any]
    logits: Callable[[np.ndarray], np.ndarray]
    losses: list[np.float32] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    first_step: float = 0.0  # seconds, compilation included

    def train_epoch(self, data: Digits, seed: int) -> None:
        """One pass over the training images, then an evaluation."""
        start, first = time.perf_counter(), len(self.losses)
        for images, labels in data.batches(len(self.epochs), seed):
            began = time.perf_counter()
            self.losses.append(np.float32(self.step(images, labels)))
            if len(self.losses) == 1:
                self.first_step = time.perf_counter() - began
        seconds = time.perf_counter() - start
        hits = self.logits(data.test_images).argmax(1) == data.test_labels
        self.epochs.append(Epoch(float(np.mean(self.losses[first:])), float(hits.mean()), seconds))

    def checkpoint(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": duo.get_rng_state(),
        }

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Continues where `checkpoint` was made, in whatever mode that was."""
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        duo.set_rng_state(checkpoint["random"])

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies of weights and of the optimizer's state."""
        out = {name: t.detach().numpy().copy() for name, t in self.model.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            out.update({f"{number}.{name}": t.detach().numpy().copy() for name, t in slots.items()})
        return out


def _start() -> tuple[Classifier, Any]:
    model = Classifier()
    return model, optim.Adam(model.parameters(), lr=2e-3)


def eager() -> Trainer:
    """Op by op, as in PyTorch."""
    model, optimizer = _start()

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(duo.tensor(images)), duo.tensor(labels))
        loss.backward()
        optimizer.step()
        return loss.item()

    return Trainer("eager mode", model, optimizer, step, lambda images: _evaluate(model, images))


def compiled() -> Trainer:
    """The whole step, backward pass and update included, as one program."""
    model, optimizer = _start()

    @duo.compile
    def train(images: Any, labels: Any) -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        return train(duo.tensor(images), duo.tensor(labels)).item()

    return Trainer("@duo.compile", model, optimizer, step, lambda images: _evaluate(model, images))


def _evaluate(model: Classifier, images: np.ndarray) -> np.ndarray:
    model.eval()
    with duo.no_grad():
        logits = model(duo.tensor(images)).numpy()
    model.train()
    return logits


def graph() -> Trainer:
    """A graph and a Session, as in TensorFlow 1, around the same module and optimizer."""
    model, optimizer = _start()
    with tf.Graph().as_default() as program:
        images = tf.placeholder(tf.float32, [None, 64], name="images")
        labels = tf.placeholder(tf.int64, [None], name="labels")
        loss = F.cross_entropy(model(images), labels)
        train = optimizer.minimize(loss)
        model.eval()
        outputs = model(images)
        model.train()
    session = tf.Session(graph=program)

    def step(x: np.ndarray, y: np.ndarray) -> Any:
        return session.run([loss, train], {images: x, labels: y})[0]

    return Trainer("graph mode", model, optimizer, step, lambda x: session.run(outputs, {images: x}))


MODES = (eager, graph, compiled)
