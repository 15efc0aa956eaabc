"""Collectives on networks: schedules do what they say, times agree with simulated packets, bad ones are refused."""

import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskgraph.errors import TaskgraphError
from taskgraph.network import (
    ALGORITHMS,
    COLLECTIVES,
    Call,
    Network,
    Schedule,
    collective_cost,
    fluid_cost,
    fluid_together,
    from_links,
    hosts_of,
    machines,
    network,
    packet_run,
    packets_together,
    schedule,
    switch,
    torus,
)
from taskgraph.network.collectives import Ranks, lacking

FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    grid = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    ranks, wrap = math.prod(grid), draw(st.booleans())
    collective = draw(st.sampled_from(COLLECTIVES))
    known = [name for name in ALGORITHMS if not lacking(collective, name, Ranks(ranks, grid, wrap))]
    return schedule(collective, draw(st.sampled_from(known)), ranks, grid, wrap)


def begun(made: Schedule, chunks: int) -> list[dict[int, frozenset[int]]]:
    """What each rank holds at the start: by chunk the ranks whose values are in it."""
    n = made.ranks
    if made.collective in ("all_reduce", "reduce_scatter"):
        return [{c: frozenset([r]) for c in range(chunks)} for r in range(n)]
    owner = (lambda c: c % n) if made.collective == "all_gather" else (lambda c: c // n % n)
    return [{c: frozenset([r]) for c in range(chunks) if owner(c) == r} for r in range(n)]


def run(made: Schedule) -> list[dict[int, frozenset[int]]]:
    """The schedule on sets of ranks in place of numbers; nothing is sent that is not held, or added twice."""
    chunks = round(1 / made.chunk_share) * (made.ranks if made.collective == "all_to_all" else 1)
    held = begun(made, chunks)
    for phase in made.phases:
        before = [dict(each) for each in held]
        for message in phase:
            assert message.source != message.target and message.chunks
            for c in message.chunks:
                value = before[message.source][c]
                if message.adds:
                    assert not value & held[message.target][c], "added twice"
                    value |= held[message.target][c]
                held[message.target][c] = value
    return held


@FEW
@given(schedules())
def test_every_schedule_does_its_collective(made: Schedule) -> None:
    n, held = made.ranks, run(made)
    every = frozenset(range(n))
    chunks = round(1 / made.chunk_share) * (n if made.collective == "all_to_all" else 1)
    for r, mine in enumerate(held):
        for c in range(chunks):
            if made.collective == "all_reduce":
                assert mine[c] == every
            elif made.collective == "all_gather":
                assert mine[c] == {c % n}
            elif made.collective == "reduce_scatter":
                assert c % n != r or mine[c] == every
            else:
                assert c % n != r or mine[c] == {c // n % n}


@pytest.mark.parametrize(
    ("text", "collective", "algorithm", "ranks", "hops", "share"),
    [
        # n - 1 phases of one hop, of a half each way: 2 (n - 1) / n of the message over a link that takes both halves
        ("ring:8", "all_reduce", "ring", 8, 14, 7 / 8),
        ("ring:8", "all_gather", "ring", 8, 7, 7 / 16),
        # two hops a phase and one link, which takes both halves
        ("switch:8", "all_reduce", "ring", 8, 28, 7 / 4),
        ("switch:8", "all_reduce", "direct", 8, 4, 7 / 4),
        ("switch:8", "all_reduce", "doubling", 8, 6, 3),
        ("switch:8", "all_gather", "halving", 8, 6, 7 / 8),
        ("switch:8", "all_to_all", "shifts", 8, 14, 7 / 8),
        # six parts, each beginning with a dimension and a direction: (64 - 1) / 64 / 6 of the message over a link
        ("torus:4x4x4", "all_gather", "dimensions", 64, 9, 63 / 64 / 6),
    ],
)
def test_costs_are_those_by_hand(
    text: str, collective: str, algorithm: str, ranks: int, hops: float, share: float
) -> None:
    cost = fluid_cost(network(f"{text}@10GB/s,1us"), collective, algorithm, ranks)
    assert cost.seconds(0.0) == pytest.approx(hops * 1e-6)
    assert cost.seconds(1e9) - cost.seconds(0.0) == pytest.approx(share / 10, rel=1e-3)


def test_the_slow_links_between_machines_take_the_rank_sums_alone() -> None:
    """Within a machine of 8 all of the message, between 2 machines an eighth of it, as much up as down."""
    made = network("machines:2x8@400GB/s,0.5us+50GB/s,2us")
    cost = fluid_cost(made, "all_reduce", "dimensions", 16)
    inside, between = 2 * 7 / 8 / 400e9, 2 * 1 / 2 / 8 / 50e9
    assert cost.seconds(1e9) - cost.seconds(0.0) == pytest.approx((inside + between) * 1e9, rel=0.01)
    assert cost.seconds(1e9) < fluid_cost(made, "all_reduce", "ring", 16).seconds(1e9)
    assert collective_cost(made, "all_reduce", 16, 1e9)[0] in ("dimensions", "levels")


def test_devices_of_a_host_share_its_link() -> None:
    """All of the message over the links of devices, and over the one link of a host to the other host only once."""
    made = network("switch:2*8@400GB/s,0.5us+50GB/s,2us")
    cost = fluid_cost(made, "all_reduce", "levels", 16)
    inside, between = 2 * 7 / 8 / 400e9, 2 * 1 / 2 / 50e9
    assert cost.seconds(1e9) - cost.seconds(0.0) == pytest.approx((inside + between) * 1e9, rel=0.01)
    # two links in each phase within a host and four between, to and from devices; latencies of phases that wait
    assert cost.seconds(0.0) == pytest.approx(2 * (2 * 0.5e-6) + 2 * (2 * 0.5e-6 + 2 * 2e-6))
    assert collective_cost(made, "all_reduce", 16, 1e6)[0] == "levels"


@pytest.mark.parametrize("outer", ["torus:2x3", "mesh:3x2", "ring:4", "switch:3", "fat-tree:2x2+2"])
def test_hosts_with_devices_have_the_ways_of_their_hosts(outer: str) -> None:
    """A device is one link from its host's switch; between hosts are the hops of the network between them."""
    alone, made = network(outer).topology, hosts_of(3, network(outer).topology, (1e11, 1e-6))
    far, between = made.distances(), alone.distances()
    for a in range(made.hosts):
        for b in range(made.hosts):
            assert far[a, b] == (0 if a == b else 2 + between[a // 3, b // 3])
    assert (made.hosts, made.tiers[-1]) == (3 * alone.hosts, 3)
    up, out = made.rates_by_place()[made.heads() >= 0].sum(), alone.rates_by_place()[alone.heads() >= 0].sum()
    assert up == pytest.approx(out + 2 * made.hosts * 1e11)


@FEW
@given(
    st.sampled_from(["torus:4x4", "mesh:4x3", "ring:6", "switch:8", "fat-tree:2x4+2", "machines:2x4", "ring:3*2"]),
    st.sampled_from(COLLECTIVES), st.floats(0, 1e8), st.floats(1.01, 3.0), st.integers(2, 8),
)  # fmt: skip
def test_the_best_algorithm_is_never_slower_than_a_fixed_one(
    text: str, collective: str, nbytes: float, more: float, ranks: int
) -> None:
    made = network(text)
    ranks = min(ranks, made.topology.hosts)
    _, best = collective_cost(made, collective, ranks, nbytes)
    for name in made.algorithms(collective, ranks):
        fixed = Network(made.topology, made.routing, name)
        assert collective_cost(fixed, collective, ranks, nbytes)[1].seconds(nbytes) >= best.seconds(nbytes)
    assert best.seconds(more * nbytes) >= best.seconds(nbytes)


@pytest.mark.parametrize(
    ("text", "collective", "algorithm", "ranks"),
    [
        ("torus:4x4", "all_reduce", "dimensions", 16),
        ("torus:5x3", "all_to_all", "shifts", 15),
        ("mesh:4x4", "all_gather", "ring", 8),
        ("switch:8", "reduce_scatter", "direct", 8),
        ("fat-tree:4x4+2", "all_reduce", "halving", 16),
        ("machines:2x4@400GB/s,500ns+50GB/s,2us", "all_reduce", "dimensions", 8),
        ("switch:2*4@400GB/s,500ns+50GB/s,2us", "all_reduce", "levels", 8),
        ("torus:2x3*4@400GB/s,500ns+50GB/s,2us", "all_gather", "dimensions", 24),
        ("fat-tree:2x2+1*4@100GB/s,500ns+50GB/s,1us", "all_to_all", "levels", 16),
    ],
)
@pytest.mark.parametrize("nbytes", [2e5, 4e6])
def test_the_fluid_model_agrees_with_packets(
    text: str, collective: str, algorithm: str, ranks: int, nbytes: float
) -> None:
    made = network(text)
    seen = packet_run(made, collective, algorithm, ranks, nbytes)
    assert fluid_cost(made, collective, algorithm, ranks).seconds(nbytes) == pytest.approx(seen.seconds, rel=0.1)
    assert seen == packet_run(made, collective, algorithm, ranks, nbytes)


@FEW
@given(schedules(), st.integers(0, 2**16))
def test_every_packet_of_a_collective_arrives(made: Schedule, packets: int) -> None:
    packets %= 5
    if made.ranks < 2:
        return
    hosts = torus(max(2, made.ranks))
    seen = packet_run(Network(hosts), made.collective, "shifts" if made.collective == "all_to_all" else "ring",
                      made.ranks, 4096.0 * packets * made.ranks)  # fmt: skip
    messages = (made.ranks - 1) * made.ranks * (1 if made.collective == "all_to_all" else 2)
    each = packets if made.collective == "all_to_all" else -(-packets // 2)
    assert seen.packets == messages * max(1, each) * (2 if made.collective == "all_reduce" else 1)


@FEW
@given(
    st.sampled_from(["torus:4x4", "mesh:4x3", "ring:6", "switch:8", "fat-tree:2x4+2", "machines:2x4", "switch:2*3"]),
    st.sampled_from(COLLECTIVES), st.sampled_from(COLLECTIVES), st.floats(0, 1e7), st.floats(1e3, 1e7), st.data(),
)  # fmt: skip
def test_collectives_at_once_take_no_less_than_alone_and_no_more_than_in_turn(
    text: str, first: str, second: str, few: float, many: float, data: st.DataObject
) -> None:
    made = network(text)
    ranks = data.draw(st.integers(2, made.topology.hosts))
    calls = [
        Call(name, data.draw(st.sampled_from(made.algorithms(name, ranks))), ranks, nbytes)
        for name, nbytes in ((first, few), (second, many))
    ]
    alone = [fluid_cost(made, *call[:3]).seconds(call.nbytes) for call in calls]
    for call, seconds in zip(calls, alone, strict=True):
        assert fluid_together(made, [call])[0] == pytest.approx(seconds)
    both = fluid_together(made, calls)
    assert all(with_other >= by_itself * (1 - 1e-6) for with_other, by_itself in zip(both, alone, strict=True))
    assert max(both) <= sum(alone) * (1 + 1e-6)
    assert fluid_together(made, calls[::-1]) == pytest.approx(both[::-1], rel=1e-3)


@pytest.mark.parametrize(
    ("text", "first", "second", "ranks"),
    [
        ("torus:4x4", ("all_reduce", "dimensions"), ("all_reduce", "dimensions"), 16),
        ("switch:8", ("all_reduce", "halving"), ("all_gather", "ring"), 8),
        ("fat-tree:2x4+2", ("all_reduce", "ring"), ("all_reduce", "levels"), 8),
        ("machines:2x4@400GB/s,500ns+50GB/s,2us", ("all_reduce", "levels"), ("all_reduce", "levels"), 8),
        ("switch:2*4@400GB/s,500ns+50GB/s,2us", ("all_reduce", "levels"), ("reduce_scatter", "dimensions"), 8),
    ],
)
@pytest.mark.parametrize("nbytes", [(1e6, 1e6), (3e6, 4e5)])
def test_collectives_at_once_agree_with_packets(
    text: str, first: tuple[str, str], second: tuple[str, str], ranks: int, nbytes: tuple[float, float]
) -> None:
    made = network(text)
    calls = [Call(*which, ranks, size) for which, size in zip((first, second), nbytes, strict=True)]
    seen = packets_together(made, calls)
    found = fluid_together(made, calls)
    assert max(found) == pytest.approx(seen.seconds, rel=0.1)
    if first == second and nbytes[0] == nbytes[1]:  # of two that are not alike the shorter waits in the other's queues
        assert found == pytest.approx(seen.each_s, rel=0.1)
    one_by_one = [packet_run(made, *call) for call in calls]
    assert seen.packets == sum(run.packets for run in one_by_one)
    assert seen.hops == sum(run.hops for run in one_by_one)
    assert all(both >= alone.seconds * 0.97 for both, alone in zip(seen.each_s, one_by_one, strict=True))


def test_groups_share_the_links() -> None:
    """Ring neighbours of a row and a half meet on the links that the other half of the torus uses too."""
    alone = Network(torus(4, 4), hosts=tuple(range(8)))
    full = network("torus:4x4")
    for name in ("halving", "shifts"):
        one, all_of_them = (fluid_cost(each, "all_to_all", name, 8).seconds(1e8) for each in (alone, full))
        assert all_of_them >= one * (1 - 1e-12)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: network("torus"), "write torus:4x4x4"),
        (lambda: network("hypercube:4"), "write torus:4x4x4"),
        (lambda: network("ring:4x4"), "write torus:4x4x4"),
        (lambda: network("machines:2"), "write torus:4x4x4"),
        (lambda: network("torus:9999x9999"), "above 4096"),
        (lambda: network("switch:8@fast"), "quantity"),
        (lambda: network("switch:8@1GB/s,5m"), "as seconds"),
        (lambda: network("switch:8", "goal"), "made for tori"),
        (lambda: network("mesh:4x4", "goal"), "Use a torus"),
        (lambda: network("torus:4x4", "best"), "use one of"),
        (lambda: network("torus:4x4", algorithm="best"), "use one of auto"),
        (lambda: Network(switch(4), hosts=(0, 4)), "from 0 to 3"),
        (lambda: Network(switch(4), hosts=(0, 0)), "given twice"),
        (lambda: Network("switch:4"), "read a text by network"),
        (lambda: collective_cost(network("torus:4x4"), "all_reduce", 17, 1e6), "17 ranks .* use a larger network"),
        (lambda: collective_cost(network("ring:8", algorithm="dimensions"), "all_reduce", 8, 1e6), "in a grid"),
        (lambda: collective_cost(network("ring:8", algorithm="direct"), "all_reduce", 8, 1e6), "hold each other up"),
        (lambda: schedule("all_to_all", "tree", 8), "is not known; use one of ring"),
        (lambda: schedule("all_reduce", "halving", 6), "power of two"),
        (lambda: schedule("broadcast", "ring", 6), "use one of all_reduce"),
        (lambda: from_links("odd", 2, [(0, 1)], [1e9, 1e9]), "give one each"),
        (lambda: machines(1, 8), "from 2|at least 2"),
        (lambda: hosts_of(1, torus(4, 4)), "from 2|at least 2"),
        (lambda: hosts_of(62, torus(4, 4, 4)), "at most 1024"),
        (lambda: fluid_together(network("switch:8"), []), "from 1 to 8"),
        (lambda: fluid_together(network("switch:8"), [("all_reduce", "ring", 8, 1e6)]), "Make one by Call"),
        (lambda: packets_together(network("switch:8"), [Call("all_reduce", "ring", 9, 1e6)]), "9 ranks"),
        (lambda: packets_together(network("switch:8"), [Call("all_reduce", "ring", 8, -1.0)]), "nbytes"),
        (lambda: network("machines:2x8*2"), "write torus:4x4x4"),
        (lambda: network("torus:4x4*8", "goal"), "made for tori"),
    ],
)
def test_what_is_wrong_is_refused_with_a_way_out(wrong: object, says: str) -> None:
    with pytest.raises(TaskgraphError) as caught:
        wrong()  # type: ignore[operator]
    assert re.search(says, str(caught.value)), caught.value
