"""The arena: no unsafe reuse (the independent checker says so), and little more than the lower bound."""

import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import graphs
from test_verify import H100, sequential

from taskgraph.graph.device import Geometry
from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.graph.op import Work, spec
from taskgraph.schedule import arena
from taskgraph.schedule.plan import Lane, Span, Step
from taskgraph.schedule.verify import verify

LIMIT = 20_000


def llama_like(layers: int, wide: int = 14336, hidden: int = 4096) -> Graph:
    """Activations of a Llama step: norm, qkv, attention, out, norm, gate and up, swiglu, down."""
    b = GraphBuilder("llama-like")
    count = 0

    def op(width: int, *inputs: Value) -> Value:
        nonlocal count
        count += 1
        return b.op("custom", inputs, [spec(f"t{count}", (8, width), "bf16")], Work(flops=1.0), f"op{count}")[0]

    x = b.input("x", (8, hidden), "bf16")
    for _ in range(layers):
        x = op(hidden, op(hidden, op(hidden + 2048, op(hidden, x))), x)
        x = op(hidden, op(wide, op(2 * wide, op(hidden, x))), x)
    b.output(op(hidden, x))
    return b.build()


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(1, 4), st.booleans(), st.randoms(use_true_random=False))
def test_no_unsafe_reuse_on_random_lanes(graph: Graph, lanes: int, fast: bool, rng: random.Random) -> None:
    flat = graph.flat()
    lane = [rng.randrange(lanes) for _ in flat.ops]
    waits = [tuple(p for p in row if lane[p] != lane[i]) for i, row in enumerate(flat.predecessors())]
    order = list(range(len(flat.ops)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "_EXACT", 0 if fast else LIMIT)
        slots, nbytes = arena.assign(flat, lane, waits, order)
    assert nbytes >= arena.max_live_bytes(graph.flat(), lane, order)
    plan = replace(
        sequential(graph, H100),
        geometries=(Geometry.of(132),),
        lanes=(Lane(0, 0),) * lanes,
        steps=tuple(Step(op.name, k, w) for op, k, w in zip(flat.ops, lane, waits, strict=True)),
        arena=slots,
        arena_bytes=nbytes,
    )
    spans = tuple(Span(step.op, step.lane, i, i + 1.0) for i, step in enumerate(plan.steps))
    verify(replace(plan, timeline=replace(plan.timeline, spans=spans)), graph)


@pytest.mark.parametrize(("limit", "factor"), [(0, 1.35), (LIMIT, 1.15)])  # the fast path is at 1.30
def test_chains_need_little_more_than_the_bound(limit: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_EXACT", limit)
    graph = llama_like(32)
    n = len(graph.ops)
    _, nbytes = arena.assign(graph, [0] * n, [()] * n, range(n))
    assert nbytes <= factor * arena.max_live_bytes(graph, [0] * n, range(n))


def test_concurrent_lanes_share_no_bytes() -> None:
    b = GraphBuilder("two-chains")
    for side in "ab":
        value = b.input(f"x{side}", (64,), "f32")
        for i in range(4):
            (value,) = b.op("custom", [value], [spec(f"{side}{i}", (64,), "f32")], Work(flops=1.0), f"op{side}{i}")
        b.output(value)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    slots, _ = arena.assign(b.build(), [0, 1] * 4, [()] * 8, order)
    left, right = ({s.offset for s in slots if s.tensor[0] == side} for side in "ab")
    assert not left & right


def test_large_chain_is_fast() -> None:
    graph = llama_like(2500)
    n = len(graph.ops)
    arena.assign(llama_like(1), [0] * 9, [()] * 9, range(9))
    begin = time.perf_counter()
    arena.assign(graph, [0] * n, [()] * n, range(n))
    assert time.perf_counter() - begin < 5.0
