"""What large graphs cost grows about as they do: declaring outputs, planning, checking. In CPU time of this thread."""

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import taskgraph as tg

SMALL, LARGE = 1_000, 8_000


def eliminate(*tensors: Any) -> None:
    """An op that only has a name."""


def tree(fronts: int) -> tuple[tg.GraphBuilder, list[tg.Value]]:
    """A tree of custom ops with tensors of many sizes, each an output and an update for its parent."""
    b = tg.GraphBuilder("tree")
    x = b.input("x", (64,), "f64")
    draw = np.random.default_rng(fronts)
    panels: list[tg.Value] = []
    waiting: list[tuple[int, tg.Value]] = []  # (height, update), the deepest last
    for i in range(fronts):
        children = [waiting.pop() for _ in range(2)] if len(waiting) > 1 and waiting[-1][0] == waiting[-2][0] else []
        size = int(draw.integers(1, 60))
        specs = [tg.spec(f"panel.{i}", (size,), "f64"), tg.spec(f"update.{i}", (size, 8), "f64")]
        work = tg.Work(flops=float(draw.integers(1, 10_000)), hbm_bytes=800.0)
        made = b.call(eliminate, [x, *(update for _, update in children)], specs, work=work, name=f"front.{i}")
        panels.append(made[0])
        waiting.append((children[0][0] + 1 if children else 0, made[1]))
    return b, panels


def cpu_seconds(run: Callable[[], object]) -> float:
    """The least of three, so that a page fault or a cache of others does not count."""
    took = []
    for _ in range(3):
        gc.collect()
        begin = time.thread_time()
        run()
        took.append(time.thread_time() - begin)
    return min(took)


def test_declaring_planning_and_checking_a_large_graph_is_about_linear() -> None:
    took: dict[int, dict[str, float]] = {}
    for fronts in (SMALL, LARGE):
        b, panels = tree(fronts)
        declared = cpu_seconds(lambda b=b, panels=panels: b.output(*panels))
        graph = b.build()
        plan = tg.plan(graph, "cpu", scheduler="list")
        took[fronts] = {
            "output": declared,
            "plan": cpu_seconds(lambda graph=graph: tg.plan(graph, "cpu", scheduler="list")),
            "verify": cpu_seconds(lambda graph=graph, plan=plan: tg.verify(plan, graph)),
        }
    times = LARGE / SMALL
    for what, seconds in took[LARGE].items():
        assert seconds < 3 * times * took[SMALL][what] + 0.01, (what, took)  # a quadratic one takes 8 times as many
