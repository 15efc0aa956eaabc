"""Networks: every packet arrives once, throughput stays below what links can carry, bad networks are refused."""

import math
import re
from collections import deque

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskgraph.errors import NetworkError
from taskgraph.network import (
    PATTERNS,
    ROUTINGS,
    Routers,
    Routing,
    Topology,
    Traffic,
    capacity,
    fat_tree,
    from_links,
    mesh,
    ring,
    simulate,
    switch,
    throughput_bound,
    torus,
    traffic,
    worst_case,
)
from taskgraph.network.bounds import flows_of
from taskgraph.network.flows import link_loads
from taskgraph.network.patterns import permutation

FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
OF_GRIDS = sorted(name for name, each in ROUTINGS.items() if not each.graphs)
shapes = st.lists(st.integers(2, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Topology, str]:
    wrap = draw(st.booleans())
    made = (torus if wrap else mesh)(*draw(shapes))
    return made, draw(
        st.sampled_from([name for name, each in ROUTINGS.items() if not each.graphs and (wrap or not each.weighted)])
    )


def distances(topology: Topology, source: int) -> dict[int, int]:
    """By breadth first search over the links, which shares nothing with coordinates."""
    heads, degree = topology.heads(), 2 * len(topology.shape)
    far, waiting = {source: 0}, deque([source])
    while waiting:
        node = waiting.popleft()
        for head in heads[node * degree : (node + 1) * degree].tolist():
            if head >= 0 and head not in far:
                far[head] = far[node] + 1
                waiting.append(head)
    return far


@FEW
@given(cases(), st.integers(0, 2**32), st.floats(0, 2), st.integers(0, 3), st.integers(1, 4), st.data())
def test_no_packet_is_lost_or_doubled(
    case: tuple[Topology, str], seed: int, load: float, spare: int, room: int, data: st.DataObject
) -> None:
    topology, routing = case
    order = np.random.default_rng(seed).permutation(topology.nodes)
    pattern = data.draw(st.sampled_from([traffic(topology, "uniform"), permutation(topology, order)]))
    choice = data.draw(st.sampled_from(["credits", "random"]))
    routers = Routers(ROUTINGS[routing].classes(topology) + spare, room, data.draw(st.integers(1, 3)), choice=choice)
    seen = simulate(topology, routing, pattern, min(load, 2.0 * len(topology.shape)), 400, 0, routers, seed)
    assert seen.doubled == 0
    assert seen.created == seen.delivered + seen.inside
    assert seen.stalled_cycles <= 2 * routers.hop_cycles
    assert seen == simulate(topology, routing, pattern, seen.offered, 400, 0, routers, seed)


@pytest.mark.parametrize("routing", OF_GRIDS)
def test_no_deadlock_where_room_is_least(routing: str) -> None:
    topology = torus(4, 4)
    routers = Routers(ROUTINGS[routing].classes(topology), room=1)
    seen = simulate(topology, routing, traffic(topology, "uniform"), 4.0, 30_000, 0, routers)
    assert seen.stalled_cycles <= 2
    assert seen.delivered > 30_000


@settings(FEW, max_examples=8)
@given(shapes, st.sampled_from(OF_GRIDS), st.sampled_from(["uniform", "tornado", "nearest-neighbour"]))
def test_no_more_is_delivered_than_the_bound(shape: tuple[int, ...], routing: str, pattern: str) -> None:
    topology = torus(*shape)
    sent = traffic(topology, pattern)  # the same from every node, so that none can have more than its share
    bound = throughput_bound(topology, routing, sent)
    load = min(1.3 * bound, 2.0 * len(shape))
    seen = simulate(topology, routing, sent, load, 1500, 500)
    assert seen.accepted <= bound + 6 * math.sqrt(load / (1500 * topology.nodes))
    half = simulate(topology, routing, sent, 0.5 * load / 1.3, 1500, 500)
    assert abs(half.accepted - half.offered) <= 6 * math.sqrt(half.offered / (1500 * topology.nodes)) + 1e-3


@FEW
@given(shapes, st.booleans(), st.integers(0, 2**32))
def test_shortest_ways_have_the_hops_of_the_graph(shape: tuple[int, ...], wrap: bool, seed: int) -> None:
    topology = (torus if wrap else mesh)(*shape)
    pattern = permutation(topology, np.random.default_rng(seed).permutation(topology.nodes))
    far = sum(distances(topology, i)[int(to)] for i, to in enumerate(pattern.targets[:, 0]))
    loads = link_loads(topology, ROUTINGS["dimension-order"], flows_of(pattern.pairs()))[0]
    assert loads.sum() == pytest.approx(far)
    assert loads[topology.heads() < 0].sum() == 0


@FEW
@given(shapes, st.booleans(), st.integers(0, 2**32), st.integers(2, 6))
def test_dimension_order_by_pair_keeps_packets_in_order(
    shape: tuple[int, ...], wrap: bool, seed: int, channels: int
) -> None:
    topology = (torus if wrap else mesh)(*shape)
    routers = Routers(channels, offers=1, choice="pair")
    seen = simulate(topology, "dimension-order", traffic(topology, "uniform"), 0.9, 500, 0, routers, seed)
    assert seen.unordered == 0 and seen.delivered > 0


def test_packets_of_adaptive_ways_do_overtake() -> None:
    topology = torus(4, 4)
    assert simulate(topology, "goal", traffic(topology, "transpose"), 0.5, 500, 0).unordered > 0


@pytest.mark.parametrize(
    ("routing", "pattern", "expected"),
    [
        ("dimension-order", "uniform", 1.0),
        ("dimension-order", "tornado", 1 / 3),
        ("dimension-order", "nearest-neighbour", 4.0),
        ("valiant", "uniform", 0.5),
        ("valiant", "tornado", 0.5),
        ("minimal-adaptive", "tornado", 1 / 3),
        ("goal", "tornado", 1 / (3 * 5 / 8)),
        ("minimal-adaptive", "bit-complement", 0.5),
    ],
)
def test_bounds_of_the_8_ary_2_cube_are_those_by_hand(routing: str, pattern: str, expected: float) -> None:
    topology = torus(8, 8)
    assert capacity(topology) == pytest.approx(1.0)
    assert throughput_bound(topology, routing, traffic(topology, pattern)) == pytest.approx(expected)


def test_routings_rank_on_tornado_as_theory_says() -> None:
    topology = torus(8, 8)
    accepted = {
        name: simulate(topology, name, traffic(topology, "tornado"), 0.45, 1500, 1000).accepted for name in OF_GRIDS
    }
    assert accepted["goal"] == pytest.approx(0.45, rel=0.03)
    for name in ("dimension-order", "minimal-adaptive"):
        assert accepted[name] <= 1.02 / 3


def test_latency_without_load_is_the_hops() -> None:
    topology, routers = ring(8), Routers(hop_cycles=5)
    pattern = permutation(topology, (np.arange(8) + 3) % 8)
    seen = simulate(topology, "dimension-order", pattern, 0.001, 20_000, 0, routers)
    assert seen.latency_cycles == pytest.approx(15, rel=0.02)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: torus(), "give a size for each dimension"),
        (lambda: torus(8, 1), "at least 2|from 2"),
        (lambda: torus(100, 100), "use at most 4096"),
        (lambda: torus(4, bytes_per_s=0), "bytes_per_s"),
        (lambda: torus(4, latency_s=math.nan), "latency_s"),
        (lambda: mesh(4, 4).place(17), "17 ranks .* use a larger network"),
        (lambda: simulate(mesh(4, 4), "goal", traffic(mesh(4, 4), "uniform"), 0.1), "Use a torus"),
        (lambda: simulate(ring(4), "best", traffic(ring(4), "uniform"), 0.1), "use one of dimension-order"),
        (lambda: simulate(ring(4), "goal", traffic(ring(5), "uniform"), 0.1), "one of 5 nodes"),
        (lambda: simulate(ring(4), "goal", traffic(ring(4), "uniform"), 3.0), "load"),
        (
            lambda: simulate(ring(4), "valiant", traffic(ring(4), "uniform"), 0.1, routers=Routers(3)),
            "needs 4 virtual channels",
        ),
        (lambda: Routers(choice="pair"), "use 1"),
        (lambda: from_links("two", 4, [(0, 1), (2, 3)]), "not connected: host 0 cannot reach host 2"),
        (lambda: from_links("none", 4, []), "give pairs"),
        (lambda: from_links("self", 2, [(0, 0), (0, 1)]), "pair of two nodes"),
        (lambda: from_links("twice", 2, [(0, 1), (1, 0)]), "give each pair once"),
        (lambda: Topology("few", (4, 4), True, hosts=3), "leave hosts out"),
        (lambda: switch(63), "at most 62|to 62"),
        (lambda: switch(4).place(5), "has 4 hosts"),
        (lambda: simulate(switch(4), "goal", traffic(switch(4), "uniform"), 0.1), "made for tori"),
        (lambda: simulate(ring(4), "shortest", traffic(ring(4), "uniform"), 0.1), "Use dimension-order"),
        (lambda: traffic(switch(4), "tornado"), "made for tori"),
        (lambda: Routers(room=0), "room"),
        (lambda: traffic(ring(4), "transpose"), "two or more dimensions"),
        (lambda: traffic(mesh(4), "nearest-neighbour"), "use a torus"),
        (lambda: traffic(ring(4), "worst"), "use one of uniform"),
        (lambda: permutation(ring(3), np.array([0, 0, 1])), "once"),
    ],
)
def test_what_is_wrong_is_refused_with_a_way_out(wrong: object, says: str) -> None:
    with pytest.raises(NetworkError) as caught:
        wrong()  # type: ignore[operator]
    assert re.search(says, str(caught.value)), caught.value


