"""Pointwise calls, and chains of them, as one `elementwise` op whose attribute is a formula.

Where operands are views that do not lie row by row, the op is an `aten.elementwise`: the same formula, whose operands
are views that are taken once, at capture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

import taskgraph as tg
from taskgraph.embed.calls import Strided, our_dtype
from taskgraph.embed.flow import Leaf, Use, View
from taskgraph.embed.lower import Match, Site, named, viewed
from taskgraph.embed.match import Matcher
from taskgraph.errors import GraphError
from taskgraph.ops.formula import MOST_INPUTS, MOST_STEPS, formula
from taskgraph.ops.pointwise import broadcast

VIEWED: Final = "aten.elementwise"
"""The kind of a formula over views; `taskgraph.embed.kinds` registers it."""
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDS: Final = {torch.bfloat16: "bf16", torch.float16: "f16"}
"""The step that rounds as torch does after each call."""
_CHANNEL: Final = "@"
"""Before the name of an argument that has an element a channel."""
_MOST_STEPS: Final = MOST_STEPS // 2

Words = tuple[tuple[str, ...], ...]
"""Steps: an operation and its arguments, which are names of the call's arguments, numbers, or "<" for the last step and
"<<" for the one before."""


def _one(name: str) -> Callable[[Matcher, int], Words | None]:
    return lambda m, i: ((name, "self"),)


def _two(name: str) -> Callable[[Matcher, int], Words | None]:
    def rule(m: Matcher, i: int) -> Words | None:
        alpha = m.arg(i, "alpha")
        if alpha in (None, 1):
            return ((name, "self", "other"),)
        return (("mul", "other", repr(float(alpha))), (name, "self", "<"))

    return rule


def _div(m: Matcher, i: int) -> Words | None:
    return None if m.arg(i, "rounding_mode") is not None else (("div", "self", "other"),)


def _rsub(m: Matcher, i: int) -> Words | None:
    return (("sub", "other", "self"),) if m.arg(i, "alpha") in (None, 1) else None


def _pow(m: Matcher, i: int) -> Words | None:
    exponent = m.arg(i, "exponent")
    if exponent == 2:
        return (("mul", "self", "self"),)
    if exponent == 3:
        return (("mul", "self", "self"), ("mul", "<", "self"))
    return None if isinstance(exponent, Use) else (("pow", "self", "exponent"),)


def _gelu(m: Matcher, i: int) -> Words | None:
    return (("gelu_tanh" if m.arg(i, "approximate") == "tanh" else "gelu", "self"),)


def _truths(name: str) -> Callable[[Matcher, int], Words | None]:
    """Of truths alone: on integers these work bit by bit."""

    def rule(m: Matcher, i: int) -> Words | None:
        uses = m.call(i).uses()
        if any(m.layout(u).dtype != torch.bool for u in uses):
            return None
        return ((name, "self", "other") if len(uses) == 2 else (name, "self"),)

    return rule


def _where(m: Matcher, i: int) -> Words | None:
    return (("where", "condition", "self", "other"),)


def _masked(m: Matcher, i: int) -> Words | None:
    return (("where", "mask", "value", "self"),)


def _softplus(m: Matcher, i: int) -> Words | None:
    """log(1 + exp(x)), and x itself where that is the same (torch's threshold)."""
    if m.arg(i, "beta") != 1:
        return None
    threshold = repr(float(m.arg(i, "threshold")))
    return (("exp", "self"), ("log1p", "<"), ("gt", "self", threshold), ("where", "<", "self", "<<"))


def _clamp(m: Matcher, i: int) -> Words | None:
    low, high = m.arg(i, "min"), m.arg(i, "max")
    steps = [] if low is None else [("maximum", "self", "min")]
    if high is not None:
        steps.append(("minimum", "<" if steps else "self", "max"))
    return tuple(steps)


def _batch_norm(m: Matcher, i: int) -> Words | None:
    """(x - mean) / sqrt(var + eps) * weight + bias, each channel its own (Ioffe and Szegedy 2015), as in inference."""
    if m.arg(i, "training") or m.arg(i, "running_mean") is None or len(m.layout(m.arg(i, "input")).size) < 2:
        return None
    steps = [
        ("add", f"{_CHANNEL}running_var", repr(float(m.arg(i, "eps")))), ("rsqrt", "<"),
        ("sub", "input", f"{_CHANNEL}running_mean"), ("mul", "<", "<<"),
    ]  # fmt: skip
    for name, step in (("weight", "mul"), ("bias", "add")):
        if m.arg(i, name) is not None:
            steps.append((step, "<", _CHANNEL + name))
    return tuple(steps)


def _per_channel(m: Matcher, i: int, name: str) -> Use:
    """An argument (channels,) of call i as a view that broadcasts along the second axis of its result."""
    use: Use = m.arg(i, name)
    count = m.layout(use).elements
    size = (count, *(1 for _ in m.layout(m.out(i)).size[2:]))
    layout = Strided(size, tuple(1 for _ in size), m.layout(use).dtype)
    view = View(use.leaf, torch.ops.aten.view.default, ([*size],), {})
    m.flow.leaves.append(Leaf(m.storage(use), layout, view, m.flow.leaves[use.leaf].offset))
    return Use(len(m.flow.leaves) - 1, use.version)


def _to(m: Matcher, i: int) -> Words | None:
    made = m.layout(m.out(i)).dtype
    return ((_ROUNDS.get(made, "copy"), "self"),)


_RULES: Final[Mapping[str, Callable[[Matcher, int], Words | None]]] = {
    "add": _two("add"), "sub": _two("sub"), "mul": _two("mul"), "div": _div, "rsub": _rsub, "pow": _pow,
    "maximum": _two("maximum"), "minimum": _two("minimum"), "gelu": _gelu, "where": _where,
    "masked_fill": _masked, "softplus": _softplus, "clamp": _clamp, "clamp_min": _clamp, "to": _to, "_to_copy": _to,
    **{name: _one(name) for name in (
        "neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "erf", "relu",
        "silu", "floor", "ceil",
    )},
    **{name: _two(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "batch_norm": _batch_norm,
    "logical_and": _truths("and"), "__and__": _truths("and"), "bitwise_and": _truths("and"),
    "logical_or": _truths("or"), "__or__": _truths("or"), "bitwise_or": _truths("or"),
    "logical_not": _truths("not"), "bitwise_not": _truths("not"),
}  # fmt: skip
"""What each pointwise operator is as steps of a formula; None where it is not."""


@dataclass(slots=True)
class _Chain:
    """A formula in the making."""

    inputs: list[Use] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)


def pointwise(m: Matcher, i: int) -> Match | None:
    """A pointwise call with those before it that nobody else needs: one formula."""
    if not _fits(m, i):
        return None
    chain = _Chain()
    if not _append(m, i, i, chain):
        return None
    chain.calls.remove(i)
    text = "; ".join(chain.steps)
    try:
        formula(text)
    except GraphError:  # too many values at once: the root alone
        chain = _Chain()
        _append(m, i, i, chain, alone=True)
        chain.calls.remove(i)
        text = "; ".join(chain.steps)
    out = m.out(i)
    dtype = our_dtype(m.layout(out).dtype)
    inputs = tuple(chain.inputs)

    def emit(site: Site) -> str:
        wanted = _shape(m, site, inputs, out)
        if all(_plain(m, site, u, out, wanted) for u in inputs) and m.layout(out).plain:
            values = [site.value(u) for u in inputs]
            if broadcast([v.shape for v in values]) == wanted:
                return named(
                    site, out.leaf, lambda n: tg.ops.elementwise(text, values, out_dtype=dtype, name=n), m.call(i).name
                )
        return viewed(
            site,
            VIEWED,
            m.call(i).name,
            inputs,
            out.leaf,
            {"formula": text, "out_dtype": str(dtype)},
            _work(m, inputs, out, text),
        )

    return m.match(chain.calls, i, "elementwise", emit)


def _work(m: Matcher, inputs: tuple[Use, ...], out: Use, text: str) -> tg.Work:
    from taskgraph.embed.work import seen_bytes

    moved = sum(seen_bytes(m.layout(u)) for u in inputs) + m.layout(out).nbytes
    return tg.Work(flops=formula(text).flops * m.layout(out).elements, hbm_bytes=float(moved))


def _shape(m: Matcher, site: Site, inputs: tuple[Use, ...], out: Use) -> tuple[int, ...]:
    """The output's shape in the graph: what an op wants, else that of an operand of all its elements, else rows."""
    wanted, size = site.wanted(out.leaf), m.layout(out).size
    if wanted is None:
        alike = (site.value(u).shape for u in inputs if m.layout(u).size == size and m.same_rows(u))
        wanted = next(alike, None)
    return m.layout(out).spec(wanted)[0]


def _plain(m: Matcher, site: Site, use: Use, out: Use, wanted: tuple[int, ...]) -> bool:
    """Whether the tensor of the graph broadcasts to the output, of shape `wanted`, as torch's tensor does."""
    if not m.same_rows(use):
        return False
    size, full = m.layout(use).size, m.layout(out).size
    shape = site.value(use).shape
    if size == full:
        return shape == wanted
    return len(size) <= 1 and shape == size


def _fits(m: Matcher, i: int) -> bool:
    call = m.call(i)
    if call.target.namespace != "aten" or call.target._opname not in _RULES or not call.single or call.changes:
        return False
    uses = call.uses()
    if not uses or len(call.results) != 1 or call.results[0] is None:
        return False
    made = m.layout(m.out(i))
    kinds = [m.layout(u).dtype for u in uses]
    known = all(kind in _FLOATS or kind == torch.bool for kind in [*kinds, made.dtype])
    return known and any(kind in _FLOATS for kind in [*kinds, made.dtype]) and made.dense and made.elements > 0


def _append(m: Matcher, i: int, root: int, chain: _Chain, alone: bool = False) -> bool:
    """Append the steps of call i, and before them those of the calls that only it needs."""
    words = _RULES[m.call(i).target._opname](m, i)
    if words is None:
        return False
    names: dict[str, str] = {}
    for word in dict.fromkeys(w for step in words for w in step[1:]):
        if word[0] in "<-0123456789":
            continue
        value = _per_channel(m, i, word[1:]) if word[0] == _CHANNEL else m.arg(i, word)
        if isinstance(value, Use):
            names[word] = _operand(m, value, i, root, chain, alone)
        elif isinstance(value, (bool, int, float)):
            names[word] = repr(float(value))
        else:
            return False
    for step in words:
        given = [f"s{len(chain.steps) - len(w)}" if w[0] == "<" else names.get(w, w) for w in step[1:]]
        chain.steps.append(" ".join((step[0], *given)))
    rounds = _ROUNDS.get(m.layout(m.out(i)).dtype)
    if rounds is not None and i != root and words[-1][0] != rounds:
        chain.steps.append(f"{rounds} s{len(chain.steps) - 1}")
    chain.calls.append(i)
    return len(chain.inputs) <= MOST_INPUTS and all(isinstance(u, Use) for u in chain.inputs)


def _operand(m: Matcher, value: Use, i: int, root: int, chain: _Chain, alone: bool) -> str:
    made = m.maker(value)
    if made is not None and not alone and _joins(m, made, i, root, chain):
        kept = (list(chain.inputs), list(chain.steps), list(chain.calls))
        if _append(m, made, root, chain):
            return f"s{len(chain.steps) - 1}"
        chain.inputs, chain.steps, chain.calls = kept
    if value not in chain.inputs:
        chain.inputs.append(value)
    return f"x{chain.inputs.index(value)}"


def _joins(m: Matcher, made: int, taker: int, root: int, chain: _Chain) -> bool:
    return (
        _fits(m, made)
        and m.layout(m.out(made)).size == m.layout(m.out(root)).size
        and m.only_for(made, [taker])
        and m.steady(made, root)
        and len(chain.steps) < _MOST_STEPS
        and len(chain.inputs) < MOST_INPUTS - 2
    )
