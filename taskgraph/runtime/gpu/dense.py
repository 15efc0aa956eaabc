"""How the ops of a dense transformer that work row by row run on a GPU through our own kernels."""

import math
from collections.abc import Sequence

import numpy as np

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.runtime.gpu.kinds import (
    KERNELS,
    THREADS,
    Buffer,
    GpuSite,
    Launch,
    Launches,
    blocks,
    float_type,
    register,
    spread,
)

_GEMM_TILE, _GEMM_FEW_ROWS, _GEMM_COLUMNS, _GEMM_BLOCK = 64, 16, 64, 256


def add_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    a, b = ins
    kind, count = float_type(op, a, b, outs[0]), math.prod(a.shape)
    args = (a.address, b.address, outs[0].address, np.int64(count))
    return [Launch(f"add_{kind}", spread(count, site), 256, args)]


def swiglu_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    kind, (rows, features) = float_type(op, ins[0], outs[0]), outs[0].shape
    args = (ins[0].address, outs[0].address, np.int64(rows), np.int32(features))
    return [Launch(f"swiglu_{kind}", spread(rows * features, site), 256, args)]


def rmsnorm_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    x, weight = ins
    columns = x.shape[-1]
    args = (x.address, weight.address, outs[0].address, np.int32(columns), np.float32(op.number("eps")))
    name = f"rmsnorm_{float_type(op, x, weight, outs[0])}"
    return [blocks(name, (math.prod(x.shape[:-1]),), THREADS, args, site)]


def embedding_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    tokens, table = ins
    kinds = (tokens.dtype, table.dtype, outs[0].dtype)
    if kinds[1:] not in (("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")):
        raise BackendUnavailable(f"op {op.name!r}: no embedding kernel from {kinds[1]} to {kinds[2]}.")
    sizes = (np.int32(table.shape[1]), np.int64(table.shape[0]))
    args = (tokens.address, table.address, outs[0].address, *sizes, site.fault())
    return [blocks(f"embedding_{'_'.join(kinds)}", (tokens.shape[0],), THREADS, args, site)]


def argmax_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    args = (ins[0].address, outs[0].address, np.int32(ins[0].shape[1]))
    return [blocks(f"argmax_{float_type(op, ins[0])}", (ins[0].shape[0],), THREADS, args, site)]


def gemm_launches(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    x, w, *extra = ins
    (m, k), n = x.shape, outs[0].shape[1]
    kinds = (x.dtype, w.dtype, outs[0].dtype)
    if kinds not in (("f32",) * 3, ("bf16",) * 3, ("bf16", "bf16", "f32"), ("f32", "bf16", "f32")):
        raise BackendUnavailable(f"op {op.name!r}: no product of {kinds[0]} and {kinds[1]} into {kinds[2]}.")
    if any(t.dtype != x.dtype for t in extra):
        raise BackendUnavailable(f"op {op.name!r}: bias and residual must be {x.dtype} like x.")
    bias = extra[0].address if op.attr("bias") else 0
    residual = extra[-1].address if op.attr("residual") else 0
    few = m <= _GEMM_FEW_ROWS
    grid = (-(-n // _GEMM_COLUMNS), -(-m // (_GEMM_FEW_ROWS if few else _GEMM_TILE)))
    numbers = (np.int32(m), np.int32(n), np.int32(k), np.int32(bool(op.attr("transpose_w"))))
    args = (x.address, w.address, bias, residual, outs[0].address, *numbers)
    name = f"gemm_{'few_rows_' if few else ''}{'_'.join(kinds)}"
    return [blocks(name, grid, _GEMM_BLOCK, args, site)]


register("add", add_launches, KERNELS / "elementwise.cu")
register("swiglu", swiglu_launches, KERNELS / "elementwise.cu")
register("rmsnorm", rmsnorm_launches, KERNELS / "elementwise.cu")
register("embedding", embedding_launches, KERNELS / "elementwise.cu")
register("argmax", argmax_launches, KERNELS / "elementwise.cu")
register("gemm", gemm_launches, KERNELS / "gemm.cu")
