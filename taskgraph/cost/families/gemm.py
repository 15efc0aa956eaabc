"""Dense products."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from taskgraph.cost.family import (
    BF16_BYTES,
    Coefficients,
    Column,
    Family,
    Features,
    Kernel,
    Spec,
    Tensors,
    coefficient,
)
from taskgraph.cost.formulas import Numbers, both, heat_seconds, log2, power, waves
from taskgraph.cost.surface import Axis, Term
from taskgraph.graph.op import ITEMSIZE, Op

TILES = (
    (256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64),
    (64, 128), (64, 64), (128, 32), (32, 128), (64, 32), (32, 64),
)  # fmt: skip
"""Output tiles of the GEMM kernels that are tried: those of CUTLASS's profiled configurations for sm_80 and sm_90."""
_OWN = tuple(TILES.index(tile) for tile in ((128, 256), (128, 128), (64, 256), (64, 128), (64, 64)))
"""Places in TILES of the tiles of our own persistent product (taskgraph/runtime/gpu/ahead/products.py)."""
_NO_OWN = 0.01
"""An `own_share` up to which there is no such product."""
_TAILS = TILES[:6]
"""The tile shapes that get a table of their waves each in the correction."""
_HEIGHT, _WIDTH = np.array(TILES, np.float64).T
_LEAST_TILE = 64.0
_SPLITS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32], np.float64)
"""Parts that k is cut into."""
_LEAST_DEPTH = 192.0
"""No part of k is shallower."""
_MOST_WAVES = 1.5
"""k is not cut where the parts would be more thread blocks than this many times the SMs."""


class GemmShape(NamedTuple):
    """(m, k) times (k, n)."""

    m: Numbers
    n: Numbers
    k: Numbers
    itemsize: Numbers
    """Bytes an element."""


@dataclass(frozen=True, slots=True)
class GemmCoefficients(Coefficients):
    """All start at the order of magnitude of an A100's and are fitted to each device's table."""

    fixed_s: float = coefficient(2.6e-6)
    """Seconds of an empty kernel: launch, first loads, last stores."""
    sm_load_bytes_per_s: float = coefficient(140e9)
    """Bytes/s of operands that an SM loads from L2."""
    k_step_s: float = coefficient(2e-10)
    """Least seconds of a tile for each element of k: the latency of its pipeline."""
    epilogue_s: float = coefficient(0.9e-6)
    """Seconds to write out a tile of 128 x 128, in proportion for others."""
    fill_s: float = coefficient(0.2e-6)
    """Seconds to fill the pipeline, once a kernel."""
    split_s: float = coefficient(2.5e-6)
    """Seconds that a split of k adds whatever its size."""
    reduce_bytes_per_s: float = coefficient(2e12)
    """Bytes/s at which the parts of a split are added up, in f32."""
    hbm_efficiency: float = coefficient(0.85, 0.3, 1.0)
    """Share of the published memory bandwidth that is reached."""
    overlap: float = coefficient(3.0, 1.0, 8.0)
    """How well arithmetic and memory overlap: `sharp` of `both`."""
    wave: float = coefficient(0.5, 0.01, 1.0)
    """How hard the rounds of thread blocks are: see `waves`."""
    kept_grid: float = coefficient(0.01, 1e-3, 10.0)
    """How much products keep the grid that their library chose for the whole device: see `_rounds`. What whole-device
    tables do not tell: fitted to products in partitions where there are some, else as good as 0."""
    own_share: float = coefficient(1e-3, 1e-3, 1.0)
    """Speed of our own persistent product, which takes the SMs of its partition as its grid, over the library's tile by
    tile. As good as 0 until it was measured on a device: then products in partitions run by what is faster."""
    heat: float = coefficient(0.03)
    """Share of the arithmetic that long kernels take longer: see `heat_seconds`."""
    tile_256x128: float = coefficient(0.85)
    """From here on: share of an SM's peak that the multiply-adds of a tile shape (m x n) reach."""
    tile_128x256: float = coefficient(0.85)
    tile_128x128: float = coefficient(0.85)
    tile_256x64: float = coefficient(0.8)
    tile_64x256: float = coefficient(0.8)
    tile_128x64: float = coefficient(0.75)
    tile_64x128: float = coefficient(0.75)
    tile_64x64: float = coefficient(0.65)
    tile_128x32: float = coefficient(0.6)
    tile_32x128: float = coefficient(0.5)
    tile_64x32: float = coefficient(0.5)
    tile_32x64: float = coefficient(0.5)

    @property
    def tile_efficiencies(self) -> np.ndarray:
        """Those of TILES, in their order."""
        return np.array([getattr(self, f"tile_{m}x{n}") for m, n in TILES])


