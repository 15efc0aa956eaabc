"""What OR-Tools adds to the search on small graphs: CP-SAT's best rigid schedule, and a bound that no plan beats.

*Rigid*: every op runs at full speed on the SMs it is given, and what runs together fits the device. That is a Project,
which CP-SAT solves to proven optimality; run by the evaluator, its order and SM counts are one more candidate. Its
optimum is no bound on plans, because ops in the evaluator may share and slow down.

*The bound* is the optimum of a mixed-integer program that every plan fulfils (the start-based event formulation of
Kone, Artigues, Lopez and Mongeau 2011, with work that flows): ops stand in the order of their starts; between two
starts each does a part of its work, no faster than alone and all together within the SMs and every soft resource;
nobody works before its start or after a successor's; and starts are a launch and the predecessor's time apart.
Partitions, lanes, geometries and fair shares only restrict further. So do modes against the classes used here: of
several modes a class has the least time and the least area. SCIP solves it, with floating-point numbers: `MARGIN` is
taken off the bound for its tolerances.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from taskgraph.errors import BackendUnavailable, PlanError
from taskgraph.schedule.bounds import longest_path, longest_tail, lower_bounds
from taskgraph.schedule.evaluate import Assignment, Evaluation, Layout, dispatch
from taskgraph.schedule.problem import Budget, Problem, legal_sizes
from taskgraph.schedule.rcpsp.evolve import solve_auto
from taskgraph.schedule.rcpsp.exact import available
from taskgraph.schedule.rcpsp.project import make_project
from taskgraph.schedule.solve import lists
from taskgraph.schedule.solve.explore import packed_or_found
from taskgraph.schedule.solve.found import Found, collectives_ordered, in_sequence, shortest

MOST_OPS = 40
"""Larger graphs are refused: nothing would be proven about them."""
LANES = 6
MARGIN = 2e-5
OPTIMAL = 1e-4
"""A plan is called the best one within this of its bound."""
_CLASSES = 5


@dataclass(frozen=True, slots=True)
class Decisions:
    """What `dispatch` needs to make a schedule: priority and mode (n,) by op."""

    priority: np.ndarray
    mode: np.ndarray


@dataclass(frozen=True, slots=True)
class _Classes:
    """Classes of an op's modes, fastest first: the fastest mode of each, and the class's least seconds and least
    resource-seconds (classes, resources)."""

    mode: np.ndarray
    seconds: np.ndarray
    area: np.ndarray


def exact(problem: Problem, budget: Budget) -> Assignment:
    """The scheduler "exact": half of the budget for what "search" does, half to better and prove it.

    BackendUnavailable without OR-Tools, PlanError for graphs of more than MOST_OPS ops."""
    if not available():
        raise BackendUnavailable("The exact scheduler needs OR-Tools: pip install 'taskgraph-gpu[exact]'.")
    if problem.n > MOST_OPS:
        raise PlanError(f"exact plans graphs of at most {MOST_OPS} ops; this has {problem.n}. Use scheduler='search'.")
    wide = problem.on(legal_sizes(problem.n, problem.device))
    half, baseline = replace(budget, seconds=budget.seconds / 2), in_sequence(wide)
    best = shortest([baseline, *packed_or_found(wide, half, baseline)], baseline)
    return collectives_ordered(proved(best, half.seconds, budget.seed)).chosen()


def proved(best: Found, budget_s: float, seed: int) -> Found:
    """`best`, or a better schedule of its graph that OR-Tools suggests, with what it proves about all of them.

    Where the search has sliced the graph into more than MOST_OPS ops, `best` as it is."""
    problem = best.problem
    if problem.n > MOST_OPS:
        return best
    gpu = problem.device.kind == "gpu"
    if gpu:
        best = _better(best, rigid(problem, budget_s / 3, seed), "CP-SAT's best rigid schedule")
    bound_s, own = proven_bound(problem, best.times, budget_s / 2)
    if own is not None and gpu:
        best = _better(best, own, "the proof's own order")
    bound_s = min(bound_s, best.makespan_s)
    gap = best.makespan_s / max(bound_s, lower_bounds(problem).best_s)
    how = "proven best" if gap < 1 + OPTIMAL else f"within {100 * (gap - 1):.2g} % of a proven bound"
    made = replace(best.assignment, proved_s=bound_s, made_by=f"{best.assignment.made_by}, {how}")
    return replace(best, assignment=made)


def _better(best: Found, made: Decisions, name: str) -> Found:
    """`best`, or the schedule of these decisions on lanes that share the device, whichever is shorter."""
    problem = best.problem
    layout, row = Layout.shared(problem.sm_count, LANES), np.zeros(problem.n, np.int64)
    for limit in (1.0, np.inf):
        assignment, times = dispatch(problem, layout, made.priority, made.mode, row, (limit, limit))
        if times.makespan_s < best.makespan_s:
            label, split = f"{name} on {lists.label(layout)}", best.assignment.split
            best = Found(problem, replace(assignment, made_by=label, split=split), times)
    return best


def rigid(problem: Problem, budget_s: float, seed: int = 0) -> Decisions:
    """The decisions of the best rigid schedule that evolution and CP-SAT find."""
    seconds = np.where(problem.legal, problem.seconds + problem.launch_s, np.inf)
    capacity = _capacity(problem)
    shared = np.flatnonzero((problem.use > 0).any(axis=(0, 1)) & (capacity > 0))
    before = [problem.pred[a:b].tolist() for a, b in zip(problem.pred_ptr[:-1], problem.pred_ptr[1:], strict=True)]
    use = np.minimum(problem.use[:, :, shared], capacity[shared])
    found = solve_auto(make_project(seconds, use, capacity[shared], before), budget_s, seed)
    return Decisions(-found.start, found.mode)


def proven_bound(problem: Problem, known: Evaluation, budget_s: float) -> tuple[float, Decisions | None]:
    """Seconds that every plan of the problem takes at least, as far as they are proven in `budget_s`, and what the
    program's own solution decides. `known` are the times of some plan; the bound is never above them."""
    from ortools.linear_solver import pywraplp

    unit_s = known.makespan_s
    program = _Program(problem, unit_s)
    program.hint(known)
    program.solver.SetTimeLimit(max(int(1000 * budget_s), 1))
    status = program.solver.Solve()
    if status not in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE):
        return 0.0, None
    bound = program.solver.Objective().BestBound() * (1 - MARGIN)
    return min(max(bound, 0.0), 1.0) * unit_s, program.decisions()


