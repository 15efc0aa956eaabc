"""Schedulers from elsewhere: found by name, held to what an assignment is, and as CONTRIBUTING says."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph.errors import PlanError
from taskgraph.graph import device as specs
from taskgraph.graph.device import Device, Geometry, Partition
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.split import Split
from taskgraph.rewrite import apply
from taskgraph.schedule.evaluate import Assignment, Layout
from taskgraph.schedule.planner import plan_from
from taskgraph.schedule.problem import make_problem
from taskgraph.schedule.solve import SCHEDULERS
from taskgraph.schedule.solve.checked import checked
from taskgraph.schedule.solve.found import in_sequence, is_sequential, sequential
from tests.strategies import devices, graphs
from tests.test_plugins import install

H100 = specs.get("h100_sxm")
ROOT = Path(__file__).resolve().parents[2]


def chain() -> Graph:
    """a -> b -> c, each an addition of 8 rows."""
    b = GraphBuilder("chain")
    x = b.input("x", (8, 4), "f32")
    for name in "abc":
        x = tg.ops.add(x, x, name=name)
    b.output(x)
    return b.build()


GRAPH = chain()
PROBLEM = make_problem(GRAPH, H100)
RIGHT = replace(sequential(PROBLEM), made_by="by hand")
CUT = Split.of((4, 4))
SLICED = make_problem(apply(GRAPH, CUT), H100)

WRONG: dict[str, tuple[Callable[[Assignment], object], str]] = {
    "nothing": (lambda a: None, "returned None"),
    "only an order": (lambda a: a.order, "must return an Assignment"),
    "a layout that is none": (lambda a: replace(a, layout=3), "on a Layout"),
    "too few ops": (lambda a: replace(a, order=a.order[:2]), "integers of shape (3,)"),
    "lanes of other ops": (lambda a: replace(a, lane=np.zeros(4, np.int64)), "lane is of int64 and shape (4,)"),
    "no numbers": (lambda a: replace(a, mode=["all"] * 3), "mode is of"),
    "ragged": (lambda a: replace(a, mode=[[1], [2, 3], 4]), "mode is"),
    "half ops": (lambda a: replace(a, order=a.order + 0.5), "it must be integers"),
    "an op twice": (lambda a: replace(a, order=np.array([0, 1, 1])), "names op 'b' twice"),
    "an op that is not there": (lambda a: replace(a, order=np.array([0, 1, 3])), "order[2] is 3"),
    "a lane that is not there": (lambda a: replace(a, lane=np.array([0, 0, 1])), "lane[2] is 1"),
    "a mode that is not there": (lambda a: replace(a, mode=a.mode + 1), "mode[0] is"),
    "less than nothing": (lambda a: replace(a, lane=np.array([-1, 0, 0])), "lane[0] is -1"),
    "against an edge": (lambda a: replace(a, order=np.array([0, 2, 1])), "op 'c' stands before 'b'"),
    "against its own hold": (lambda a: replace(a, holds=np.array([[2, 0]])), "op 'a' stands before 'c'"),
    "a hold of three": (lambda a: replace(a, holds=np.array([[0, 1, 2]])), "holds is of"),
    "more SMs than the lane has": (
        lambda a: replace(a, layout=Layout.shared(64, 1)), "op 'a' gets 132 SMs on a lane of 64"
    ),
    "no lanes": (lambda a: replace(a, layout=Layout((), ())), "its layout"),
    "lanes of other partitions": (lambda a: replace(a, layout=Layout((Geometry.of(132),), ((1, 1),))), "its layout"),
    "a partition that is none": (lambda a: replace(a, layout=Layout.shared(131, 1)), "no partition of 131 SMs"),
    "a partition ahead of the first SM": (
        lambda a: replace(a, layout=Layout((Geometry((Partition(-1, 64),)),), ((1,),))), "of 64 SMs from SM -1 on"
    ),
    "a partition beyond the last SM": (
        lambda a: replace(a, layout=Layout((Geometry((Partition(72, 64),)),), ((1,),))), "of 64 SMs from SM 72 on"
    ),
    "fewer lanes than none": (lambda a: replace(a, layout=Layout((Geometry.of(64, 64),), ((2, -1),))), "has no lanes"),
    "partitions without lanes": (lambda a: replace(a, layout=Layout((Geometry.of(64),), ((0,),))), "has no lanes"),
    "a proof of less than nothing": (lambda a: replace(a, proved_s=-1.0), "proved_s is -1.0"),
    "a proof of the end of time": (lambda a: replace(a, proved_s=float("inf")), "proved_s is inf"),
    "a proof of nothing": (lambda a: replace(a, proved_s=float("nan")), "proved_s is nan"),
    "a proof in words": (lambda a: replace(a, proved_s="long"), "proved_s is 'long'"),
    "made by nobody": (lambda a: replace(a, made_by=7), "made_by is 7"),
    "another graph": (lambda a: replace(a, problem=SLICED), "is not of graph 'chain'"),
    "a split without its problem": (lambda a: replace(a, split=CUT), "is not of graph 'chain' as its split"),
    "a split that does not fit": (lambda a: replace(a, problem=SLICED, split=Split.of((3, 3))), "its split does not"),
    "another device": (lambda a: replace(a, problem=make_problem(GRAPH, specs.get("l40s"))), "for device 'l40s'"),
    "no problem": (lambda a: replace(a, problem=GRAPH), "its problem is"),
    "worse than a wrong one": (lambda a: replace(a, against=replace(a, lane=a.lane + 1)), "lane[0] is 1"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_what_is_no_assignment_is_refused_by_the_name_of_its_scheduler(how: str) -> None:
    checked("mine", PROBLEM, RIGHT)
    change, text = WRONG[how]
    with pytest.raises(PlanError, match="scheduler 'mine'") as caught:
        checked("mine", PROBLEM, change(RIGHT))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_partition_may_have_no_lane() -> None:
    spare = replace(RIGHT, layout=Layout((Geometry.of(64, 64),), ((0, 1),)), mode=np.full(3, PROBLEM.mode_of(64)))
    assert plan_from(PROBLEM, spare).partition(0).first_sm == 64


def test_sms_below_a_demand_are_refused() -> None:
    b = GraphBuilder("demanding")
    x = b.input("x", (8, 4), "f32")
    b.output(*b.op("custom", [x], [tg.spec("y", (4,), "f32")], tg.Work(flops=1.0), "wide", tg.demand(sm=(100, 132))))
    problem = make_problem(b.build(), H100)
    with pytest.raises(PlanError, match=r"op 'wide' gets \d+ SMs and demands more"):
        checked("mine", problem, replace(sequential(problem), mode=np.zeros(1, np.int64)))


@settings(max_examples=40, deadline=None)
@given(graphs(), devices(), st.integers(0, 2**32))
def test_any_legal_assignment_becomes_a_plan_that_passes(graph: Graph, device: Device, seed: int) -> None:
    """Random lanes of one or two geometries, random SM counts; lists do as well as arrays."""
    draw = np.random.default_rng(seed)
    splits = device.splits()
    picked = [splits[i] for i in sorted({*draw.integers(0, len(splits), 2).tolist()})]
    layout = Layout(tuple(picked), tuple(tuple(draw.integers(1, 3, len(g.partitions)).tolist()) for g in picked))
    problem = make_problem(graph, device, device.partition_sizes())
    lane = draw.integers(0, len(layout.lane_partition), problem.n)
    room = np.searchsorted(problem.sizes, layout.table[layout.lane_partition[lane], 2])
    least = np.argmax(problem.legal, axis=1)
    assume((least <= room).all())
    mode = draw.integers(least, room + 1)
    made = Assignment(layout, list(range(problem.n)), lane.tolist(), mode.tolist(), made_by="at random")  # type: ignore[arg-type]
    plan = plan_from(problem, made)
    tg.verify(plan, graph, memory=False)
    assert plan.made_by == "at random" and plan.verdict.choice == "packed"


def test_the_sequential_schedule_is_known_by_what_it_does() -> None:
    assert is_sequential(PROBLEM, RIGHT)
    two = replace(RIGHT, layout=Layout.shared(132, 2))
    few = replace(RIGHT, mode=RIGHT.mode * 0)
    assert not is_sequential(PROBLEM, two) and not is_sequential(PROBLEM, few)


# ------------------------------------------------------------------------------- from packages


def test_a_scheduler_that_is_not_asked_for_is_not_imported() -> None:
    code = (
        "import sys, taskgraph as tg; b = tg.GraphBuilder('g'); x = b.input('x', (4, 4), 'f32');"
        "b.output(tg.ops.add(x, x)); tg.plan(b.build(), 'h100_sxm', 'list');"
        "print(*sorted(m for m in sys.modules if m.startswith('taskgraph.schedule')), 'ortools' in sys.modules)"
    )
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "taskgraph.schedule.solve.packing" in names and names[-1] == "False"
    solve = "taskgraph.schedule.solve."
    unasked = {f"{solve}{name}" for name in ("auto", "explore", "annealing", "cycles", "proof")}
    assert not unasked & {*names} and not any(name.startswith("taskgraph.schedule.rcpsp") for name in names)


BROUGHT = """
import numpy as np
from taskgraph.schedule.evaluate import Assignment, Layout

