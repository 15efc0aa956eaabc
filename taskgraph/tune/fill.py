"""Values for the tensors that a measurement needs and nobody gave: random, of the right dtype, valid as indices."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Tensor, seen_inputs
from taskgraph.ops.kinds import KINDS, Range
from taskgraph.ops.signatures import Attrs
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE

_DATA: Range = (1, 8)


def fill(graph: Graph, given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A value for every input, weight and state of a flat graph: the caller's own, else drawn from `seed`.

    Floats are normal, matrices among the weights scaled by one over the root of their row length. Integers are token
    numbers and positions where an op's kind says so (`Kind.index_ranges`), else data from 1 to 7: give your own where a
    custom op takes them as an index into something smaller. States that the caller gave are copied, because replays
    change them.
    """
    draw = torch.Generator().manual_seed(seed)
    ranges = _ranges(graph)
    values = dict(given)
    for t in graph.with_role("input", "weight", "state"):
        if t.name not in values:
            values[t.name] = _drawn(t, ranges.get(t.name, _DATA), draw)
        elif t.role == "state":
            value = values[t.name]
            tensor = value if isinstance(value, torch.Tensor) else torch.utils.dlpack.from_dlpack(value)
            values[t.name] = tensor.clone()
    return values


def _ranges(graph: Graph) -> dict[str, Range]:
    """The range of every index tensor: what all of its readers allow."""
    found: dict[str, Range] = {}
    for op in graph.ops:
        rules = KINDS[op.kind].index_ranges if op.kind in KINDS else {}
        ins = seen_inputs(op, graph.tensor)
        for place, rule in rules.items():
            low, high = rule(ins, Attrs(op.attrs))
            before = found.get(ins[place].name, (low, high))
            found[ins[place].name] = (min(low, before[0]), min(high, before[1]))
    return found


def _drawn(t: Tensor, allowed: Range, draw: torch.Generator) -> torch.Tensor:
    if t.dtype not in TORCH_DTYPE:
        raise BackendUnavailable(f"tensor {t.name!r}: there are no random values of dtype {t.dtype!r}; give your own.")
    kind = TORCH_DTYPE[t.dtype]
    if kind == torch.bool:
        return torch.randint(0, 2, t.shape, generator=draw).bool()
    if not kind.is_floating_point:
        return torch.randint(*allowed, t.shape, generator=draw, dtype=kind)
    if t.role == "weight" and len(t.shape) == 1:
        return torch.rand(t.shape, generator=draw).add_(0.5).to(kind)
    scale = 1 / math.sqrt(t.shape[-1]) if t.role == "weight" else 1.0
    return torch.randn(t.shape, generator=draw).mul_(scale).to(kind)
