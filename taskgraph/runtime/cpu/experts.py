"""Mixture of experts on a CPU: routing, and products of each expert with the rows that come to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from taskgraph.graph.op import Op
from taskgraph.runtime.cpu import kernels_experts
from taskgraph.runtime.cpu.arguments import ready
from taskgraph.runtime.cpu.choose import FEW
from taskgraph.runtime.cpu.kinds import FIXED, TORCH, CpuSite, Entry, Tensors, bits, register
from taskgraph.runtime.cpu.products import Linear, in_panels, room_for
from taskgraph.runtime.cpu.tile import COLUMNS


@dataclass(frozen=True, slots=True)
class _Router:
    """How experts are chosen: see `ops.RouteSpec`. `groups` is (how many, how many are kept)."""

    sigmoid: bool
    top_k: int
    normalize: bool
    scale: float
    groups: tuple[int, int] | None

    @staticmethod
    def of(op: Op) -> "_Router":
        groups, kept = op.integer("groups"), op.integer("top_groups")
        shape = (groups, kept) if kept < groups else None
        sigmoid, normalize = op.attr("scoring") == "sigmoid", bool(op.attr("normalize"))
        return _Router(sigmoid, op.integer("top_k"), normalize, op.number("scale"), shape)

    def route(
        self, logits: torch.Tensor, correction: torch.Tensor | None, slots: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """The weights of the chosen experts into `out`, zeros elsewhere."""
        scores = logits.float().sigmoid() if self.sigmoid else logits.float().softmax(-1)
        choice = scores if correction is None else scores + correction
        if self.groups is not None:
            choice = _within_best_groups(choice, *self.groups)
        chosen = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        out.zero_().scatter_(1, chosen, weights * self.scale)
        if slots is not None:
            out.masked_fill_((slots < 0).unsqueeze(1), 0.0)


def bind_route(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    logits, *rest = ins
    correction, slots = ([t for t in rest if (t.dtype == torch.int32) is whether] for whether in (False, True))
    first, whole = op.integer("first"), outs[0] if outs[0].shape == logits.shape else torch.empty(logits.shape)
    biased, going = (which[0] if which else None for which in (correction, slots))
    route = _routed(_Router.of(op), logits, biased, going, whole)
    if whole is outs[0]:
        return route
    mine = whole.narrow(1, first, outs[0].shape[1])

    def held() -> None:
        route()
        outs[0].copy_(mine)

    return held


def _routed(
    router: _Router,
    logits: torch.Tensor,
    correction: torch.Tensor | None,
    slots: torch.Tensor | None,
    out: torch.Tensor,
) -> Entry:
    """By the kernel for few tokens whose experts are in one group, else by torch."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    known = logits.dtype in floats and out.dtype == torch.float32
    known &= correction is None or correction.dtype == torch.float32
    if router.groups is not None or len(logits) > FEW or not known:
        return partial(router.route, logits, correction, slots, out)
    added = np.empty(0, np.float32) if correction is None else correction.numpy()
    places = np.empty(0, np.int32) if slots is None else slots.numpy()
    how = (router.sigmoid, router.top_k, router.normalize, router.scale)
    return ready(kernels_experts.route, bits(logits), added, places, out.numpy(), *how)


def _within_best_groups(choice: torch.Tensor, groups: int, kept: int) -> torch.Tensor:
    """-inf outside the `kept` groups whose two best scores sum highest."""
    grouped = choice.view(len(choice), groups, -1)
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
    out = torch.ones(len(choice), groups, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(out.unsqueeze(-1), float("-inf")).view(choice.shape)


def bind_experts(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    x, routing, gate_up, down, *residual = ins
    fixed = set(op.inputs[2:4]) <= site.constants and room_for(2 * (gate_up.nbytes + down.nbytes))
    more = residual[0] if residual else None
    if fixed and _few(x, routing, gate_up, site):
        return _by_kernel(x, routing, (gate_up, down), more, outs[0], site.threads)
    total = torch.empty(x.shape, dtype=torch.float32)
    first, second = (
        [Linear(op.name, w, fixed, site.threads, site.ways) for w in weights] for weights in (gate_up, down)
    )
    return partial(_experts, x, routing, first, second, more, total, outs[0])


def _few(x: torch.Tensor, routing: torch.Tensor, gate_up: torch.Tensor, site: CpuSite) -> bool:
    """Whether the kernel is for these: few tokens, by the tile, with hidden channels in whole panels."""
    kind = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}.get(x.dtype)
    whole = gate_up.shape[1] % (2 * COLUMNS) == 0 and x.shape[1] % 2 == 0
    tiled = kind is not None and site.ways.product(kind, 1, fixed=True) == "tile"
    return len(x) <= FEW and whole and tiled and routing.dtype == torch.float32 and x.dtype == gate_up.dtype


def _by_kernel(
    x: torch.Tensor,
    routing: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    residual: torch.Tensor | None,
    out: torch.Tensor,
    threads: int,
) -> Entry:
    count, wide = len(weights[0]), weights[1].shape[2]
    packed = [[in_panels(w) for w in each] for each in weights]
    sets = tuple(_weights([one.panels for one in each]) for each in packed)
    chosen = kernels_experts.Rows(np.empty(count + 1, np.int64), np.empty(len(x) * count, np.int64))
    hidden = np.empty((len(x) * count, wide), np.float32)
    more = np.empty((0, 0), bits(x).dtype) if residual is None else bits(residual)
    run = ready(kernels_experts.experts, bits(x), routing.numpy(), sets, chosen, hidden, more, bits(out), threads)
    return _held(run, (packed, x, routing, residual, out))


def _weights(panels: Sequence[npt.NDArray[Any]]) -> kernels_experts.Weights:
    first = panels[0]
    at = np.array([p.ctypes.data for p in panels], np.int64)
    return kernels_experts.Weights(at, first.strides[0], first.shape[1], first.dtype == np.uint32)


def _held(run: Entry, kept: object) -> Entry:
    """`run`, with what lies at the addresses that it knows."""

    def entry(_: object = kept) -> None:
        run()

    return entry


def _experts(
    x: torch.Tensor,
    routing: torch.Tensor,
    gate_up: Sequence[Linear],
    down: Sequence[Linear],
    residual: torch.Tensor | None,
    total: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Sums in float32 over the experts that some token goes to, each on its own tokens only."""
    total.zero_() if residual is None else total.copy_(residual)
    where = routing.t().nonzero()
    counts = torch.bincount(where[:, 0], minlength=len(gate_up)).tolist()
    for expert, rows in enumerate(torch.split(where[:, 1], counts)):
        if len(rows):
            gate, up = gate_up[expert](x[rows]).chunk(2, dim=-1)
            made = down[expert](F.silu(gate) * up)
            total.index_add_(0, rows, made.float() * routing[rows, expert, None])
    out.copy_(total)


def bind_gated_add(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    x, gate, base = ins
    return lambda: torch.addcmul(base, x, gate.sigmoid(), out=outs[0])


register("route", bind_route, TORCH)
register("experts", bind_experts, FIXED)
register("gated_add", bind_gated_add, TORCH)
