"""Exact scheduling of a Project with OR-Tools CP-SAT: cumulative constraints, and optional intervals for modes.

This is the one importer of ortools (extra `exact`); `available` says whether it is there.
"""

import importlib.util
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from taskgraph.errors import BackendUnavailable, PlanError
from taskgraph.schedule.rcpsp.project import Project, Schedule, with_bound
from taskgraph.schedule.rcpsp.sgs import whole_units

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

MODEL_S = 0.02
"""Seconds kept for building the model and reading the answer."""
TICK_BITS = 24
"""Durations that are not whole are counted in ticks, at most 2 to this power of them for all activities together."""


def available() -> bool:
    """Is ortools installed?"""
    return importlib.util.find_spec("ortools") is not None


def solve(project: Project, budget_s: float, hint: Schedule | None = None, workers: int = 2, seed: int = 0) -> Schedule:
    """The best schedule that CP-SAT finds in `budget_s`, from `hint` on, with its lower bound; proven when they meet.

    The clock ends the search, so what is found before a proof may differ from run to run; a proof does not.
    """
    if not available():
        raise BackendUnavailable("The exact scheduler needs OR-Tools: install the extra `exact`.")
    from ortools.sat.python import cp_model

    tick = 1.0 if project.whole else 2.0 ** (math.frexp(_longest(project))[1] - TICK_BITS)
    model, start, chosen = _model(project, tick, hint)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = budget_s
    solver.parameters.num_workers = workers
    solver.parameters.random_seed = seed
    status = solver.solve(model)
    # Rounding up has lengthened the best schedule by less than a tick an activity.
    proved = solver.best_objective_bound * tick - (0.0 if project.whole else project.n * tick)
    lower = max(proved, hint.lower_bound if hint else 0.0)
    found = hint
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        begin = np.array([solver.value(s) for s in start]) * tick
        mode = np.array([next(k for k, on in row.items() if solver.boolean_value(on)) for row in chosen])
        makespan = float((begin + project.seconds[np.arange(project.n), mode]).max())
        if hint is None or makespan < hint.makespan:
            found = Schedule(begin, mode, makespan, 0.0, False, "exact", hint.schedules if hint else 1)
    if found is None:
        raise PlanError(f"CP-SAT found no schedule in {budget_s} s; give a larger budget or a schedule to start from.")
    return with_bound(project, found, lower)


def _longest(project: Project) -> float:
    return float(np.where(np.isfinite(project.seconds), project.seconds, 0.0).max(axis=1).sum())


def _model(
    project: Project, tick: float, hint: Schedule | None
) -> tuple["cp_model.CpModel", list[Any], list[dict[int, Any]]]:
    """(model, start of each activity, a literal for each of its allowed modes)."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    took = np.ceil(np.where(np.isfinite(project.seconds), project.seconds, -tick) / tick).astype(np.int64)
    amount, limit = whole_units(project)
    horizon = int(took.max(axis=1).sum() if hint is None else np.ceil(hint.makespan / tick) + project.n)
    floor = 0 if hint is None else math.floor(hint.lower_bound / tick * (1 - 1e-9))
    makespan = model.new_int_var(floor, horizon, "makespan")
    start = [model.new_int_var(0, horizon, f"start{i}") for i in range(project.n)]
    chosen: list[dict[int, Any]] = []
    ends: list[Any] = []
    intervals: list[tuple[Any, np.ndarray]] = []
    for i in range(project.n):
        modes = [k for k in range(took.shape[1]) if took[i, k] >= 0]
        one = len(modes) == 1
        chosen.append({k: model.new_constant(1) if one else model.new_bool_var(f"mode{i}_{k}") for k in modes})
        if not one:
            model.add_exactly_one(chosen[i].values())
        for k, on in chosen[i].items():
            size = int(took[i, k])
            interval = (
                model.new_fixed_size_interval_var(start[i], size, f"i{i}")
                if one
                else model.new_optional_fixed_size_interval_var(start[i], size, on, f"i{i}_{k}")
            )
            intervals.append((interval, amount[i, k]))
        ends.append(start[i] + sum(int(took[i, k]) * on for k, on in chosen[i].items()))
        model.add(makespan >= ends[i])
        for p in project.pred[project.pred_ptr[i] : project.pred_ptr[i + 1]].tolist():
            model.add(start[i] >= ends[p])
    for r, capacity in enumerate(limit.tolist()):
        users = [(interval, int(use[r])) for interval, use in intervals if use[r] > 0]
        model.add_cumulative([u[0] for u in users], [u[1] for u in users], capacity)
    if hint is not None:
        _add_hint(model, start, chosen, tick, hint)
    model.minimize(makespan)
    return model, start, chosen


def _add_hint(
    model: "cp_model.CpModel", start: list[Any], chosen: list[dict[int, Any]], tick: float, hint: Schedule
) -> None:
    """Start from a schedule; where ticks are coarser than its times CP-SAT has to repair it."""
    for i, row in enumerate(chosen):
        model.add_hint(start[i], math.ceil(hint.start[i] / tick))
        if len(row) > 1:
            for k, on in row.items():
                model.add_hint(on, int(k == hint.mode[i]))
