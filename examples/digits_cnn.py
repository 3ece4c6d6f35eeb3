"""One convolutional network for handwritten digits, trained in eager mode and in graph mode: the same bits.

    python examples/digits_cnn.py [--epochs N]

The model is written once, with PyTorch's names; the loops around it are PyTorch's and TensorFlow 1's. Both end with equal weights.
Needs scikit-learn, which brings the images: pip install 'duo[examples]'
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

import duo
import duo.graph as tf
import duo.nn.functional as F
from duo import nn, optim


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.full = nn.Linear(32 * 2 * 2, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.full(x.flatten(1))


def digits():
    """(images [n, 1, 8, 8], labels, batches of training rows per epoch, test rows)."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return (images / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels, order[:1408], order[1408:]


def start():
    """The model and its optimizer, as every run begins."""
    duo.manual_seed(0)
    model = Net()
    return model, optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def eager(epochs):
    """Yields (loss, accuracy on the test rows) of each epoch; returns the model."""
    images, labels, train, test = digits()
    model, optimizer = start()
    shuffle = np.random.default_rng(1)
    for _ in range(epochs):
        total = 0.0
        for rows in shuffle.permutation(train).reshape(-1, 64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(duo.tensor(images[rows])), duo.tensor(labels[rows]))
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        with duo.no_grad():
            guesses = model.eval()(duo.tensor(images[test])).argmax(1).numpy()
        model.train()
        yield total / len(train), float((guesses == labels[test]).mean())
    return model


def graph(epochs):
    """The same in graph mode."""
    images, labels, train, test = digits()
    model, optimizer = start()
    with tf.Graph().as_default() as built:
        x, y = tf.placeholder(tf.float32, [None, 1, 8, 8]), tf.placeholder(tf.int64, [None])
        loss = F.cross_entropy(model(x), y)
        step = optimizer.minimize(loss)
        guess = tf.argmax(model.eval()(x), 1)
        model.train()
    shuffle = np.random.default_rng(1)
    with tf.Session(graph=built) as session:
        for _ in range(epochs):
            total = 0.0
            for rows in shuffle.permutation(train).reshape(-1, 64):
                value, _ = session.run([loss, step], {x: images[rows], y: labels[rows]})
                total += float(value) * len(rows)
            guesses = session.run(guess, {x: images[test]})
            yield total / len(train), float((guesses == labels[test]).mean())
    return model


def run(name, epochs):
    """(accuracy, weights and statistics) after training in that mode."""
    steps = {"eager": eager, "graph": graph}[name](epochs)
    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        loss, accuracy = next(steps)
        print(f"{name} epoch {epoch}  loss {loss:.6f}  accuracy {accuracy:.1%}")
    try:
        next(steps)
    except StopIteration as done:
        return accuracy, {k: v.numpy() for k, v in done.value.state_dict().items()}


def main(epochs: int = 5) -> float:
    """Trains in both modes, compares to the bit, gives the accuracy on images that were not trained on."""
    accuracy, weights = run("eager", epochs)
    _, others = run("graph", epochs)
    same = all(np.array_equal(weights[k], others[k]) for k in weights)
    print("weights and statistics are equal to the bit" if same else "the modes differ")
    return accuracy if same else 0.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
