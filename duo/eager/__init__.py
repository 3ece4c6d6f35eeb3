"""Eager mode: tensors that look immediate and are lazy underneath."""
