"""`@duo.compile` and `duo.lower`: recording a Python function as one program, and replaying it while that is proven safe."""
