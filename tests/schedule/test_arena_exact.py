"""The arena against a second one that looks at all pairs of tensors and keeps its free bytes as a list of gaps."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgraph.graph.graph import Graph, GraphBuilder, Value
from taskgraph.graph.op import Work, spec
from taskgraph.schedule import arena
from tests.schedule.problems_by_hand import max_live_bytes

WORK = Work(flops=1.0)


@dataclass(frozen=True)
class Case:
    """A flat graph, the order of its ops, and the lane and waits of every step."""

    graph: Graph
    order: tuple[int, ...]
    lanes: tuple[int, ...]
    waits: tuple[tuple[int, ...], ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 14 ops with one or two outputs, in any order that keeps the edges, on up to four lanes."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    b = GraphBuilder("random")
    values: list[Value] = [b.input("x", (4,), "u8")]
    for i in range(draw(st.integers(1, 14))):
        inputs = rng.sample(values, min(len(values), rng.randint(1, 3)))
        outs = [spec(f"t{i}.{k}", (rng.choice([1, 64, 65, 128, 129, 500]),), "u8") for k in range(rng.randint(1, 2))]
        values += b.op("custom", inputs, outs, WORK, f"op{i}")
    b.output(*rng.sample(values[1:], min(len(values) - 1, rng.randint(1, 2))), values[-1])
    graph = b.build()
    before = graph.predecessors()
    order: list[int] = []
    while len(order) < len(before):
        order.append(rng.choice([i for i, p in enumerate(before) if i not in order and set(p) <= set(order)]))
    count = draw(st.integers(1, 4))
    lanes = tuple(rng.randrange(count) for _ in order)
    step = {op: s for s, op in enumerate(order)}
    waits = []
    for s, op in enumerate(order):
        others = [j for j in range(s) if lanes[j] != lanes[s]]
        wanted = {step[p] for p in before[op]} & set(others) | {j for j in others if rng.random() < 0.15}
        waits.append(tuple(sorted(wanted)))
    return Case(graph, tuple(order), lanes, tuple(waits))


def known(lanes: Sequence[int], waits: Sequence[tuple[int, ...]]) -> list[set[int]]:
    """For every step those that have ended when it starts."""
    found: list[set[int]] = []
    for s, lane in enumerate(lanes):
        direct = {j for j in range(s) if lanes[j] == lane} | set(waits[s])
        found.append(direct.union(*(found[j] for j in direct)))
    return found


@dataclass(frozen=True)
class Life:
    """A tensor: its bytes in the arena, the steps that use it (the first makes it), and the step from which on every
    step starts after they have ended."""

    name: str
    raw: int
    size: int
    users: tuple[int, ...]
    gone: int


def lives(case: Case) -> list[Life]:
    """In the order of their first steps."""
    graph, ended = case.graph, known(case.lanes, case.waits)
    step = {op: s for s, op in enumerate(case.order)}
    found = []
    for op in (graph.ops[i] for i in case.order):
        for name in op.outputs:
            if name not in graph.outputs:
                users = sorted(step[i] for i, o in enumerate(graph.ops) if name in (*o.inputs, *o.outputs))
                gone = 1 + max(s for s in range(len(case.order)) if not set(users) <= ended[s])
                nbytes = graph.tensor[name].nbytes
                found.append(Life(name, nbytes, (nbytes + 63) // 64 * 64, tuple(users), gone))
    return found


def gap_for(size: int, taken: list[tuple[int, int]]) -> int:
    """Where `size` bytes fit most tightly between (start, end) that are taken; at their end where they fit nowhere."""
    gaps, floor = [], 0
    for start, end in sorted(taken):
        if start - floor >= size:
            gaps.append((start - floor, floor))
        floor = max(floor, end)
    return min(gaps)[1] if gaps else floor


def place(tensors: list[Life], meet: list[set[int]]) -> dict[int, int]:
    """From the largest down, each tensor i in the tightest gap between those of meet[i]."""
    offset: dict[int, int] = {}
    for i in sorted(range(len(tensors)), key=lambda i: -tensors[i].size):
        near = [(offset[j], offset[j] + tensors[j].size) for j in meet[i] if j in offset]
        offset[i] = gap_for(tensors[i].size, near)
    return offset


def in_order(tensors: list[Life], until: list[int]) -> dict[int, int]:
    """As they are made, each in the tightest gap that those that have ended left."""
    offset: dict[int, int] = {}
    for i, tensor in enumerate(tensors):
        alive = [j for j in offset if until[j] > tensor.users[0]]
        offset[i] = gap_for(tensor.size, [(offset[j], offset[j] + tensors[j].size) for j in alive])
    return offset


def pairs_of(tensors: list[Life], until: list[int]) -> int:
    return sum(tensors[j].users[0] < until[i] for i in range(len(tensors)) for j in range(i + 1, len(tensors)))


def second_arena(case: Case, most: int) -> tuple[list[tuple[str, int, int]], int]:
    """(tensor, offset, bytes) of every slot, and the bytes of the arena."""
    tensors, ended = lives(case), known(case.lanes, case.waits)
    if not tensors:
        return [], 0
    offset: dict[int, int] = {}
    if pairs_of(tensors, [t.gone for t in tensors]) <= most:
        together = [(i, j) for j, late in enumerate(tensors) for i, early in enumerate(tensors[:j])
                    if not set(early.users) <= ended[late.users[0]]]  # fmt: skip
        meet = [{i + j - k for i, j in together if k in (i, j)} for k in range(len(tensors))]
        offset = place(tensors, meet)
    else:
        base = 0
        region = [{case.lanes[s] for s in t.users} for t in tensors]
        home = [min(r) if len(r) == 1 else -1 for r in region]
        for r in sorted(set(home)):
            mine = [i for i, h in enumerate(home) if h == r]
            part = [tensors[i] for i in mine]
            until = [t.gone if r < 0 else t.users[-1] + 1 for t in part]
            if pairs_of(part, until) <= most:
                meet = [
                    {j for j in range(len(part)) if j != i and part[max(i, j)].users[0] < until[min(i, j)]}
                    for i in range(len(part))
                ]
                at = place(part, meet)
            else:
                at = in_order(part, until)
            offset |= {i: base + at[k] for k, i in enumerate(mine)}
            base += max(at[k] + part[k].size for k in range(len(part)))
    slots = [(t.name, offset[i], t.size) for i, t in enumerate(tensors)]
    return slots, max(start + size for _, start, size in slots)


@settings(max_examples=150)
@given(cases(), st.sampled_from([arena._PAIRS, 0, 3, 12, -1]))
def test_slots_are_where_the_second_arena_has_them(case: Case, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "_PAIRS", most)
        slots, nbytes = arena.assign(case.graph, case.lanes, case.waits, case.order)
    assert ([(s.tensor, s.offset, s.nbytes) for s in slots], nbytes) == second_arena(case, most)


@settings(max_examples=60)
@given(cases())
def test_the_last_steps_that_have_ended_are_those_of_a_search(case: Case) -> None:
    wanted = [
        [max((j for j in ended if case.lanes[j] == lane), default=-1) for lane in range(max(case.lanes) + 1)]
        for ended in known(case.lanes, case.waits)
    ]
    assert arena.ended_steps(case.lanes, case.waits).tolist() == wanted


@settings(max_examples=60)
@given(cases())
def test_what_is_alive_at_a_step_is_counted(case: Case) -> None:
    tensors = lives(case)
    alive = [sum(t.raw for t in tensors if t.users[0] <= s <= t.users[-1]) for s in range(len(case.order))]
    assert max_live_bytes(case.graph, case.lanes, case.order) == max(alive)


def test_on_paper() -> None:
    """a (65 bytes, so 128), b (64), c (1, so 64) in a chain on one lane: c takes the place of a, whose user ended."""
    b = GraphBuilder("chain")
    value = b.input("x", (4,), "u8")
    for name, size in (("a", 65), ("b", 64), ("c", 1), ("out", 7)):
        (value,) = b.op("custom", [value], [spec(name, (size,), "u8")], WORK, f"op_{name}")
    b.output(value)
    slots, nbytes = arena.assign(b.build(), [0] * 4, [()] * 4, range(4))
    assert [(s.tensor, s.offset, s.nbytes) for s in slots] == [("a", 0, 128), ("b", 128, 64), ("c", 0, 64)]
    assert nbytes == 192
    assert max_live_bytes(b.build(), [0] * 4, range(4)) == 129


def test_a_graph_whose_tensors_are_all_given_needs_no_arena() -> None:
    b = GraphBuilder("given")
    b.output(*b.op("custom", [b.input("x", (4,), "u8")], [spec("out", (4,), "u8")], WORK, "op"))
    assert arena.assign(b.build(), [0], [()], [0]) == ((), 0)


def test_any_sequence_of_steps_will_do() -> None:
    """A tuple, too: numpy takes one for a place in several dimensions."""
    b = GraphBuilder("pair")
    x = b.input("x", (4,), "u8")
    (made,) = b.op("custom", [x], [spec("a", (4,), "u8")], WORK, "one")
    b.output(*b.op("custom", [made], [spec("b", (4,), "u8")], WORK, "two"))
    graph = b.build()
    for order in ([0, 1], (0, 1), range(2)):
        assert arena.assign(graph, [0, 0], [(), ()], order)[1] == 64
