"""How ops that work row by row run by Triton functions: bound by memory, so tiles and programs are chosen for loads of
16 bytes a thread and enough of them in flight."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from taskgraph.graph.op import Op
from taskgraph.runtime.gpu.ahead.launching import Argument, Pointer, launch
from taskgraph.runtime.gpu.kinds import Buffer, GpuSite, Launches, register_ahead

_JIT = "taskgraph.runtime.gpu.ahead.jit.rows:"
_SM_WARPS = 64
"""Resident warps of an SM (CUDA Programming Guide, compute capabilities 8.0, 9.0, 10.0)."""
_ENTRIES = 2048
"""Entries of a tile where rows are short: 16 bytes of bf16 for each of 128 threads, twice."""
_MOST_WASTE = 1.125
"""Columns in tiles over columns there are, beyond which tiles are narrower."""
_LONGEST = 8192
"""Entries of a row that its tile holds at once."""
_PARTS = 32
"""Most parts that a row is cut into."""


class Tile(NamedTuple):
    """Rows and columns of a tile, powers of two."""

    rows: int
    columns: int

    def of(self, rows: int, columns: int) -> int:
        """How many tiles a matrix is."""
        return -(-rows // self.rows) * -(-columns // self.columns)


def padded(count: int) -> int:
    """The least power of two from `count` on."""
    return 1 << max(count - 1, 0).bit_length()


def tile_of(columns: int) -> Tile:
    """A tile of rows of `columns` entries."""
    wide = min(padded(columns), _ENTRIES)
    while wide > 256 and -(-columns // wide) * wide > _MOST_WASTE * columns:
        wide //= 2
    return Tile(max(1, _ENTRIES // wide) if wide >= columns else 1, wide)


def programs(tiles: int, warps: int, site: GpuSite) -> tuple[int]:
    """A grid for kernels that loop over tiles: no more programs than the SMs of the op hold at a time."""
    return (max(1, min(tiles, site.sm_count * (_SM_WARPS // warps))),)


def dense(*buffers: Buffer) -> bool:
    """Whether the rows of all lie one after another."""
    return all(b.strides is None for b in buffers)


def floats(*buffers: Buffer) -> bool:
    """Whether all are dense and of one float type that the kernels know."""
    return dense(*buffers) and {b.dtype for b in buffers} in ({"f32"}, {"bf16"})


def same_floats(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    """Whether all operands are `floats`."""
    return floats(*ins, *outs)


def _by_tiles(name: str, shape: tuple[int, ...], arguments: dict[str, Buffer], site: GpuSite) -> Launches:
    """A launch of a function of its buffers, rows and tiles; `shape` is (rows, columns)."""
    rows, columns = shape
    tile, warps = tile_of(columns), 4
    given: dict[str, Argument] = {
        **arguments,
        "rows": np.int32(rows),
        "COLUMNS": columns,
        "ROWS": tile.rows,
        "N": tile.columns,
    }
    return [launch(_JIT + name, programs(tile.of(rows, columns), warps, site), given, warps, 1)]


def _columns_of(count: int) -> int:
    """Columns by which `count` entries in a row are a matrix, so that tiles know how they divide."""
    return next((wide for wide in (_ENTRIES, 1024, 512, 256, 128, 64, 32, 16, 8) if count % wide == 0), 1)


def add_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    count = math.prod(ins[0].shape)
    columns = _columns_of(count)
    return _by_tiles("add", (count // columns, columns), {"a": ins[0], "b": ins[1], "out": outs[0]}, site)


def swiglu_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    return _by_tiles("swiglu", outs[0].shape, {"x": ins[0], "out": outs[0]}, site)


def gated_add_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    x, gate, base = ins
    return _by_tiles("gated_add", x.shape, {"x": x, "gate": gate, "base": base, "out": outs[0]}, site)


def rmsnorm_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    x, weight = ins
    columns = x.shape[-1]
    rows, wide = math.prod(x.shape[:-1]), min(padded(columns), _LONGEST)
    at_once = max(1, _ENTRIES // wide) if wide >= columns else 1
    warps = 4 if wide < 4096 else 8
    given: dict[str, Argument] = {
        "x": x, "weight": weight, "out": outs[0], "rows": np.int32(rows), "eps": np.float32(op.number("eps")),
        "COLUMNS": columns, "ROWS": at_once, "N": wide,
    }  # fmt: skip
    return [launch(_JIT + "rmsnorm", programs(-(-rows // at_once), warps, site), given, warps, 1)]


def embedding_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    tokens, table = ins
    rows, columns = outs[0].shape
    tile, warps = tile_of(columns), 4
    given: dict[str, Argument] = {
        "tokens": tokens, "table": table, "out": outs[0], "rows": np.int32(rows),
        "vocabulary": np.int64(table.shape[0]), "fault": Pointer(site.fault(), "i64"),
        "COLUMNS": columns, "ROWS": tile.rows, "N": tile.columns,
    }  # fmt: skip
    return [launch(_JIT + "embedding", programs(tile.of(rows, columns), warps, site), given, warps, 1)]


def embedding_takes(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    tokens, table = ins
    kinds = (table.dtype, outs[0].dtype)
    return dense(*ins, *outs) and tokens.dtype in ("i32", "i64") and kinds in (
        ("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32"),
    )  # fmt: skip


def argmax_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    """Rows that are fewer than the SMs are cut into parts, whose winners a second launch compares."""
    rows, columns = ins[0].shape
    wide, warps = max(32, min(padded(columns), 4096)), 8
    parts = max(1, min(_PARTS, 4 * site.sm_count // rows, -(-columns // wide)))
    values, places = (site.scratch(4 * rows * parts) for _ in range(2))
    kept: dict[str, Argument] = {"values": Pointer(values, "f32"), "places": Pointer(places, "i32")}
    given: dict[str, Argument] = {
        "x": ins[0], "out": outs[0], **kept, "rows": np.int32(rows), "parts": np.int32(parts), "COLUMNS": columns,
        "N": wide,
    }  # fmt: skip
    first = launch(_JIT + "argmax", programs(rows * parts, warps, site), given, warps, 1)
    if parts == 1:
        return [first]
    joined: dict[str, Argument] = {
        **kept,
        "out": outs[0],
        "parts": np.int32(parts),
        "COLUMNS": columns,
        "PADDED": _PARTS,
    }
    return [first, launch(_JIT + "argmax_join", (rows,), joined, 1, 1)]


def argmax_takes(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    return floats(ins[0]) and dense(outs[0])


register_ahead("add", add_launches, same_floats)
register_ahead("swiglu", swiglu_launches, same_floats)
register_ahead("gated_add", gated_add_launches, same_floats)
register_ahead("rmsnorm", rmsnorm_launches, same_floats)
register_ahead("embedding", embedding_launches, embedding_takes)
register_ahead("argmax", argmax_launches, argmax_takes)