def gemm_seconds(shape: GemmShape, spec: Spec, c: GemmCoefficients, sms: np.ndarray) -> np.ndarray:
    """Tiles of the output in waves over the SMs, the best of a few tile shapes and splits of k (Osama et al. 2023,
    "Stream-K"; CUTLASS's efficient-GEMM notes), against one pass over memory."""
    library = library_seconds(shape, spec, c, sms)
    if c.own_share <= _NO_OWN:
        return library
    made: np.ndarray = np.where(sms < spec.sms, np.minimum(library, own_seconds(shape, spec, c, sms)), library)
    return made


def library_seconds(shape: GemmShape, spec: Spec, c: GemmCoefficients, sms: np.ndarray) -> np.ndarray:
    """Those of the library's product."""
    return _with_memory(_best_tiling(shape, spec, c, sms), shape, spec, c, sms)


def own_seconds(shape: GemmShape, spec: Spec, c: GemmCoefficients, sms: np.ndarray) -> np.ndarray:
    """Those of our own: the best tile shape for these very SMs, each of which takes every so-many-th tile."""
    m, n, k, _ = map(np.asarray, shape)
    tiles = np.ceil(m / _HEIGHT) * np.ceil(n / _WIDTH)
    step, epilogue = _steps(shape, spec, c)
    tile_s = (np.ceil(k / 32.0) * 32.0 * step + epilogue) / c.own_share
    rounds = np.ceil(tiles[:, _OWN, None] / sms)
    best = (rounds * tile_s[:, _OWN, None]).min(axis=1) + c.fill_s
    return _with_memory(best, shape, spec, c, sms)


def _with_memory(tiles_s: np.ndarray, shape: GemmShape, spec: Spec, c: GemmCoefficients, sms: np.ndarray) -> np.ndarray:
    """The whole kernel, of which the tiles take `tiles_s`."""
    m, n, k, itemsize = shape
    heated = tiles_s + heat_seconds(2.0 * m * n * k, spec.flops_per_s, c.heat)
    drawn = spec.hbm_bytes_per_s * c.hbm_efficiency * spec.hbm_share(sms)
    return c.fixed_s + both(heated, itemsize * (m * k + k * n + m * n) / drawn, c.overlap)


