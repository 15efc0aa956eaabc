"""How copies and moves of rows and pages run on a GPU, and collectives of one rank."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.ops import COLLECTIVES
from taskgraph.runtime.gpu.kinds import KERNELS, Buffer, CopyLaunch, GpuSite, Launch, Launches, register, spread


def _move_rows(source: Buffer, start: int, step: int, rows: int, target: int, site: GpuSite) -> Launch:
    """Rows start, start + step, ... of `source`, `rows` of them, one after another to `target`."""
    row = source.nbytes // source.shape[0]
    unit = 4 if row % 4 == 0 else 1
    places = (start, step, row // unit, rows)
    args = (source.address, target, *map(np.int64, places))
    return Launch(f"slice_rows_b{unit}", spread(rows * row // unit, site), 256, args)


class RowMoves:
    """Launch rules of the kinds that are moves of whole rows, by what makes the launch of one."""

    def __init__(self, move: Callable[[Buffer, int, int, int, int, GpuSite], Launch]) -> None:
        self.move = move

    def slice_rows(self, op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
        rows = outs[0].shape[0]
        return [self.move(ins[0], op.integer("start"), op.integer("step"), rows, outs[0].address, site)]

    def concat_rows(self, op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
        """A launch a part: they follow each other on the lane."""
        targets = accumulate((b.nbytes for b in ins[:-1]), initial=outs[0].address)
        return [self.move(b, 0, 1, b.shape[0], target, site) for b, target in zip(ins, targets, strict=True)]

    def collective(self, op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
        """A collective of one rank is a copy; more ranks go through NCCL (collectives.py)."""
        return [self.move(ins[0], 0, 1, ins[0].shape[0], outs[0].address, site)]


def copy_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    """A copy engine's work, or a kernel on at most the SMs that the demand pins."""
    source, target, nbytes = ins[0].address, outs[0].address, ins[0].nbytes
    if op.demand.sm is None:
        return [CopyLaunch(target, source, nbytes)]
    wide = (nbytes | source | target) % 16 == 0
    grid = (min(op.demand.sm[1], site.sm_count),)
    name = "copy_on_sms" if wide else "copy_bytes_on_sms"
    return [Launch(name, grid, 1024, (source, target, np.int64(nbytes // 16 if wide else nbytes)))]


COPY_SMS = 8
"""Blocks that move pages unless the demand says more: enough for the copy path, and most SMs stay free."""


def copy_pages_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    source, target, pairs = ins
    page = source.nbytes // source.shape[0]
    if page % 4:
        raise BackendUnavailable(f"op {op.name!r}: pages of {page} bytes; the kernel moves multiples of 4.")
    wide = min(site.sm_count, op.demand.sm[1] if op.demand.sm else COPY_SMS)
    numbers = (np.int32(pairs.shape[0]), np.int64(page // 4))
    ends = (np.int32(source.shape[0]), np.int32(target.shape[0]), site.fault())
    args = (source.address, target.address, pairs.address, outs[0].address, *numbers, *ends)
    return [Launch("copy_pages", (wide,), 1024, args)]


_ROWS = RowMoves(_move_rows)
register("slice_rows", _ROWS.slice_rows, KERNELS / "elementwise.cu")
register("concat_rows", _ROWS.concat_rows, KERNELS / "elementwise.cu")
register("copy", copy_launches, KERNELS / "pages.cu")
register("copy_pages", copy_pages_launches, KERNELS / "pages.cu")
for _kind in COLLECTIVES:
    register(_kind, _ROWS.collective, KERNELS / "elementwise.cu")
