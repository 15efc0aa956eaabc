"""How moves of rows and pages run by Triton functions, in units of 4 bytes or of one."""

from collections.abc import Sequence

import numpy as np

from taskgraph.graph.op import Op
from taskgraph.ops import COLLECTIVES
from taskgraph.runtime.gpu.ahead.launching import Argument, Pointer, launch
from taskgraph.runtime.gpu.ahead.rows import dense, programs, tile_of
from taskgraph.runtime.gpu.kinds import Buffer, GpuSite, Launch, Launches, register_ahead
from taskgraph.runtime.gpu.moves import COPY_SMS, RowMoves

_JIT = "taskgraph.runtime.gpu.ahead.jit.moves:"
_ALIGNED = 16


def _move_rows(source: Buffer, start: int, step: int, rows: int, target: int, site: GpuSite) -> Launch:
    """Rows start, start + step, ... of `source`, `rows` of them, one after another to `target`."""
    row = source.nbytes // source.shape[0]
    unit = 4 if row % 4 == 0 else 1
    columns, kind = row // unit, "i32" if unit == 4 else "i8"
    tile, warps = tile_of(columns), 4
    given: dict[str, Argument] = {
        "x": Pointer(source.address, kind, source.address % _ALIGNED == 0),
        "out": Pointer(target, kind, target % _ALIGNED == 0),
        "start": np.int64(start), "step": np.int64(step), "rows": np.int32(rows),
        "COLUMNS": columns, "ROWS": tile.rows, "N": tile.columns,
    }  # fmt: skip
    return launch(_JIT + "slice_rows", programs(tile.of(rows, columns), warps, site), given, warps, 1)


def rows_taken(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    return dense(*ins, *outs)


def _words(pages: Buffer) -> Pointer:
    return Pointer(pages.address, "i32", pages.address % _ALIGNED == 0)


def copy_pages_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    source, target, pairs = ins
    units = source.nbytes // source.shape[0] // 4
    wide = min(site.sm_count, op.demand.sm[1] if op.demand.sm else COPY_SMS)
    given: dict[str, Argument] = {
        "source": _words(source), "target": _words(target),
        "pairs": pairs, "done": outs[0], "count": np.int32(pairs.shape[0]), "source_pages": np.int32(source.shape[0]),
        "target_pages": np.int32(target.shape[0]), "fault": Pointer(site.fault(), "i64"), "UNITS": units, "N": 4096,
    }  # fmt: skip
    return [launch(_JIT + "copy_pages", (wide,), given, 8, 1)]


def copy_pages_taken(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    page = ins[0].nbytes // ins[0].shape[0]
    return dense(*ins, *outs) and page % 4 == 0 and ins[2].dtype == "i32"


_ROWS = RowMoves(_move_rows)
register_ahead("slice_rows", _ROWS.slice_rows, rows_taken)
register_ahead("concat_rows", _ROWS.concat_rows, rows_taken)
register_ahead("copy_pages", copy_pages_launches, copy_pages_taken)
for _kind in COLLECTIVES:
    register_ahead(_kind, _ROWS.collective, rows_taken)
