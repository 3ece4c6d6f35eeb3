"""GPU kernels: kernel IR to CUDA C (`emit.py` and what it imports; needs no GPU and no CUDA), and the runtime that compiles and runs it."""