@st.composite
def graphs(draw: st.DrawFn) -> Topology:
    """Connected: a random tree with some links more; some of its nodes are switches."""
    nodes = draw(st.integers(2, 9))
    tree = {(draw(st.integers(0, i - 1)), i) for i in range(1, nodes)}
    more = draw(st.sets(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), max_size=6))
    links = tree | {(min(pair), max(pair)) for pair in more if pair[0] != pair[1]}
    return from_links("drawn", draw(st.integers(2, nodes)), sorted(links))


@FEW
@given(graphs(), st.integers(0, 2**32), st.integers(1, 2))
def test_any_connected_graph_delivers_in_order_and_without_deadlock(topology: Topology, seed: int, room: int) -> None:
    routers = Routers(ROUTINGS["shortest"].classes(topology), room, offers=1, choice="pair")
    pattern = traffic(topology, "uniform")
    seen = simulate(topology, "shortest", pattern, 1.0, 800, 0, routers, seed)
    assert seen.doubled == seen.unordered == 0 and seen.stalled_cycles <= 2
    assert seen.created == seen.delivered + seen.inside
    bound = throughput_bound(topology, "shortest", pattern)
    assert seen.accepted <= bound + 6 * math.sqrt(bound / (800 * topology.hosts)) + 0.05


def test_one_class_too_few_is_a_deadlock_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = from_links("ring", 6, [(i, (i + 1) % 6) for i in range(6)])
    monkeypatch.setattr(Routing, "classes", lambda *_: 1)
    with pytest.raises(NetworkError, match="in deadlock"):
        simulate(topology, "shortest", traffic(topology, "uniform"), 1.0, 100_000, 0, Routers(1, room=1))


