"""How tokens are drawn, and fed to the next step, on a CPU: by torch, a handful of calls a batch."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from taskgraph.errors import ExecutionError
from taskgraph.graph.op import Op
from taskgraph.runtime.cpu.kinds import TORCH, CpuSite, Entry, Tensors, register

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

GREEDY_BELOW = 1e-5
"""Temperatures below this are 0: they would divide by less than the logits' own precision."""
NO_TOKEN = -1
_ONE = 2.0**40
"""The weight of the likeliest token."""
_FEW = 256
"""Likeliest tokens that are sorted at first; rows whose cut lies beyond them are sorted whole."""


def draw(
    logits: torch.Tensor, temperature: npt.NDArray[np.floating], top_k: Ints, top_p: Floats, uniform: Floats
) -> Ints:
    """A token for every row of logits (rows, vocabulary), each with its own parameters: what `tg.ops.draw` says."""
    values = logits.float()
    peak = values.amax(1, keepdim=True)
    finite = np.isfinite(peak[:, 0].numpy())
    result = np.full(len(temperature), NO_TOKEN, np.int64)
    greedy = np.flatnonzero(finite & ~(temperature >= GREEDY_BELOW))
    if len(greedy):
        result[greedy] = values[greedy].argmax(1).numpy()
    drawn = np.flatnonzero(finite & (temperature >= GREEDY_BELOW))
    if not len(drawn):
        return result
    if len(drawn) < len(values):
        values, peak = values[drawn], peak[drawn]
    heat = torch.from_numpy(temperature[drawn].astype(np.float32))[:, None]
    result[drawn] = _drawn(_Rows(values, peak, heat), top_k[drawn], top_p[drawn], uniform[drawn])
    return result


class _Rows(NamedTuple):
    """Rows of logits, the largest of each, and their temperatures, (rows, 1) both."""

    values: torch.Tensor
    peak: torch.Tensor
    heat: torch.Tensor

    def of(self, which: Ints) -> "_Rows":
        """Some of them."""
        return self if len(which) == len(self.values) else _Rows(*(t[which] for t in self))

    def weights(self, values: torch.Tensor) -> torch.Tensor:
        """The weights of some of the logits of each row: whole numbers, whose sums have no order."""
        return (values - self.peak).div_(self.heat).exp_().mul_(_ONE).long()


def _drawn(rows: _Rows, top_k: Ints, top_p: Floats, uniform: Floats) -> Ints:
    result, columns = np.empty(len(top_k), np.int64), rows.values.shape[1]
    cut = (top_k > 0) | (top_p < 1.0)
    free = np.flatnonzero(~cut)
    if len(free):
        some = rows.of(free)
        result[free] = _crossing(some.weights(some.values).cumsum(1), uniform[free])
    most = np.full(len(top_k), 2**62)
    shared = np.flatnonzero(top_p < 1.0)
    if len(shared):
        some = rows.of(shared)
        whole = some.weights(some.values).sum(1).numpy().astype(np.float64)
        most[shared] = np.maximum(np.ceil(top_p[shared] * whole), 1.0).astype(np.int64)
    left = np.flatnonzero(cut)
    width = min(_FEW, columns)
    while len(left):
        some = rows.of(left)
        best = torch.topk(some.values, width)
        heavy = some.weights(best.values)
        kept = _kept(heavy, top_k[left], most[left])
        enough = ~kept[:, -1].numpy() | (width == columns) | (top_k[left] == width)
        which = _crossing(torch.where(kept, heavy, 0).cumsum(1), uniform[left])
        result[left[enough]] = _tokens(some.values, best, which)[enough]
        left, width = left[~enough], columns
    return result


def _kept(heavy: torch.Tensor, top_k: Ints, most: Ints) -> torch.Tensor:
    """The entries, the likeliest first, that both cuts leave: the first top_k, and those before which less than `most`
    has been."""
    place = torch.arange(heavy.shape[1])
    within_k = place[None, :] < torch.from_numpy(np.where(top_k > 0, top_k, heavy.shape[1] + 1))[:, None]
    return within_k & (heavy.cumsum(1) - heavy < torch.from_numpy(most)[:, None])


def _crossing(cumulative: torch.Tensor, uniform: Floats) -> Ints:
    """The first entry of each row at which the sum exceeds uniform times the whole."""
    whole = cumulative[:, -1].numpy()
    target = np.clip(uniform * whole.astype(np.float64), 0.0, 2.0**62).astype(np.int64)
    target = np.minimum(target, whole - 1)
    found = torch.searchsorted(cumulative, torch.from_numpy(target)[:, None], right=True).squeeze(1)
    result: Ints = found.numpy()
    return result


def _tokens(values: torch.Tensor, best: "torch.return_types.topk", which: Ints) -> Ints:
    """The tokens at those places of the likeliest; of equal ones, which a partial sort leaves in any order, by their
    place in the vocabulary."""
    rows = np.arange(len(which))
    tokens: Ints = best.indices.numpy()[rows, which]
    sorted_values = best.values.numpy()
    mine = sorted_values[rows, which]
    equal = sorted_values == mine[:, None]
    for row in np.flatnonzero((equal.sum(1) > 1) | (mine == sorted_values[:, -1])).tolist():
        alike = np.flatnonzero(values[row].numpy() == mine[row])
        tokens[row] = alike[which[row] - int((sorted_values[row] > mine[row]).sum())]
    return tokens


def _need_places(op: Op, odd: torch.Tensor) -> None:
    """ExecutionError if there are any that are none."""
    if len(odd):
        text = f"the index {int(odd[0])}, which its axis has not"
        raise ExecutionError(f"op {op.name!r} was given {text}.", op=op.name)


def bind_draw(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    logits, likeliest, temperature, top_k, top_p, uniform, *kept = ins
    out = outs[0]
    each = [temperature.numpy(), top_k.numpy(), top_p.numpy(), uniform.numpy()]

    def run() -> None:
        _need_places(op, likeliest[(likeliest < 0) | (likeliest >= logits.shape[1])])
        peak = logits.gather(1, likeliest[:, None])[:, 0]
        out.copy_(torch.where(peak.isfinite(), likeliest, NO_TOKEN))
        rows = np.flatnonzero(each[0] >= GREEDY_BELOW)
        if len(rows):
            temperatures, counts, shares, numbers = (values[rows] for values in each)
            out[rows] = torch.from_numpy(draw(logits[rows], temperatures, counts.astype(np.int64), shares, numbers))
        for state in kept:
            state[: len(out)] = out

    return run


def bind_feed(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    (tokens, sources, kept), out, vocabulary = ins, outs[0], op.integer("vocabulary")

    def run() -> None:
        _need_places(op, sources[sources >= len(kept)])
        known = kept[sources.clamp(min=0).long()].clamp(0, vocabulary - 1)
        torch.where(sources >= 0, known, tokens, out=out)

    return run


register("draw", bind_draw, TORCH)
register("feed", bind_feed, TORCH)
