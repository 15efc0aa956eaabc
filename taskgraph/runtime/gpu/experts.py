"""How mixtures of experts run on a GPU: kernels for reference, without tensor cores."""

import math
from collections.abc import Sequence

import numpy as np

from taskgraph.graph.op import ITEMSIZE, Op
from taskgraph.runtime.gpu.kinds import (
    KERNELS,
    THREADS,
    Buffer,
    GpuSite,
    Launch,
    Launches,
    at_most,
    float_type,
    register,
)

_MAX_EXPERTS, _MAX_GROUPS, _COLUMNS, _BLOCK = 512, 64, 64, 256
"""The arrays in shared memory of `experts.cu`, the columns of a tile and the threads of its block."""


def route_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    logits, *rest = ins
    bias, slots = (sum(t.address for t in rest if (t.dtype == "i32") is whether) for whether in (False, True))
    tokens, count = logits.shape
    groups = op.integer("groups")
    at_most(op, "experts", count, _MAX_EXPERTS)
    at_most(op, "groups", groups, _MAX_GROUPS)
    chosen = (count, op.integer("top_k"), groups, op.integer("top_groups"), op.integer("first"), outs[0].shape[1])
    flags = (op.attr("scoring") == "sigmoid", bool(op.attr("normalize")))
    args = (
        logits.address,
        bias,
        slots,
        outs[0].address,
        *map(np.int32, (*chosen, *flags)),
        np.float32(op.number("scale")),
    )
    return [Launch(f"route_{float_type(op, logits)}", (tokens,), THREADS, args)]


def experts_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    """Lists of each expert's tokens, its two products on them, and the sum of every token's rows."""
    x, routing, gate_up, down, *residual = ins
    kind, (rows, hidden), (held, _, inner) = float_type(op, x, gate_up, down, outs[0], *residual), x.shape, down.shape
    room = rows * min(op.integer("top_k"), held)
    tokens, places, counts, offsets = (site.scratch(4 * n) for n in (held * rows, held * rows, held, held))
    active, made = site.scratch(room * inner * ITEMSIZE[kind]), site.scratch(4 * room * hidden)
    sizes = tuple(map(np.int32, (hidden, inner, room)))
    lists = (routing.address, tokens, places, counts, np.int32(rows), np.int32(held))
    up = (x.address, gate_up.address, tokens, counts, offsets, active, np.int32(rows), *sizes)
    summed = (routing.address, places, offsets, made, residual[0].address if residual else 0, outs[0].address)
    return [
        Launch("expert_lists", (held,), THREADS, lists),
        Launch("expert_offsets", (1,), 1, (counts, offsets, np.int32(held))),
        Launch(f"expert_up_{kind}", (-(-inner // _COLUMNS), held), _BLOCK, up),
        Launch(
            f"expert_down_{kind}", (-(-hidden // _COLUMNS), held), _BLOCK,
            (active, down.address, counts, offsets, made, *sizes),
        ),
        Launch(
            f"expert_sum_{kind}", (rows,), THREADS, (*summed, *map(np.int32, (held, hidden, room))),
        ),
    ]  # fmt: skip


def gated_add_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    x, gate, base = ins
    count = math.prod(x.shape)
    grid = (max(1, min(-(-count // 256), 8 * site.sm_count)),)
    args = (x.address, gate.address, base.address, outs[0].address, np.int64(count), np.int32(x.shape[1]))
    return [Launch(f"gated_add_{float_type(op, x, gate, base, outs[0])}", grid, 256, args)]


register("route", route_launches, KERNELS / "experts.cu")
register("experts", experts_launches, KERNELS / "experts.cu")
register("gated_add", gated_add_launches, KERNELS / "experts.cu")
