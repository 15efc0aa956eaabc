"""gpu-check: one run that says what a GPU can do, whether the cuda backend is right on it, and how fast things are."""
