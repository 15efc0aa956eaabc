"""Scheduling time: list scheduler and evaluator on a random layered DAG, against HEFT over networkx in plain Python."""

import argparse
import bisect
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

import taskgraph as tg
from benchmarks import count, machine, one_line, positive, print_json, seconds_of, whole
from taskgraph.graph.device import Device
from taskgraph.schedule.evaluate import NO_HOLDS, Assignment, Layout, evaluate
from taskgraph.schedule.planner import candidate
from taskgraph.schedule.problem import Budget, Problem, make_problem
from taskgraph.schedule.solve.lists import layouts, pack
from taskgraph.schedule.solve.rules import FROM

if TYPE_CHECKING:
    import networkx

EPILOG = """\
The DAG has layers of --width ops; each op reads one to three ops of the layer before. plan_seconds is the whole of
tg.plan(scheduler="list") on a graph that it has not seen: costs, schedules, waits, arena, bounds, fingerprint;
plan_cpu_seconds is what it costs of both cores together, which a busy machine changes less.
list_seconds is the serial list scheduler plus the evaluator over every layout of the device. Both are warm: numba's
machine code is loaded. With several --nodes every size has a row and the JSON's "growth" holds them; the other keys
are those of the last size. --search S adds a search of S seconds at the last size.

The peer is HEFT (Topcuoglu, Hariri and Wu 2002) with insertion, a common way to write it over a networkx DiGraph, for
one layout and without an evaluator; list_one_seconds is the same for taskgraph, and speedup compares the two. The peer
runs on at most --peer-nodes nodes; for more nodes networkx_heft_seconds is null, and networkx_heft_seconds_at and
speedup_nodes say what was run.

--dags N compares makespans on N seeded random DAGs of 20 to 200 ops in layers of 2 to 24: the peer's schedules of all
layouts, timed by taskgraph's evaluator, the best of them counts, against tg.plan(scheduler="list"); worse_share is
the share of the DAGs on which taskgraph's makespan is longer.

example:
  python -m benchmarks.schedule --nodes 10000 --device h100_sxm --json
  python -m benchmarks.schedule --nodes 1000 10000 100000 1000000 --dags 0 --peer-nodes 10000
"""


def layered_graph(nodes: int, width: int, seed: int) -> tg.Graph:
    """A random layered DAG; flops and bytes are log-uniform over two decades. Every op can be launched on any number of
    SMs: what is compared is how well planners use that."""
    draw, any_grid = random.Random(seed), tg.demand(sm=(1, 1024))
    builder = tg.GraphBuilder(f"layered-{nodes}")
    before = [builder.input("x", (1,), "f32")]
    layer: list[Any] = []
    for i in range(nodes):
        inputs = draw.sample(before, min(len(before), draw.randint(1, 3)))
        work = tg.Work(flops=10 ** draw.uniform(8, 10), hbm_bytes=10 ** draw.uniform(5, 7))
        layer += builder.op("call", inputs, [tg.spec(f"t{i}", (1,), "f32")], work, f"n{i}", demand=any_grid)
        if len(layer) == width or i == nodes - 1:
            before, layer = layer, []
    builder.output(*before)
    return builder.build()


def networkx_heft(dag: "networkx.DiGraph[str]", lanes: int) -> dict[str, tuple[int, float]]:
    """HEFT in plain Python: nodes by upward rank, each on the lane where it ends first; (lane, end) by node."""
    import networkx

    order = list(networkx.topological_sort(dag))
    rank: dict[str, float] = {}
    for node in reversed(order):
        seconds = statistics.fmean(dag.nodes[node]["seconds"])
        rank[node] = seconds + max((rank[after] for after in dag.successors(node)), default=0.0)
    busy: list[list[tuple[float, float]]] = [[] for _ in range(lanes)]
    placed: dict[str, tuple[int, float]] = {}
    for node in sorted(order, key=lambda name: -rank[name]):
        ready = max((placed[before][1] for before in dag.predecessors(node)), default=0.0)
        seconds = dag.nodes[node]["seconds"]
        end, lane = min((_gap(busy[i], ready, seconds[i]) + seconds[i], i) for i in range(lanes))
        bisect.insort(busy[lane], (end - seconds[lane], end))
        placed[node] = (lane, end)
    return placed


def _gap(busy: list[tuple[float, float]], ready: float, seconds: float) -> float:
    """The earliest start after `ready` in a gap of a lane that is long enough: the insertion of HEFT."""
    begin = ready
    for start, end in busy[max(bisect.bisect_left(busy, (ready, 0.0)) - 1, 0) :]:
        if begin + seconds <= start:
            break
        begin = max(begin, end)
    return begin


