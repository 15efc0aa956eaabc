"""What a scheduler returns, at the border: an Assignment of the problem, or a PlanError that names the scheduler."""

import math
from dataclasses import replace
from typing import NoReturn

import numpy as np

from taskgraph.errors import GraphError, PlanError
from taskgraph.record import shown
from taskgraph.rewrite.nanobatch import apply
from taskgraph.schedule.evaluate import Assignment, Layout
from taskgraph.schedule.problem import Problem


def checked(scheduler: str, problem: Problem, made: object) -> Assignment:
    """`made` if it assigns every op of the problem once: to a lane that is there, on SMs that the op may have and the
    lane's partition has, in an order that keeps every edge. PlanError names the scheduler, and the op where one is
    wrong. Numbers of ops, lanes and modes may be any integers; they come back as arrays."""
    if not isinstance(made, Assignment) or not isinstance(made.layout, Layout):
        raise PlanError(f"scheduler {scheduler!r} returned {shown(made)}; it must return an Assignment on a Layout.")
    return _Border(scheduler, problem, made).checked()


class _Border:
    """One check of one assignment."""

    def __init__(self, scheduler: str, problem: Problem, made: Assignment) -> None:
        self.scheduler, self.given, self.made = scheduler, problem, made
        if not isinstance(made.problem, Problem | None):
            self._fail(f"its problem is {shown(made.problem)}")
        self.problem = made.problem or problem

    def _fail(self, what: str) -> NoReturn:
        raise PlanError(f"scheduler {self.scheduler!r} returned a wrong assignment: {what}.")

    def _name(self, op: int) -> str:
        return self.problem.graph.flat().ops[op].name

    def checked(self) -> Assignment:
        made, n = self.made, self.problem.n
        self._same_ops()
        lanes = self._lanes()
        order = self._integers("order", made.order, (n,), n)
        if len(np.unique(order)) < n:
            self._fail(f"its order of {n} ops names op {self._name(_twice(order))!r} twice")
        lane = self._integers("lane", made.lane, (n,), lanes)
        mode = self._integers("mode", made.mode, (n,), len(self.problem.sizes))
        holds = self._integers("holds", made.holds, (len(made.holds), 2), n)
        self._fits(lane, mode)
        self._in_order(order, holds)
        if not isinstance(made.made_by, str):
            self._fail(f"made_by is {shown(made.made_by)}, no text")
        if isinstance(made.proved_s, bool) or not isinstance(made.proved_s, (int, float)):
            self._fail(f"proved_s is {shown(made.proved_s)}, no number")
        if not (math.isfinite(made.proved_s) and made.proved_s >= 0):
            self._fail(f"proved_s is {made.proved_s}, no time")
        against = made.against
        if against is not None:
            against = checked(self.scheduler, self.given, against)
        return replace(made, order=order, lane=lane, mode=mode, holds=holds, against=against)

    def _same_ops(self) -> None:
        """The problem that the assignment says it is of is that of the graph, as its split slices it."""
        mine, given, split = self.problem, self.given, self.made.split
        if mine is given and not split.parts:
            return
        if mine.device != given.device:
            self._fail(f"its problem is for device {mine.device.name!r}, not {given.device.name!r}")
        try:
            cut = apply(given.graph, split)
        except GraphError as error:
            self._fail(f"its split does not fit the graph: {str(error).rstrip('.')}")
        if mine.graph is not cut and mine.graph.fingerprint != cut.fingerprint:
            self._fail(f"its problem is not of graph {given.graph.name!r} as its split slices it")

    def _lanes(self) -> int:
        """The number of lanes, in partitions that the device can have."""
        layout, device = self.made.layout, self.problem.device
        parts = [tuple(geometry.partitions) for geometry in layout.geometries]
        if not parts or [len(each) for each in parts] != [len(each) for each in layout.lanes_each]:
            self._fail("its layout does not say the lanes of each partition of each geometry")
        sizes = {*device.partition_sizes()}
        for part in (part for each in parts for part in each):
            if part.sm_count not in sizes or part.first_sm < 0 or part.end_sm > device.sm_count:
                self._fail(f"{device.name} has no partition of {part.sm_count} SMs from SM {part.first_sm} on")
        if any(count < 0 for each in layout.lanes_each for count in each) or not len(layout.lane_partition):
            self._fail("its layout has no lanes")
        return len(layout.lane_partition)

    def _integers(self, what: str, given: object, shape: tuple[int, ...], end: int) -> np.ndarray:
        """`given` as an array of this shape of integers from 0 up to `end`."""
        try:
            array = np.asarray(given)
        except ValueError:  # lists of several lengths
            self._fail(f"{what} is {shown(given)}, no array of shape {shape}")
        if array.shape != shape or not (np.issubdtype(array.dtype, np.integer) or not array.size):
            self._fail(f"{what} is of {array.dtype} and shape {array.shape}; it must be integers of shape {shape}")
        wrong = np.argwhere((array < 0) | (array >= end))
        if len(wrong):
            self._fail(f"{what}{wrong[0].tolist()} is {array[tuple(wrong[0])]}; it must be from 0 to {end - 1}")
        return array.astype(np.int64)

    def _fits(self, lane: np.ndarray, mode: np.ndarray) -> None:
        layout, sizes = self.made.layout, self.problem.sizes
        room = layout.table[layout.lane_partition[lane], 2]
        over = np.flatnonzero(sizes[mode] > room)
        if len(over):
            op = int(over[0])
            self._fail(f"op {self._name(op)!r} gets {sizes[mode[op]]} SMs on a lane of {room[op]}")
        short = np.flatnonzero(~self.problem.legal[np.arange(len(mode)), mode])
        if len(short):
            op = int(short[0])
            self._fail(f"op {self._name(op)!r} gets {sizes[mode[op]]} SMs and demands more")

    def _in_order(self, order: np.ndarray, holds: np.ndarray) -> None:
        """Every edge and every hold leads from an earlier op to a later one."""
        problem, place = self.problem, np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        after = np.repeat(np.arange(problem.n), np.diff(problem.pred_ptr))
        edges = np.concatenate([np.stack([problem.pred, after], axis=1), holds])
        late = np.flatnonzero(place[edges[:, 0]] >= place[edges[:, 1]])
        if len(late):
            before, behind = (self._name(int(op)) for op in edges[late[0]])
            self._fail(f"op {behind!r} stands before {before!r}, for which it has to wait")


def _twice(order: np.ndarray) -> int:
    """The first number that stands twice."""
    values, counts = np.unique(order, return_counts=True)
    return int(values[counts > 1][0])
