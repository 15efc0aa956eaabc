"""What runs the engine's batches: planned graphs on a CPU, a GPU, or several ranks."""
