"""CPU kernels of mixtures of experts, for few tokens: routing, and the products of each expert with the rows it gets.

Weights of experts are panels as `kernels.pack_weight` makes them; sums are float32, over k in order whatever rows stand
beside a row.
"""

from typing import Any, NamedTuple

import numpy as np

from taskgraph.runtime.cpu.arguments import Array
from taskgraph.runtime.cpu.tile import COLUMNS, ROWS, SINGLE, WIDE, exp, fork, inlined, kernel, narrow, tile, widen


class Weights(NamedTuple):
    """Weights of experts in panels: their addresses (experts,) int64, the bytes from panel to panel, the words of a
    column, and whether these are pairs of bf16."""

    at: Array
    stride: int
    steps: int
    pairs: bool


class Rows(NamedTuple):
    """Which tokens an expert gets: expert e those at starts[e] to starts[e + 1] of `rows`; (experts + 1,) and (tokens *
    experts,) int64."""

    starts: Array
    rows: Array


@inlined
def _silu(x: Any) -> Any:
    one = np.float32(1.0)
    small = exp(-abs(x))
    return x * ((one if x >= np.float32(0.0) else small) / (one + small))


@kernel
def _multiply(lines: Any, count: Any, panel: Any, weights: Any, sums: Any) -> None:
    """sums[r] = lines[r] times the panel at that address, for the first `count` rows."""
    mode = WIDE if weights.pairs else SINGLE
    for top in range(0, count, ROWS):
        x, into = lines.ctypes.data + top * lines.strides[0], sums.ctypes.data + top * sums.strides[0]
        tile(min(ROWS, count - top), (x, lines.strides[0]), panel, weights.steps, (into, sums.strides[0]), mode)


@kernel
def _sort(routing: Any, starts: Any, rows: Any) -> None:
    tokens, count = routing.shape
    at = 0
    for e in range(count):
        starts[e] = at
        for i in range(tokens):
            if routing[i, e] != np.float32(0.0):
                rows[at] = i
                at += 1
    starts[count] = at


@kernel
def _up(x: Any, weights: Any, chosen: Any, hidden: Any, part: Any, parts: Any) -> None:
    """hidden[j] = silu(gate x) * up x, of the token and the expert at place j of `chosen`."""
    tokens, wide = x.shape
    panels = hidden.shape[1] // COLUMNS
    lines = np.empty((tokens, wide), np.float32)
    gate, up = np.empty((tokens, COLUMNS), np.float32), np.empty((tokens, COLUMNS), np.float32)
    for e in range(len(weights.at)):
        start, count = chosen.starts[e], chosen.starts[e + 1] - chosen.starts[e]
        if count == 0:
            continue
        for r in range(count):
            line, row = lines[r], x[chosen.rows[start + r]]
            for j in range(wide):
                line[j] = widen(row[j])
        for panel in range(panels * part // parts, panels * (part + 1) // parts):
            _multiply(lines, count, weights.at[e] + panel * weights.stride, weights, gate)
            _multiply(lines, count, weights.at[e] + (panels + panel) * weights.stride, weights, up)
            column = panel * COLUMNS
            for r in range(count):
                for c in range(COLUMNS):
                    hidden[start + r, column + c] = _silu(gate[r, c]) * up[r, c]


@kernel
def _down(hidden: Any, weights: Any, chosen: Any, routing: Any, residual: Any, out: Any, part: Any, parts: Any) -> None:
    """out[i] = residual[i] + the sum over its experts of routing[i, e] times down hidden."""
    tokens, wide = out.shape
    panels = (wide + COLUMNS - 1) // COLUMNS
    total, made = np.empty((tokens, COLUMNS), np.float32), np.empty((tokens, COLUMNS), np.float32)
    for panel in range(panels * part // parts, panels * (part + 1) // parts):
        column = panel * COLUMNS
        width = min(COLUMNS, wide - column)
        total[:, :] = np.float32(0.0)
        if len(residual) > 0:
            for i in range(tokens):
                for c in range(width):
                    total[i, c] = widen(residual[i, column + c])
        for e in range(len(weights.at)):
            start, count = chosen.starts[e], chosen.starts[e + 1] - chosen.starts[e]
            if count == 0:
                continue
            _multiply(hidden[start : start + count], count, weights.at[e] + panel * weights.stride, weights, made)
            for r in range(count):
                i = chosen.rows[start + r]
                share = routing[i, e]
                for c in range(COLUMNS):
                    total[i, c] += share * made[r, c]
        for i in range(tokens):
            for c in range(width):
                out[i, column + c] = narrow(total[i, c], out)


@kernel
def experts(
    x: Any, routing: Any, weights: Any, chosen: Any, hidden: Any, residual: Any, out: Any, threads: Any = 1
) -> None:
    """out = residual + sum_e routing[:, e] down_e(silu(gate_e x) * up_e x) (Shazeer et al. 2017).

    x, residual and out (t, h), residual (0, 0) for none; routing (t, experts) float32, zero where a token does not go;
    `weights` the Weights of gate over up and of down; `chosen` Rows and hidden (t * experts, i) float32 are room for
    what is between, i a multiple of COLUMNS. Threads take columns."""
    _sort(routing, chosen.starts, chosen.rows)
    fork(_up, (x, weights[0], chosen, hidden), threads)
    fork(_down, (hidden, weights[1], chosen, routing, residual, out), threads)


@kernel
def route(
    logits: Any, correction: Any, slots: Any, out: Any, sigmoid: Any, top_k: Any, normalize: Any, scale: Any
) -> None:
    """out[i, e] = the weight of expert e for token i, zero where it is not one of the `top_k` of the largest scores (of
    scores and `correction`, (experts,) or empty); zero rows where slots[i] < 0 (`slots` may be empty). logits and out
    (t, experts); scores are a softmax, or sigmoids."""
    tokens, count = logits.shape
    scores, rank = np.empty(count, np.float32), np.empty(count, np.float32)
    one, zero = np.float32(1.0), np.float32(0.0)
    for i in range(tokens):
        if sigmoid:
            for e in range(count):
                value = widen(logits[i, e])
                small = exp(-abs(value))
                scores[e] = (one if value >= zero else small) / (one + small)
        else:
            top, total = np.float32(-np.inf), zero
            for e in range(count):
                top = max(top, widen(logits[i, e]))
            for e in range(count):
                scores[e] = exp(widen(logits[i, e]) - top)
                total += scores[e]
            for e in range(count):
                scores[e] /= total
        for e in range(count):
            rank[e] = scores[e] + correction[e] if len(correction) > 0 else scores[e]
            out[i, e] = zero
        if len(slots) > 0 and slots[i] < 0:
            continue
        total = zero
        for _ in range(top_k):
            best = 0
            for e in range(1, count):
                if rank[e] > rank[best]:
                    best = e
            rank[best] = np.float32(-np.inf)
            out[i, best] = scores[best]
            total += scores[best]
        share = np.float32(scale) / (total + np.float32(1e-20)) if normalize else np.float32(scale)
        for e in range(count):
            out[i, e] *= share
