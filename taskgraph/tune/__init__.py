"""Tune: measure plans and ops on a backend, choose by what was measured, and check a GPU."""
