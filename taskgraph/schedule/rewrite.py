"""Rewrites: a new graph that computes the same, from a graph; the planner chooses among them."""

from taskgraph.schedule.nanobatch import Split, SplitInfo, apply, split_batch, splittable

__all__ = ["Split", "SplitInfo", "apply", "split_batch", "splittable"]