def _steps(shape: GemmShape, spec: Spec, c: GemmCoefficients) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a tile of each shape for an element of k (n, tiles), and of its epilogue (tiles,)."""
    multiply = 2.0 * _HEIGHT * _WIDTH / (spec.sm_flops_per_s * c.tile_efficiencies)
    load = (_HEIGHT + _WIDTH) * np.asarray(shape.itemsize) / c.sm_load_bytes_per_s
    slow, fast = np.maximum(multiply, load), np.minimum(multiply, load)
    square = (fast / slow) * (fast / slow)
    step = np.maximum(slow * power(1.0 + square * square, 0.25), c.k_step_s)
    return step, c.epilogue_s * _HEIGHT * _WIDTH / 16384.0


def _best_tiling(shape: GemmShape, spec: Spec, c: GemmCoefficients, sms: np.ndarray) -> np.ndarray:
    """Seconds (n, m) of the tile shape and split of k that is best on the whole device, which is what libraries choose
    whatever SMs a product gets.

    A tile costs its multiply-adds at the tile's share of the SM's peak, or the loading of its operands from L2, or the
    latency of its steps along k, whichever is longest, and an epilogue. A split of k adds a reduction.
    """
    m, n, k, _ = map(np.asarray, shape)  # (n, 1); times _HEIGHT, _WIDTH and _SPLITS a table of tiles or splits
    tiles = np.ceil(m / _HEIGHT) * np.ceil(n / _WIDTH)
    step, epilogue = _steps(shape, spec, c)
    depth = np.ceil(k / _SPLITS / 32.0) * 32.0
    reduce_s = np.where(_SPLITS > 1.0, c.split_s + m * n * 4.0 * (_SPLITS + 1.0) / c.reduce_bytes_per_s, 0.0)
    deep, few = k >= _LEAST_DEPTH * _SPLITS, tiles[:, :, None] * _SPLITS <= _MOST_WAVES * spec.sms
    row, tile, split = np.nonzero((_SPLITS == 1.0) | (deep[:, None, :] & few))
    count = tiles[row, tile] * _SPLITS[split]
    tile_s = depth[row, split] * step[row, tile] + epilogue[tile]
    whole_s = waves(count, spec.sms, c.wave) * tile_s + c.fill_s + reduce_s[row, split]
    order = np.lexsort((whole_s, row))
    best = order[np.searchsorted(row[order], np.arange(len(m)))]
    rounds = _rounds(count[best][:, None], sms, spec.sms, c)
    made: np.ndarray = rounds * tile_s[best][:, None] + c.fill_s + reduce_s[row[best], split[best]][:, None]
    return made


def _rounds(tiles: np.ndarray, sms: np.ndarray, device_sms: float, c: GemmCoefficients) -> np.ndarray:
    """Rounds (n, m) of `tiles` (n, 1) on `sms` (m,) SMs.

    Thread blocks that take the next tile as they end need `waves`. Those of a grid that was made for the whole device,
    each with its own part of the tiles, need as many times the device's rounds as the grid fills the SMs: twice on 72
    to 131 of 132. A share kept_grid / rounds of a product behaves like the latter, by cuBLAS's products on H200 and
    H100: nearly all of one that has two rounds, little of one that has fourteen.
    """
    whole = waves(tiles, device_sms, c.wave)
    grid = np.ceil(tiles / np.ceil(tiles / device_sms))  # as even as it can be
    kept = whole * np.ceil(grid / sms)
    share = np.minimum(c.kept_grid / whole, 1.0)
    made: np.ndarray = (1.0 - share) * waves(tiles, sms, c.wave) + share * kept
    return made


def gemm_blocks(shape: GemmShape) -> np.ndarray:
    """Tiles of the least square tile that libraries use: a product with few of them leaves SMs free."""
    made: np.ndarray = np.ceil(np.asarray(shape.m) / _LEAST_TILE) * np.ceil(np.asarray(shape.n) / _LEAST_TILE)
    return made


def gemm_kernel(op: Op, ins: Tensors, outs: Tensors) -> Kernel:
    """The product of an activation and a weight."""
    x, weight = ins[:2]
    m, k = x.shape
    return Kernel("gemm", weight.dtype, GemmShape(m, outs[0].shape[1], k, ITEMSIZE[weight.dtype]))


def gemm_features(shape: GemmShape, spec: Spec) -> Features:
    """The logs of the shape; of the tile shapes with a table the log of their waves on all SMs, and of how much of the
    last wave is idle."""
    m, n, k = (np.asarray(x) for x in shape[:3])
    found = {"m": log2(m), "n": log2(n), "k": log2(k)}
    for height, width in _TAILS:
        rounds = np.ceil(m / height) * np.ceil(n / width) / spec.sms
        found[f"waves_{height}x{width}"] = log2(rounds)
        found[f"idle_{height}x{width}"] = log2(np.ceil(rounds) / rounds)
    return found


def _tail(height: int, width: int) -> Term:
    tile = f"{height}x{width}"
    return Axis(f"waves_{tile}", -3, 1, 8), Axis(f"idle_{tile}", 0, 1 / 3, 4), Axis("k", 8, 2.5, 4)


def gemm_read(columns: Mapping[str, np.ndarray]) -> GemmShape:
    """The shapes of a table."""
    return GemmShape(columns["m"], columns["n"], columns["k"], BF16_BYTES)


GEMM = Family(
    "gemm",
    GemmShape,
    GemmCoefficients,
    gemm_seconds,
    kinds={"gemm": gemm_kernel},
    columns=(Column("m"), Column("n"), Column("k")),
    read=gemm_read,
    features=gemm_features,
    choices=len(TILES),
    thread_blocks=gemm_blocks,
    terms=((Axis("m", 0, 2, 9), Axis("n", 5, 2, 7), Axis("k", 5, 2, 7)), *(_tail(*tile) for tile in _TAILS)),
)
