"""What is recognised in a flow, as a table of patterns, one function each.

A pattern looks at a call that may be the last of its own, and returns a Match or None. They are tried in the order of
the table, the longest first; what is left of pointwise calls is joined afterwards (`pointwise.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import taskgraph as tg
from taskgraph.embed import standard
from taskgraph.embed.attention import attention
from taskgraph.embed.collectives import collective
from taskgraph.embed.experts import experts
from taskgraph.embed.flow import Flow, Use
from taskgraph.embed.lower import Match, Site, shaped
from taskgraph.embed.match import Matcher
from taskgraph.embed.pointwise import pointwise
from taskgraph.embed.rotary import rotary

Pattern = Callable[[Matcher, int], Match | None]


def recognise(flow: Flow, *, collectives: bool = True) -> list[Match]:
    """All matches, none of which shares a call with another; `collectives` of several ranks among them."""
    matcher, found = Matcher(flow), list[Match]()
    for pattern in PATTERNS if collectives else tuple(p for p in PATTERNS if p is not collective):
        for i in matcher.roots():
            match = pattern(matcher, i)
            if match is not None:
                matcher.taken |= {*match.calls}
                found.append(match)
    return found


# ---------------------------------------------------------------------------------------- products


def product(m: Matcher, i: int) -> Match | None:
    """x W^T + bias, x W + bias, and a residual that is added to it: `gemm`."""
    root, residual = i, None
    if m.is_op(i, "add") and m.arg(i, "alpha") in (1, None):
        sides = [m.arg(i, "self"), m.arg(i, "other")]
        found = next((s for s in (1, 0) if isinstance(sides[s], Use) and _is_product(m, m.rows_of(sides[s]))), None)
        if found is None or not isinstance(sides[1 - found], Use) or m.storage(sides[0]) == m.storage(sides[1]):
            return None
        residual, made = sides[1 - found], sides[found]
        inner = m.rows_of(made)
        assert inner is not None
        if m.layout(residual) != m.layout(made) or m.layout(m.out(i)) != m.layout(made) or not m.layout(residual).plain:
            return None
        i = inner
    if not _is_product(m, i):
        return None
    x, w, bias, transposed = _operands(m, i)
    k, n = m.layout(w).size[::-1] if transposed else m.layout(w).size
    count = m.layout(x).elements // k
    shape = (count, n)
    for use, wanted in ((x, (count, k)), (residual, shape), (m.out(root), shape)):
        m.want(use, wanted)

    more = [(u, s) for u, s in ((bias, (n,)), (residual, shape)) if u is not None]

    def emit(site: Site) -> str:
        def make(x: tg.Value, w: tg.Value, *rest: tg.Value, name: str) -> tg.Value:
            given = iter(rest)
            first = None if bias is None else next(given)
            return tg.ops.gemm(x, w, first, next(given, None), transpose_w=transposed, name=name)

        operands = [(x, (count, k)), (w, m.layout(w).size), *more]
        return shaped(site, m.call(i).name, operands, m.out(root).leaf, make)

    return m.match([i], root, "gemm", emit)


def _is_product(m: Matcher, i: int | None) -> bool:
    if i is None or not m.is_op(i, "linear", "addmm", "mm"):
        return False
    x, w, bias, _ = _operands(m, i)
    if m.is_op(i, "addmm") and not (m.arg(i, "beta") == m.arg(i, "alpha") == 1):
        return False
    weights = all(u is None or (m.flow.is_whole(u) and m.flow.storage(u).role == "weight") for u in (w, bias))
    plain = m.layout(w).plain and (bias is None or len(m.layout(bias).size) == 1)
    return weights and plain and m.layout(x).plain and m.layout(m.out(i)).plain and len(m.layout(w).size) == 2


def _operands(m: Matcher, i: int) -> tuple[Use, Use, Use | None, bool]:
    if m.is_op(i, "linear"):
        return m.arg(i, "input"), m.arg(i, "weight"), m.arg(i, "bias"), True
    if m.is_op(i, "addmm"):
        return m.arg(i, "mat1"), m.arg(i, "mat2"), m.arg(i, "self"), False
    return m.arg(i, "self"), m.arg(i, "mat2"), None, False


# ------------------------------------------------------------------------------------------- norms


def rms_norm(m: Matcher, i: int) -> Match | None:
    """weight * (x * rsqrt(mean(x^2) + eps)), with or without conversions to f32 and back: `rmsnorm`."""
    if m.is_op(i, "rms_norm"):
        x, weight, eps = m.arg(i, "input"), m.arg(i, "weight"), m.arg(i, "eps")
        if not isinstance(weight, Use) or eps is None or len(m.arg(i, "normalized_shape")) != 1:
            return None
        return _rms_match(m, [], i, x, weight, float(eps))
    if not m.is_op(i, "mul"):
        return None
    sides = (m.arg(i, "self"), m.arg(i, "other"))
    for scaled, weight in (sides, sides[::-1]):
        found = _scaled(m, scaled)
        if found is not None and isinstance(weight, Use) and len(m.layout(weight).size) == 1:
            inner, x, eps = found
            return _rms_match(m, inner, i, x, weight, eps)
    return None


def _scaled(m: Matcher, use: Any) -> tuple[list[int], Use, float] | None:
    """x * rsqrt(mean(x^2, -1) + eps): its calls, x and eps."""
    calls: list[int] = []

    def step(value: Any, *names: str) -> int | None:
        made = m.maker(value)
        if not m.is_op(made, *names):
            return None
        assert made is not None
        calls.append(made)
        return made

    made = m.maker(use)
    if m.is_op(made, "to", "_to_copy"):
        assert made is not None
        calls.append(made)
        use = m.arg(made, "self")
    times = step(use, "mul")
    if times is None:
        return None
    for x, factor in ((m.arg(times, "self"), m.arg(times, "other")), (m.arg(times, "other"), m.arg(times, "self"))):
        before = len(calls)
        root = step(factor, "rsqrt")
        plus = None if root is None else step(m.arg(root, "self"), "add")
        mean = None if plus is None else step(m.arg(plus, "self"), "mean")
        square = None if mean is None else step(m.arg(mean, "self"), "pow")
        if square is None or plus is None or mean is None or not isinstance(m.arg(plus, "other"), (int, float)):
            del calls[before:]
            continue
        last = len(m.layout(m.out(square)).size) - 1
        if m.arg(mean, "keepdim") is not True or m.arg(mean, "dtype") is not None:
            del calls[before:]
            continue
        if m.arg(square, "exponent") != 2 or m.arg(square, "self") != x or m.arg(mean, "dim") not in ([-1], [last]):
            del calls[before:]
            continue
        wide = m.maker(x)
        if m.is_op(wide, "to", "_to_copy"):
            assert wide is not None
            calls.append(wide)
            x = m.arg(wide, "self")
        return calls, x, float(m.arg(plus, "other"))
    return None


def _rms_match(m: Matcher, inner: list[int], i: int, x: Any, weight: Use, eps: float) -> Match | None:
    if not (isinstance(x, Use) and m.layout(x).plain and m.layout(m.out(i)).plain):
        return None
    if m.layout(m.out(i)).dtype != m.layout(x).dtype:
        return None
    width = m.layout(x).size[-1]
    shape = (m.layout(x).elements // width, width)
    if m.layout(weight).size != (width,):
        return None
    m.want(x, shape)
    m.want(m.out(i), shape)

    def emit(site: Site) -> str:
        make = partial(tg.ops.rmsnorm, eps=eps)
        return shaped(site, "rmsnorm", [(x, shape), (weight, (width,))], m.out(i).leaf, make)

    return m.match(inner, i, "rmsnorm", emit)


def layer_norm(m: Matcher, i: int) -> Match | None:
    """torch's layer norm over the last axis: `layer_norm`."""
    if not m.is_op(i, "layer_norm") or len(m.arg(i, "normalized_shape")) != 1:
        return None
    x, weight, bias, eps = (m.arg(i, name) for name in ("input", "weight", "bias", "eps"))
    if not m.layout(x).plain or not m.layout(m.out(i)).plain or (weight is None and bias is not None):
        return None
    width = m.layout(x).size[-1]
    shape = (m.layout(x).elements // width, width)
    m.want(x, shape)
    m.want(m.out(i), shape)
    operands = [(x, shape), *((u, (width,)) for u in (weight, bias) if u is not None)]

    def emit(site: Site) -> str:
        return shaped(site, "layer_norm", operands, m.out(i).leaf, partial(tg.ops.layer_norm, eps=float(eps)))

    return m.match([], i, "layer_norm", emit)


# ------------------------------------------------------------------------------------- look-ups, samples


def embedding(m: Matcher, i: int) -> Match | None:
    """Rows of a table: `embedding`."""
    if not m.is_op(i, "embedding"):
        return None
    table, tokens = m.arg(i, "weight"), m.arg(i, "indices")
    if not m.layout(tokens).plain or m.flow.storage(table).role != "weight" or not m.flow.is_whole(table):
        return None
    count = m.layout(tokens).elements
    m.want(tokens, (count,))
    m.want(m.out(i), (count, m.layout(table).size[-1]))

    def emit(site: Site) -> str:
        operands = [(tokens, (count,)), (table, m.layout(table).size)]
        return shaped(site, "embedding", operands, m.out(i).leaf, tg.ops.embedding)

    return m.match([], i, "embedding", emit)


def argmax(m: Matcher, i: int) -> Match | None:
    """The place of the largest of the last axis: `argmax`."""
    if not m.is_op(i, "argmax") or not m.layout(m.arg(i, "self")).plain:
        return None
    x = m.arg(i, "self")
    size = m.layout(x).size
    if m.arg(i, "dim") not in (-1, len(size) - 1) or not size:
        return None
    shape = (m.layout(x).elements // size[-1], size[-1])
    m.want(x, shape)
    m.want(m.out(i), shape[:1])

    def emit(site: Site) -> str:
        return shaped(site, "argmax", [(x, shape)], m.out(i).leaf, tg.ops.argmax)

    return m.match([], i, "argmax", emit)


PATTERNS: Final[tuple[Pattern, ...]] = (
    attention, experts, rotary, rms_norm, layer_norm, product, embedding, argmax, standard.softmax, standard.product,
    standard.reduction, standard.join, standard.pick, standard.look_up, standard.repetition,
    standard.transposing_copy, collective, pointwise,
)  # fmt: skip
