"""Scalar recipes: the protocol they are written against, the math functions, and a NumPy evaluator."""
