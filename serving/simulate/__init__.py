"""Serving without a machine: traces, and engines whose batches take the time that plans predict."""
