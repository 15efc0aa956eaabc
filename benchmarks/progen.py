"""Random projects after ProGen (Kolisch, Sprecher and Drexl 1995): the generator behind PSPLIB, written anew.

The parameters are those of PSPLIB's sets: network complexity, resource factor and resource strength. The instances
are our own; figures on them are near those on the library's sets, not the same.
"""

import random

import numpy as np

from taskgraph.schedule.rcpsp.project import Project, make_project

GRID = {  # activities: (network complexities, resource factors, resource strengths)
    30: ((1.5, 1.8, 2.1), (0.25, 0.5, 0.75, 1.0), (0.2, 0.5, 0.7, 1.0)),
    60: ((1.5, 1.8, 2.1), (0.25, 0.5, 0.75, 1.0), (0.2, 0.5, 0.7, 1.0)),
    120: ((1.5, 1.8, 2.1), (0.25, 0.5, 0.75, 1.0), (0.1, 0.2, 0.3, 0.4, 0.5)),
}
RESOURCES = 4
LONGEST = 10
MOST_ARCS = 3
ENDS = 3


def grid(activities: int, each: int, seed: int = 0) -> list[Project]:
    """`each` projects for every cell of the set's parameter grid."""
    complexities, factors, strengths = GRID[activities]
    cells = [(c, f, s) for c in complexities for f in factors for s in strengths]
    return [
        generate(activities, *cell, seed=seed * 10**6 + i * 1000 + k)
        for i, cell in enumerate(cells)
        for k in range(each)
    ]


def generate(activities: int, complexity: float, factor: float, strength: float, seed: int, modes: int = 1) -> Project:
    """One project. With several modes, mode k takes fewer seconds than mode k + 1 and uses more."""
    draw = random.Random(seed)
    successors = network(activities, complexity, draw)
    predecessors: list[list[int]] = [[] for _ in range(activities)]
    for i, row in enumerate(successors):
        for j in row:
            predecessors[j].append(i)
    seconds = np.array([sorted(draw.sample(range(1, LONGEST + 1), modes)) for _ in range(activities)], float)
    use = np.zeros((activities, modes, RESOURCES))
    for i in range(activities):
        for r in range(RESOURCES):
            if draw.random() < factor:
                use[i, :, r] = sorted((draw.randint(1, LONGEST) for _ in range(modes)), reverse=True)
    return make_project(seconds, use, _capacity(seconds, use, predecessors, strength), predecessors)


def network(activities: int, complexity: float, draw: random.Random) -> list[set[int]]:
    """Successors of each activity: no arc that a path implies, at most three in and out, `complexity` arcs a node."""
    successors: list[set[int]] = [set() for _ in range(activities)]
    reach = np.eye(activities, dtype=bool)
    into = [0] * activities
    last_start, first_end = ENDS - 1, activities - ENDS

    def link(i: int, j: int) -> bool:
        if reach[i, j] or len(successors[i]) >= MOST_ARCS or into[j] >= MOST_ARCS:
            return False
        above, below = np.flatnonzero(reach[:, i]), np.flatnonzero(reach[j])
        if any(b in successors[a] for a in above for b in below):
            return False
        reach[np.ix_(above, below)] = True
        successors[i].add(j)
        into[j] += 1
        return True

    for j in range(last_start + 1, activities):
        sources = list(range(min(j, first_end)))
        draw.shuffle(sources)
        any(link(i, j) for i in sources)
    for i in range(first_end - 1, -1, -1):
        if not successors[i]:
            targets = list(range(max(i, last_start) + 1, activities))
            draw.shuffle(targets)
            any(link(i, j) for j in targets)
    wanted = int(complexity * (activities + 2)) - 2 * ENDS
    for _ in range(200 * activities):
        if sum(map(len, successors)) >= wanted:
            break
        i = draw.randrange(first_end)
        link(i, draw.randrange(max(i, last_start) + 1, activities))
    return successors


def _capacity(seconds: np.ndarray, use: np.ndarray, predecessors: list[list[int]], strength: float) -> np.ndarray:
    """From the least that any schedule needs (strength 0) to the peak of the earliest-start schedule (strength 1)."""
    start = np.zeros(len(seconds))
    for j, before in enumerate(predecessors):
        start[j] = max((start[i] + seconds[i, 0] for i in before), default=0.0)
    least = use.min(axis=1).max(axis=0)
    running = [(start <= t) & (t < start + seconds[:, 0]) for t in start]
    peak = np.array([use[now, 0].sum(axis=0) for now in running]).max(axis=0)
    return np.maximum(np.round(least + strength * (peak - least)), 1.0)