def halves(problem, budget):
    return Assignment(Layout.shared(problem.sm_count, 2), np.arange(problem.n), np.arange(problem.n) % 2,
                      np.full(problem.n, problem.mode_of(problem.sm_count)), made_by=f"halves, seed {budget.seed}")

def backwards(problem, budget):
    return Assignment(Layout.shared(problem.sm_count, 1), np.arange(problem.n)[::-1], np.zeros(problem.n, int),
                      np.full(problem.n, problem.mode_of(problem.sm_count)))

def boastful(problem, budget):
    from dataclasses import replace
    return replace(halves(problem, budget), proved_s=1.0)
"""


def test_a_package_brings_a_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("halves", "backwards", "boastful")
    entries = "".join(f"{name} = bringer_of_schedules:{name}\n" for name in names)
    install(tmp_path, "bringer_of_schedules", f"[taskgraph.schedulers]\n{entries}", BROUGHT)
    assert {*names} <= {*SCHEDULERS.names()}
    made = tg.plan(GRAPH, H100, "halves", seed=5)
    tg.verify(made, GRAPH)
    assert made.made_by == "halves: halves, seed 5" and len(made.lanes) == 2
    assert made.verdict.sequential_s == in_sequence(PROBLEM).makespan_s
    with pytest.raises(PlanError, match=r"scheduler 'backwards' returned a wrong assignment: op 'b' stands before 'a'"):
        tg.plan(GRAPH, H100, "backwards")
    with pytest.raises(PlanError, match=r"scheduler 'boastful' says that every plan takes 1\.0 s or more; its own"):
        tg.plan(GRAPH, H100, "boastful")


def test_the_scheduler_of_contributing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file and its line, as they stand there, in a package of their own."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## How to add a scheduler")[1].split("\n## ")[0]
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))
    monkeypatch.syspath_prepend(str(tmp_path))
    install(
        tmp_path,
        "taskgraph_dealt",
        blocks["toml"].replace("project.entry-points.", "").replace('"', ""),
        blocks["python"],
    )
    made = tg.plan(GRAPH, H100, "dealt")
    tg.verify(made, GRAPH)
    assert made.made_by == "dealt: dealt to 2 lanes"
    line = re.search(r'`"dealt": "([\w.]+):(\w+)",`', section)
    assert (
        line is not None and line[1].startswith("taskgraph.schedule.solve.") and f"def {line[2]}(" in blocks["python"]
    )
