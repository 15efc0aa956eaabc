"""Solvers: each finds assignments of a Problem's ops to lanes and SMs; the planner judges them with one clock.

A scheduler is a function of a Problem and a Budget that returns an Assignment, in one file, and a line below. Other
packages add theirs by an entry point of the group "taskgraph.schedulers".
"""

from collections.abc import Callable

from taskgraph.errors import PlanError
from taskgraph.plugins import Registry
from taskgraph.schedule.evaluate import Assignment
from taskgraph.schedule.problem import Budget, Problem

Scheduler = Callable[[Problem, Budget], Assignment]

SCHEDULERS: Registry[Scheduler] = Registry(
    "scheduler",
    "taskgraph.schedulers",
    {
        "auto": "taskgraph.schedule.solve.auto:auto",
        "sequential": "taskgraph.schedule.solve.found:sequential",
        "list": "taskgraph.schedule.solve.packing:packed",
        "search": "taskgraph.schedule.solve.explore:searched",
        "exact": "taskgraph.schedule.solve.proof:exact",
    },
    PlanError,
)
"""name -> the scheduler, imported when it is first asked for."""
