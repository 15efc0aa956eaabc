"""How the rotation of queries and keys runs by Triton functions, alone and with the write of the cache."""

from collections.abc import Sequence

import numpy as np

from taskgraph.graph.op import Op
from taskgraph.runtime import rotary
from taskgraph.runtime.gpu.ahead.launching import Argument, Pointer, launch
from taskgraph.runtime.gpu.ahead.rows import dense, floats, padded, programs
from taskgraph.runtime.gpu.kinds import Buffer, GpuSite, Launches, register_ahead

_JIT = "taskgraph.runtime.gpu.ahead.jit.rotary:"
_TOGETHER = 2048
"""Channel pairs that a program turns at a time."""


def _inverse(op: Op, dim: int, site: GpuSite) -> Pointer:
    return Pointer(site.constant(rotary.inverse_frequencies(op, dim)), "f32", aligned=True)


def _warps(dim: int) -> int:
    """Warps of a program, more for wide heads, whose channels need registers."""
    return 4 if dim <= 128 else 8


def _heads(count: int, half: int) -> int:
    """Heads that are turned at a time."""
    return min(padded(count), max(1, _TOGETHER // padded(half)))


def _sizes(heads: int, kv: int, dim: int) -> dict[str, Argument]:
    return {"HEADS": heads, "KV": kv, "HALF": dim // 2, "PADDED": padded(dim // 2)}


def rope_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    x, positions = ins
    tokens, heads, dim = x.shape
    given: dict[str, Argument] = {
        "x": x, "positions": positions, "inverse": _inverse(op, dim, site), "out": outs[0], "tokens": np.int32(tokens),
        "HEADS": heads, "HALF": dim // 2, "PADDED": padded(dim // 2), "TOGETHER": _heads(heads, dim // 2),
    }  # fmt: skip
    return [launch(_JIT + "rope", programs(tokens, _warps(dim), site), given, _warps(dim), 1)]


def rope_taken(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    return floats(ins[0], outs[0]) and dense(ins[1]) and ins[1].dtype == "i64"


def _fused(op: Op, norms: Sequence[Buffer], out: Buffer, site: GpuSite) -> dict[str, Argument]:
    """The arguments that both caches have alike, up to the tokens."""
    q_norm, k_norm = norms or (None, None)
    tokens, _, dim = out.shape
    inverse = _inverse(op, dim, site)
    return {"q_norm": q_norm, "k_norm": k_norm, "inverse": inverse, "out": out, "tokens": np.int32(tokens)}


def _last(op: Op, site: GpuSite) -> dict[str, Argument]:
    eps, size = np.float32(op.number("eps")), np.float32(rotary.size(op))
    return {"eps": eps, "size": size, "fault": Pointer(site.fault(), "i64")}


def _together(heads: int, kv: int, dim: int) -> dict[str, Argument]:
    return {"TOGETHER": _heads(heads, dim // 2), "KV_TOGETHER": _heads(kv, dim // 2)}


def rope_kv_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    qkv, positions, keys, values, *norms = ins
    batch, kv, length, dim = keys.shape
    tokens, heads, _ = outs[0].shape
    given: dict[str, Argument] = {
        "qkv": qkv, "positions": positions, "keys": keys, "values": values, **_fused(op, norms, outs[0], site),
        "each": np.int32(tokens // batch), "length": np.int64(length), **_last(op, site), **_sizes(heads, kv, dim),
        **_together(heads, kv, dim),
    }  # fmt: skip
    return [launch(_JIT + "rope_kv", programs(tokens, _warps(dim), site), given, _warps(dim), 1)]


def rope_kv_taken(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    qkv, positions, *rest = ins
    return floats(qkv, *rest, outs[0]) and dense(positions) and positions.dtype == "i64"


def paged_rope_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    qkv, positions, slots, keys, values, *norms = ins
    pages, kv, rows, wide = keys.shape
    tokens, heads, dim = outs[0].shape
    given: dict[str, Argument] = {
        "qkv": qkv, "positions": positions, "slots": slots, "keys": keys, "values": values,
        **_fused(op, norms, outs[0], site), "slots_end": np.int64(pages * rows),
        "context": np.int32(op.integer("context")), **_last(op, site), **_sizes(heads, kv, dim), "PAGE": rows,
        "WIDE": wide, **_together(heads, kv, dim),
    }  # fmt: skip
    return [launch(_JIT + "paged_rope", programs(tokens, _warps(dim), site), given, _warps(dim), 1)]


def paged_rope_taken(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    qkv, positions, slots, *rest = ins
    return floats(qkv, *rest, outs[0]) and dense(positions, slots) and {positions.dtype, slots.dtype} == {"i32"}


register_ahead("rope", rope_launches, rope_taken)
register_ahead("rope_kv", rope_kv_launches, rope_kv_taken)
register_ahead("paged_rope", paged_rope_launches, paged_rope_taken)
