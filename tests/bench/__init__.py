"""Benchmarks: `python -m tests.bench`. Figures and ratios, no assertions."""