def heft_makespan(graph: tg.Graph, dag: "networkx.DiGraph[str]", problem: Problem, layout: Layout) -> float:
    """Seconds of the peer's schedule on one layout, as taskgraph's evaluator times it."""
    lane_mode = np.array([problem.mode_of(size) for size in layout.table[layout.lane_partition, 2].tolist()])
    for op, row in zip(graph.ops, (problem.seconds[:, lane_mode] + problem.launch_s).tolist(), strict=True):
        dag.nodes[op.name]["seconds"] = row
    placed = networkx_heft(dag, len(lane_mode))
    lane = np.array([placed[op.name][0] for op in graph.ops])
    end = np.array([placed[op.name][1] for op in graph.ops])
    order = np.argsort(end, kind="stable")
    return evaluate(problem, Assignment(layout, order, lane, lane_mode[lane], NO_HOLDS)).makespan_s


def against_heft(dags: int, device: Device) -> dict[str, Any]:
    """Makespans of `dags` random DAGs over the peer's: how many are longer, and the geometric mean of the ratio."""
    ratios: list[float] = []
    for seed in range(dags):
        draw = random.Random(seed)
        graph = layered_graph(draw.randint(20, 200), draw.randint(2, 24), seed)
        problem, dag = make_problem(graph, device), graph.to_networkx()
        peer = min(heft_makespan(graph, dag, problem, layout) for layout in layouts(device))
        ratios.append(tg.plan(graph, device, "list").makespan_s / peer)
    worse = sum(ratio > 1 + 1e-9 for ratio in ratios)
    return {
        "dags": dags,
        "worse": worse,
        "worse_share": worse / dags,
        "mean_ratio": statistics.geometric_mean(ratios),
        "worst_ratio": max(ratios),
    }


def heft_seconds(graph: tg.Graph, problem: Problem, layout: Layout) -> float:
    """Seconds of networkx_heft for one lane in each partition; the DiGraph is made outside the clock."""
    dag = graph.to_networkx()
    modes = [problem.mode_of(size) for size in layout.geometries[0].sizes]
    for op, row in zip(graph.ops, problem.seconds[:, modes].tolist(), strict=True):
        dag.nodes[op.name]["seconds"] = row
    return seconds_of(lambda: networkx_heft(dag, len(modes)))


