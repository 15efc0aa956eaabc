"""How the ops of a dense transformer that work row by row run on a CPU."""

from functools import partial

import torch

from taskgraph.errors import ExecutionError
from taskgraph.graph.op import Op
from taskgraph.runtime.cpu import kernels, products
from taskgraph.runtime.cpu.arguments import ready
from taskgraph.runtime.cpu.kinds import COMPILED, FIXED, TORCH, CpuSite, Entry, Tensors, bits, need_floats, register

_A_THREAD = 1 << 16
"""Multiplications that are worth another thread: some microseconds of one core."""


def bind_embedding(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
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


def bind_gemm(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    x, w, *extra = ins
    bias = extra[0] if op.attr("bias") else None
    residual = extra[-1] if op.attr("residual") else None
    weight = w if op.attr("transpose_w") else w.t()
    threads = min(site.threads, 1 + x.shape[0] * weight.numel() // _A_THREAD)
    product = products.Product(x, weight, bias, residual, outs[0], op.inputs[1] in site.constants, threads)
    return products.entry(op.name, product, site.ways)


def bind_rmsnorm(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    x, weight = ins
    need_floats(op, x, weight, outs[0])
    rows = [bits(t.view(-1, t.shape[-1])) for t in (x, outs[0])]
    return ready(kernels.rmsnorm, rows[0], bits(weight), rows[1], op.number("eps"), site.threads_for(rows[0].shape[0]))


def bind_swiglu(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    need_floats(op, ins[0], outs[0])
    return ready(kernels.swiglu, bits(ins[0]), bits(outs[0]), site.threads_for(outs[0].shape[0]))


def bind_add(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    return partial(torch.add, ins[0], ins[1], out=outs[0])


def bind_argmax(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    need_floats(op, ins[0])
    return ready(kernels.argmax, bits(ins[0]), outs[0].numpy(), site.threads_for(outs[0].shape[0]))


register("embedding", bind_embedding, TORCH)
register("gemm", bind_gemm, FIXED)
register("rmsnorm", bind_rmsnorm, COMPILED)
register("swiglu", bind_swiglu, COMPILED)
register("add", bind_add, TORCH)
register("argmax", bind_argmax, COMPILED)
