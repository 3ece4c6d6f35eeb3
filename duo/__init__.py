"""duo: a deep-learning framework with two frontends and one result."""
