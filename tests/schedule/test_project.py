"""Projects: the checker, the bounds, schedule generation, the list solver and the search, on random projects."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import progen
from benchmarks.rcpsp import chain_bound
from benchmarks.rcpsp_list import Own, parallel, solve_list
from taskgraph.errors import DemandError, GraphError, PlanError
from taskgraph.schedule.bounds import longest_path
from taskgraph.schedule.rcpsp import sgs
from taskgraph.schedule.rcpsp.evolve import solve
from taskgraph.schedule.rcpsp.passes import chains, priorities, ticks_bound
from taskgraph.schedule.rcpsp.project import Project, Schedule, check, make_project
from taskgraph.schedule.rcpsp.sgs import Tables, justify, make_scratch, make_tables, seconds_of, serial

SHORT_S = 0.02
SLOW = {True: 1e-5, False: 1e-5}
"""So slow a rate that a budget's clock never decides."""


@st.composite
def projects(draw: st.DrawFn, most: int = 9, modes: int = 2, whole: bool | None = None) -> Project:
    """A random project; whole or real times and uses, resources enough for one word or several."""
    n, m = draw(st.integers(1, most)), draw(st.integers(1, modes))
    r = draw(st.sampled_from([1, 2, 4, 9]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    exact = draw(st.booleans()) if whole is None else whole
    seconds = rng.integers(0, 9, (n, m)).astype(float) if exact else rng.uniform(1e-6, 1e-3, (n, m))
    use = rng.integers(0, 6, (n, m, r)).astype(float) if exact else rng.uniform(0.0, 0.7, (n, m, r))
    capacity = rng.integers(5, 9, r).astype(float) if exact else rng.uniform(0.7, 1.5, r)
    before = [[i for i in range(j) if rng.random() < 0.3] for j in range(n)]
    return make_project(seconds, use, capacity, before)


def lists_of(project: Project) -> list[np.ndarray]:
    """A list of activities for every priority rule: stable orders by key that respect precedence."""
    tables, _ = make_tables(project)
    depth = longest_path(np.ones(project.n), project.pred_ptr, project.pred)  # not seconds: some activities take none
    keys = priorities(project, tables, chains(tables))
    return [np.lexsort((np.arange(project.n), key, depth)) for key in keys]


def brute_force(project: Project) -> float:
    """The least makespan: serial generation over all lists that respect precedence and all modes."""
    tables, tick = make_tables(project)
    scratch, best = make_scratch(tables), np.inf
    start, end = np.zeros(project.n, np.int64), np.zeros(project.n, np.int64)
    allowed = [np.flatnonzero(np.isfinite(row)).tolist() for row in project.seconds]
    for order in itertools.permutations(range(project.n)):
        place = {i: k for k, i in enumerate(order)}
        rows = itertools.pairwise(project.pred_ptr)
        if any(place[int(p)] > place[j] for j, (a, b) in enumerate(rows) for p in project.pred[a:b]):
            continue
        for modes in itertools.product(*allowed):
            best = min(best, serial(tables, False, np.array(order), np.array(modes), start, end, scratch) * tick)
    return best


def scheduled(project: Project, tables: Tables, tick: float, start: np.ndarray, mode: np.ndarray) -> Schedule:
    return seconds_of(project, tick, start, mode, 0, "test", 1)


@given(projects())
@settings(max_examples=60, deadline=None)
def test_every_generated_schedule_is_valid_and_justification_never_lengthens(project: Project) -> None:
    tables, tick = make_tables(project)
    scratch = make_scratch(tables)
    mode = np.where(np.isfinite(project.seconds), project.seconds, np.inf).argmin(axis=1)
    start, end = np.zeros(project.n, np.int64), np.zeros(project.n, np.int64)
    own = Own(*np.zeros((2, project.n), np.int64))
    for order, is_serial in itertools.product(lists_of(project), (True, False)):
        list_ = order.copy()
        if is_serial:
            before = serial(tables, False, list_, mode, start, end, scratch)
        else:
            before = parallel(tables, list_, mode, start, end, scratch, own)
        check(project, scheduled(project, tables, tick, start, mode))
        after, passes = justify(tables, list_, mode, start, end, scratch, before)
        assert after <= before and passes % 2 == 0
        check(project, scheduled(project, tables, tick, start, mode))
        assert sorted(list_.tolist()) == list(range(project.n))


@given(projects(most=14, whole=True))
@settings(max_examples=60, deadline=None)
def test_grid_and_events_give_the_same_schedule(project: Project) -> None:
    grid, _ = make_tables(project)
    events = grid._replace(horizon=0)
    mode = project.seconds.argmin(axis=1)
    for order, back in itertools.product(lists_of(project), (False, True)):
        found = []
        for tables in (grid, events):
            scratch, start, end = make_scratch(tables), np.zeros(project.n, np.int64), np.zeros(project.n, np.int64)
            list_ = order[::-1].copy() if back else order
            for _ in range(2):
                serial(tables, back, list_, mode, start, end, scratch)
            found.append(start)
        assert (found[0] == found[1]).all()


@given(projects(most=5))
@settings(max_examples=30, deadline=None)
def test_bounds_hold_and_solvers_reach_the_least_makespan(project: Project) -> None:
    least = brute_force(project)
    tables, tick = make_tables(project)
    assert ticks_bound(tables, chains(tables)) * tick <= least * (1 + 1e-9)
    assert chain_bound(project) <= least * (1 + 1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sgs, "ACTIVITY_S", SLOW)
        solved = (solve_list(project, 0.5), solve(project, 0.5))
    for found in solved:
        check(project, found)
        assert found.lower_bound <= least * (1 + 1e-9)
        assert found.makespan >= least * (1 - 1e-9)
    assert found.makespan == pytest.approx(least, rel=1e-6)


@given(projects(most=12, modes=2))
@settings(max_examples=25, deadline=None)
def test_a_clock_that_has_run_out_leaves_a_schedule(project: Project) -> None:
    for solver in (solve_list, solve):
        check(project, solver(project, 1e-9))


@given(projects(most=25, modes=3), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_equal_seeds_give_equal_results(project: Project, seed: int) -> None:
    for solver in (solve_list, solve):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sgs, "ACTIVITY_S", SLOW)
            one, two = solver(project, 0.5, seed), solver(project, 0.5, seed)
        check(project, one)
        assert (one.start == two.start).all() and (one.mode == two.mode).all()
        assert one.schedules == two.schedules


@pytest.mark.parametrize("activities", [30, 60])
def test_search_is_not_worse_than_the_list_solver_and_nearer_the_bound(activities: int) -> None:
    total = {"list": 0.0, "search": 0.0, "bound": 0.0}
    for project in progen.grid(activities, 1)[::6]:
        quick, searched = solve_list(project, SHORT_S), solve(project, 0.1)
        check(project, quick)
        check(project, searched)
        total["list"] += quick.makespan
        total["search"] += searched.makespan
        total["bound"] += searched.lower_bound
    assert total["bound"] <= total["search"] <= total["list"]
    assert total["search"] < 1.15 * total["bound"]


def one_resource() -> tuple[Project, Schedule]:
    project = make_project(
        np.array([[2.0], [3.0], [1.0]]), np.array([[[2.0]], [[2.0]], [[1.0]]]), np.array([3.0]), [[], [], [0]]
    )
    return project, Schedule(np.array([0.0, 2.0, 2.0]), np.zeros(3, np.int64), 5.0, 5.0, True, "hand", 1)


def test_the_checker_accepts_a_valid_schedule() -> None:
    check(*one_resource())


@pytest.mark.parametrize(
    ("start", "makespan", "says"),
    [
        ([0.0, 2.0, 1.0], 5.0, "before its predecessor 0 ends at 2.0"),
        ([0.0, 1.0, 2.0], 4.0, "resource 0 is used 4.0 times of 3.0"),
        ([0.0, 2.0, 2.0], 6.0, "makespan is 5.0"),
        ([-1.0, 2.0, 2.0], 5.0, "starts at -1.0"),
        ([0.0, np.nan, 2.0], 5.0, "starts at nan"),
    ],
)
def test_the_checker_names_the_broken_rule(start: list[float], makespan: float, says: str) -> None:
    project, good = one_resource()
    with pytest.raises(PlanError, match=says):
        check(project, replace(good, start=np.array(start), makespan=makespan))


def test_the_checker_rejects_modes_and_bounds() -> None:
    project, good = one_resource()
    with pytest.raises(PlanError, match="mode is not one of 0 to 0"):
        check(project, replace(good, mode=np.array([0, 1, 0])))
    with pytest.raises(PlanError, match="above the makespan"):
        check(project, replace(good, lower_bound=5.5))


def test_bad_projects_say_what_is_wrong() -> None:
    one = np.ones((2, 1))
    with pytest.raises(DemandError, match=r"Activity 0 has no mode that fits: it uses at least \[1.0\] of \[0.5\]"):
        make_project(one, np.ones((2, 1, 1)), np.array([0.5]), [[], []])
    with pytest.raises(GraphError, match="topological order"):
        make_project(one, np.ones((2, 1, 1)), np.array([1.0]), [[1], []])
    with pytest.raises(DemandError, match="negative or undefined"):
        make_project(-one, np.ones((2, 1, 1)), np.array([1.0]), [[], []])
    project, _ = one_resource()
    for solver in (solve_list, solve):
        with pytest.raises(PlanError, match="budget of 0"):
            solver(project, 0.0)


def test_thirds_of_a_capacity_run_together() -> None:
    project = make_project(np.full((3, 1), 0.1), np.full((3, 1, 1), 0.7 / 3), np.array([0.7]), [[], [], []])
    found = solve_list(project, SHORT_S)
    check(project, found)
    assert found.makespan == 0.1
