"""Rewrites: from a graph a new graph that computes the same. The planner chooses among them.

Nano-batches (`split_batch`), the collectives of a tensor-parallel layer (`with_collectives`), tensors that live on the
host (`offload`, `save_to_host`), and chains of pointwise ops as one (`fuse_pointwise`).
"""

from taskgraph.graph.split import UNSPLIT, Split
from taskgraph.rewrite.collectives import collective_choices, collective_variants, with_collectives
from taskgraph.rewrite.nanobatch import SplitInfo, apply, split_batch, splittable
from taskgraph.rewrite.offload import offload, save_to_host
from taskgraph.rewrite.pointwise import fuse_pointwise
