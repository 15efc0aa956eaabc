"""How layer norms, softmax, batched products and reductions run on a CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.ops.algebra import reduced_axes
from taskgraph.ops.signatures import Attrs
from taskgraph.runtime.cpu import kernels_algebra
from taskgraph.runtime.cpu.arguments import ready
from taskgraph.runtime.cpu.kernels import use_threads
from taskgraph.runtime.cpu.kinds import CHANGING, COMPILED, TORCH, CpuSite, Entry, Tensors, bits, need_floats, register


def bind_layer_norm(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    x, *extra = ins
    need_floats(op, *ins, outs[0])
    none = bits(x.new_empty(0))
    weight = bits(extra[0]) if op.attr("weight") else none
    bias = bits(extra[-1]) if op.attr("bias") else none
    rows = [bits(t.view(-1, t.shape[-1])) for t in (x, outs[0])]
    threads = site.threads_for(rows[0].shape[0])
    return ready(kernels_algebra.layer_norm, rows[0], weight, bias, rows[1], op.number("eps"), threads)


def bind_softmax(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    _known(op, ins[0])
    run: Callable[..., Any] = torch.log_softmax if op.attr("log") else torch.softmax
    return partial(run, ins[0], op.integer("axis"), out=outs[0])


def bind_matmul(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    """By torch; converted first where the output has another dtype."""
    a, b, out = ins[0], ins[1], outs[0]
    _known(op, a)
    right = b.transpose(-1, -2) if op.attr("transpose_b") else b
    if a.dtype == out.dtype:
        return alone_if_small(op, site, partial(torch.matmul, a, right, out=out))
    wide = torch.promote_types(a.dtype, torch.float32)

    def run() -> None:
        out.copy_(torch.matmul(a.to(wide), right.to(wide)))

    return run


_A_TEAM: Final = 4 << 20
"""Flops or bytes that are worth all threads of a lane: a small product on a team waits for it more than it computes."""


def alone_if_small(op: Op, site: CpuSite, run: Entry) -> Entry:
    """`run`, a call that libraries spread over all threads however small it is, on one thread if it is small."""
    if site.threads == 1 or max(op.work.flops, op.work.hbm_bytes) >= _A_TEAM:
        return run
    return partial(_alone, run, site.threads)


def _alone(run: Entry, threads: int) -> None:
    use_threads(1)
    try:
        run()
    finally:
        use_threads(threads)


def bind_reduce(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    _known(op, ins[0])
    functions: dict[str, Callable[..., Any]] = {
        "sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin
    }  # fmt: skip
    attrs = Attrs(op.attrs)
    run = functions[str(attrs["operation"])]
    return partial(run, ins[0], reduced_axes(attrs), keepdim=attrs.flag("keep_axes"), out=outs[0])


def _known(op: Op, x: torch.Tensor) -> None:
    """BackendUnavailable for a type that torch does not compute with here."""
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise BackendUnavailable(f"op {op.name!r}: {op.kind} on the cpu backend takes f64, f32, bf16 or f16.")


register("layer_norm", bind_layer_norm, COMPILED)
register("softmax", bind_softmax, TORCH)
register("matmul", bind_matmul, CHANGING)
register("reduce", bind_reduce, TORCH)
