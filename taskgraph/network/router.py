"""The compiled part of the simulator: what every router does in a cycle. `simulator` says what it stands for."""

import math
from typing import NamedTuple

import numpy as np

from taskgraph.jit import inner, kernel

NEVER = 1 << 60
STUCK = 2000
"""Cycles beyond those of a hop in which packets wait and none moves that are taken for a deadlock."""


class Net(NamedTuple):
    """Coordinates (nodes, n), sizes (n,), the head of each link, the links into each node (nodes, most; -1: none),
    for a graph the port to each target (nodes, nodes), (0, 0) for a grid, and of each link the cycles of a hop and
    between two packets; `slow`: these are above 1 somewhere."""

    at: np.ndarray
    shape: np.ndarray
    heads: np.ndarray
    into: np.ndarray
    ports: np.ndarray
    hops: np.ndarray
    periods: np.ndarray
    wrap: bool
    slow: bool


class Rules(NamedTuple):
    """Routing and routers. `base`: classes of a way by dimension order; `rate`: packets a cycle of each slot;
    `log_idle`: the logarithm of 1 - rate."""

    weighted: bool
    detour: bool
    adaptive: bool
    base: int
    channels: int
    room: int
    hop_cycles: int
    choice: int
    rate: float
    log_idle: float


class State(NamedTuple):
    """Queues by link and channel (packets, first, length, credits), slots of sources, packets by number (`left`: hops
    with sign by dimension; `stream`: the collective that it is of), free numbers, credits to give back, births of the
    latest delivered by pair, packets inside by node, in queues by link, in slots by node, the next birth by node, the
    cycle from which each link takes a packet again, packets delivered by stream, counts."""

    queue: np.ndarray
    first: np.ndarray
    length: np.ndarray
    credits: np.ndarray
    slots: np.ndarray
    births: np.ndarray
    source: np.ndarray
    target: np.ndarray
    final: np.ndarray
    born: np.ndarray
    ready: np.ndarray
    left: np.ndarray
    alive: np.ndarray
    stream: np.ndarray
    free: np.ndarray
    freed: np.ndarray
    latest: np.ndarray
    inside: np.ndarray
    busy: np.ndarray
    held: np.ndarray
    due: np.ndarray
    opens: np.ndarray
    arrived: np.ndarray
    counts: np.ndarray
    bins: np.ndarray
    random: np.ndarray


class Counts(NamedTuple):
    """The places of `State.counts`."""

    created: int
    delivered: int
    measured: int
    waited: int
    doubled: int
    unordered: int
    hops: int
    stalled: int
    stuck: int
    used: int
    turn: int


CREATED, DELIVERED, MEASURED, WAITED, DOUBLED, UNORDERED, HOPS, STALLED, STUCK_AT, USED, TURN = range(11)


@inner
def _draw(state: State) -> float:
    """Uniform in [0, 1): xorshift64*, Vigna 2016."""
    x = state.random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state.random[0] = x
    return float((x * np.uint64(2685821657736338717)) >> np.uint64(11)) * 1.1102230246251565e-16


@inner
def _gap(state: State, rules: Rules) -> int:
    """Cycles to the next packet of a slot: geometric."""
    if rules.rate >= 1.0:
        return 1
    if rules.rate <= 0.0:
        return NEVER
    return 1 + int(min(math.log(1.0 - _draw(state)) / rules.log_idle, 1e15))


@inner
def _aim(net: Net, rules: Rules, state: State, packet: int, node: int, to: int) -> None:
    """Set the hops from `node` to `to`, with the direction of each dimension."""
    state.target[packet] = to
    if net.ports.size > 0:
        state.left[packet, 0] = 0
    for d in range(net.shape.size):
        size = net.shape[d]
        up = net.at[to, d] - net.at[node, d]
        if net.wrap and up != 0:
            up %= size
            if rules.weighted:
                if _draw(state) * size < up:
                    up -= size
            elif 2 * up == size:
                if rules.choice == 2:
                    down = (net.at[node].sum() & 1) == 1
                elif rules.choice == 3:
                    down = (state.counts[TURN] >> d) & 1 == 1
                else:
                    down = _draw(state) < 0.5
                if down:
                    up -= size
            elif 2 * up > size:
                up -= size
        state.left[packet, d] = up


