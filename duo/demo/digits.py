"""The demo's data and model: scikit-learn's 8x8 handwritten digits, and a small classifier with dropout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from duo import nn
from duo_ir.errors import DuoError

BATCH = 64


@dataclass(frozen=True)
class Digits:
    """Images as f32[n, 64] from 0 to 1, labels as i64[n]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def batches(self, epoch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The training set once, in batches of BATCH, in an order that depends on epoch and seed alone."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self.train_labels))
        for rows in order.reshape(-1, BATCH):
            yield self.train_images[rows], self.train_labels[rows]


def load_digits() -> Digits:
    """1408 images to train on (22 batches) and 389 to test on. Raises DuoError when scikit-learn is not installed."""
    try:
        from sklearn import datasets  # optional: the extra `examples`
    except ImportError:
        raise DuoError(
            "the digits are scikit-learn's, which is not installed; run: pip install 'duo[examples]'"
        ) from None
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16.0).astype(np.float32), labels[order].astype(np.int64)
    cut = 22 * BATCH
    return Digits(images[:cut], labels[:cut], images[cut:], labels[cut:])


class Classifier(nn.Module):
    """f32[b, 64] -> logits f32[b, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 128),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 10),
        )

    def forward(self, images: Any) -> Any:
        return self.layers(images)
