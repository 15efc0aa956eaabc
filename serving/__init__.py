"""Serving: engine, scheduler and cache, what runs their batches, the HTTP front, and simulation."""
