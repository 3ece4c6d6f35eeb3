"""Handwritten digits in graph mode: TensorFlow 1's names, TensorFlow 1's way.

    python examples/digits_graph.py [--epochs N]

Needs scikit-learn, which brings the images: pip install 'duo[examples]'
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

import duo.graph as tf


def dense(x, units, name):
    """x @ kernel + bias, with variables in a scope of their own."""
    with tf.variable_scope(name):
        kernel = tf.get_variable("kernel", [int(x.shape[1]), units])
        bias = tf.get_variable("bias", [units], initializer=tf.zeros_initializer())
        return tf.nn.bias_add(tf.matmul(x, kernel), bias)


def main(epochs: int = 10) -> float:
    """Trains and gives the accuracy on images that were not trained on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1408], order[1408:]

    tf.reset_default_graph()
    tf.set_random_seed(0)
    x = tf.placeholder(tf.float32, [None, 64], name="images")
    y = tf.placeholder(tf.int64, [None], name="labels")
    keep = tf.placeholder_with_default(1.0, [], name="keep")
    hidden = tf.nn.dropout(tf.nn.relu(dense(x, 128, "hidden")), keep_prob=keep)
    logits = dense(hidden, 10, "output")
    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits), name="loss")
    hits = tf.equal(tf.argmax(logits, 1), y)
    accuracy = tf.reduce_mean(tf.cast(hits, tf.float32), name="accuracy")
    step = tf.train.AdamOptimizer(2e-3).minimize(loss)

    score = 0.0
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        rng = np.random.default_rng(1)
        for epoch in range(1, epochs + 1):
            total = 0.0
            for rows in rng.permutation(train).reshape(-1, 64):
                value, _ = session.run([loss, step], {x: images[rows], y: labels[rows], keep: 0.9})
                total += value * len(rows)
            score = float(session.run(accuracy, {x: images[test], y: labels[test]}))
            print(f"epoch {epoch:2}  loss {total / len(train):.4f}  accuracy {score:.1%}")
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