def test_trees_need_one_class_and_a_ring_of_links_one_a_hop() -> None:
    shortest = ROUTINGS["shortest"]
    assert shortest.classes(switch(8)) == shortest.classes(fat_tree(4, 4, 2)) == 1
    assert shortest.classes(from_links("ring", 6, [(i, (i + 1) % 6) for i in range(6)])) == 3


def test_spines_limit_a_fat_tree() -> None:
    full, half = (capacity(fat_tree(4, 4, spines)) for spines in (4, 2))
    assert full == pytest.approx(16 / 15)  # a sixteenth goes to itself
    assert half == pytest.approx(2 / 3)  # a quarter of the traffic stays below its leaf: 4 * 3/4 packets on 2 links


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_every_pattern_sends_as_much_to_each_node(pattern: str) -> None:
    pairs = traffic(torus(4, 4), pattern).pairs()
    assert pairs.sum(0) == pytest.approx(1.0) and pairs.sum(1) == pytest.approx(1.0)


@FEW
@given(st.one_of(cases(), st.tuples(graphs(), st.just("shortest"))), st.integers(0, 2**32), st.floats(0.2, 1.0))
def test_no_more_crosses_a_cut_than_its_links_carry(case: tuple[Topology, str], seed: int, load: float) -> None:
    """Bisections among them: every packet goes from one side to the other, over a link of the cut once at least."""
    topology, routing = case
    drawn = np.random.default_rng(seed)
    side = drawn.integers(0, 2, topology.nodes)
    side[: topology.hosts][[0, -1]] = 0, 1
    there = np.flatnonzero(side[: topology.hosts] == 1)
    sends = (side == 0) & (np.arange(topology.nodes) < topology.hosts)
    targets = np.where(sends, drawn.choice(there, topology.nodes), -1)
    heads = topology.heads()
    tails = np.repeat(np.arange(topology.nodes), heads.size // topology.nodes)
    cut = int(((heads >= 0) & (side[tails] == 0) & (side[heads] == 1)).sum())
    seen = simulate(topology, routing, Traffic("across", targets.reshape(-1, 1)), load, 500, 0, seed=seed)
    assert seen.delivered <= cut * 500


@pytest.mark.slow
@pytest.mark.parametrize("routing", OF_GRIDS)
def test_no_deadlock_in_a_million_cycles(routing: str) -> None:
    """More than links can carry, with room for one packet a channel: where packets hold each other up most. In a ring
    for the time that it takes; `python -m benchmarks.network --million` is the 4-ary 2-cube."""
    topology = ring(4)
    routers = Routers(ROUTINGS[routing].classes(topology), room=1)
    seen = simulate(topology, routing, traffic(topology, "uniform"), 2.0, 1_000_000, 0, routers)
    assert seen.stalled_cycles <= 2
    assert seen.created == seen.delivered + seen.inside > 1_000_000


@FEW
@given(st.integers(2, 5), st.integers(2, 4))
def test_no_permutation_is_bounded_lower_than_the_worst(a: int, b: int) -> None:
    topology = torus(a, b)
    worst = throughput_bound(topology, "dimension-order", worst_case(topology, "dimension-order"))
    for seed in range(5):
        other = permutation(topology, np.random.default_rng(seed).permutation(a * b))
        assert worst <= throughput_bound(topology, "dimension-order", other) * (1 + 1e-9)
    halves = throughput_bound(topology, "valiant", worst_case(topology, "valiant"))
    assert halves >= 0.5 * capacity(topology) * (1 - 1e-9)


def test_the_worst_for_dimension_order_is_no_better_than_transpose() -> None:
    topology = torus(8, 8)
    worst = throughput_bound(topology, "dimension-order", worst_case(topology, "dimension-order"))
    assert worst <= throughput_bound(topology, "dimension-order", traffic(topology, "transpose"))
