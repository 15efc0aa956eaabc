"""The work of a call of torch: torch's own flop counts, and every operand's bytes moved once."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import flop_counter

import taskgraph as tg
from taskgraph.embed.calls import Strided, by_name, mapped
from taskgraph.embed.flow import Call, Flow, Use

_FREE = frozenset(
    {"copy_", "clone", "contiguous", "reshape", "_to_copy", "to", "fill_", "zero_", "zeros", "cat", "stack"}
)
"""Calls that move bytes and compute nothing."""


def of_call(flow: Flow, call: Call) -> tg.Work:
    """The work of a call as it is."""
    ins = {(use.leaf, use.version): seen_bytes(flow.layout(use)) for use in call.uses()}
    made = [flow.leaves[leaf].layout for leaf in call.results if leaf is not None]
    changed = 0.0
    if call.changes:
        first = next(iter(call.uses()))
        changed = float(seen_bytes(flow.layout(first)))
    moved = float(sum(ins.values()) + sum(layout.nbytes for layout in made) + changed)
    read = _indexed(flow, call)
    if read is not None:
        moved = read + float(sum(layout.nbytes for layout in made))
    return tg.Work(flops=max(_flops(flow, call, made), 0.0), hbm_bytes=max(moved, 1.0))


def seen_bytes(layout: Strided) -> int:
    """Bytes that a reader of the tensor touches: expanded axes once."""
    touched = math.prod(n for n, step in zip(layout.size, layout.stride, strict=True) if step != 0)
    return int(touched * layout.dtype.itemsize)


def _indexed(flow: Flow, call: Call) -> float | None:
    """What a look-up reads and writes, which is not the whole of its table."""
    target = call.target._opname
    if target == "embedding":
        indices = call.args[1]
        rows, width = flow.layout(indices), flow.layout(call.args[0])
        return float(rows.nbytes + rows.elements * width.size[-1] * width.dtype.itemsize)
    if target in ("index_copy_", "index_put_", "scatter_"):
        return 2.0 * sum(flow.layout(u).nbytes for u in call.uses()[1:])
    return None


def _flops(flow: Flow, call: Call, made: list[Strided]) -> float:
    given: dict[str, Any] = mapped(
        by_name(call.target, call.args, call.kwargs), lambda v: _meta(flow.layout(v)) if isinstance(v, Use) else v
    )
    names = call.target._opname
    rule = flop_counter.flop_registry.get(call.target.overloadpacket)
    elements = float(sum(layout.elements for layout in made))
    if rule is not None and made:
        order = [given[a.name] for a in call.target._schema.arguments if a.name in given]
        try:
            return float(rule(*order, out_val=_meta(made[0])))
        except Exception:  # its rule takes other arguments than the call has
            return 2.0 * elements
    depth = _DEPTHS.get(names)
    if depth is not None:
        return 2.0 * float(depth(given, elements))
    if names in _FREE:
        return 0.0
    return max(elements, float(sum(flow.layout(u).elements for u in call.uses()[:1])))


def _by_linear(given: dict[str, Any], elements: float) -> float:
    return elements * given["input"].shape[-1]  # type: ignore[no-any-return]


def _by_matmul(given: dict[str, Any], elements: float) -> float:
    return elements * given["self"].shape[-1]  # type: ignore[no-any-return]


def _by_attention(given: dict[str, Any], elements: float) -> float:
    return 2.0 * math.prod(given["query"].shape) * given["key"].shape[-2]  # type: ignore[no-any-return]


def _by_convolution(given: dict[str, Any], elements: float) -> float:
    return elements * float(math.prod(given["weight"].shape[1:]))


def _by_recurrence(given: dict[str, Any], elements: float) -> float:
    steps: int = math.prod(given["input"].shape[:-1])
    return float(steps * sum(math.prod(w.shape) for w in given["params"] if len(w.shape) == 2))


_DEPTHS: dict[str, Callable[[dict[str, Any], float], float]] = {
    "linear": _by_linear,
    "matmul": _by_matmul,
    "scaled_dot_product_attention": _by_attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _by_convolution),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _by_recurrence),
}
"""Multiplications of composite calls, which torch's counter sees only in parts."""


def _meta(layout: Strided) -> torch.Tensor:
    return torch.empty_strided(layout.size, layout.stride, dtype=layout.dtype, device="meta")
