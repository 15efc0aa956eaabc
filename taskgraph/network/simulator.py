"""A simulator of links in cycles: packets of one flit, virtual channels with credits, one order of events.

A cycle is the time that a link takes for a packet. In each, nodes are served in order of their numbers, and in a node
its links in a circle that starts one further every cycle, its host among them: each virtual channel sends its first
packet if a link that it may take is still free in this cycle and has a credit. What is sent is seen downstream, and
credits upstream, in a later cycle, so the order of nodes changes nothing but who draws which random number. Links are
the only limit: a node takes any number of packets out of the network in a cycle, and an input that has several
virtual channels may send one from each."""

import math
from dataclasses import dataclass

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.network.bounds import capacity
from taskgraph.network.fluid import MOST_AT_ONCE
from taskgraph.network.patterns import Traffic
from taskgraph.network.router import Counts, Net, Rules, State, run
from taskgraph.network.routing import Routing, next_ports, routing_for
from taskgraph.network.topology import Topology
from taskgraph.record import instance, integer, number, one_of

CHOICES = ("credits", "random", "pair", "turns")
BINS = 4096


@dataclass(frozen=True, slots=True)
class Routers:
    """What every node's router has: virtual channels a link, packets of room in each, cycles of a hop, packets that
    its host may offer at once (0: two a link), and how a channel of a class is chosen: the one with most "credits",
    one at "random", or by the "pair" of source and target; "turns" is "credits" for messages, whose packets go both
    ways in turns where both are as short. With "pair" and one offered at once, packets of a pair stay in order under
    dimension order. Channels are shared out evenly to the classes that a routing needs; what is over after two classes
    for the way out of an adaptive routing is its free class."""

    channels: int = 8
    room: int = 8
    hop_cycles: int = 1
    offers: int = 0
    choice: str = "credits"

    def __post_init__(self) -> None:
        integer("channels", self.channels, NetworkError, 1, 64)
        integer("room", self.room, NetworkError, 1, 1024)
        integer("hop_cycles", self.hop_cycles, NetworkError, 1, 10_000)
        integer("offers", self.offers, NetworkError, 0, 64)
        one_of("choice", self.choice, CHOICES, NetworkError)
        if self.choice == "pair" and self.offers != 1:
            raise NetworkError(f"channels by pair keep packets in order; offers is {self.offers}, use 1.")


