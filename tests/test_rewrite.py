"""Rewrites against the graph they came from: outputs and states on the CPU, work, structure, and what is refused."""

import itertools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph import ops
from taskgraph.errors import GraphError
from taskgraph.graph import device as specs
from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.graph.op import Work, spec
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig
from taskgraph.runtime.impls import TORCH_DTYPE
from taskgraph.schedule import rewrite

CPU = specs.make("h100_sxm", name="two cores", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)
"""A made-up device of two cores, so that no test here waits for the probe or depends on it."""
HIDDEN, HEADS, DIM, CACHE, VOCABULARY = 16, 2, 8, 8, 23
WIDTH = (HEADS + 2) * DIM
TINY = ModelConfig(
    name="tiny", family="qwen3", hidden_size=32, layers=3, heads=4, kv_heads=2, head_dim=8, intermediate_size=48,
    vocab_size=50, norm_eps=1e-5, rope_theta=1e4, max_context=32, tie_embeddings=False,
)  # fmt: skip
Tensors = dict[str, torch.Tensor]


def random_tensors(graph: Graph, seed: int = 0) -> Tensors:
    """Values for all that the graph does not make; places and ids are small integers."""
    made = torch.Generator().manual_seed(seed)
    return {
        t.name: torch.randint(0, 3, t.shape, generator=made)
        if t.dtype == "i64"
        else torch.randn(t.shape, generator=made).to(TORCH_DTYPE[t.dtype])
        for t in graph.flat().with_role("input", "weight", "state")
    }


def run(graph: Graph, tensors: Tensors, scheduler: str = "list") -> tuple[Tensors, Tensors]:
    """Outputs, and states afterwards, of one replay on the CPU backend; the plan is verified."""
    given = {name: t.clone() for name, t in tensors.items()}
    p = tg.plan(graph, CPU, scheduler)
    tg.verify(p, graph)
    with tg.compile(graph, p) as exe:
        outputs = exe(given)
    flat = graph.flat()
    by_name = {name: outputs[made] for name, made in zip(graph.outputs, flat.outputs, strict=True)}
    return by_name, {t.name: given[t.name] for t in flat.with_role("state")}


