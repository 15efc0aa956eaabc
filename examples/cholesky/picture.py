"""A picture of a factorisation, the tree of its ops and who ran when: `python -m examples.cholesky.picture out.png`."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import taskgraph as tg
from taskgraph.schedule.planner import plan_from
from taskgraph.schedule.problem import make_problem
from taskgraph.schedule.solve import lists

from .factor import Factor
from .ordering import grid_dissection
from .problems import poisson

COLOURS = ("#3b6fb6", "#d98c2b", "#5a9e6f", "#a05a9e")


def places(graph: tg.Graph) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """(x, depth, (child, parent) pairs) of every op: leaves side by side, a parent over the middle of its children."""
    children = graph.predecessors()
    parent = {c: op for op, held in enumerate(children) for c in held}
    x, depth = np.zeros(len(children)), np.zeros(len(children))
    leaf = 0
    for op, held in enumerate(children):
        x[op] = np.mean(x[list(held)]) if held else leaf
        leaf += not held
    for op in range(len(children) - 1, -1, -1):
        depth[op] = depth[parent[op]] + 1 if op in parent else 0
    return x, depth, sorted(parent.items())


def draw_tree(axes: Any, graph: tg.Graph, colour: dict[str, str]) -> None:
    """The ops as discs whose area is their work, coloured by lane."""
    x, depth, edges = places(graph)
    for child, above in edges:
        axes.plot(x[[child, above]], -depth[[child, above]], color="#bbbbbb", linewidth=0.8, zorder=1)
    work = np.array([op.work.flops for op in graph.ops])
    axes.scatter(
        x, -depth, s=10 + 500 * work / work.max(), c=[colour[op.name] for op in graph.ops], zorder=2, edgecolors="white"
    )
    axes.set_axis_off()


def draw_timeline(axes: Any, plan: tg.Plan, timeline: tg.Timeline) -> None:
    """A row a lane, with the cores that it may use; fronts by BLAS are hatched."""
    step = {each.op: each for each in plan.steps}
    for span in timeline.spans:
        colour, hatch = COLOURS[step[span.op].lane % len(COLOURS)], "///" if span.op.startswith("front") else ""
        axes.barh(
            span.lane, 1e3 * (span.end_s - span.start_s), left=1e3 * span.start_s, height=0.7,
            color=colour, edgecolor="white", linewidth=0.4, hatch=hatch,
        )  # fmt: skip
    cores = [plan.partition(i).sm_count for i in range(len(plan.lanes))]
    axes.set_yticks(range(len(cores)), [f"lane {i}: {c} core{'s'[: c > 1]}" for i, c in enumerate(cores)])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def in_turns(graph: tg.Graph, device: tg.Device) -> tg.Plan:
    """Lanes on parts of the cores, in turns with one on all of them, by declared prices; PlanError on a single core."""
    problem = make_problem(graph, device)
    layout = next((each for each in lists.layouts(device) if len(each.geometries) > 1), None)
    made = lists.pack(problem, layout) if layout is not None else None
    if layout is None or made is None:
        raise tg.PlanError(f"{device.name} has {device.sm_count} core: there is nothing to take turns.")
    return plan_from(problem, replace(made, made_by=lists.label(layout)))


def drawn(factor: Factor, timeline: tg.Timeline, path: Path, title: str) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(10, 6.5), height_ratios=(3, 1.3))
    colour = {step.op: COLOURS[step.lane % len(COLOURS)] for step in factor.plan.steps}
    draw_tree(above, factor.graph, colour)
    draw_timeline(below, factor.plan, timeline)
    above.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("examples.cholesky.picture", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--side", type=int, default=420, help="points along each axis of a square grid (default: 420)")
    parser.add_argument("--rounds", type=int, default=20, help="replays, of which the shortest is drawn (default: 20)")
    args = parser.parse_args(argv)
    shape = (args.side, args.side)
    matrix = poisson(shape)
    with Factor(matrix, grid_dissection(shape), scheduler="sequential") as factor:
        factor.replan(in_turns(factor.graph, factor.plan.device))
        factor.refactor(matrix)
        best = min((factor.executable.timeline() for _ in range(args.rounds)), key=lambda t: t.makespan_s)
        title = f"2D Poisson, {matrix.shape[0]} unknowns: {len(factor.graph.ops)} ops on {factor.plan.made_by}"
        drawn(factor, best, args.path, title)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
