"""`python -m tests.device_check`: everything that needs a real GPU, in one command."""
