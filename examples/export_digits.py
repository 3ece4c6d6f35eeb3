"""Makes a training step of a digits classifier ahead of time, for examples/train_digits.c, in the current folder.

python examples/export_digits.py
cc -O2 -I. examples/train_digits.c -o train_digits -L. -ldigits -Wl,-rpath,'$ORIGIN'
./train_digits checkpoint.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import duo
from duo import nn, optim

BATCH, STEPS = 128, 100


def build() -> tuple[nn.Module, optim.Optimizer]:
    """The model and its optimizer."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    return model, optim.Adam(model.parameters(), lr=2e-3)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 64] from 0 to 1, labels [1797]."""
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype("f4"), labels.astype("i8")


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int = STEPS) -> list[float]:
    """The same steps in Python; their losses."""
    images, labels = data()
    losses = []
    for step in range(steps):
        start = step * BATCH % (len(images) - BATCH)
        optimizer.zero_grad()
        x, y = (duo.tensor(a[start : start + BATCH]) for a in (images, labels))
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(folder: str = ".") -> None:
    model, optimizer = build()
    specs = ("x: f32[batch,64]", "y: i64[batch]")
    duo.export_training(model, nn.functional.cross_entropy, optimizer, *specs, path=Path(folder) / "libdigits.so")
    images, labels = data()
    (Path(folder) / "digits.bin").write_bytes(images.tobytes() + labels.tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
