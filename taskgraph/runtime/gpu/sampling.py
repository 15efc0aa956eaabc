"""How tokens are drawn, and fed to the next step, on a GPU."""

from collections.abc import Sequence

import numpy as np

from taskgraph.graph.op import Op
from taskgraph.runtime.gpu.kinds import KERNELS, Buffer, GpuSite, Launch, Launches, blocks, float_type, register, spread

_DRAWERS = 512
"""Threads of a block that draws; `sampling.cu` has the same number."""


def draw_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    logits, *each = ins
    rows, columns = logits.shape
    kept = each[5].address if len(each) > 5 else 0
    addresses = (logits.address, *(b.address for b in each[:5]), outs[0].address, kept)
    args = (*addresses, np.int32(columns), site.fault())
    return [blocks(f"draw_{float_type(op, logits)}", (rows,), _DRAWERS, args, site)]


def feed_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    tokens, _, kept = ins
    count = tokens.shape[0]
    sizes = (np.int32(count), np.int32(kept.shape[0]), np.int64(op.integer("vocabulary")))
    args = (*(b.address for b in ins), outs[0].address, *sizes, site.fault())
    return [Launch("feed", spread(count, site), 256, args)]


register("draw", draw_launches, KERNELS / "sampling.cu")
register("feed", feed_launches, KERNELS / "sampling.cu")
