"""Search over rules: how wide ops are launched and how eagerly they start, by a few numbers for the whole graph.

A graph of many thousand ops is too large to decide op by op. A rule is a point in a small box; `dispatch` turns it into
a schedule, and the one clock judges it (parameterised priority rules, Hildebrandt, Heger and Scholz-Reiter 2010). Half
of the points are drawn anywhere, the others ever closer to the best one so far.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from taskgraph.schedule.bounds import longest_path, longest_tail
from taskgraph.schedule.evaluate import Assignment, Evaluation, Layout, dispatch
from taskgraph.schedule.problem import Problem
from taskgraph.schedule.solve.lists import upward_rank

FROM = 1_000
"""From so many ops on, a graph without a repeated body is searched by rules."""
GENERATION = 8
_OP_S = 8e-6
"""Seconds that one op costs in one trial, on the slow side: it turns a budget into a number of trials, as in search."""
_LANES = (3, 4, 6, 8, 12)
_SLACK = 16.0
_FLOAT = 1e-3
_WITHIN = 1 + 1e-9
_THREADS = 2


@dataclass(frozen=True, slots=True)
class Rule:
    """Ops are launched on the least SMs that keep them within `slack` of their best time, where they have at least the
    share `loose` of the critical path as float; with less float, by so much closer to their best time.

    `lanes` share the device; `sm` and `soft` are the limits of `dispatch`, `patient` is its backfill off, and `own`
    ranks ops by the times that they are launched with, not by their best ones.
    """

    slack: float
    loose: float
    lanes: int
    sm: float
    soft: float
    patient: bool
    own: bool

    @staticmethod
    def at(point: np.ndarray) -> "Rule":
        """The rule at a point of the unit box."""
        slack, loose, lanes, sm, soft, patient, own = point.tolist()
        return Rule(
            slack=_SLACK**slack,
            loose=_FLOAT ** (1.0 - loose),
            lanes=_LANES[min(int(lanes * len(_LANES)), len(_LANES) - 1)],
            sm=_limit(sm),
            soft=_limit(soft),
            patient=patient > 0.9,
            own=own > 0.5,
        )

    def label(self) -> str:
        """The rule for people: "slack 1.70 on 6 lanes"."""
        return f"slack {self.slack:.2f} on {self.lanes} lanes"

    def modes(self, problem: Problem, near: np.ndarray) -> np.ndarray:
        """The mode of every op; `near` (n,) is 1 on the critical path and less by an op's float, in critical paths."""
        slack = self.slack ** np.minimum((1.0 - near) / self.loose, 1.0)
        time_s = np.where(problem.legal, problem.seconds, np.inf)
        modes: np.ndarray = np.argmax(time_s <= (time_s.min(axis=1) * slack * _WITHIN)[:, None], axis=1)
        return modes


DIMENSIONS = len(fields(Rule))


def _limit(share: float) -> float:
    """Oversubscription from 1 to 4, and none in the upper half."""
    return float(np.inf) if share > 0.5 else 4.0 ** (2.0 * share)


FEW = tuple(Rule(slack, _FLOAT, 6, np.inf, np.inf, False, False) for slack in (1.0, 4.0))
"""Rules of a list schedule of a graph of FROM ops and more."""
MANY = tuple(
    Rule(slack, loose, lanes, np.inf, np.inf, False, own)
    for slack in (1.0, 1.3, 1.7, 2.5, 4.0) for loose in (_FLOAT, 0.3) for lanes in (3, 6) for own in (False, True)
)  # fmt: skip
"""Rules of a list schedule of any other graph."""


def by_rules(problem: Problem, tried: Sequence[Rule]) -> Iterator[tuple[Rule, Assignment, Evaluation]]:
    """The schedule of each rule, on several threads where the graph is large."""
    near = _near(problem)
    with ThreadPoolExecutor(_THREADS) as threads:
        run = threads.map if problem.n >= FROM else map
        for rule, made in zip(tried, run(lambda rule: _apply(problem, near, rule), tried), strict=True):
            yield rule, *made


def best_rule(problem: Problem, budget_s: float, seed: int) -> tuple[Rule, Assignment, Evaluation]:
    """The best rule found for lanes that share the device, and its schedule; equal arguments give equal results unless
    the machine is too slow for the number of trials that `budget_s` stands for, and the clock ends the search."""
    deadline = time.monotonic() + 0.9 * budget_s
    total = max(1, int(budget_s / (_OP_S * problem.n * GENERATION) * _THREADS))
    near = _near(problem)
    draw = np.random.default_rng(seed)
    points = [np.array([slack, 0.0, 0.5, 1.0, 1.0, 0.0, own]) for slack in (0.0, 0.2, 0.4, 0.6) for own in (0.0, 1.0)]
    best, best_s = points[0], np.inf
    with ThreadPoolExecutor(_THREADS) as threads:
        for done in range(total):
            seconds = list(threads.map(lambda point: _apply(problem, near, Rule.at(point))[1].makespan_s, points))
            if min(seconds) < best_s:
                best, best_s = points[seconds.index(min(seconds))], min(seconds)
            if time.monotonic() > deadline:
                break
            points = _next(best, done / total, draw)
    rule = Rule.at(best)
    return rule, *_apply(problem, near, rule)


def _next(best: np.ndarray, spent: float, draw: np.random.Generator) -> list[np.ndarray]:
    """The points to try: near the best one, and at first half of them anywhere."""
    anywhere = GENERATION // 2 if spent < 0.5 else 0
    spread = 0.3 * (1.0 - spent) ** 2 + 0.01
    moved = np.clip(draw.normal(best, spread, (GENERATION - anywhere, DIMENSIONS)), 0.0, 1.0)
    kept = draw.random(moved.shape) < 0.5
    return [*draw.random((anywhere, DIMENSIONS)), *np.where(kept, best, moved)]


def _near(problem: Problem) -> np.ndarray:
    """(n,) the longest chain through each op over the longest of all, at best times."""
    seconds = problem.best_seconds()
    through = longest_path(seconds, problem.pred_ptr, problem.pred) + upward_rank(problem) - seconds
    near: np.ndarray = through / through.max()
    return near


def _apply(problem: Problem, near: np.ndarray, rule: Rule) -> tuple[Assignment, Evaluation]:
    mode = rule.modes(problem, near)
    own = problem.seconds[np.arange(problem.n), mode] + problem.launch_s
    priority = longest_tail(own if rule.own else problem.best_seconds(), problem.succ_ptr, problem.succ)
    layout, row = Layout.shared(problem.sm_count, rule.lanes), np.zeros(problem.n, np.int64)
    return dispatch(problem, layout, priority, mode, row, (rule.sm, rule.soft), not rule.patient)
