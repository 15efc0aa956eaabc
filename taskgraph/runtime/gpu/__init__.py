"""The CUDA backend: lanes are streams in green contexts of SM partitions, a plan is one CUDA graph."""
