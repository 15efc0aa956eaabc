"""How the ops over a paged KV cache run on a CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.runtime.cpu import kernels_paged as kernels
from taskgraph.runtime.cpu.binders import Entry, Site, Tensors, binder, bits, rope_table
from taskgraph.runtime.cpu.tile import COLUMNS


def _check(op: Op, x: torch.Tensor, keys: torch.Tensor) -> None:
    if keys.shape[2] % COLUMNS or keys.shape[3] % COLUMNS:
        raise BackendUnavailable(
            f"op {op.name!r}: pages of {keys.shape[2]} tokens by {keys.shape[3]} channels; the cpu backend takes "
            f"multiples of {COLUMNS} of both."
        )
    if x.dtype not in (torch.float32, torch.bfloat16) or keys.dtype != x.dtype:
        raise BackendUnavailable(f"op {op.name!r}: the cpu backend takes f32 or bf16, the same for all.")


@binder("paged_rope")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    qkv, positions, slots, keys, values, *norms = ins
    _check(op, qkv, keys)
    cos, sin = rope_table(op, op.integer("context"), outs[0].shape[2])
    q_norm, k_norm = (t.float().numpy() for t in norms) if norms else (np.empty(0, np.float32),) * 2
    buffers = (bits(qkv), positions.numpy(), slots.numpy(), bits(keys), bits(values), cos, sin)
    threads = site.threads_for(qkv.shape[0])
    return partial(kernels.paged_rope, *buffers, q_norm, k_norm, op.number("eps"), bits(outs[0]), threads)


@binder("paged_decode")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    return _attention(op, ins, outs, site, kernels.paged_decode)


@binder("paged_prefill")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    return _attention(op, ins, outs, site, kernels.paged_prefill)


def _attention(op: Op, ins: Tensors, outs: Tensors, site: Site, kernel: Callable[..., Any]) -> Entry:
    q, *tables, blocks, keys, values = ins
    _check(op, q, keys)
    length = blocks.shape[1] * keys.shape[2]
    scratch = np.empty(kernels.scratch_size(length, q.shape[2], site.threads), np.float32)
    places = [t.numpy() for t in (*tables, blocks)]
    return partial(kernel, bits(q), *places, bits(keys), bits(values), bits(outs[0]), scratch, site.dots, site.threads)


@binder("copy_pages")
def _(op: Op, ins: Tensors, outs: Tensors, site: Site) -> Entry:
    source, target, pairs = ins
    flat = [t.view(torch.uint8).view(t.shape[0], -1).numpy() for t in (source, target)]
    return partial(kernels.copy_pages, *flat, pairs.numpy(), outs[0].numpy())