def measure(
    nodes: int, width: int, device: Device, peer_nodes: int, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """All figures of one size, in seconds."""
    tried = layouts(device)

    def search(problem: Problem) -> None:
        for layout in tried:
            packed = pack(problem, layout)
            assert packed is not None, "no op of this graph asks for SMs"
            evaluate(problem, packed)

    say(f"building {nodes:,} nodes")
    graphs: list[tg.Graph] = []
    build_s = seconds_of(lambda: graphs.append(layered_graph(nodes, width, 1)))
    graph = graphs[0]
    say("planning")
    plans: list[tg.Plan] = []
    busy = time.process_time()
    plan_s = seconds_of(lambda: plans.append(tg.plan(graph, device, "list")))
    busy = time.process_time() - busy
    problems: list[Problem] = []
    problem_s = seconds_of(lambda: problems.append(make_problem(graph, device)))
    problem = problems[0]
    widest = max(tried, key=lambda layout: len(layout.table))
    say(f"scheduling on {len(tried)} layouts")
    list_s = [seconds_of(lambda: search(problem)) for _ in range(rounds)]
    one_s = [seconds_of(lambda: pack(problem, widest)) for _ in range(rounds)]
    say("HEFT over networkx")
    asked = nodes <= peer_nodes
    peer_graph = graph if asked else layered_graph(peer_nodes, width, 1)
    peer_problem = problem if asked else make_problem(peer_graph, device)
    heft_s = heft_seconds(peer_graph, peer_problem, widest)
    peer_one_s = statistics.median(seconds_of(lambda: pack(peer_problem, widest)) for _ in range(rounds))
    return {
        "nodes": nodes,
        "list_seconds": statistics.median(list_s),
        "networkx_heft_seconds": heft_s if asked else None,
        "networkx_heft_seconds_at": {str(len(peer_graph.ops)): heft_s},
        "list_one_seconds": statistics.median(one_s),
        "speedup": heft_s / peer_one_s,
        "speedup_nodes": len(peer_graph.ops),
        "plan_seconds": plan_s,
        "plan_cpu_seconds": busy,
        "plan_gap": plans[0].gap,
        "build_seconds": build_s,
        "problem_seconds": problem_s,
        "layouts": len(tried),
        "lanes_of_one": len(widest.table),
        "device": device.name,
        "machine": machine(),
    }


WARM_NODES = 100_000


def warm_up(nodes: Sequence[int], width: int, device: Device) -> None:
    """Load or compile every kernel that the measured calls use: plans of other graphs of these sizes, but not larger
    than WARM_NODES, and a search."""
    for size in {min(n, WARM_NODES) for n in nodes}:
        tg.plan(layered_graph(size, width, 0), device, "list")
    tg.plan(layered_graph(FROM, width, 0), device, "search", budget_s=0.01)


def searched(graph: tg.Graph, device: Device, budget_s: float) -> dict[str, Any]:
    """What a search of so many seconds makes of the list's plan, and what it takes."""
    listed = tg.plan(graph, device, "list")
    found: list[tg.Plan] = []
    seconds = seconds_of(lambda: found.append(candidate(graph, device, "search", Budget(budget_s))))
    ratio = found[0].makespan_s / listed.makespan_s
    return {"search_seconds": seconds, "search_over_list": ratio, "search_gap": found[0].gap, "list_gap": listed.gap}


def table_of(result: dict[str, Any]) -> Table:
    """One row for each thing that was timed."""
    table = Table(
        title=f"{result['nodes']:,} nodes on {result['device']}, seconds (measured)", caption=result["machine"]
    )
    table.add_column("what")
    table.add_column("seconds", justify="right")
    one = f"{result['lanes_of_one']} lanes"
    table.add_row('tg.plan(scheduler="list"), whole', f"{result['plan_seconds']:.3f}")
    table.add_row(f"list scheduler + evaluator, all {result['layouts']} layouts", f"{result['list_seconds']:.3f}")
    table.add_row(f"list scheduler alone, one layout, {one}", f"{result['list_one_seconds']:.4f}")
    for nodes, seconds in result["networkx_heft_seconds_at"].items():
        table.add_row(f"HEFT over networkx, one layout, {one}, {int(nodes):,} nodes", f"{seconds:.3f}")
    table.add_row(f"taskgraph over HEFT, one layout, {result['speedup_nodes']:,} nodes", f"{result['speedup']:,.0f}x")
    table.add_row("building the graph", f"{result['build_seconds']:.3f}")
    table.add_row("make_problem", f"{result['problem_seconds']:.3f}")
    return table


GROWTH = ("nodes", "plan_seconds", "plan_cpu_seconds", "plan_gap")


def growth_table(rows: Sequence[dict[str, Any]]) -> Table:
    """How planning grows with the graph."""
    table = Table(title='tg.plan(scheduler="list") (measured)', caption=rows[0]["machine"])
    for column in ("nodes", "plan, s", "of CPU, s", "us of CPU a node", "makespan over bound (simulated)"):
        table.add_column(column, justify="right")
    for row in rows:
        busy = row["plan_cpu_seconds"]
        each = f"{1e6 * busy / row['nodes']:.1f}"
        table.add_row(f"{row['nodes']:,}", f"{row['plan_seconds']:.3f}", f"{busy:.3f}", each, f"{row['plan_gap']:.4f}")
    return table


def _print_comparison(figures: dict[str, Any]) -> None:
    worse, dags = figures["worse"], figures["dags"]
    print(
        f"{dags} random DAGs against HEFT (simulated makespans): longer on {worse} ({100 * figures['worse_share']:.1f} "
        f"%), mean ratio {figures['mean_ratio']:.4f}, worst {figures['worst_ratio']:.4f}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.schedule", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=count, nargs="+", default=[100_000], help="ops of the DAG (default 100000)")
    parser.add_argument("--width", type=count, default=64, help="ops of a layer (default 64)")
    parser.add_argument("--device", default="h100_sxm", help="device to schedule on (default h100_sxm)")
    parser.add_argument("--peer-nodes", type=whole, default=10_000, help="most nodes for the peer (default 10000)")
    parser.add_argument("--rounds", type=count, default=3, help="repetitions of the scheduler (default 3)")
    parser.add_argument("--dags", type=whole, default=500, help="DAGs for the comparison of makespans (default 500)")
    parser.add_argument("--search", type=positive, metavar="S", help="search for S seconds, too")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    return parser


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    if min(*args.nodes, args.width, args.peer_nodes, args.rounds) < 1 or args.dags < 0:
        parser.error("--nodes, --width, --peer-nodes and --rounds are at least 1, --dags at least 0.")
    device = tg.devices.get(args.device)
    console = Console()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    say("compiling")
    warm_up(args.nodes, args.width, device)
    rows = [measure(n, args.width, device, args.peer_nodes, args.rounds, say) for n in args.nodes]
    result = dict(rows[-1])
    console.print(table_of(result))
    if len(rows) > 1:
        console.print(growth_table(rows))
        result["growth"] = [{key: row[key] for key in GROWTH} for row in rows]
    if args.search is not None:
        say(f"searching for {args.search} s")
        result |= searched(layered_graph(args.nodes[-1], args.width, 1), device, args.search)
        print(
            f"search of {args.search} s: {result['search_seconds']:.1f} s (measured); makespan over bound "
            f"{result['search_gap']:.4f}, the list's {result['list_gap']:.4f} (simulated)"
        )
    if args.dags:
        say(f"{args.dags} random DAGs")
        result |= against_heft(args.dags, device)
        _print_comparison(result)
    if args.json:
        print_json(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
