"""Mixtures of experts as transformers writes them, by gathered weights ("batched_mm") and by sorted rows
("grouped_mm"): `experts`, behind `route` where the router is one that it knows."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

import taskgraph as tg
from taskgraph.embed.calls import Strided, text_of
from taskgraph.embed.flow import Use
from taskgraph.embed.lower import Match, NoFit, Recognised, Site, operand_texts
from taskgraph.embed.match import Matcher
from taskgraph.ops import RouteSpec

ROUTING: Final = "aten.routing"
"""The kind that makes a matrix of weights of places and weights; `taskgraph.embed.kinds` registers it."""
_COPIES: Final = ("to", "_to_copy")


@dataclass(slots=True)
class _Found:
    """Calls of a mixture of experts: x (t, h) and its rows' experts and weights (t, k), and the experts' weights."""

    calls: list[int] = field(default_factory=list)
    x: Any = None
    places: Any = None
    weights: Any = None
    gate_up: Any = None
    down: Any = None
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class _Router:
    calls: list[int]
    logits: Use
    normalize: bool


def experts(m: Matcher, i: int) -> Match | None:
    """The sum over a token's experts of weight * down(silu(gate x) * up x): `experts`."""
    last = m.maker(m.arg(i, "self")) if m.is_op(i, *_COPIES) else i
    if last is None or not m.is_op(last, "sum") or m.arg(last, "dim") not in ([1], [-2]) or m.arg(last, "keepdim"):
        return None
    parts = m.arg(last, "self")
    size = m.layout(parts).size
    if len(size) != 3 or m.layout(parts).dtype != m.layout(m.out(last)).dtype or not m.layout(m.out(i)).plain:
        return None
    for form in (_gathered, _sorted):
        found = form(m, parts)
        if found is None or found.top_k != size[1] or not _fits(m, found, size):
            continue
        if m.layout(found.x).dtype != m.layout(m.out(i)).dtype:
            return None
        found.calls += [last] if last != i else []
        router = _router(m, found)
        if router is not None and _closed(m, [*found.calls, *router.calls], i):
            return _match(m, i, found, router)
        return _match(m, i, found, None) if _closed(m, found.calls, i) else None
    return None


