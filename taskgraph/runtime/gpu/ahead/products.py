"""How products run by Triton functions: persistent, with the SMs of the op as the grid; so they follow its partition.

Tiles are chosen by the rounds that they make on those SMs. What a tile shape reaches is assumed until it is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from taskgraph.graph.op import ITEMSIZE, Op
from taskgraph.runtime.gpu.ahead.cubins import architecture
from taskgraph.runtime.gpu.ahead.launching import Argument, launch, with_descriptors
from taskgraph.runtime.gpu.ahead.rows import dense
from taskgraph.runtime.gpu.kinds import Buffer, GpuSite, Launches, register_ahead

_JIT = "taskgraph.runtime.gpu.ahead.jit.products:"
GROUP = 8
"""Rows of tiles that share their columns of weights in L2 (Triton's tutorial on matrix multiplication)."""
_SHARED_KB: Final = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
_LEAST_SHARED_KB = 99
"""Shared memory of a block by compute capability, and in all others (CUDA Programming Guide, compute capabilities)."""
RESERVED_BYTES = 1536
"""Shared memory that a block has besides: 1 KiB of the driver's (CUDA Programming Guide), and barriers."""
_KINDS = {("f32",) * 3, ("bf16",) * 3, ("bf16", "bf16", "f32"), ("f32", "bf16", "f32")}


@dataclass(frozen=True, slots=True)
class Tiling:
    """A tile of the output (rows, columns), its step along k, warps, and the steps whose loads are under way at once.
    `share`: assumed part of the SM's peak that its multiply-adds reach. `blocks` of it an SM: one multiplies while the
    other writes."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    share: float
    blocks: int = 1

    def shared_bytes(self, extra: int, itemsize: int = 2) -> int:
        """Shared memory of its operands, and of the output's half and `extra` more of such."""
        halves = (1 + extra) * self.rows * self.columns // 2
        return RESERVED_BYTES + itemsize * (self.stages * self.depth * (self.rows + self.columns) + halves)

    def fits(self, extra: int, limit: int) -> bool:
        """Whether an SM with so much shared memory holds its blocks."""
        return self.blocks * self.shared_bytes(extra) <= limit

    def seconds(self, m: int, n: int, sms: int) -> float:
        """Relative time: rounds of tiles on `sms` SMs, each as long as its multiply-adds."""
        tiles = -(-m // self.rows) * -(-n // self.columns)
        rounds = -(-tiles // (sms * self.blocks)) * self.blocks
        return rounds * self.rows * self.columns / self.share


TILINGS: Final = (
    Tiling(128, 256, 64, 8, 4, 0.85), Tiling(128, 256, 64, 8, 3, 0.84), Tiling(128, 128, 64, 4, 4, 0.78),
    Tiling(128, 128, 64, 4, 3, 0.8, blocks=2), Tiling(64, 256, 64, 4, 4, 0.72), Tiling(128, 128, 32, 8, 4, 0.68),
    Tiling(64, 128, 64, 4, 5, 0.62), Tiling(64, 128, 64, 4, 3, 0.6), Tiling(64, 64, 128, 4, 4, 0.5),
    Tiling(64, 64, 64, 4, 4, 0.48), Tiling(32, 64, 128, 4, 5, 0.28), Tiling(32, 64, 64, 4, 4, 0.25),
    Tiling(16, 64, 128, 4, 5, 0.15), Tiling(16, 64, 64, 4, 5, 0.13), Tiling(16, 32, 256, 4, 5, 0.1),
)  # fmt: skip
"""What is tried, by what compiled code shows: no spills, at most 174 registers of a thread with a residual."""
_BY_LOADS = 64
"""Rows, columns and depth of a tile without bulk copies: the addresses of a larger one take more registers than there
are."""
_PLAIN = Tiling(64, 64, 32, 8, 3, 1.0)
"""Where an operand is f32, which has no tensor cores at its precision."""


def shared_bytes(arch: str) -> int:
    """Shared memory that a block may have."""
    return _SHARED_KB.get(architecture(arch), _LEAST_SHARED_KB) << 10


def tiling(m: int, n: int, sms: int, extra: int, limit: int, bulk: bool = True) -> Tiling:
    """The tiling of an (m, n) output in bf16 that takes the fewest and cheapest rounds on `sms` SMs; `extra`: how many
    operands more the size of the output there are; `limit`: shared memory of a block; `bulk`: whether there
    are bulk copies."""
    fits = [t for t in TILINGS if t.fits(extra, limit) and (bulk or max(t.rows, t.columns, t.depth) <= _BY_LOADS)]
    return min((t for t in fits if t.rows <= 16 or t.rows < 2 * m), key=lambda t: t.seconds(m, n, sms))


def by_descriptors(ins: Sequence[Buffer], out: Buffer) -> bool:
    """Whether bulk copies can move all operands: factors in bf16, and every row, so every address, a multiple of 16
    bytes."""
    aligned = all(b.address % 16 == 0 and b.shape[-1] * ITEMSIZE[b.dtype] % 16 == 0 for b in (*ins, out))
    return aligned and ins[0].dtype == ins[1].dtype == "bf16"


def gemm_launches(
    op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite, tile: Tiling | None = None
) -> Launches:
    """A persistent product, by the tiling that suits the SMs, or by `tile`."""
    x, w, *extra = ins
    (m, k), n = x.shape, outs[0].shape[1]
    bias = extra[0] if op.attr("bias") else None
    residual = extra[-1] if op.attr("residual") else None
    half, bulk = x.dtype == w.dtype == "bf16", by_descriptors(ins, outs[0])
    extra_tiles = (residual is not None) + ITEMSIZE[outs[0].dtype] // 2 - 1  # of two bytes an entry
    chosen = tiling(m, n, site.sm_count, extra_tiles, shared_bytes(site.arch), bulk) if half else _PLAIN
    tile = tile or chosen
    tiles = -(-m // tile.rows) * -(-n // tile.columns)
    grid = (max(1, min(tiles, site.sm_count * tile.blocks)),)
    given: dict[str, Argument] = {
        "x": x, "w": w, "bias": bias, "residual": residual, "out": outs[0], "m": np.int32(m), "N": n, "K": k,
        "TRANSPOSED": bool(op.attr("transpose_w")), "BM": tile.rows, "BN": tile.columns, "BK": tile.depth,
        "GROUP": GROUP,
    }  # fmt: skip
    if bulk:
        made = launch(_JIT + "product_by_tiles", grid, given, tile.warps, tile.stages)
        return [with_descriptors(made, 4 if residual else 3, site)]
    return [launch(_JIT + "product", grid, given, tile.warps, tile.stages)]


def gemm_taken(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    x, w, *extra = ins
    return dense(*ins, *outs) and (x.dtype, w.dtype, outs[0].dtype) in _KINDS and all(t.dtype == x.dtype for t in extra)


register_ahead("gemm", gemm_launches, gemm_taken)
