"""torch's scaled dot-product attention: grouped heads without copies of keys and values, few queries by a kernel."""

import math
from typing import Any, Final

import torch

import taskgraph as tg
from taskgraph.embed.flow import Use
from taskgraph.embed.lower import Match, Site, viewed
from taskgraph.embed.match import Matcher
from taskgraph.embed.work import seen_bytes
from taskgraph.graph.op import Attr

ATTENTION: Final = "aten.attention"
"""The kind; `taskgraph.embed.kinds` registers it."""
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


def attention(m: Matcher, i: int) -> Match | None:
    """scaled_dot_product_attention, with the repetition of keys and values that groups of heads share:
    `aten.attention`."""
    ours = m.call(i).target.namespace == "taskgraph" and m.call(i).target._opname == "attention"
    if not ours and not m.is_op(i, "scaled_dot_product_attention"):
        return None
    q, k, v, mask = (m.arg(i, name) for name in ("query", "key", "value", "attn_mask"))
    out = m.out(i)
    layout = m.layout(out)
    if any(len(m.layout(u).size) != 4 for u in (q, k, v)) or layout.dtype not in _FLOATS or not layout.dense:
        return None
    inner: list[int] = []
    if m.layout(k).size[1] == m.layout(q).size[1]:
        pairs = [_unrepeated(m, u, i) for u in (k, v)]
        (k_inner, k_base), (v_inner, v_base) = pairs
        if m.layout(k_base).size[1] == m.layout(v_base).size[1]:
            inner, k, v = [*k_inner, *v_inner], k_base, v_base
    uses = (q, k, v) if mask is None else (q, k, v, mask)
    scale = m.arg(i, "scale")
    batch, heads, rows, dim = m.layout(q).size
    keys, wide = m.layout(k).size[2], m.layout(v).size[3]
    attrs: dict[str, Attr] = {
        "sizes": (batch, heads, rows, dim, m.layout(k).size[1], keys, wide),
        "scale": float(scale) if scale is not None else 1.0 / math.sqrt(m.layout(q).size[-1]),
        "causal": bool(m.arg(i, "is_causal")),
        "masked": mask is not None,
    }
    moved = sum(seen_bytes(m.layout(u)) for u in uses) + layout.nbytes
    work = tg.Work(flops=2.0 * batch * heads * rows * keys * (dim + wide), hbm_bytes=float(moved))

    def emit(site: Site) -> str:
        return viewed(site, ATTENTION, "attention", uses, out.leaf, attrs, work)

    return m.match(inner, i, ATTENTION, emit)


def _unrepeated(m: Matcher, use: Use, root: int) -> tuple[list[int], Use]:
    """The heads before each was repeated for its group (b, g, s, d), and the call that copied them."""
    copy = m.maker(use)
    if not m.is_op(copy, "reshape", "clone", "contiguous", "_unsafe_view"):
        return [], use
    assert copy is not None
    source: Any = m.arg(copy, "self")
    leaf = m.flow.leaves[source.leaf]
    if len(leaf.layout.size) != 5 or leaf.view is None or not m.steady(copy, root) or not m.only_for(copy, [root]):
        return [], use
    expanded = leaf.layout
    if expanded.stride[2] != 0 or expanded.size[1] * expanded.size[2] != m.layout(use).size[1]:
        return [], use
    base = leaf.view.base
    for _ in range(2):  # through expand, then unsqueeze
        view = m.flow.leaves[base].view
        if len(m.flow.leaves[base].layout.size) == 4:
            break
        if view is None:
            return [], use
        base = view.base
    found = m.flow.leaves[base].layout
    wanted = (expanded.size[0], expanded.size[1], *expanded.size[3:])
    if found.size != wanted or m.flow.leaves[base].offset != leaf.offset:
        return [], use
    steps = [expanded.stride[axis] for axis in (0, 1, 3, 4)]
    if any(n > 1 and a != b for n, a, b in zip(found.size, found.stride, steps, strict=True)):
        return [], use
    return [copy], Use(base, source.version)
