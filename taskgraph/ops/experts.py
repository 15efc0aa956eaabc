"""Mixture-of-experts ops: which experts a token goes to, the experts' products, and the shared expert's gate.

Routing is one matrix (tokens, experts) of weights, zero where a token does not go: a rank that holds some experts
takes their columns, and slices of the batch take rows.
"""

import math
from dataclasses import dataclass

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Value
from taskgraph.graph.op import ITEMSIZE, Work
from taskgraph.ops.kinds import Axes, Kind, Output, apply, axis_of, register, row_work
from taskgraph.ops.signatures import (
    COUNT,
    FLAG,
    NUMBER,
    PLACE,
    WORD,
    Attrs,
    Shapes,
    Signature,
    moved,
    need,
    need_floats,
)
from taskgraph.record import instance, integer, number

SCORINGS = ("softmax", "sigmoid")


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """How a token's `top_k` experts are chosen and weighed (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Scores are the softmax of the logits over experts or their sigmoid (`scoring`). With `groups`, only the `top_groups`
    whose two best experts sum highest are in the choice. Weights that are `normalize`d sum to 1 a token; then `scale`.
    A rank that holds some of the experts keeps the columns of those, `held` from `first` on (None: all from there).
    """

    top_k: int
    scoring: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    first: int = 0
    held: int | None = None


def route(
    logits: Value,
    correction: Value | None = None,
    slots: Value | None = None,
    *,
    spec: RouteSpec,
    name: str | None = None,
) -> Value:
    """Weights f32 (tokens, experts) of the `top_k` experts of every token, zero elsewhere.

    `correction` (experts,) counts in the choice, not in the weights. A token whose entry of `slots` (tokens,) i32 is
    below 0 stands for nothing and goes nowhere.
    """
    given = instance("spec of route", spec, RouteSpec, GraphError)
    rest = axis_of("route", "logits", logits, -1) - integer("first of route", given.first, GraphError, 0)
    attrs = Attrs(top_k=given.top_k, scoring=given.scoring, normalize=given.normalize)
    attrs |= {"scale": number("scale", given.scale, GraphError), "groups": given.groups, "top_groups": given.top_groups}
    attrs |= {"first": given.first, "held": rest if given.held is None else given.held}
    return apply("route", [logits, *(v for v in (correction, slots) if v is not None)], attrs, name=name)


