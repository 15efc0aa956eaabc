"""How attention over keys and values in pages, or in a cache of its own, runs by Triton functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from taskgraph.graph.op import ITEMSIZE, Op
from taskgraph.runtime.gpu.ahead.cubins import architecture
from taskgraph.runtime.gpu.ahead.launching import ALIGNMENT, Argument, Pointer, launch, with_descriptors
from taskgraph.runtime.gpu.kinds import Buffer, GpuSite, Launches, register_ahead

_JIT = "taskgraph.runtime.gpu.ahead.jit"
_LOG2_E: Final = math.log2(math.e)
_SHARED_KB: Final = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100, 121: 100}
"""Shared memory of an SM (CUDA Programming Guide, compute capabilities); others are taken to have the least."""
_HOPPER = 90
_MAX_DIM, _MAX_GROUP, _LEAST_TILES, _SCAN = 256, 16, 4, 256
_WARPS_OF_REGISTERS = 8
"""Warps of an SM that find registers where each thread has 255 (65,536 of an SM)."""


def padded(count: int, least: int) -> int:
    """The power of two that holds `count`, `least` or more."""
    return max(least, 1 << (count - 1).bit_length())


@dataclass(frozen=True, slots=True)
class _Cache:
    """Keys and values in pages (count, kv heads, rows, wide), or (count, rows, kv heads, dim) where heads lie `beside`
    each other. `lengths` of sequences in i32, or positions in i64, or None: all have `limit` keys. Without `tables`
    page i is sequence i's."""

    keys: Buffer
    values: Buffer
    lengths: Buffer | None
    tables: Buffer | None
    limit: int
    beside: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Pages, kv heads, rows, elements from row to row."""
        pages, a, b, wide = self.keys.shape
        return (pages, b, a, b * wide) if self.beside else (pages, a, b, wide)


@dataclass(frozen=True, slots=True)
class _Tile:
    """How `decode` is compiled: keys of a tile, warps of a block, stages, whether a head's last tile has code of its
    own, and how many blocks an SM holds at a time."""

    keys: int
    warps: int
    stages: int
    apart: bool
    held: int


def _tile(dtype: str, channels: int, heads: int, rows: int, arch: int) -> _Tile:
    """*Assumed*, without a GPU, from what compiled code shows: no spills, as few instructions a byte as may be, and
    the more bytes on their way. In bf16 on an sm_90, heads of 128: 264 instructions a warp for 16 KB, 6 blocks an SM
    with 16 to 32 KB each on their way (96 to 192 KB; 110 GB/s an SM over 0.7 us need 77)."""
    row = channels * ITEMSIZE[dtype]
    fast = dtype == "bf16" and channels <= 128 and arch >= _HOPPER
    keys = 32 if fast and rows % 32 == 0 else 16
    warps = 4 if dtype == "f32" else max(1, channels // 128) * (1 if heads <= 8 else 2)
    stages = 4 if keys == 16 and row <= 256 else 3
    shared = (stages - 1 + (not fast)) * 2 * keys * row + 4096
    held = min(_WARPS_OF_REGISTERS // warps, _SHARED_KB.get(arch, 100) * 1024 // shared)
    return _Tile(keys, warps, stages, fast, max(1, held))


def _decode(op: Op, q: Buffer, cache: _Cache, out: Buffer, site: GpuSite) -> Launches:
    """As many blocks as its SMs hold at a time, each with an equal part of the keys, and a step that joins what was
    cut between two of them."""
    (batch, heads, dim), (count, kv, rows, wide) = q.shape, cache.sizes
    group, channels = heads // kv, padded(dim, 32)
    tile = _tile(q.dtype, channels, padded(group, 8), rows if cache.tables else 32, architecture(site.arch))
    sms = min(site.sm_count, op.demand.sm[1]) if op.demand.sm else site.sm_count
    most = -(-batch * kv * -(-cache.limit // tile.keys) // _LEAST_TILES)
    blocks = max(1, min(sms * tile.held, most))
    parts = Pointer(site.scratch(4 * blocks * 2 * group * (channels + 2)), "f32", aligned=True)
    cut = Pointer(site.scratch(8 * blocks), "i32", aligned=True)
    of_group = {"GROUP": group, "PADDED": padded(group, 8), "DIM": dim, "CHANNELS": channels}
    pages_each = 0 if cache.tables is None else cache.tables.shape[1]
    arguments: dict[str, Argument] = {
        "q": q, "lengths": cache.lengths, "tables": cache.tables, "keys": cache.keys, "values": cache.values,
        "out": out, "parts": parts, "cut": cut, "fault": Pointer(site.fault(), "i64"), "batch": np.int32(batch),
        "limit": np.int32(cache.limit), "each": np.int32(pages_each), "count": np.int32(count),
        "scale": np.float32(_LOG2_E / math.sqrt(dim)), "KV": kv, **of_group, "ROWS": rows, "WIDE": wide,
        "POSITIONS": cache.lengths is not None and cache.lengths.dtype == "i64", "N": tile.keys, "SCAN": _SCAN,
        "APART": tile.apart, "BESIDE": cache.beside,
    }  # fmt: skip
    made = launch(f"{_JIT}.decode:decode", (blocks,), arguments, warps=tile.warps, stages=tile.stages)
    joined: dict[str, Argument] = {"parts": parts, "cut": cut, "out": out, **of_group}
    return [
        with_descriptors(made, 2, site),
        launch(f"{_JIT}.decode:join", (blocks,), joined, warps=4, stages=1),
    ]


def _attends(q: Buffer, keys: Buffer, values: Buffer, out: Buffer) -> bool:
    """Whether the kernels take these: one type, rows that bulk copies can take, dims that fit."""
    given, dim, wide = (q, keys, values, out), q.shape[-1], keys.shape[-1]
    return (
        len({b.dtype for b in given}) == 1
        and q.dtype in ("f32", "bf16")
        and all(b.strides is None and b.address % ALIGNMENT == 0 for b in given)
        and dim <= min(_MAX_DIM if q.dtype == "bf16" else _MAX_DIM // 2, wide)
        and wide * ITEMSIZE[q.dtype] % ALIGNMENT == 0
        and q.shape[1] // keys.shape[1] <= _MAX_GROUP
        and math.prod(keys.shape[:3]) < 1 << 31
    )


def paged_decode_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    q, lengths, tables, keys, values = ins
    cache = _Cache(keys, values, lengths, tables, tables.shape[1] * keys.shape[2])
    return _decode(op, q, cache, outs[0], site)


@dataclass(frozen=True, slots=True)
class _Rows:
    """How `prefill` is compiled: rows and keys of a tile, warps of a block, stages. An SM holds one block."""

    rows: int
    keys: int
    warps: int
    stages: int


def _rows(dtype: str, channels: int, arch: int) -> _Rows:
    """*Assumed*, without a GPU, from what compiled code shows. In bf16 on an sm_90, heads of 128: wgmma by two groups
    of four warps, that of the values still under way when the next keys come; 455 instructions a warp for 64 keys
    take 910 cycles of an SM's schedulers where the products take 1,024 of its tensor cores; 131 KB on their way or in
    use; no spills."""
    if dtype == "f32":
        return _Rows(32, 16, 8, 2)
    if channels > 128 or arch < _HOPPER:
        return _Rows(64, 32, 8 if channels > 64 else 4, 2)
    return _Rows(128, 64 if arch == _HOPPER else 32, 8, 3)


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Where the rows of chunks begin, and where the last ones end; `each` rows of every chunk where the cache has
    positions, else 0."""

    count: int
    starts: Buffer | Pointer
    each: int = 0