@inner
def _deliver(state: State, packet: int, now: int, warm_up: int) -> None:
    counts = state.counts
    counts[DELIVERED] += 1
    state.arrived[state.stream[packet]] += 1
    if state.alive[packet] != 1:
        counts[DOUBLED] += 1
    state.alive[packet] = 0
    source, target, born = state.source[packet], state.final[packet], state.born[packet]
    if state.latest[source, target] > born:
        counts[UNORDERED] += 1
    state.latest[source, target] = max(born, state.latest[source, target])
    if now >= warm_up:
        counts[MEASURED] += 1
        counts[WAITED] += now - born
        state.bins[min(now - born, state.bins.size - 1)] += 1
    counts[USED] -= 1
    state.free[counts[USED]] = packet


@inner
def _arrived(net: Net, rules: Rules, state: State, packet: int, node: int) -> bool:
    """Whether the packet is where it leaves the network; at the place of its detour it is sent on."""
    if node != state.target[packet]:
        return False
    if state.final[packet] != node:
        _aim(net, rules, state, packet, node, state.final[packet])
        return False
    return True


class Sent(NamedTuple):
    """A packet as its source makes it: the node that it is for, the cycle in which it was made, and its stream."""

    final: int
    born: int
    stream: int


@inner
def enter(net: Net, rules: Rules, state: State, node: int, slot: int, sent: Sent, now: int, warm_up: int) -> None:
    """Put a packet into the slot; one to the node itself is delivered at once."""
    packet = state.free[state.counts[USED]]
    state.counts[USED] += 1
    state.counts[CREATED] += 1
    state.source[packet], state.final[packet], state.alive[packet] = node, sent.final, 1
    state.born[packet], state.stream[packet] = sent.born, sent.stream
    to = sent.final
    if rules.detour:
        to = int(_draw(state) * net.at.shape[0])
    _aim(net, rules, state, packet, node, to)
    if _arrived(net, rules, state, packet, node):
        _deliver(state, packet, now, warm_up)
    else:
        state.slots[node, slot] = packet
        state.inside[node] += 1
        state.held[node] += 1


@inner
def _create(
    net: Net, rules: Rules, targets: np.ndarray, state: State, node: int, slot: int, now: int, warm_up: int
) -> None:
    """Fill the slot with the next packet that is due; those to the node itself are delivered at once."""
    if state.births[node, slot] < 0:
        state.births[node, slot] = _gap(state, rules) - 1
    while state.slots[node, slot] < 0 and state.births[node, slot] <= now:
        m = targets.shape[1]
        final = targets[node, 0] if m == 1 else targets[node, int(_draw(state) * m)]
        born = state.births[node, slot]
        state.births[node, slot] += _gap(state, rules)
        enter(net, rules, state, node, slot, Sent(final, born, 0), now, warm_up)


@inner
def _crosses(net: Net, state: State, packet: int, node: int, d: int) -> bool:
    there = net.at[node, d] + state.left[packet, d]
    return bool(there < 0 or there >= net.shape[d])


@inner
def _best(rules: Rules, state: State, packet: int, link: int, low: int, high: int) -> int:
    """The queue at the end of `link` of a channel from `low` below `high`, by the rule; -1 if that has no credit."""
    base = link * rules.channels
    if rules.choice == 2:
        queue = base + low + (state.source[packet] * 31 + state.final[packet]) % (high - low)
        return queue if state.credits[queue] > 0 else -1
    if rules.choice == 1:
        start, best = int(_draw(state) * (high - low)), -1
        for j in range(high - low):
            queue = base + low + (start + j) % (high - low)
            if state.credits[queue] > 0:
                return queue
        return -1
    best, most = -1, 0
    for queue in range(base + low, base + high):
        if state.credits[queue] > most:
            best, most = queue, state.credits[queue]
    return best


