"""Values for the tensors that a measurement needs and nobody gave: random, of the right dtype, valid as indices."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op, Tensor, seen_inputs
from taskgraph.runtime.cpu.dense import TORCH_DTYPE

Range = tuple[int, int]

INDEX_RANGES: dict[tuple[str, int], Callable[[Op, Sequence[Tensor]], Range]] = {
    ("embedding", 0): lambda op, ins: (0, ins[1].shape[0]),
    ("rope", 1): lambda op, ins: (0, ins[0].shape[0]),
    ("rope_kv", 1): lambda op, ins: _last_place(ins[2].shape[2], ins),
    ("attention", 1): lambda op, ins: _last_place(min(op.integer("context"), ins[2].shape[2]), ins),
    ("latent_rope", 3): lambda op, ins: _last_place(ins[4].shape[1], [ins[0], ins[3]]),
    ("latent_attention", 1): lambda op, ins: _last_place(min(op.integer("context"), ins[2].shape[1]), ins),
    ("paged_latent_rope", 3): lambda op, ins: (0, op.integer("context")),
    ("paged_latent_rope", 4): lambda op, ins: (0, ins[5].shape[0] * ins[5].shape[1]),
    ("paged_latent_decode", 1): lambda op, ins: _length(op.integer("context"), ins[2], ins[3].shape[1]),
    ("paged_latent_decode", 2): lambda op, ins: (0, ins[3].shape[0]),
    ("paged_latent_prefill", 1): lambda op, ins: (0, 1),
    ("paged_latent_prefill", 3): lambda op, ins: (0, ins[4].shape[0]),
    ("paged_rope", 1): lambda op, ins: (0, op.integer("context")),
    ("paged_rope", 2): lambda op, ins: (0, ins[3].shape[0] * ins[3].shape[2]),
    ("paged_decode", 1): lambda op, ins: _length(op.integer("context"), ins[2], ins[3].shape[2]),
    ("paged_decode", 2): lambda op, ins: (0, ins[3].shape[0]),
    ("paged_prefill", 1): lambda op, ins: (0, 1),
    ("paged_prefill", 3): lambda op, ins: (0, ins[4].shape[0]),
    ("copy_pages", 2): lambda op, ins: (0, min(ins[0].shape[0], ins[1].shape[0])),
}
"""(kind, input number) -> the range [low, high) of an integer input that is an index and not data.

Positions stand at the end of the context that the op's cost counts: at the start of it, attention would be free. A
prefill over pages gets no rows: chunks that fit together are not a matter of a range.
"""

_DATA: Range = (1, 8)


def _last_place(context: int, ins: Sequence[Tensor]) -> Range:
    """The place of a sequence's first new token such that its last one fills the context."""
    place = max(context - ins[0].shape[0] // ins[1].shape[0], 0)
    return (place, place + 1)


def _length(context: int, blocks: Tensor, size: int) -> Range:
    """The context that the cost counts, as far as the block tables of pages of `size` tokens reach."""
    length = min(context, blocks.shape[1] * size)
    return (length, length + 1)


def fill(graph: Graph, given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A value for every input, weight and state of a flat graph: the caller's own, else drawn from `seed`.

    Floats are normal, matrices among the weights scaled by one over the root of their row length. Integers are token
    numbers and positions where INDEX_RANGES knows them to be, else data from 1 to 7: give your own where a custom op
    takes them as an index into something smaller. States that the caller gave are copied, because replays change them.
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
        ins = seen_inputs(op, graph.tensor)
        for place, t in enumerate(ins):
            if (op.kind, place) in INDEX_RANGES:
                low, high = INDEX_RANGES[op.kind, place](op, ins)
                before = found.get(t.name, (low, high))
                found[t.name] = (min(low, before[0]), min(high, before[1]))
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
