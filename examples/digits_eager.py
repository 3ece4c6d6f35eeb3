"""Handwritten digits in eager mode: PyTorch's names, PyTorch's way.

    python examples/digits_eager.py [--epochs N]

Needs scikit-learn, which brings the images: pip install 'duo[examples]'
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

import duo as torch
import duo.nn.functional as F
from duo import nn, optim


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 128)
        self.drop = nn.Dropout(0.1)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        return self.fc2(self.drop(F.relu(self.fc1(x))))


def main(epochs: int = 10) -> float:
    """Trains and gives the accuracy on images that were not trained on."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy((images / 16).astype(np.float32))
    labels = torch.from_numpy(labels.astype(np.int64))

    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    train, test = order[:1408], order[1408:]
    model = Net()
    optimizer = optim.Adam(model.parameters(), lr=2e-3)
    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for rows in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        model.eval()
        with torch.no_grad():
            accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
        print(f"epoch {epoch:2}  loss {total / len(train):.4f}  accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
