"""How each op kind runs on a CPU: a table from kind to a function that binds buffers and returns a program entry.

A binder runs once, at capture, with the op and its torch tensors. It returns a callable without arguments, which
replay calls. All choices (dtype, packing, shapes) are made in the binder; the entry has none.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from taskgraph.errors import BackendUnavailable, ExecutionError
from taskgraph.graph.op import Op
from taskgraph.runtime import custom, rotary
from taskgraph.runtime.cpu import collectives, experts, kernels, latent, paged, products  # noqa: F401 - they register their kinds
from taskgraph.runtime.cpu.binders import BINDERS, TORCH_DTYPE, Binder, Entry, Site, Tensors, binder, rope_table
from taskgraph.runtime.cpu.binders import bits as _bits

__all__ = ["BINDERS", "TORCH_DTYPE", "Binder", "Entry", "Site", "bind", "binder", "rope_table"]


def bind(op: Op, ins: Tensors, outs: Tensors, site: Site, functions: Mapping[str, Callable[..., Any]]) -> Entry:
    """The program entry of one op; BackendUnavailable when the CPU has no implementation of its kind."""
    views = op.views
    if views:
        ins = [t.narrow(v.axis, v.start, v.stop - v.start) if (v := views.get(i)) else t for i, t in enumerate(ins)]
    if op.kind == "call":
        return custom.bound(op, functions, ins, outs)
    if op.kind not in BINDERS:
        raise BackendUnavailable(
            f"op {op.name!r}: the cpu backend has no implementation of kind {op.kind!r}; use GraphBuilder.call."
        )
    return BINDERS[op.kind](op, ins, outs, site)


@binder("embedding")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    tokens, table = ins
    direct = table.dtype == outs[0].dtype
    look_up = partial(torch.index_select, table, 0, tokens, out=outs[0] if direct else None)

    def run() -> None:
        try:
            made = look_up()
        except IndexError:
            odd = tokens[(tokens < 0) | (tokens >= len(table))]
            text = f"the token {int(odd[0])}, which is outside its table of {len(table)}"
            raise ExecutionError(f"op {op.name!r} was given {text}.", op=op.name) from None
        if not direct:
            outs[0].copy_(made)

    return run


@binder("gemm")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    x, w, *extra = ins
    bias = extra[0] if op.attr("bias") else None
    residual = extra[-1] if op.attr("residual") else None
    weight = w if op.attr("transpose_w") else w.t()
    product = products.Product(x, weight, bias, residual, outs[0], op.inputs[1] in site.constants, site.threads)
    return products.entry(op.name, product, site.ways)


@binder("rmsnorm")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    x, weight = ins
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        raise BackendUnavailable(f"op {op.name!r}: rmsnorm on the cpu backend takes f32, bf16 or f16, both alike.")
    rows = [_bits(t.view(-1, t.shape[-1])) for t in (x, outs[0])]
    return partial(
        kernels.rmsnorm, rows[0], _bits(weight), rows[1], op.number("eps"), site.threads_for(rows[0].shape[0])
    )


@binder("rope")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
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


@binder("rope_kv")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    qkv, positions, keys, values, *norms = ins
    cos, sin = rope_table(op, keys.shape[2], keys.shape[3])
    q_norm, k_norm = (t.float().numpy() for t in norms) if norms else (np.empty(0, np.float32),) * 2
    buffers = (_bits(qkv), positions.numpy(), _bits(keys), _bits(values), cos, sin)
    return partial(
        kernels.rope_kv, *buffers, q_norm, k_norm, op.number("eps"), _bits(outs[0]), site.threads_for(qkv.shape[0])
    )


@binder("attention")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    q, positions, keys, values = ins
    batch, _, length, dim = keys.shape
    each = q.shape[0] // batch
    buffers = tuple(map(_bits, (q, positions, keys, values, outs[0])))
    if each == 1:
        return partial(kernels.decode_attention, *buffers, np.empty(length * site.threads, np.float32), site.threads)
    if q.dtype == torch.float16 or dim % 2:  # the tile's panels are of float32 and pairs of bf16
        return partial(_attend_by_torch, q, positions, keys, values, outs[0])
    scratch = np.empty(kernels.prefill_scratch_size(length, dim, site.threads), np.float32)
    return partial(kernels.prefill_attention, *buffers, scratch, site.dots, site.threads)


def _attend_by_torch(
    q: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
) -> None:
    """`kernels.prefill_attention` in float32."""
    (batch, _, length, dim), each = keys.shape, len(q) // len(keys)
    if int(positions.min()) < 0 or int(positions.max()) + each > length:
        raise ValueError("a position is outside the KV cache; make the cache longer or stop earlier")
    mask = torch.arange(length) <= positions[:, None, None, None] + torch.arange(each)[:, None]
    queries = q.view(batch, each, -1, dim).transpose(1, 2).float()
    made = F.scaled_dot_product_attention(queries, keys.float(), values.float(), mask, enable_gqa=True)
    out.view(batch, each, -1, dim).copy_(made.transpose(1, 2))


@binder("decode_attention")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    q, kv = ins
    queries, keys, values = q.unsqueeze(2), kv[0].transpose(1, 2), kv[1].transpose(1, 2)
    out = outs[0]
    attend = F.scaled_dot_product_attention
    if products.widened(q.dtype, 1, site.ways):
        return lambda: out.copy_(attend(queries.float(), keys.float(), values.float(), enable_gqa=True).squeeze(2))
    return lambda: out.copy_(attend(queries, keys, values, enable_gqa=True).squeeze(2))


@binder("swiglu")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    return partial(kernels.swiglu, _bits(ins[0]), _bits(outs[0]), site.threads_for(outs[0].shape[0]))


@binder("add")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    return partial(torch.add, ins[0], ins[1], out=outs[0])


@binder("argmax")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    return partial(kernels.argmax, _bits(ins[0]), outs[0].numpy(), site.threads_for(outs[0].shape[0]))


@binder("copy")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    return partial(outs[0].copy_, ins[0])


@binder("slice_rows")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    rows = slice(op.integer("start"), op.integer("stop"), op.integer("step"))
    return partial(outs[0].copy_, ins[0][rows])


@binder("concat_rows")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    return partial(torch.cat, list(ins), out=outs[0])