def assert_equal(graph: Graph, other: Graph, seed: int = 0) -> None:
    tensors = random_tensors(graph, seed)
    wanted, got = run(graph, tensors, "sequential"), run(other, tensors)
    for ours, theirs in zip(wanted, got, strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------------- random graphs


class Maker:
    """Appends random ops on rows of `batch * each` tokens to a builder."""

    def __init__(self, draw: st.DrawFn, b: GraphBuilder, batch: int, each: int) -> None:
        self.draw, self.b, self.batch, self.each, self.count = draw, b, batch, each, 0
        self.positions = b.input("positions", (batch,), "i64")
        self.places = b.input("places", (batch * each,), "i64")

    def weight(self, *shape: int) -> Value:
        self.count += 1
        return self.b.weight(f"w{self.count}", shape, "f32")

    def step(self, pool: list[Value]) -> Value:
        """One or more ops on values of the pool, each (tokens, HIDDEN), to another such value."""
        kind = self.draw(st.sampled_from(sorted(name for name in dir(self) if name.startswith("do_"))))
        made: Value = getattr(self, kind)(*(self.draw(st.sampled_from(pool)) for _ in range(2)))
        return made

    def do_gemm(self, x: Value, y: Value) -> Value:
        bias = self.weight(HIDDEN) if self.draw(st.booleans()) else None
        return ops.gemm(x, self.weight(HIDDEN, HIDDEN), bias, y if self.draw(st.booleans()) else None)

    def do_norm(self, x: Value, y: Value) -> Value:
        return ops.rmsnorm(x, self.weight(HIDDEN))

    def do_add(self, x: Value, y: Value) -> Value:
        return ops.add(x, y)

    def do_copy(self, x: Value, y: Value) -> Value:
        return ops.copy(x, direction=self.draw(st.sampled_from(["h2d", "d2d"])))

    def do_swiglu(self, x: Value, y: Value) -> Value:
        return ops.swiglu(ops.gemm(x, self.weight(2 * HIDDEN, HIDDEN), transpose_w=True))

    def do_rope(self, x: Value, y: Value) -> Value:
        q = self.b.call(
            reshape, [x], [spec(f"heads{len(self.b._ops)}", (x.shape[0], HEADS, DIM), "f32")],
            work=Work(hbm_bytes=128.0 * x.shape[0]), split_axes=(0,),
        )  # fmt: skip
        q = ops.rope(q, self.places)
        return self.b.call(
            reshape, [q], [spec(f"rows{len(self.b._ops)}", x.shape, "f32")], work=Work(hbm_bytes=128.0 * x.shape[0])
        )  # type: ignore[no-any-return]

    def do_attention(self, x: Value, y: Value) -> Value:
        self.count += 1
        room = (self.batch, 1, CACHE, DIM)
        keys, values = (self.b.state(f"{n}{self.count}", room, "f32") for n in ("k", "v"))
        qkv = ops.gemm(x, self.weight(HIDDEN, WIDTH))
        q = ops.rope_kv(qkv, self.positions, keys, values, heads=HEADS)
        return ops.attention(q, self.positions, keys, values)

    def do_decode(self, x: Value, y: Value) -> Value:
        self.count += 1
        tokens = self.batch * self.each
        kv = self.b.state(f"kv{self.count}", (2, tokens, 5, HEADS, DIM), "f32")
        q = self.b.call(
            reshape, [x], [spec(f"q{self.count}", (tokens, HEADS, DIM), "f32")], work=Work(flops=5.0 * tokens),
            split_axes=(0,), split_multiple=2,
        )  # fmt: skip
        mixed = ops.decode_attention(q, kv)
        return self.b.call(
            reshape, [mixed], [spec(f"m{self.count}", x.shape, "f32")], work=Work(flops=5.0 * tokens), split_axes=(0,)
        )  # type: ignore[no-any-return]

    def do_regroup(self, x: Value, y: Value) -> Value:
        tokens = x.shape[0]
        cut = self.draw(st.integers(0, tokens))
        first = [x.rows(0, cut) if self.draw(st.booleans()) else ops.slice_rows(x, 0, cut)] if cut else []
        last = [ops.slice_rows(y, cut, tokens)] if cut < tokens else []
        return ops.concat_rows([*first, *last])

    def do_ranks(self, x: Value, y: Value) -> Value:
        return ops.all_reduce(x, ranks=1, axis=self.draw(st.integers(0, 1)))


def reshape(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x.reshape(out.shape))


@st.composite
def batched_graphs(draw: st.DrawFn) -> Graph:
    """Random graphs over a batch: diamonds, states, views, sometimes a repeat with one or two carries."""
    b = GraphBuilder("batched")
    batch, each = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    make = Maker(draw, b, batch, each)
    tokens = b.input("tokens", (batch * each,), "i64")
    pool = [ops.embedding(tokens, b.weight("table", (VOCABULARY, HIDDEN), "f32"))]
    for _ in range(draw(st.integers(0, 4))):
        pool.append(make.step(pool))
    if draw(st.booleans()):
        with b.repeat(draw(st.integers(1, 3))) as loop:
            inside = [
                loop.carry(v, f"c{i}")
                for i, v in enumerate(draw(st.lists(st.sampled_from(pool), min_size=1, max_size=2)))
            ]
            body = [*inside, draw(st.sampled_from(pool))]
            for _ in range(draw(st.integers(1, 4))):
                body.append(make.step(body))
            nexts = [draw(st.sampled_from([v for v in body if v.name.startswith("layer/")])) for _ in inside]
            nexts[0] = body[-1]
            pool += [_next(loop, v, n, i) for i, (v, n) in enumerate(zip(inside, nexts, strict=True))]
    for _ in range(draw(st.integers(0, 2))):
        pool.append(make.step(pool))
    last = ops.slice_rows(pool[-1], each - 1, batch * each, each)
    b.output(
        last,
        ops.argmax(last),
        pool[-1],
        *draw(st.lists(st.sampled_from(pool[1:]) if pool[1:] else st.nothing(), max_size=2)) if pool[1:] else [],
    )
    return b.build()


def _next(loop: Any, inside: Value, value: Value, number: int) -> Value:
    """The result of a carry; two carries may have the same next, so each gets its own name."""
    if any(c.next == value.name for c in loop._carries.values()):
        value = ops.copy(value)
    return loop.next(inside, value)  # type: ignore[no-any-return]


def sizes_of(draw: st.DrawFn, units: int, multiple: int) -> tuple[int, ...]:
    """Slices of multiples that sum to `units`; the last may be odd."""
    cuts = draw(st.sets(st.integers(1, max((units - 1) // multiple, 1)).map(lambda n: n * multiple), max_size=3))
    borders = [0, *sorted(c for c in cuts if c < units), units]
    return tuple(high - low for low, high in itertools.pairwise(borders))


@st.composite
def splits(draw: st.DrawFn, graph: Graph) -> rewrite.Split:
    """Random slicings: one for the whole graph, and others for single ops."""
    infos = rewrite.splittable(graph)
    parts: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
    if not infos:
        return rewrite.Split()
    if draw(st.booleans()):
        batch = max(info.batch for info in infos.values())
        parts.append(((), sizes_of(draw, batch, 1)))
    names = draw(st.lists(st.sampled_from(sorted(infos)), unique=True, max_size=6))
    parts += [((name,), sizes_of(draw, infos[name].units, infos[name].multiple)) for name in names]
    return rewrite.Split(tuple(parts))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_graphs_split_at_random_equal_themselves(data: st.DataObject) -> None:
    graph = data.draw(batched_graphs())
    split = data.draw(splits(graph))
    other = rewrite.apply(graph, split)
    assert other.outputs == graph.outputs
    assert_equal(graph, other, data.draw(st.integers(0, 1000)))
    again = data.draw(splits(other))
    assert_equal(graph, rewrite.apply(other, again))