def _fits(m: Matcher, found: _Found, size: tuple[int, ...]) -> bool:
    tokens, top_k, hidden = size
    count, wide, _ = m.layout(found.gate_up).size
    return (
        m.layout(found.x).size == (tokens, hidden)
        and m.layout(found.down).size == (count, hidden, wide // 2)
        and m.layout(found.places).elements == m.layout(found.weights).elements == tokens * top_k
        and all(m.layout(u).plain for u in (found.x, found.places, found.weights, found.gate_up, found.down))
        and all(m.flow.storage(u).role == "weight" and m.flow.is_whole(u) for u in (found.gate_up, found.down))
        and m.layout(found.x).dtype == m.layout(found.gate_up).dtype == m.layout(found.down).dtype
        and m.layout(found.places).dtype == torch.int64
    )


def _match(m: Matcher, i: int, found: _Found, router: _Router | None) -> Match:
    tokens, hidden = m.layout(found.x).size
    count, top_k = m.layout(found.gate_up).size[0], found.top_k
    m.want(found.x, (tokens, hidden))
    m.want(m.out(i), (tokens, hidden))
    calls = [*found.calls, *(router.calls if router is not None else [])]
    if router is not None:
        m.want(router.logits, (tokens, count))

    def emit(site: Site) -> str:
        if any(site.value(u).shape != m.layout(u).size for u in (found.x, found.gate_up, found.down)):
            raise NoFit
        if router is not None and site.value(router.logits).shape != (tokens, count):
            raise NoFit
        name = site.free_name("routing")
        if router is not None:
            spec = RouteSpec(top_k, normalize=router.normalize)
            routing = tg.ops.route(site.value(router.logits), spec=spec, name=name)
        else:
            routing = _routing(site, found, (tokens, count), name)
        site.recognised.append(Recognised(name, "route" if router is not None else ROUTING, ()))
        operands = [site.value(u) for u in (found.x, found.gate_up, found.down)]
        made = site.free_name("experts")
        site.make(m.out(i).leaf, tg.ops.experts(operands[0], routing, *operands[1:], top_k=top_k, name=made))
        return made

    return Match((*sorted(calls), i), "experts", emit)


def _routing(site: Site, found: _Found, shape: tuple[int, int], name: str) -> tg.Value:
    """A matrix (t, experts) of the weights, zero where a token does not go."""
    rows = (shape[0], found.top_k)
    values, body = operand_texts(site, [found.places, found.weights], [rows, rows])
    body["out"] = [Strided(shape, (shape[1], 1), torch.float32).to_json()]
    work = tg.Work(flops=float(rows[0] * rows[1]), hbm_bytes=float(4 * shape[0] * shape[1] + 16 * rows[0] * rows[1]))
    spec = tg.spec(f"{name}.out", shape, "f32")
    (made,) = site.builder.op((ROUTING, {"program": text_of(body)}), values, [spec], work, name)
    return made


def _closed(m: Matcher, calls: Iterable[int], root: int) -> bool:
    """Whether these calls may be left out for an op at `root`: nothing else needs or changes what they make or read."""
    group = {*calls, root}
    for i in group - {root}:
        call = m.call(i)
        if i in m.taken or not m.only_for(i, group):
            return False
        for storage in {m.storage(u) for u in call.uses()} | {s for s, _ in call.changes}:
            outside = [c for c in m.changed.get(storage, ()) if c not in group]
            if any(i < c < root for c in outside):
                return False
        if any(m.made.get(s) not in group for s, _ in call.changes):
            return False
    return True


# ------------------------------------------------------------------------------------------ two ways to write it


def _gathered(m: Matcher, parts: Use) -> _Found | None:
    """Each row times its expert's weights, which are gathered for it."""
    found = _Found()
    weighed = _step(m, found, m.rows_of(parts), "mul")
    if weighed is None:
        return None
    for made, weights in _sides(m, weighed):
        down = _gathered_product(m, found, m.rows_of(made))
        if down is None:
            continue
        found.down, places, inner = down
        up = _gathered_product(m, found, _halves(m, found, m.rows_of(inner)))
        repeated = None if up is None else _step(m, found, m.rows_of(up[2]), "repeat_interleave")
        if up is None or repeated is None or up[1] != places:
            return None
        found.gate_up, found.places, found.weights = up[0], places, weights
        found.x, found.top_k = m.arg(repeated, "self"), m.arg(repeated, "repeats")
        return found if m.arg(repeated, "dim") == 0 else None
    return None


def _gathered_product(m: Matcher, found: _Found, i: int | None) -> tuple[Use, Use, Use] | None:
    """bmm(weights[places], rows): the weights, places and rows."""
    product = _step(m, found, i, "bmm")
    picked = None if product is None else _step(m, found, m.maker(m.arg(product, "self")), "index")
    if product is None or picked is None or len(m.arg(picked, "indices")) != 1:
        return None
    (places,) = m.arg(picked, "indices")
    return m.arg(picked, "self"), places, m.arg(product, "mat2")


def _sorted(m: Matcher, parts: Use) -> _Found | None:
    """Rows sorted by their experts, a product of each expert with its own, and the rows back in order."""
    found = _Found()
    back = _step(m, found, m.rows_of(parts), "index")
    weighed = None if back is None else _step(m, found, m.maker(m.arg(back, "self")), "mul")
    if back is None or weighed is None:
        return None
    for made, weights in _sides(m, weighed):
        down = _grouped_product(m, found, m.rows_of(made))
        if down is None:
            continue
        inner, found.down, ends = down
        up = _grouped_product(m, found, _halves(m, found, m.rows_of(inner)))
        if up is None or up[2] != ends:
            return None
        rows, found.gate_up, _ = up
        order = _order(m, found, ends)
        picked, drawn = (_at(m, found, m.rows_of(u)) for u in (rows, weights))
        if order is None or picked is None or drawn is None or drawn[1] != order:
            return None
        found.x, found.weights = picked[0], drawn[0]
        divided = _step(m, found, m.maker(picked[1]), "floor_divide")
        if divided is None or m.arg(divided, "self") != order or not isinstance(m.arg(divided, "other"), int):
            return None
        found.top_k = m.arg(divided, "other")
        return found if _undone(m, found, m.arg(back, "indices"), order) else None
    return None


def _grouped_product(m: Matcher, found: _Found, i: int | None) -> tuple[Use, Use, Use] | None:
    """A grouped product with transposed weights: the rows, the weights as they lie, and where groups end."""
    if i is None or i in m.taken or m.call(i).target._opname not in ("grouped_mm_fallback", "_grouped_mm"):
        return None
    call = m.call(i)
    if len(call.args) != 3 or call.kwargs or not all(isinstance(u, Use) for u in call.args):
        return None
    rows, weights, ends = call.args
    view = m.flow.leaves[weights.leaf].view
    base = None if view is None else Use(view.base, weights.version)
    if base is None or m.layout(base).size != (m.layout(weights).size[0], *m.layout(weights).size[:0:-1]):
        return None
    if m.layout(weights).stride != (m.layout(base).stride[0], 1, m.layout(base).stride[1]):
        return None
    found.calls.append(i)
    return rows, base, ends


def _order(m: Matcher, found: _Found, ends: Use) -> Use | None:
    """cumsum(histc(sorted places)): the order in which they are sorted; the places are found too."""
    summed = _step(m, found, m.maker(ends), "cumsum")
    counted = None if summed is None else _step(m, found, m.maker(m.arg(summed, "self")), "histc")
    if summed is None or counted is None or m.arg(summed, "dim") not in (0, -1):
        return None
    count = m.layout(found.gate_up).size[0]
    if [m.arg(counted, name) for name in ("bins", "min", "max")] != [count, 0, count - 1]:
        return None
    floats = _step(m, found, m.maker(m.arg(counted, "self")), *_COPIES)
    if floats is None:
        return None
    ordered = m.made.get(m.storage(m.arg(floats, "self")))
    if _step(m, found, ordered, "sort") is None or ordered is None or m.arg(ordered, "descending"):
        return None
    values, order = (Use(leaf, 0) for leaf in m.call(ordered).results if leaf is not None)
    found.places = m.arg(ordered, "self")
    return order if m.arg(floats, "self") == values and len(m.layout(found.places).size) == 1 else None


def _at(m: Matcher, found: _Found, i: int | None) -> tuple[Use, Use] | None:
    """A tensor at one index: both."""
    picked = _step(m, found, i, "index")
    if picked is None or len(m.arg(picked, "indices")) != 1:
        return None
    return m.arg(picked, "self"), m.arg(picked, "indices")[0]


def _undone(m: Matcher, found: _Found, indices: list[Any], order: Use) -> bool:
    """Whether the one index is the inverse of `order`: an empty tensor, of which that at `order` is set to 0, 1, ..."""
    if len(indices) != 1 or not isinstance(indices[0], Use) or not m.flow.is_whole(indices[0]):
        return False
    number = m.storage(indices[0])
    made, changed = m.made.get(number), m.changed.get(number, [])
    if made is None or len(changed) != 1 or not m.is_op(changed[0], "index_put_"):
        return False
    put = changed[0]
    count = m.flow.storage(m.arg(put, "values")).value
    if m.arg(put, "indices") != [order] or m.arg(put, "accumulate") or count is None:
        return False
    found.calls += [made, put]
    return m.call(made).target._opname == "empty_like" and torch.equal(count, torch.arange(len(count)))


# ----------------------------------------------------------------------------------------------- shared


def _step(m: Matcher, found: _Found, i: int | None, *names: str) -> int | None:
    """Call i, now one of what was found, if it is one of these names."""
    if i is None or not m.is_op(i, *names):
        return None
    found.calls.append(i)
    return i


def _sides(m: Matcher, i: int) -> tuple[tuple[Use, Use], ...]:
    a, b = m.arg(i, "self"), m.arg(i, "other")
    return ((a, b), (b, a)) if isinstance(a, Use) and isinstance(b, Use) else ()


def _halves(m: Matcher, found: _Found, i: int | None) -> int | None:
    """silu(first half) * second half of one tensor's rows: the call that makes it."""
    times = _step(m, found, i, "mul")
    if times is None:
        return None
    for gated, up in _sides(m, times):
        gate = m.rows_of(gated)
        if not m.is_op(gate, "silu"):
            continue
        assert gate is not None
        first = m.arg(gate, "self")
        (rows, inner), one, two = m.layout(up).size, m.flow.leaves[first.leaf], m.flow.leaves[up.leaf]
        whole = m.flow.leaves[m.flow.storage(up).whole].layout
        apart = one.storage == two.storage and (one.offset, two.offset) == (0, inner)
        steps = one.layout.stride == two.layout.stride == (2 * inner, 1) and one.layout.size == (rows, inner)
        if apart and steps and whole.plain and whole.elements == 2 * rows * inner and one.storage not in m.changed:
            found.calls.append(gate)
            return m.made.get(one.storage)
    return None


def _router(m: Matcher, found: _Found) -> _Router | None:
    """softmax, the largest, and weights that sum to 1 or not: what `route` does."""
    top = m.made.get(m.storage(found.places))
    if not m.is_op(top, "topk") or top is None or not m.arg(top, "largest"):
        return None
    values, places = (m.flow.leaves[leaf].storage for leaf in m.call(top).results if leaf is not None)
    if m.storage(found.places) != places or places in m.changed:
        return None
    inner = _Found([top])
    number, made = m.storage(found.weights), m.made.get(m.storage(found.weights))
    if m.is_op(made, *_COPIES) and made is not None:
        inner.calls.append(made)
        number = m.storage(m.arg(made, "self"))
        made = m.made.get(number)
    scaled = m.changed.get(number, [])
    normalize = bool(scaled) or number != values
    if normalize:
        by = scaled[0] if scaled else made
        if not m.is_op(by, "div_", "div") or by is None or len(scaled) > 1:
            return None
        total = _step(m, inner, m.maker(m.arg(by, "other")), "sum")
        both = {m.storage(u) for u in (m.arg(by, "self"), m.arg(total, "self"))} if total is not None else set()
        if total is None or both != {values} or m.arg(total, "dim") not in ([-1], [1]) or not m.arg(total, "keepdim"):
            return None
        inner.calls.append(by)
    probabilities = m.arg(top, "self")
    soft = _step(m, inner, m.maker(probabilities), "softmax", "_softmax")
    size = m.layout(probabilities).size
    if soft is None or len(size) != 2 or m.arg(top, "dim") not in (-1, 1) or m.arg(soft, "dim") not in (-1, 1):
        return None
    logits = m.arg(soft, "self")
    wide = m.maker(logits)
    if m.is_op(wide, *_COPIES) and wide is not None:
        inner.calls.append(wide)
        logits = m.arg(wide, "self")
    known = m.layout(probabilities).dtype == torch.float32 and m.layout(logits).plain
    fits = m.arg(top, "k") == found.top_k and size[1] == m.layout(found.gate_up).size[0]
    return _Router(inner.calls, logits, normalize) if known and fits else None