def _capacity(problem: Problem) -> np.ndarray:
    return np.array([problem.sm_count, *problem.capacity], np.float64)


def _classes(problem: Problem, op: int) -> _Classes:
    """The modes that no faster one matches in every area, in at most _CLASSES groups of neighbours in time."""
    modes = np.flatnonzero(problem.legal[op])
    modes = modes[np.argsort(problem.seconds[op, modes], kind="stable")]
    seconds = problem.seconds[op, modes]
    area = problem.use[op, modes] * seconds[:, None]
    kept: list[int] = []
    for k in range(len(modes)):
        if not (area[kept] <= area[k] * (1 + 1e-9)).all(axis=1).any():
            kept.append(k)
    groups = np.array_split(np.array(kept), min(len(kept), _CLASSES))
    first = [group[0] for group in groups]
    return _Classes(modes[first], seconds[first], np.array([area[group].min(axis=0) for group in groups]))


class _Program:
    """The mixed-integer program, in units of the known makespan. Position q stands for the op that starts q-th, at
    at[q]; at[n] is the makespan. flow[i][c][q] is the share of op i that is done in class c from at[q] to at[q + 1].
    """

    def __init__(self, problem: Problem, unit_s: float) -> None:
        from ortools.linear_solver import pywraplp

        self.solver: Any = pywraplp.Solver.CreateSolver("SCIP")
        self.problem, self.n = problem, problem.n
        self.launch = problem.launch_s / unit_s
        self.classes = [_classes(problem, i) for i in range(self.n)]
        self.took = [(kinds.seconds / unit_s).tolist() for kinds in self.classes]
        least = np.array([min(row) for row in self.took]) + self.launch
        self.head = longest_path(least, problem.pred_ptr, problem.pred) - least
        self.rest = longest_tail(least, problem.succ_ptr, problem.succ) - least
        floor = lower_bounds(problem).best_s / unit_s
        new, n = self.solver, self.n
        self.at = [*(new.NumVar(0, 1, "") for _ in range(n)), new.NumVar(min(floor, 1.0), 1 + 1e-6, "makespan")]
        self.starts = [self._positions(i) for i in range(n)]
        self.chosen = [[new.BoolVar("") for _ in row] for row in self.took]
        self.flow = [[[new.NumVar(0, 1, "") for _ in range(n)] for _ in row] for row in self.took]
        self._order()
        self._share(unit_s)
        for i in range(n):
            self._work(i)
            for j in problem.succ[problem.succ_ptr[i] : problem.succ_ptr[i + 1]].tolist():
                self._precede(i, j)
        new.Minimize(self.at[n])

    def _positions(self, i: int) -> dict[int, Any]:
        """Where op i may stand: after all that must end before it, before all that it must precede."""
        first, last = self._relatives(i, -1), self.n - 1 - self._relatives(i, 1)
        return {q: self.solver.BoolVar("") for q in range(first, last + 1)}

    def _relatives(self, i: int, way: int) -> int:
        p = self.problem
        pointer, index = (p.succ_ptr, p.succ) if way > 0 else (p.pred_ptr, p.pred)
        seen, todo = {i}, [i]
        while todo:
            op = todo.pop()
            new = set(index[pointer[op] : pointer[op + 1]].tolist()) - seen
            seen |= new
            todo += new
        return len(seen) - 1

    def _started(self, i: int, q: int) -> Any:
        """1 when op i stands at q or before."""
        return sum((on for at, on in self.starts[i].items() if at <= q), 0)

    def _order(self) -> None:
        add = self.solver.Add
        for q in range(self.n):
            add(self.at[q + 1] >= self.at[q])
            add(sum(row[q] for row in self.starts if q in row) == 1)

    def _share(self, unit_s: float) -> None:
        """In every interval all flows together fit each resource."""
        capacity = _capacity(self.problem)
        for q in range(self.n):
            length = self.at[q + 1] - self.at[q]
            for r in np.flatnonzero(capacity > 0).tolist():
                drawn = [
                    float(kinds.area[c, r] / (capacity[r] * unit_s)) * self.flow[i][c][q]
                    for i, kinds in enumerate(self.classes)
                    for c in range(len(kinds.seconds))
                    if kinds.area[c, r] > 0
                ]
                if drawn:
                    self.solver.Add(sum(drawn) <= length)

    def _length(self, i: int) -> Any:
        """Seconds of op i from start to end, launch included, at full speed."""
        return self.launch + sum(t * on for t, on in zip(self.took[i], self.chosen[i], strict=True))

    def _work(self, i: int) -> None:
        add, flow = self.solver.Add, self.flow[i]
        add(sum(self.starts[i].values()) == 1)
        add(sum(self.chosen[i]) == 1)
        for on, row in zip(self.chosen[i], flow, strict=True):
            add(sum(row) == on)
        for q in range(self.n):
            add(sum(t * row[q] for t, row in zip(self.took[i], flow, strict=True)) <= self.at[q + 1] - self.at[q])
            add(sum(row[q] for row in flow) <= self._started(i, q))
        for q, here in self.starts[i].items():
            add(self.at[self.n] - self.at[q] >= self._length(i) + float(self.rest[i]) - 2 * (1 - here))
            add(self.at[q] >= float(self.head[i]) * here)

    def _precede(self, i: int, j: int) -> None:
        """Op i ends before op j starts."""
        add = self.solver.Add
        for q in range(self.n):
            add(sum(row[q] for row in self.flow[i]) <= 1 - self._started(j, q))
        for q, first in self.starts[i].items():
            for later, second in self.starts[j].items():
                if later > q:
                    add(self.at[later] - self.at[q] >= self._length(i) - 2 * (2 - first - second))
                else:
                    add(first + second <= 1)

    def hint(self, known: Evaluation) -> None:
        """Start from the order and the times of a plan."""
        order = np.lexsort((np.arange(self.n), known.start_s)).tolist()
        literals = [(on, float(order[q] == i)) for i, row in enumerate(self.starts) for q, on in row.items()]
        times = zip(self.at, [*(known.start_s[order] / known.makespan_s).tolist(), 1.0], strict=True)
        both = [*literals, *times]
        self.solver.SetHint([v for v, _ in both], [float(x) for _, x in both])

    def decisions(self) -> Decisions:
        """The order of the starts and the fastest mode of each class that was chosen."""
        place = [max(row, key=lambda q: float(row[q].solution_value())) for row in self.starts]
        chosen = [int(np.argmax([on.solution_value() for on in row])) for row in self.chosen]
        mode = np.array([kinds.mode[c] for kinds, c in zip(self.classes, chosen, strict=True)])
        return Decisions(-np.array(place, np.float64), mode)
