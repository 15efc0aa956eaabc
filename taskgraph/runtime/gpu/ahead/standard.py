"""Importing this registers the Triton functions of every kind of `taskgraph.ops` that has some."""

from taskgraph.runtime.gpu.ahead import attention, experts, moves, products, rotary, rows

__all__ = ["attention", "experts", "moves", "products", "rotary", "rows"]
