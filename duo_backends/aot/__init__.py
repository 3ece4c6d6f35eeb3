"""Ahead of time: programs as files and libraries that need no Python, no compiler and no framework (see `artefact.py`)."""
