"""Collectives as schedules of messages: what each rank sends to which in each phase, by algorithm.

A schedule moves chunks of equal size. A rank begins with its own part (`all_gather`, `all_to_all`) or with a summand of
everything (`reduce_scatter`, `all_reduce`); a message carries chunks as its sender holds them when the phase begins, to
take their place or to be added. A phase begins when the one before has ended everywhere."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from taskgraph.errors import NetworkError
from taskgraph.record import integer, one_of

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
MOST_RANKS = 512
MOST_DIRECT = 128


class Message(NamedTuple):
    """`chunks` from one rank to another, added to what that holds or in its place."""

    source: int
    target: int
    chunks: tuple[int, ...]
    adds: bool


Phase = tuple[Message, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The phases of a collective of `ranks`. A chunk is `chunk_share` of the collective's bytes: of the whole message,
    which is the larger side of it; of an all-to-all what a rank holds for all. Chunk c of a gather or a reduction is
    of rank c % ranks; of an all-to-all it is the one from rank c // ranks % ranks to rank c % ranks."""

    collective: str
    algorithm: str
    ranks: int
    chunk_share: float
    phases: tuple[Phase, ...]


class Ranks(NamedTuple):
    """Where ranks are: how many, and their places in a grid with the last dimension fastest; () where they are in
    none. `torus`: they are in a torus or mesh, where it pays to begin with each dimension."""

    ranks: int
    grid: tuple[int, ...] = ()
    torus: bool = False


Maker = Callable[[Ranks], list[Phase]]


class Rule(NamedTuple):
    """Phases of one collective, and the chunks that it cuts what is of each rank (in an all-to-all: of each pair) into;
    0: the message is one chunk, WAYS: one for each of `_ways`."""

    parts: int
    make: Maker


WAYS = -1


class Algorithm(NamedTuple):
    """Its rule for each collective; `fits` says why not where a place does not suit it."""

    rules: dict[str, Rule]
    source: str
    fits: Callable[[Ranks], str] = lambda place: ""


def schedule(collective: str, algorithm: str, ranks: int, grid: tuple[int, ...] = (), torus: bool = False) -> Schedule:
    """The schedule of a collective among `ranks` in a `grid`; NetworkError where the algorithm has none for it."""
    one_of("collective", collective, COLLECTIVES, NetworkError)
    one_of("algorithm", algorithm, ALGORITHMS, NetworkError)
    integer("ranks", ranks, NetworkError, 1, MOST_RANKS)
    place = Ranks(ranks, tuple(grid), torus)
    lacks = lacking(collective, algorithm, place)
    if lacks:
        others = ", ".join(name for name in ALGORITHMS if not lacking(collective, name, place))
        raise NetworkError(f"algorithm {algorithm!r} of {collective} {lacks}; use one of {others}.")
    return _scheduled(collective, algorithm, place)


def lacking(collective: str, algorithm: str, place: Ranks) -> str:
    """Why the algorithm has no schedule for it; empty where it has."""
    made = ALGORITHMS[algorithm]
    if collective not in made.rules:
        return "is not known"
    return made.fits(place)


@lru_cache(maxsize=64)
def _scheduled(collective: str, algorithm: str, place: Ranks) -> Schedule:
    rule = ALGORITHMS[algorithm].rules[collective]
    parts = len(_ways(place)) if rule.parts == WAYS else rule.parts
    share = 1.0 / (parts * place.ranks) if parts else 1.0
    phases = rule.make(place) if place.ranks > 1 else []
    return Schedule(collective, algorithm, place.ranks, share, tuple(phases))


# ------------------------------------------------------------------------------------------- ring


def _ring_gather(place: Ranks) -> list[Phase]:
    """Two rings in opposite directions, half of the message each (Patarasuk and Yuan 2009)."""
    n = place.ranks
    return [
        tuple(
            Message(i, (i + step) % n, (part * n + (i - step * k) % n,), False)
            for i in range(n)
            for part, step in enumerate((1, -1))
        )
        for k in range(n - 1)
    ]


def _ring_scatter(place: Ranks) -> list[Phase]:
    n = place.ranks
    return [
        tuple(
            Message(i, (i + step) % n, (part * n + (i - step * (k + 1)) % n,), True)
            for i in range(n)
            for part, step in enumerate((1, -1))
        )
        for k in range(n - 1)
    ]