@inner
def _ordered(net: Net, rules: Rules, state: State, packet: int, node: int, taken: int) -> int:
    """The queue for the next hop by dimension order; -1 for none now."""
    if net.ports.size > 0:
        port, hop = net.ports[node, state.target[packet]], 0
        if (taken >> port) & 1:
            return -1
        if rules.base > 1:
            hop = state.left[packet, 0]
        low, high = hop * rules.channels // rules.base, (hop + 1) * rules.channels // rules.base
        return _best(rules, state, packet, node * (net.heads.size // net.into.shape[0]) + port, low, high)
    d = 0
    while state.left[packet, d] == 0:
        d += 1
    side = 2 * d + (1 if state.left[packet, d] < 0 else 0)
    if (taken >> side) & 1:
        return -1
    kind = 0
    if net.wrap and not _crosses(net, state, packet, node, d):
        kind = 1
    total = rules.base
    if rules.adaptive:
        return _best(rules, state, packet, node * 2 * net.shape.size + side, kind, kind + 1)
    if rules.detour:
        total *= 2
        if state.target[packet] == state.final[packet]:
            kind += rules.base
    low, high = kind * rules.channels // total, (kind + 1) * rules.channels // total
    return _best(rules, state, packet, node * 2 * net.shape.size + side, low, high)


@inner
def _freely(net: Net, rules: Rules, state: State, packet: int, node: int, taken: int, turn: int) -> int:
    """The queue for the next hop in any dimension: of the free links the one with most credits; -1 for none now."""
    n = net.shape.size
    best, most = -1, 0
    for j in range(n):
        d = (turn + j) % n
        hops = state.left[packet, d]
        side = 2 * d + (1 if hops < 0 else 0)
        if hops == 0 or (taken >> side) & 1:
            continue
        link = node * 2 * n + side
        total = 0
        for queue in range(link * rules.channels + rules.base, (link + 1) * rules.channels):
            total += state.credits[queue]
        if total > most:
            found = _best(rules, state, packet, link, rules.base, rules.channels)
            if found >= 0:
                best, most = found, total
    return best


@inner
def _pop(rules: Rules, state: State, queue: int) -> None:
    state.first[queue] += 1
    if state.first[queue] == rules.room:
        state.first[queue] = 0
    state.length[queue] -= 1
    state.busy[queue // rules.channels] -= 1


@inner
def _opened(net: Net, state: State, node: int, now: int) -> int:
    """The links of the node that take no packet in this cycle, as bits by port."""
    taken, most = 0, net.heads.size // net.into.shape[0]
    for side in range(most):
        if state.opens[node * most + side] > now:
            taken |= 1 << side
    return taken


@inner
def _take_out(net: Net, rules: Rules, state: State, queue: int, node: int, now: int, warm_up: int, moved: int) -> int:
    """Deliver the first packets of the queue that are where they leave the network; `moved` with them."""
    while state.length[queue] > 0:
        packet = state.queue[queue, state.first[queue]]
        if state.ready[packet] > now or not _arrived(net, rules, state, packet, node):
            return moved
        _pop(rules, state, queue)
        state.freed[moved] = queue
        moved += 1
        state.inside[node] -= 1
        _deliver(state, packet, now, warm_up)
    return moved


@inner
def _send(net: Net, rules: Rules, state: State, packet: int, queue: int, to_queue: int, now: int) -> int:
    """Put the packet from its queue (-1: it had a slot) into one at the other end of a link; the port of its node."""
    link = to_queue // rules.channels
    side: int = link % (net.heads.size // net.into.shape[0])
    if queue >= 0:
        _pop(rules, state, queue)
    state.counts[HOPS] += 1
    state.credits[to_queue] -= 1
    if net.ports.size > 0:
        state.left[packet, 0] += 1
    else:
        state.left[packet, side // 2] += -1 if side % 2 == 0 else 1
    state.ready[packet] = now + net.hops[link]
    if net.slow:
        state.opens[link] = now + net.periods[link]
    place = state.first[to_queue] + state.length[to_queue]
    state.queue[to_queue, place if place < rules.room else place - rules.room] = packet
    state.length[to_queue] += 1
    state.busy[link] += 1
    state.inside[net.heads[link]] += 1
    return side


@inner
def serve(net: Net, rules: Rules, state: State, node: int, now: int, warm_up: int, waiting: int) -> int:
    """One cycle of one node; how many packets have left an input in it, `waiting` of them before."""
    channels, ports, moved = rules.channels, 0, waiting
    while ports < net.into.shape[1] and net.into[node, ports] >= 0:
        ports += 1
    taken, groups = _opened(net, state, node, now) if net.slow else 0, ports + 1
    start, turn = (now + node) % groups, now // groups
    for g in range(groups):
        port = start + g if start + g < groups else start + g - groups
        link = net.into[node, port] if port < ports else -1
        width = channels if link >= 0 else state.slots.shape[1]
        rest, i = state.busy[link] if link >= 0 else state.held[node], turn % width - 1
        for j in range(width):
            if rest == 0:  # all that is there has been seen
                break
            i, queue = (i + 1 if i + 1 < width else 0), -1
            if link >= 0:
                queue = link * channels + i
                rest -= state.length[queue]
                if state.length[queue] == 0 or state.ready[state.queue[queue, state.first[queue]]] > now:
                    continue
                if state.target[state.queue[queue, state.first[queue]]] == node:
                    moved = _take_out(net, rules, state, queue, node, now, warm_up, moved)
                    if state.length[queue] == 0 or state.ready[state.queue[queue, state.first[queue]]] > now:
                        continue
            packet = state.queue[queue, state.first[queue]] if link >= 0 else state.slots[node, i]
            if packet < 0:
                continue
            rest -= 1 if link < 0 else 0
            to_queue = _freely(net, rules, state, packet, node, taken, now + j) if rules.adaptive else -1
            if to_queue < 0:
                to_queue = _ordered(net, rules, state, packet, node, taken)
            if to_queue >= 0:
                if link < 0:
                    state.slots[node, i] = -1
                    state.held[node] -= 1
                    state.due[node] = min(state.due[node], state.births[node, i])
                taken |= 1 << _send(net, rules, state, packet, queue, to_queue, now)
                state.inside[node] -= 1
                state.freed[moved] = queue
                moved += 1
    return moved


@inner
def give_back(state: State, moved: int) -> None:
    """The credits of what moved in a cycle, at its end."""
    for j in range(moved):
        if state.freed[j] >= 0:
            state.credits[state.freed[j]] += 1


@kernel
def run(net: Net, rules: Rules, targets: np.ndarray, state: State, warm_up: int, end: int) -> None:
    """Run cycles 0 to `end`; what is created, delivered and measured is added up in `state.counts`."""
    nodes = net.at.shape[0]
    idle = 0
    for now in range(end):
        moved = 0
        for node in range(nodes):
            if targets[node, 0] < 0 or state.due[node] > now:
                continue
            due = NEVER
            for slot in range(state.slots.shape[1]):
                if state.slots[node, slot] < 0:
                    _create(net, rules, targets, state, node, slot, now, warm_up)
                    if state.slots[node, slot] < 0:
                        due = min(due, state.births[node, slot])
            state.due[node] = due
        for node in range(nodes):
            if state.inside[node] > 0:
                moved = serve(net, rules, state, node, now, warm_up, moved)
        give_back(state, moved)
        if moved > 0 or state.counts[USED] == 0:
            idle = 0
        else:
            idle += 1
            state.counts[STALLED] = max(state.counts[STALLED], idle)
            if idle > STUCK + rules.hop_cycles:
                state.counts[STUCK_AT] = now
                return
