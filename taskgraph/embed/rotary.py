"""Rotary embedding as transformers writes it: x * cos + rotate_half(x) * sin."""

from typing import Any, Final

import torch

import taskgraph as tg
from taskgraph.embed.flow import Use
from taskgraph.embed.lower import Match, Site, viewed
from taskgraph.embed.match import Matcher
from taskgraph.embed.work import seen_bytes

ROTARY: Final = "aten.rotary"
"""The kind; `taskgraph.embed.kinds` registers it."""
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


def rotary(m: Matcher, i: int) -> Match | None:
    """add(mul(x, cos), mul(cat(neg(second half of x), first half), sin)): `aten.rotary`."""
    if not m.is_op(i, "add") or m.arg(i, "alpha") not in (None, 1):
        return None
    for one, two in (("self", "other"), ("other", "self")):
        straight, crossed = m.maker(m.arg(i, one)), m.maker(m.arg(i, two))
        if straight is None or crossed is None or not (m.is_op(straight, "mul") and m.is_op(crossed, "mul")):
            continue
        for x, cos in _orders(m, straight):
            for turned, sin in _orders(m, crossed):
                made = _half_turned(m, turned, x)
                if made is not None:
                    return _match(m, [straight, crossed, *made], i, (x, cos, sin))
    return None


def _orders(m: Matcher, i: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    a, b = m.arg(i, "self"), m.arg(i, "other")
    return (a, b), (b, a)


def _half_turned(m: Matcher, turned: Any, x: Any) -> list[int] | None:
    """The calls of cat(-x[..., half:], x[..., :half]); None if it is not that."""
    cat = m.maker(turned)
    if not m.is_op(cat, "cat") or not isinstance(x, Use):
        return None
    assert cat is not None
    parts, size = m.arg(cat, "tensors"), m.layout(x).size
    if len(parts) != 2 or m.arg(cat, "dim") not in (-1, len(size) - 1) or size[-1] % 2:
        return None
    neg = m.maker(parts[0])
    if not m.is_op(neg, "neg"):
        return None
    assert neg is not None
    half = size[-1] // 2
    if _is_part(m, m.arg(neg, "self"), x, half) and _is_part(m, parts[1], x, 0):
        return [cat, neg]
    return None


def _is_part(m: Matcher, part: Any, x: Use, start: int) -> bool:
    """Whether `part` is the half of x along its last axis that begins at `start`."""
    if not isinstance(part, Use) or m.storage(part) != m.storage(x) or part.version != x.version:
        return False
    whole, piece = m.flow.leaves[x.leaf], m.flow.leaves[part.leaf]
    size = (*whole.layout.size[:-1], whole.layout.size[-1] // 2)
    offset = whole.offset + start * whole.layout.stride[-1]
    return (piece.layout.size, piece.layout.stride, piece.offset) == (size, whole.layout.stride, offset)


def _match(m: Matcher, inner: list[int], i: int, uses: tuple[Any, Any, Any]) -> Match | None:
    out = m.out(i)
    layout = m.layout(out)
    x = uses[0]
    if not all(isinstance(u, Use) and m.layout(u).dtype == layout.dtype for u in uses):
        return None
    if layout.dtype not in _FLOATS or layout.size != m.layout(x).size or len(layout.size) > 4 or not layout.dense:
        return None
    if any(m.layout(u).size[-1] != layout.size[-1] or m.layout(u).stride[-1] != 1 for u in uses):
        return None
    if layout.stride[-1] != 1:
        return None
    moved = sum(seen_bytes(m.layout(u)) for u in uses) + layout.nbytes
    work = tg.Work(flops=3.0 * layout.elements, hbm_bytes=float(moved))

    def emit(site: Site) -> str:
        return viewed(site, ROTARY, "rotary", uses, out.leaf, {}, work)

    return m.match(inner, i, ROTARY, emit)
