"""The arena: no unsafe reuse (the independent checker says so), and little more than the lower bound."""

import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgraph.graph.device import Geometry
from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.graph.op import Work, spec
from taskgraph.schedule import arena
from taskgraph.schedule.plan import Lane, Span, Step, uncollected
from taskgraph.schedule.sliced import verify
from tests.schedule.problems_by_hand import max_live_bytes
from tests.schedule.test_verify import H100, sequential
from tests.strategies import graphs

PAIRS = arena._PAIRS
LANES_OF_THEIR_OWN, IN_STEP_ORDER = 200, -1
"""Values of `arena._PAIRS` that make small graphs take the paths of large ones."""


def llama_like(layers: int, slices: int = 1, wide: int = 14336, hidden: int = 4096) -> Graph:
    """Activations of a Llama step: norm, qkv, attention, out, norm, gate and up, swiglu, down; slice by slice."""
    b = GraphBuilder("llama-like")
    count = 0

    def op(width: int, *inputs: Value) -> Value:
        nonlocal count
        count += 1
        return b.op("custom", inputs, [spec(f"t{count}", (8, width), "bf16")], Work(flops=1.0), f"op{count}")[0]

    def each(width: int, *before: list[Value]) -> list[Value]:
        return [op(width, *row) for row in zip(*before, strict=True)]

    x = [b.input(f"x{i}", (8, hidden), "bf16") for i in range(slices)]
    for _ in range(layers):
        x = each(hidden, each(hidden, each(hidden + 2048, each(hidden, x))), x)
        x = each(hidden, each(wide, each(2 * wide, each(hidden, x))), x)
    b.output(*each(hidden, x))
    return b.build()


def arena_ratio(graph: Graph, lanes: int) -> float:
    """Bytes of the arena over what must live at once, with the ops dealt out to `lanes` lanes in turn."""
    lane = [i % lanes for i in range(len(graph.ops))]
    order = range(len(lane))
    waits = [tuple(p for p in row if lane[p] != lane[i]) for i, row in enumerate(graph.predecessors())]
    _, nbytes = arena.assign(graph, lane, waits, order)
    return nbytes / max_live_bytes(graph, lane, order)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(1, 4), st.sampled_from([PAIRS, 5, -1]), st.randoms(use_true_random=False))
def test_no_unsafe_reuse_on_random_lanes(graph: Graph, lanes: int, pairs: int, rng: random.Random) -> None:
    flat = graph.flat()
    lane = [rng.randrange(lanes) for _ in flat.ops]
    waits = [tuple(p for p in row if lane[p] != lane[i]) for i, row in enumerate(flat.predecessors())]
    order = list(range(len(flat.ops)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "_PAIRS", pairs)
        slots, nbytes = arena.assign(flat, lane, waits, order)
    assert nbytes >= max_live_bytes(graph.flat(), lane, order)
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


@pytest.mark.parametrize("layers", [1, 32, 2500])
def test_a_chain_needs_little_more_than_the_bound(layers: int) -> None:
    assert arena_ratio(llama_like(layers), lanes=1) <= 1.01


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_nano_batches_of_80_layers_need_little_more_than_the_bound(lanes: int) -> None:
    assert arena_ratio(llama_like(80, slices=32), lanes) <= 1.15


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("pairs", [PAIRS, LANES_OF_THEIR_OWN, IN_STEP_ORDER])
def test_every_path_needs_little_more_than_the_bound(pairs: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_PAIRS", pairs)
    assert arena_ratio(llama_like(4, slices=32), lanes) <= (1.15 if pairs > 0 else 1.2)


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


@pytest.mark.parametrize(("slices", "lanes"), [(1, 1), (160, 4)])
def test_time_grows_with_the_nodes_not_their_square(slices: int, lanes: int) -> None:
    def seconds(nodes: int) -> float:
        graph = llama_like(nodes // (8 * slices), slices)
        with uncollected():  # as plan() does: what else is alive here costs nothing
            begin = time.thread_time()
            arena_ratio(graph, lanes)
            return time.thread_time() - begin

    seconds(10 * slices)
    assert min(seconds(100_000) for _ in range(2)) < 15 * min(seconds(20_000) for _ in range(2))  # 25 if quadratic


def test_all_alive_at_once_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_PAIRS", IN_STEP_ORDER)
    b = GraphBuilder("fan")
    x = b.input("x", (1,), "f32")
    leaves = [b.op("custom", [x], [spec(f"t{i}", (16,), "f32")], Work(flops=1.0), f"op{i}")[0] for i in range(5_000)]
    b.output(*b.op("custom", leaves, [spec("all", (1,), "f32")], Work(flops=1.0), "join"))
    assert arena_ratio(b.build(), lanes=1) == 1.0
