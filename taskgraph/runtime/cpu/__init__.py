"""The CPU backend: lanes are threads pinned to cores."""
