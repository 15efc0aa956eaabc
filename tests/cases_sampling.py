"""Draws of tokens and their feed: what every table of op kinds says about them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from taskgraph import ops
from taskgraph.graph.graph import GraphBuilder, Value
from taskgraph.graph.op import Work

Tensors = dict[str, torch.Tensor]
Case = tuple[Callable[[GraphBuilder, str], Value], Callable[[Tensors], torch.Tensor]]


def drawn(row: list[float], temperature: float, top_k: int, top_p: float, uniform: float) -> int:
    """One token by the definition, one entry after another, in whole numbers; float32 where the op has it."""
    peak = max(row)
    if any(map(math.isnan, row)) or not math.isfinite(peak):
        return -1
    if not temperature >= 1e-5:
        return row.index(peak)
    heat = np.float32(temperature)
    scaled = [float(np.exp((np.float32(x) - np.float32(peak)) / heat)) for x in row]
    weights = [int(x * 2**40) for x in scaled]
    order = list(range(len(row)))
    if top_k > 0 or top_p < 1.0:
        order.sort(key=lambda i: (-row[i], i))
    most = max(math.ceil(top_p * float(sum(weights))), 1) if top_p < 1.0 else math.inf
    kept, before = [], 0
    for rank, i in enumerate(order):
        if (top_k > 0 and rank >= top_k) or before >= most:
            break
        kept.append(i)
        before += weights[i]
    target = min(max(int(uniform * float(before)), 0), before - 1)
    for i in kept:
        target -= weights[i]
        if target < 0:
            return i
    raise AssertionError("the weights of a row have a sum")


def _draw(columns: int, keeps: bool) -> Callable[[GraphBuilder, str], Value]:
    def make(b: GraphBuilder, d: str) -> Value:
        x, rows = b.input("x", (5, columns), d), (5,)
        types = {"heat": "f32", "top_k": "i32", "top_p": "f64", "uniform": "f64"}
        how = [b.input(name, rows, dtype) for name, dtype in types.items()]
        return ops.draw(x, ops.argmax(x), *how, b.state("kept", (9,), "i64") if keeps else None)

    return make


def _draw_reference(t: Tensors) -> torch.Tensor:
    """The tokens; and keeps them."""
    rows = zip(t["x"], t["heat"], t["top_k"], t["top_p"], t["uniform"], strict=True)
    tokens = torch.tensor([drawn(row.tolist(), *(float(v) for v in how)) for row, *how in rows])  # type: ignore[arg-type]
    if "kept" in t:
        t["kept"][: len(tokens)] = tokens
    return tokens


CASES: dict[str, Case] = {
    "draw": (_draw(33, False), _draw_reference),
    "draw kept": (_draw(700, True), _draw_reference),
    "feed": (
        lambda b, d: ops.feed(
            b.input("tokens", (5,), "i64"), b.input("sources", (5,), "i32"), b.state("kept", (9,), "i64"), vocabulary=6
        ),
        lambda t: torch.where(t["sources"] >= 0, t["kept"][t["sources"].clamp(min=0).long()].clamp(max=5), t["tokens"]),
    ),
}  # fmt: skip


def _operands(b: GraphBuilder, bad: str = "") -> list[Value]:
    shapes = {"likeliest": "i64", "heat": "f32", "top_k": "i32", "top_p": "f64", "uniform": "f64"}
    x = b.input("x", (3, 8), "f32")
    return [x, *(b.input("bad" if n == bad else n, (3,), "bf16" if n == bad else t) for n, t in shapes.items())]


MADE: dict[str, tuple[Callable[[GraphBuilder], Value], tuple[int, ...], str, Work]] = {
    "draw": (
        lambda b: ops.draw(*_operands(b), b.state("kept", (4,), "i64")),
        (3,), "i64", Work(flops=96, hbm_bytes=96 + 3 * (8 + 4 + 4 + 8 + 8) + 24 + 24),
    ),
    "feed": (
        lambda b: ops.feed(
            b.input("t", (3,), "i64"), b.input("s", (3,), "i32"), b.state("kept", (4,), "i64"), vocabulary=9
        ),
        (3,), "i64", Work(hbm_bytes=24 + 12 + 24 + 24),
    ),
}  # fmt: skip
MISFITS: dict[str, Callable[[GraphBuilder], Any]] = {
    "draw": lambda b: ops.draw(*_operands(b), b.state("bad", (2,), "i64")),
    "draw dtype": lambda b: ops.draw(*_operands(b), b.state("bad", (3,), "i32")),
    "draw top_p": lambda b: ops.draw(*_operands(b, "top_p")),
    "draw likeliest": lambda b: ops.draw(*_operands(b, "likeliest")),
    "feed": lambda b: ops.feed(
        b.input("t", (3,), "i64"), b.input("bad", (4,), "i32"), b.state("kept", (4,), "i64"), vocabulary=9
    ),
    "feed dtype": lambda b: ops.feed(
        b.input("bad", (3,), "i32"), b.input("s", (3,), "i32"), b.state("kept", (4,), "i64"), vocabulary=9
    ),
}
