"""What `duo demo` runs: one classifier trained in eager mode, in graph mode and as a compiled step, compared bit by bit."""
