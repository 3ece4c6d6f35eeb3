"""Kernels: what a backend is given after fusion, and the passes that make and plan them."""