def _prefill(op: Op, q: Buffer, chunked: _Chunks, cache: _Cache, out: Buffer, site: GpuSite) -> Launches:
    """No more blocks than its SMs hold at a time, each with tiles of rows from the longest to the shortest."""
    (tokens, heads, dim), (count, kv, page, wide) = q.shape, cache.sizes
    group, channels, chunks, each = heads // kv, padded(dim, 32), chunked.count, chunked.each
    tables = cache.tables
    tile = _rows(q.dtype, channels, architecture(site.arch))
    rows = tile.rows // padded(group, 1)
    sms = min(site.sm_count, op.demand.sm[1]) if op.demand.sm else site.sm_count
    blocks = max(1, min(sms, (-(-tokens // rows) + chunks) * kv))
    arguments: dict[str, Argument] = {
        "q": q, "starts": chunked.starts, "lengths": cache.lengths, "tables": tables, "keys": cache.keys,
        "values": cache.values, "out": out, "fault": Pointer(site.fault(), "i64"), "tokens": np.int32(tokens),
        "chunks": np.int32(chunks), "each": np.int32(tables.shape[1] if tables else 1), "count": np.int32(count),
        "scale": np.float32(_LOG2_E / math.sqrt(dim)),
        "KV": kv, "GROUP": group, "PADDED": padded(group, 1), "DIM": dim, "CHANNELS": channels, "ROWS": page,
        "WIDE": wide, "TOKENS": rows, "N": tile.keys, "ALL": padded(heads * dim, 32), "POSITIONS": each,
    }  # fmt: skip
    return [launch(f"{_JIT}.prefill:prefill", (blocks,), arguments, warps=tile.warps, stages=tile.stages)]


def paged_prefill_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    q, starts, lengths, tables, keys, values = ins
    cache = _Cache(keys, values, lengths, tables, tables.shape[1] * keys.shape[2])
    return _prefill(op, q, _Chunks(lengths.shape[0], starts), cache, outs[0], site)


def paged_prefill_taken(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    q, *_, keys, values = ins
    return _attends(q, keys, values, outs[0])


def paged_decode_taken(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    q, _, _, keys, values = ins
    return _attends(q, keys, values, outs[0]) and keys.shape[2] % 16 == 0


def attention_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    """A cache of its own is a page a sequence, and its tokens a chunk a sequence."""
    q, positions, keys, values = ins
    batch, tokens = keys.shape[0], q.shape[0]
    cache = _Cache(keys, values, positions, None, keys.shape[2])
    if tokens == batch:
        return _decode(op, q, cache, outs[0], site)
    each = tokens // batch
    starts = Pointer(site.constant(np.arange(0, tokens + 1, each, dtype=np.int32)), "i32")
    return _prefill(op, q, _Chunks(batch, starts, each), cache, outs[0], site)


def attention_taken(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    q, positions, keys, values = ins
    return positions.dtype == "i64" and _attends(q, keys, values, outs[0])


def decode_attention_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    q, kv = ins
    return _decode(op, q, _Cache(*_halves(kv), None, None, kv.shape[2], beside=True), outs[0], site)


def decode_attention_taken(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    """Sequences one after another, as in a part of a batch; dims that fill the tile, for the next head lies behind."""
    q, kv = ins
    _, _, length, heads, dim = kv.shape
    inner = (length * heads * dim, heads * dim, dim, 1)
    k, v = (replace(half, shape=(half.shape[0], heads, length, dim)) for half in _halves(kv))
    return (kv.strides is None or kv.strides[1:] == inner) and padded(dim, 32) == dim and _attends(q, k, v, outs[0])


def _halves(kv: Buffer) -> tuple[Buffer, Buffer]:
    """Keys and values (batch, length, kv heads, dim), whose sequences lie one after another."""
    apart = (kv.strides or (math.prod(kv.shape[1:]),))[0]
    keys = Buffer(kv.address, kv.shape[1:], kv.dtype)
    return keys, replace(keys, address=kv.address + apart * ITEMSIZE[kv.dtype])


register_ahead("attention", attention_launches, attention_taken)
register_ahead("decode_attention", decode_attention_launches, decode_attention_taken)
register_ahead("paged_decode", paged_decode_launches, paged_decode_taken)
register_ahead("paged_prefill", paged_prefill_launches, paged_prefill_taken)