def route_shape(ins: Shapes, attrs: Attrs) -> Output:
    logits, *rest = ins
    correction, slots = ([t for t in rest if (t.dtype == "i32") is whether] for whether in (False, True))
    need(len(logits.shape) == 2, "route", ins, "logits must be (tokens, experts)")
    need_floats("route", ins, logits)
    need(len(correction) <= 1 and len(slots) <= 1, "route", ins, "there is at most one correction and one of slots")
    need(all(t.dtype == "f32" for t in correction), "route", ins, "the correction must be f32 and slots i32")
    need(all(t.shape == logits.shape[:1] for t in slots), "route", ins, "slots have one entry a token")
    count, top, groups, kept = logits.shape[1], *(attrs.integer(key) for key in ("top_k", "groups", "top_groups"))
    need(all(t.shape == (count,) for t in correction), "route", ins, f"the correction must be ({count},)")
    need(attrs["scoring"] in SCORINGS, "route", ins, f"scoring is one of {', '.join(SCORINGS)}")
    need(groups >= 1 and count % groups == 0, "route", ins, f"{count} experts do not make {groups} equal groups")
    need(1 <= kept <= groups, "route", ins, f"{kept} of {groups} groups cannot be kept")
    need(groups == 1 or count // groups >= 2, "route", ins, "a group is scored by its two best experts; it has one")
    need(1 <= top <= kept * (count // groups), "route", ins, f"{kept} groups do not hold the top {top} experts")
    first, held = attrs.integer("first"), attrs.integer("held")
    need(0 <= first < first + held <= count, "route", ins, f"experts {first}:{first + held} of {count} do not exist")
    return (logits.shape[0], held), "f32"


def route_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """A score and a look at each choice's maximum, an expert and token."""
    return Work(flops=(2.0 + attrs.integer("top_k")) * math.prod(ins[0].shape), hbm_bytes=moved(ins) + moved(outs))


def route_split(ins: Shapes, attrs: Attrs) -> Axes:
    """A correction is for all, slots are one a token."""
    return 0, *(0 if t.dtype == "i32" else None for t in ins[1:])


_GROUPS = {"groups": COUNT, "top_groups": COUNT, "first": PLACE, "held": COUNT}
_ROUTE = {"top_k": COUNT, "scoring": WORD, "normalize": FLAG, "scale": NUMBER, **_GROUPS}
register(Kind("route", Signature("211", _ROUTE, spare=2), route_shape, route_work, route_split))


def experts(
    x: Value,
    routing: Value,
    gate_up: Value,
    down: Value,
    residual: Value | None = None,
    *,
    top_k: int,
    ranks: int = 1,
    name: str | None = None,
) -> Value:
    """residual + sum over the experts e of a token of routing[e] * (silu(gate_e x) * (up_e x)) down_e, x (m, hidden).

    Two grouped products over the rows that each expert gets (MegaBlocks, Gale et al. 2022): gate_up (experts,
    2 * inner, hidden), gate first, and down (experts, hidden, inner). A row of `routing` has
    at most `top_k` entries that are not zero, and so many the cost counts, or the share of one rank where the experts
    of all `ranks` are as many times as many.
    """
    inputs = [x, routing, gate_up, down, *([residual] if residual is not None else [])]
    return apply("experts", inputs, {"top_k": top_k, "ranks": ranks}, name=name)


def experts_shape(ins: Shapes, attrs: Attrs) -> Output:
    x, routing, gate_up, down, *residual = ins
    need_floats("experts", ins, x)
    need(len(x.shape) == 2, "experts", ins, "x must be (tokens, hidden)")
    need(len(gate_up.shape) == len(down.shape) == 3, "experts", ins, "gate_up and down must have an expert axis")
    (tokens, hidden), (count, _, inner) = x.shape, down.shape
    need(routing.shape == (tokens, count), "experts", ins, f"routing must be ({tokens}, {count})")
    need(gate_up.shape == (count, 2 * inner, hidden), "experts", ins, "gate_up must be (experts, 2 * inner, hidden)")
    need(down.shape[1] == hidden, "experts", ins, "down must be (experts, hidden, inner)")
    need(x.dtype == gate_up.dtype == down.dtype, "experts", ins, "dtypes of x and the weights differ")
    need(routing.dtype == "f32", "experts", ins, "routing must be f32, as `route` makes it")
    need(all((t.shape, t.dtype) == (x.shape, x.dtype) for t in residual), "experts", ins, "residual must be like x")
    need(min(attrs.integer(k) for k in ("top_k", "ranks")) >= 1, "experts", ins, "top_k and ranks must be at least 1")
    return x.shape, x.dtype


def experts_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    """Three products a token and expert that it goes to; the weights of every expert that a token goes to, once."""
    x, _, gate_up, _, *_ = ins
    tokens, hidden = x.shape
    held, width, _ = gate_up.shape
    top, ranks = attrs.integer("top_k"), attrs.integer("ranks")
    each = 1.5 * width * hidden
    weights = active_experts(tokens, top, held * ranks) / ranks * each * ITEMSIZE[gate_up.dtype]
    others = moved([*ins[:2], *ins[4:], *outs])
    return Work(flops=2.0 * tokens * top / ranks * each, hbm_bytes=weights + others)


def active_experts(tokens: int, top_k: int, experts: int) -> float:
    """Experts that at least one of `tokens` goes to, expected under uniform routing: each token leaves one out with
    probability 1 - top_k / experts (the occupancy problem, Feller 1968)."""
    return experts * (1.0 - (1.0 - min(top_k / experts, 1.0)) ** tokens)


_EXPERTS = Signature("22332", {"top_k": COUNT, "ranks": COUNT}, spare=1)
register(Kind("experts", _EXPERTS, experts_shape, experts_work, split=(0, 0, None, None, 0)))


def gated_add(x: Value, gate: Value, base: Value, *, name: str | None = None) -> Value:
    """base + sigmoid(gate) * x, gate (m, 1): the shared expert of Qwen2-MoE."""
    return apply("gated_add", [x, gate, base], name=name)


def gated_add_shape(ins: Shapes, attrs: Attrs) -> Output:
    x, gate, base = ins
    need_floats("gated_add", ins, x)
    need(len(x.shape) == 2, "gated_add", ins, "x must be (tokens, features)")
    need(gate.shape == (x.shape[0], 1), "gated_add", ins, "the gate must be (tokens, 1)")
    need((base.shape, base.dtype, gate.dtype) == (x.shape, x.dtype, x.dtype), "gated_add", ins, "base must be like x")
    return x.shape, x.dtype


register(Kind("gated_add", Signature("222"), gated_add_shape, row_work(2.0), split=(0, 0, 0)))