DEFAULT = Routers()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation saw; rates and latencies are of the cycles after the warm-up. Kind: simulated.

    `offered` and `accepted`: packets per host and cycle created (that a source has not yet offered included) and
    delivered. `latency_cycles`: mean from creation to delivery; `latency_p99_cycles`, 4095 at most. `created`,
    `delivered`, `inside` (found in queues at the end), `doubled`, `unordered` (delivered after a later one of its
    pair), `hops`: of
    the whole run. `stalled_cycles`: most in a row in which packets waited and none moved."""

    offered: float
    accepted: float
    latency_cycles: float
    latency_p99_cycles: float
    created: int
    delivered: int
    inside: int
    doubled: int
    unordered: int
    hops: int
    stalled_cycles: int


def simulate(
    topology: Topology,
    routing: str,
    pattern: Traffic,
    load: float,
    cycles: int = 4000,
    warm_up: int = 1000,
    routers: Routers = DEFAULT,
    seed: int = 0,
) -> Outcome:
    """Every host sends `load` packets a cycle in the mean, at most one a link (in a graph one), at random times, for
    `warm_up` and then `cycles` cycles.

    NetworkError where the routing is not made for the topology, the traffic is another network's, there are too few
    virtual channels for the routing to be free of deadlock, or (a bug of this module) packets waited and none moved."""
    instance("topology", topology, Topology, NetworkError)
    instance("pattern", pattern, Traffic, NetworkError, "Make one by traffic(topology, name).")
    instance("routers", routers, Routers, NetworkError)
    integer("cycles", cycles, NetworkError, 1, 2**40)
    integer("warm_up", warm_up, NetworkError, 0, 2**40)
    integer("seed", seed, NetworkError, 0)
    if routers.choice == "turns":
        raise NetworkError("turns are those of a message's packets; for a load use credits, random or pair.")
    way = routing_for(topology, routing)
    links = 2 * len(topology.shape) or 1
    offers = routers.offers or 2 * links
    number("load", load, NetworkError, 0, min(offers, links))
    if pattern.targets.shape[0] != topology.nodes:
        raise NetworkError(
            f"the traffic is one of {pattern.targets.shape[0]} nodes; {topology.name!r} has {topology.nodes}."
        )
    needed = way.classes(topology)
    if routers.channels < needed:
        raise NetworkError(
            f"routing {routing!r} needs {needed} virtual channels on {topology.name!r} to be free of deadlock; routers "
            f"have {routers.channels}. Give them more channels."
        )
    if topology.rates or topology.latencies:
        raise NetworkError(
            f"the links of {topology.name!r} differ; loads are packets a cycle of one link. Use links that are alike."
        )
    net, rules = net_of(topology, routers.hop_cycles), rules_of(topology, way, routers, load / offers)
    state = state_of(topology, routers, offers, seed)
    run(net, rules, np.ascontiguousarray(pattern.targets), state, warm_up, warm_up + cycles)
    return _outcome(topology, state, load, cycles)


def saturation(
    topology: Topology,
    routing: str,
    pattern: Traffic,
    routers: Routers = DEFAULT,
    cycles: int = 4000,
    seed: int = 0,
) -> float:
    """The throughput at saturation as a fraction of `capacity`: the highest load at which at least 97 % of what is
    offered is delivered, from a quarter of capacity by doubling, then by halving to 1 %. Simulated."""
    full = capacity(topology)
    most = float(min(routers.offers or 64, 2 * len(topology.shape) or 1))

    def carried(load: float) -> bool:
        seen = simulate(topology, routing, pattern, load, cycles, cycles // 2, routers, seed)
        return seen.accepted >= 0.97 * seen.offered

    low, high = 0.0, min(0.25 * full, most)
    while high < most and carried(high):  # a network that is far beyond saturation takes long to simulate
        low, high = high, min(2.0 * high, most)
    while high - low > 0.01 * max(full, high):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if carried(middle) else (low, middle)
    return low / full


def net_of(topology: Topology, hop_cycles: int | np.ndarray, periods: int | np.ndarray = 1) -> Net:
    """The network as the router takes it: cycles of a hop, and between two packets, for all links or each (links,)."""
    heads = topology.heads()
    nodes = topology.nodes
    into = np.full((nodes, int(np.bincount(heads[heads >= 0]).max())), -1, np.int64)
    used = [0] * nodes
    for link in np.flatnonzero(heads >= 0):
        head = heads[link]
        into[head, used[head]] = link
        used[head] += 1
    ports = next_ports(topology) if topology.links else np.zeros((0, 0), np.int64)
    hops, every = (np.zeros(heads.size, np.int64) + each for each in (hop_cycles, periods))
    at, shape = topology.coordinates(), np.array(topology.shape, np.int64)
    return Net(at, shape, heads, into, ports, hops, every, topology.wrap, bool((every > 1).any()))


def rules_of(topology: Topology, way: Routing, routers: Routers, rate: float) -> Rules:
    """Routing and routers as the router takes them; `rate`: packets a cycle of each slot."""
    base = way.classes(topology) if way.graphs else 2 if topology.wrap else 1
    log_idle = math.log1p(-rate) if rate < 1 else -math.inf
    return Rules(
        way.weighted, way.detour, way.adaptive, base, routers.channels, routers.room, routers.hop_cycles,
        CHOICES.index(routers.choice), rate, log_idle,
    )  # fmt: skip


def state_of(topology: Topology, routers: Routers, offers: int, seed: int) -> State:
    """The state of an empty network with `offers` slots at each host."""
    nodes, n = topology.nodes, max(1, len(topology.shape))
    queues = topology.heads().size * routers.channels
    packets = queues * routers.room + nodes * offers + 1
    whole = np.random.default_rng(seed).integers(1, 2**63, 1, dtype=np.uint64)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int64)

    return State(
        queue=zeros(queues, routers.room), first=zeros(queues), length=zeros(queues),
        credits=zeros(queues) + routers.room, slots=zeros(nodes, offers) - 1, births=zeros(nodes, offers) - 1,
        source=zeros(packets), target=zeros(packets), final=zeros(packets), born=zeros(packets), ready=zeros(packets),
        left=zeros(packets, n), alive=zeros(packets), stream=zeros(packets), free=np.arange(packets, dtype=np.int64),
        freed=zeros(packets), latest=zeros(nodes, nodes) - 1, inside=zeros(nodes),
        busy=zeros(queues // routers.channels), held=zeros(nodes), due=zeros(nodes),
        opens=zeros(queues // routers.channels), arrived=zeros(MOST_AT_ONCE), counts=zeros(len(Counts._fields)),
        bins=zeros(BINS), random=whole,
    )  # fmt: skip


def _outcome(topology: Topology, state: State, load: float, cycles: int) -> Outcome:
    counts = Counts(*state.counts.tolist())
    if counts.stuck:
        raise NetworkError(
            f"{topology.name!r} is in deadlock after {counts.delivered} packets: none moved in {counts.stalled} cycles."
        )
    inside = int(state.length.sum()) + int((state.slots >= 0).sum())
    below = np.cumsum(state.bins)
    p99 = float(np.searchsorted(below, 0.99 * below[-1])) if counts.measured else 0.0
    return Outcome(
        load, counts.measured / (topology.hosts * cycles), counts.waited / max(1, counts.measured), p99,
        counts.created, counts.delivered, inside, counts.doubled, counts.unordered, counts.hops, counts.stalled,
    )  # fmt: skip
