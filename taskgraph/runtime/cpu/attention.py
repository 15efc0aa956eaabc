"""How attention with a cache of keys and values, static or in pages, and the rotation before it run on a CPU."""

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.runtime import rotary
from taskgraph.runtime.cpu import kernels_attention, kernels_paged, products
from taskgraph.runtime.cpu.arguments import Cache, Chunks, Places, Rope, Tables, ready
from taskgraph.runtime.cpu.kinds import (
    CHANGING,
    COMPILED,
    TILED,
    TORCH,
    CpuSite,
    Entry,
    Tensors,
    bits,
    need_floats,
    register,
    rope_table,
)
from taskgraph.runtime.cpu.tile import COLUMNS


def bind_rope(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    x, positions = ins
    half = x.shape[2] // 2
    inverse = torch.from_numpy(rotary.inverse_frequencies(op, 2 * half))

    def rotate() -> None:
        angle = positions[:, None, None].float() * inverse
        cos, sin = angle.cos(), angle.sin()
        low, high = x[..., :half].float(), x[..., half:].float()
        outs[0][..., :half] = low * cos - high * sin
        outs[0][..., half:] = high * cos + low * sin

    return rotate


def bind_rope_kv(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    qkv, positions, keys, values, *norms = ins
    need_floats(op, qkv, keys, values, outs[0])
    cos, sin = rope_table(op, keys.shape[2], keys.shape[3])
    q_norm, k_norm = (t.float().numpy() for t in norms) if norms else (np.empty(0, np.float32),) * 2
    cache, rope = Cache(bits(keys), bits(values)), Rope(cos, sin, q_norm, k_norm, op.number("eps"))
    threads = site.threads_for(qkv.shape[0])
    return ready(kernels_attention.rope_kv, bits(qkv), positions.numpy(), cache, rope, bits(outs[0]), threads)


def bind_attention(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    q, positions, keys, values = ins
    need_floats(op, q, keys, values, outs[0])
    batch, _, length, dim = keys.shape
    each = q.shape[0] // batch
    given = (bits(q), positions.numpy(), Cache(bits(keys), bits(values)), bits(outs[0]))
    if each == 1:
        scratch = np.empty(length * site.threads, np.float32)
        return ready(kernels_attention.decode_attention, *given, scratch, site.threads)
    if q.dtype == torch.float16 or dim % 2:  # the tile's panels are of float32 and pairs of bf16
        return partial(_attend_by_torch, q, positions, keys, values, outs[0])
    scratch = np.empty(kernels_attention.prefill_scratch_size(length, dim, site.threads), np.float32)
    return ready(kernels_attention.prefill_attention, *given, scratch, site.dots, site.threads)


def _attend_by_torch(
    q: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
) -> None:
    """`kernels_attention.prefill_attention` in float32."""
    (batch, _, length, dim), each = keys.shape, len(q) // len(keys)
    if int(positions.min()) < 0 or int(positions.max()) + each > length:
        raise ValueError("a position is outside the KV cache; make the cache longer or stop earlier")
    mask = torch.arange(length) <= positions[:, None, None, None] + torch.arange(each)[:, None]
    queries = q.view(batch, each, -1, dim).transpose(1, 2).float()
    made = F.scaled_dot_product_attention(queries, keys.float(), values.float(), mask, enable_gqa=True)
    out.view(batch, each, -1, dim).copy_(made.transpose(1, 2))


def bind_decode_attention(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    q, kv = ins
    queries, keys, values = q.unsqueeze(2), kv[0].transpose(1, 2), kv[1].transpose(1, 2)
    out = outs[0]
    attend = F.scaled_dot_product_attention
    if products.widened(q.dtype, 1, site.ways):
        return lambda: out.copy_(attend(queries.float(), keys.float(), values.float(), enable_gqa=True).squeeze(2))
    return lambda: out.copy_(attend(queries, keys, values, enable_gqa=True).squeeze(2))


# -- pages -------------------------------------------------------------------------------------------------------------


def _need_pages(op: Op, x: torch.Tensor, keys: torch.Tensor) -> None:
    if keys.shape[2] % COLUMNS or keys.shape[3] % COLUMNS:
        raise BackendUnavailable(
            f"op {op.name!r}: pages of {keys.shape[2]} tokens by {keys.shape[3]} channels; the cpu backend takes "
            f"multiples of {COLUMNS} of both."
        )
    if x.dtype not in (torch.float32, torch.bfloat16) or keys.dtype != x.dtype:
        raise BackendUnavailable(f"op {op.name!r}: the cpu backend takes f32 or bf16, the same for all.")


def bind_paged_rope(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    qkv, positions, slots, keys, values, *norms = ins
    _need_pages(op, qkv, keys)
    cos, sin = rope_table(op, op.integer("context"), outs[0].shape[2])
    q_norm, k_norm = (t.float().numpy() for t in norms) if norms else (np.empty(0, np.float32),) * 2
    places, cache = Places(positions.numpy(), slots.numpy()), Cache(bits(keys), bits(values))
    rope, threads = Rope(cos, sin, q_norm, k_norm, op.number("eps")), site.threads_for(qkv.shape[0])
    return ready(kernels_paged.paged_rope, bits(qkv), places, cache, rope, bits(outs[0]), threads)


def bind_paged_decode(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    q, lengths, blocks, keys, values = ins
    _need_pages(op, q, keys)
    given = (Tables(lengths.numpy(), blocks.numpy()), Cache(bits(keys), bits(values)), bits(outs[0]))
    return ready(kernels_paged.paged_decode, bits(q), *given, _scratch(q, keys, blocks, site), site.dots, site.threads)


def bind_paged_prefill(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    q, starts, lengths, blocks, keys, values = ins
    _need_pages(op, q, keys)
    chunks = Chunks(starts.numpy(), lengths.numpy(), blocks.numpy())
    given = (chunks, Cache(bits(keys), bits(values)), bits(outs[0]))
    return ready(kernels_paged.paged_prefill, bits(q), *given, _scratch(q, keys, blocks, site), site.dots, site.threads)


def _scratch(q: torch.Tensor, keys: torch.Tensor, blocks: torch.Tensor, site: CpuSite) -> npt.NDArray[np.float32]:
    longest = blocks.shape[1] * keys.shape[2]
    return np.empty(kernels_paged.scratch_size(longest, q.shape[2], site.threads), np.float32)


register("rope", bind_rope, TORCH)
register("rope_kv", bind_rope_kv, COMPILED)
register("attention", bind_attention, TILED)
register("decode_attention", bind_decode_attention, CHANGING)
register("paged_rope", bind_paged_rope, COMPILED)
register("paged_decode", bind_paged_decode, TILED)
register("paged_prefill", bind_paged_prefill, TILED)
