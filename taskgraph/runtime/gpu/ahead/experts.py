"""How the grouped products of routed experts run by Triton functions: sizes stay on the device, and programs go over
the tiles of all experts.

torch's grouped product is not used: it takes its pointer tables and workspace from an allocator in every call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from taskgraph.graph.op import ITEMSIZE, Op
from taskgraph.runtime.gpu.ahead.launching import Argument, Pointer, launch, with_descriptors
from taskgraph.runtime.gpu.ahead.products import RESERVED_BYTES, by_descriptors, shared_bytes
from taskgraph.runtime.gpu.ahead.rows import floats, padded, programs
from taskgraph.runtime.gpu.kinds import Buffer, GpuSite, Launches, register_ahead

_JIT = "taskgraph.runtime.gpu.ahead.jit.experts:"
_MOST = 512
"""Experts whose numbers of rows a program holds."""


class _Tile(NamedTuple):
    """A tile of an expert's output (rows, columns), its step along k, warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the first product's operands, whose weights are two."""
        return 2 * self.stages * self.depth * (self.rows + 2 * self.columns) + RESERVED_BYTES


_TILES = (
    _Tile(16, 64, 128, 4, 4),
    _Tile(16, 64, 64, 4, 4),
    _Tile(32, 64, 64, 4, 4),
    _Tile(64, 64, 64, 4, 4),
    _Tile(128, 64, 64, 8, 4),
)
"""By what compiled code shows: no spills, and 110 KB of shared memory at most."""
_PLAIN = _Tile(16, 32, 32, 4, 2)
"""In f32, which has no tensor cores at its precision."""


def _tile(kind: str, each: float, arch: str) -> _Tile:
    """The tile for experts of `each` rows on average: the least that holds them, or the largest."""
    if kind == "f32":
        return _PLAIN
    fits = [t for t in _TILES if t.shared_bytes <= shared_bytes(arch)]
    return next((t for t in fits if each <= t.rows), fits[-1])


def experts_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    """Lists of each expert's tokens, its two products on them, and the sum of every token's rows."""
    x, routing, gate_up, down, *residual = ins
    kind, (rows, hidden), (held, _, inner) = x.dtype, x.shape, down.shape
    top = min(op.integer("top_k"), held)
    room = rows * top
    tokens, places, counts = (
        Pointer(site.scratch(4 * n), "i32", aligned=True) for n in (held * rows, held * rows, held)
    )
    active = Pointer(site.scratch(room * inner * ITEMSIZE[kind]), kind, aligned=True)
    made = Pointer(site.scratch(4 * room * hidden), "f32", aligned=True)
    tile = _tile(kind, room / held, site.arch)
    experts: dict[str, Argument] = {"HELD": held, "HELD_PADDED": padded(held), "HIDDEN": hidden, "INNER": inner}
    bulk = by_descriptors((gate_up, down), down)
    blocks: dict[str, Argument] = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "BULK": bulk}
    most, room_given = room // tile.rows + held, np.int32(room)
    up_grid, down_grid = (programs(most * -(-n // tile.columns), 16, site) for n in (inner, hidden))
    wide = min(padded(hidden), 1024)
    lists: dict[str, Argument] = {
        "routing": routing, "tokens": tokens, "places": places, "counts": counts, "rows": np.int32(rows), "HELD": held,
        "N": 1024,
    }  # fmt: skip
    up: dict[str, Argument] = {
        "x": x, "gate_up": gate_up, "tokens": tokens, "counts": counts, "active": active, "rows": np.int32(rows),
        "room": room_given, **experts, **blocks,
    }  # fmt: skip
    down_given: dict[str, Argument] = {
        "active": active,
        "down": down,
        "counts": counts,
        "made": made,
        "room": room_given,
        **experts,
        **blocks,
    }
    summed: dict[str, Argument] = {
        "routing": routing, "places": places, "counts": counts, "made": made,
        "residual": residual[0] if residual else None, "out": outs[0], "rows": np.int32(rows), "room": room_given,
        "HELD": held, "HELD_PADDED": padded(held), "HIDDEN": hidden, "N": wide,
    }  # fmt: skip
    products = (
        launch(_JIT + "expert_up", up_grid, up, tile.warps, tile.stages),
        launch(_JIT + "expert_down", down_grid, down_given, tile.warps, tile.stages),
    )
    return [
        launch(_JIT + "expert_lists", (held,), lists, 4, 1),
        *(with_descriptors(one, 1, site) if bulk else one for one in products),
        launch(_JIT + "expert_sum", programs(rows * -(-hidden // wide), 4, site), summed, 4, 1),
    ]


def experts_taken(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    x, routing, gate_up, down, *residual = ins
    return floats(x, gate_up, down, *residual, *outs) and routing.strides is None and down.shape[0] <= _MOST


register_ahead("experts", experts_launches, experts_taken)
