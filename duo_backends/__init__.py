"""Backends: kernel IR to machine code, memory and threads. Imports duo_ir, never duo."""