def _ring_exchange(place: Ranks) -> list[Phase]:
    """What is for rank s + d goes up for d <= n / 2 and down for the others, from neighbour to neighbour; at n / 2 half
    of the ranks send down."""
    n = place.ranks

    def up(source: int) -> int:
        return (n - 1) // 2 + (1 - n % 2) * (1 - source % 2)

    phases = []
    for k in range(n // 2):
        sent = []
        for i in range(n):
            s = (i - k) % n
            ahead = tuple(s * n + (s + d) % n for d in range(k + 1, up(s) + 1))
            t = (i + k) % n
            behind = tuple(t * n + (t - d) % n for d in range(k + 1, n - 1 - up(t) + 1))
            sent += [Message(i, (i + step) % n, c, False) for step, c in ((1, ahead), (-1, behind)) if c]
        phases.append(tuple(sent))
    return phases


# ----------------------------------------------------------------------------- halving and doubling


def _doubling_gather(place: Ranks) -> list[Phase]:
    """Recursive doubling (Thakur, Rabenseifner and Gropp 2005): partners a power of two apart swap all they have."""
    n = place.ranks
    return [
        tuple(Message(i, i ^ 1 << k, tuple(_block(i, k, n)), False) for i in range(n))
        for k in range(n.bit_length() - 1)
    ]


def _halving_scatter(place: Ranks) -> list[Phase]:
    """Recursive halving: the gather backwards."""
    n = place.ranks
    return [
        tuple(Message(i, i ^ 1 << k, tuple(_block(i ^ 1 << k, k, n)), True) for i in range(n))
        for k in reversed(range(n.bit_length() - 1))
    ]


def _block(i: int, k: int, n: int) -> range:
    first = i >> k << k
    return range(first, min(first + (1 << k), n))


def _doubling_reduce(place: Ranks) -> list[Phase]:
    """The whole message in each of log2(ranks) phases: least latency."""
    n = place.ranks
    return [tuple(Message(i, i ^ 1 << k, (0,), True) for i in range(n)) for k in range(n.bit_length() - 1)]


def _doubling_exchange(place: Ranks) -> list[Phase]:
    """Through a cube: in each dimension what is for the other half (Johnsson and Ho 1989)."""
    n = place.ranks
    phases = []
    for k in range(n.bit_length() - 1):
        low = (1 << k) - 1
        sent = []
        for i in range(n):
            held = [s * n + t for s in range(n) if (s ^ i) & ~low == 0 for t in range(n) if (t ^ i) & low == 0]
            sent.append(Message(i, i ^ 1 << k, tuple(c for c in held if (c % n ^ i) >> k & 1), False))
        phases.append(tuple(sent))
    return phases


# -------------------------------------------------------------------------------------------- trees


def _tree_gather(place: Ranks) -> list[Phase]:
    """A binomial tree to rank 0, and all back down it."""
    n = place.ranks
    up = [
        tuple(Message(i, i - (1 << k), tuple(_block(i, k, n)), False) for i in range(1 << k, n, 2 << k))
        for k in range((n - 1).bit_length())
    ]
    return up + _down(n, lambda i, k: tuple(range(n)))


def _tree_scatter(place: Ranks) -> list[Phase]:
    n = place.ranks
    return _up(n, tuple(range(n))) + _down(n, lambda i, k: tuple(_block(i, k, n)))


def _tree_reduce(place: Ranks) -> list[Phase]:
    return _up(place.ranks, (0,)) + _down(place.ranks, lambda i, k: (0,))


def _up(n: int, chunks: tuple[int, ...]) -> list[Phase]:
    return [
        tuple(Message(i, i - (1 << k), chunks, True) for i in range(1 << k, n, 2 << k))
        for k in range((n - 1).bit_length())
    ]


def _down(n: int, chunks: Callable[[int, int], tuple[int, ...]]) -> list[Phase]:
    return [
        tuple(Message(i - (1 << k), i, chunks(i, k), False) for i in range(1 << k, n, 2 << k))
        for k in reversed(range((n - 1).bit_length()))
    ]


# ------------------------------------------------------------------------------------------- direct


def _pairs(n: int) -> Iterable[tuple[int, int]]:
    return ((i, (i + d) % n) for i in range(n) for d in range(1, n))


def _direct_gather(place: Ranks) -> list[Phase]:
    """Everybody to everybody at once."""
    return [tuple(Message(i, j, (i,), False) for i, j in _pairs(place.ranks))]


def _direct_scatter(place: Ranks) -> list[Phase]:
    return [tuple(Message(i, j, (j,), True) for i, j in _pairs(place.ranks))]


def _direct_exchange(place: Ranks) -> list[Phase]:
    return [tuple(Message(i, j, (i * place.ranks + j,), False) for i, j in _pairs(place.ranks))]


def _shifted_exchange(place: Ranks) -> list[Phase]:
    """In phase d everybody to the d-th next."""
    n = place.ranks
    return [tuple(Message(i, (i + d) % n, (i * n + (i + d) % n,), False) for i in range(n)) for d in range(1, n)]


# ------------------------------------------------------------------------------- dimension by dimension


def _ways(place: Ranks) -> list[tuple[tuple[int, ...], int]]:
    """The order of the dimensions, inner first, and the direction of each part of the message. In a torus a part begins
    with each dimension and goes each way, so that all links are in use at once (Jain and Sabharwal 2010)."""
    n = len(place.grid)
    inner = tuple(reversed(range(n)))
    turns = [inner[d:] + inner[:d] for d in range(n)] if place.torus else [inner]
    return [(turn, step) for turn in turns for step in (1, -1)]


def _together(parts: Iterable[list[Phase]]) -> list[Phase]:
    """The parts side by side, phase by phase."""
    return [tuple(message for phase in some for message in phase) for some in zip_longest(*parts, fillvalue=())]


def _positions(place: Ranks) -> np.ndarray:
    return np.arange(place.ranks).reshape(place.grid)


def _alike(places: np.ndarray, at: Sequence[int], fixed: Iterable[int]) -> np.ndarray:
    """The ranks whose coordinates in the `fixed` dimensions are those of `at`."""
    kept = set(fixed)
    made: np.ndarray = places[tuple(at[d] if d in kept else slice(None) for d in range(places.ndim))].reshape(-1)
    return made


def _moved(at: tuple[int, ...], d: int, by: int, size: int) -> tuple[int, ...]:
    return (*at[:d], (at[d] + by) % size, *at[d + 1 :])


def _grid_gather(place: Ranks) -> list[Phase]:
    """Rings along one dimension after another, each passing on what those before have gathered."""
    return _together(_gather_part(place, part, order, step) for part, (order, step) in enumerate(_ways(place)))


def _gather_part(place: Ranks, part: int, order: tuple[int, ...], step: int) -> list[Phase]:
    places, first, phases = _positions(place), part * place.ranks, []
    for stage, d in enumerate(order):
        size, fixed = place.grid[d], order[stage:]
        for k in range(size - 1):
            sent = []
            for at in np.ndindex(*place.grid):
                block = _alike(places, _moved(at, d, -step * k, size), fixed) + first
                to = places[_moved(at, d, step, size)]
                sent.append(Message(int(places[at]), int(to), tuple(block.tolist()), False))
            phases.append(tuple(sent))
    return phases


def _grid_scatter(place: Ranks) -> list[Phase]:
    return _together(_scatter_part(place, part, order, step) for part, (order, step) in enumerate(_ways(place)))


def _scatter_part(place: Ranks, part: int, order: tuple[int, ...], step: int) -> list[Phase]:
    places, first, phases = _positions(place), part * place.ranks, []
    for stage, d in enumerate(order):
        size, fixed = place.grid[d], order[: stage + 1]
        for k in range(size - 1):
            sent = []
            for at in np.ndindex(*place.grid):
                block = _alike(places, _moved(at, d, -step * (k + 1), size), fixed) + first
                to = places[_moved(at, d, step, size)]
                sent.append(Message(int(places[at]), int(to), tuple(block.tolist()), True))
            phases.append(tuple(sent))
    return phases


def _grid_reduce(place: Ranks) -> list[Phase]:
    """Each part scattered dimension by dimension, then gathered the same way back."""
    return _together(
        _scatter_part(place, part, order, step) + _gather_part(place, part, order[::-1], step)
        for part, (order, step) in enumerate(_ways(place))
    )


def _grid_exchange(place: Ranks) -> list[Phase]:
    """In one dimension after another everything to the place of its target there."""
    return _together(_exchange_part(place, part, order, step) for part, (order, step) in enumerate(_ways(place)))


def _exchange_part(place: Ranks, part: int, order: tuple[int, ...], step: int) -> list[Phase]:
    places, n, phases = _positions(place), place.ranks, []
    for stage, d in enumerate(order):
        size, done, todo = place.grid[d], order[:stage], order[stage:]
        for k in range(1, size):
            sent = []
            for at in np.ndindex(*place.grid):
                to = _moved(at, d, step * k, size)
                sources, targets = _alike(places, at, todo), _alike(places, to, (*done, d))
                chunks = part * n * n + sources[:, None] * n + targets[None, :]
                sent.append(Message(int(places[at]), int(places[to]), tuple(chunks.reshape(-1).tolist()), False))
            phases.append(tuple(sent))
    return phases


# ----------------------------------------------------------------------------------- level by level


def _levels_gather(place: Ranks) -> list[Phase]:
    """Within the innermost groups everybody to everybody at once, then so between these groups, and on outwards."""
    return _gathered(place, _outwards(place))


def _levels_scatter(place: Ranks) -> list[Phase]:
    places, order, phases = _positions(place), _outwards(place), []
    for stage, d in enumerate(order):
        sent = [(at, to, _alike(places, to, order[: stage + 1])) for at, to in _along(place, d)]
        phases.append(tuple(Message(int(places[at]), int(places[to]), tuple(c.tolist()), True) for at, to, c in sent))
    return phases


def _levels_reduce(place: Ranks) -> list[Phase]:
    """Scattered level by level, then gathered the same way back."""
    return _levels_scatter(place) + _gathered(place, _outwards(place)[::-1])


def _levels_exchange(place: Ranks) -> list[Phase]:
    places, n, order, phases = _positions(place), place.ranks, _outwards(place), []
    for stage, d in enumerate(order):
        sent = []
        for at, to in _along(place, d):
            sources, targets = _alike(places, at, order[stage:]), _alike(places, to, order[: stage + 1])
            chunks = (sources[:, None] * n + targets[None, :]).reshape(-1)
            sent.append(Message(int(places[at]), int(places[to]), tuple(chunks.tolist()), False))
        phases.append(tuple(sent))
    return phases


def _gathered(place: Ranks, order: tuple[int, ...]) -> list[Phase]:
    places, phases = _positions(place), []
    for stage, d in enumerate(order):
        sent = [(at, to, _alike(places, at, order[stage:])) for at, to in _along(place, d)]
        phases.append(tuple(Message(int(places[at]), int(places[to]), tuple(c.tolist()), False) for at, to, c in sent))
    return phases


def _outwards(place: Ranks) -> tuple[int, ...]:
    return tuple(reversed(range(len(place.grid))))


def _along(place: Ranks, d: int) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each place with all that differ from it in dimension `d` alone."""
    size = place.grid[d]
    return ((at, _moved(at, d, k, size)) for at in np.ndindex(*place.grid) for k in range(1, size))


# ------------------------------------------------------------------------------------------- all of them


def _both(scatter: Maker, gather: Maker) -> Maker:
    return lambda place: scatter(place) + gather(place)


def _powers(place: Ranks) -> str:
    return "" if place.ranks & (place.ranks - 1) == 0 else f"needs a power of two of ranks, not {place.ranks}"


def _few(place: Ranks) -> str:
    if place.torus:
        return "is not made for tori and meshes, where packets of all pairs at once hold each other up"
    return "" if place.ranks <= MOST_DIRECT else f"is for at most {MOST_DIRECT} ranks, not {place.ranks}"


def _grids(place: Ranks) -> str:
    return "" if sum(size > 1 for size in place.grid) > 1 else "needs ranks in a grid of two dimensions or more"


def _groups(place: Ranks) -> str:
    return _few(place) or _grids(place)


def _rules(parts: int, scatter: Maker, gather: Maker, exchange: Rule, reduce: Maker | None = None) -> dict[str, Rule]:
    both = reduce or _both(scatter, gather)
    made = (Rule(parts, both), Rule(parts, gather), Rule(parts, scatter), exchange)
    return dict(zip(COLLECTIVES, made, strict=True))


ALGORITHMS: dict[str, Algorithm] = {
    "ring": Algorithm(_rules(2, _ring_scatter, _ring_gather, Rule(1, _ring_exchange)), "Patarasuk and Yuan 2009"),
    "tree": Algorithm(
        {
            "all_reduce": Rule(0, _tree_reduce),
            "all_gather": Rule(1, _tree_gather),
            "reduce_scatter": Rule(1, _tree_scatter),
        },
        "Thakur, Rabenseifner and Gropp 2005",
    ),
    "halving": Algorithm(
        _rules(1, _halving_scatter, _doubling_gather, Rule(1, _doubling_exchange)),
        "Thakur, Rabenseifner and Gropp 2005", _powers,
    ),
    "doubling": Algorithm(
        {"all_reduce": Rule(0, _doubling_reduce)}, "Thakur, Rabenseifner and Gropp 2005", _powers
    ),
    "direct": Algorithm(
        _rules(1, _direct_scatter, _direct_gather, Rule(1, _direct_exchange)), "Chan et al. 2007", _few
    ),
    "shifts": Algorithm({"all_to_all": Rule(1, _shifted_exchange)}, "Thakur, Rabenseifner and Gropp 2005"),
    "dimensions": Algorithm(
        _rules(WAYS, _grid_scatter, _grid_gather, Rule(WAYS, _grid_exchange), _grid_reduce),
        "Jain and Sabharwal 2010", _grids,
    ),
    "levels": Algorithm(
        _rules(1, _levels_scatter, _levels_gather, Rule(1, _levels_exchange), _levels_reduce), "Karonis et al. 2000",
        _groups,
    ),
}  # fmt: skip
"""By name. ring: from neighbour to neighbour; tree: binomial; halving: recursive halving, then doubling; doubling: the
whole message to partners a power of two apart; direct: everybody to everybody at once; shifts: to the d-th next in
phase d; dimensions: rings along one dimension of a grid after another, all of a torus at once, or within machines and
then between them; levels: everybody to everybody within machines, then between them."""
