"""Replay overhead: what one empty node costs, against dask's threaded scheduler and a concurrent.futures executor."""

import argparse
import gc
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.table import Table

import taskgraph as tg
from benchmarks import count, interleaved, machine, one_line, positive, print_json, spread, whole

SHAPES = ("chain", "wide")
PEERS = ("dask", "futures")
EPILOG = """\
A chain is n ops, each after the one before; a wide DAG is n ops that all read one input. Every op is a Python
function that does nothing, so the time is what the runtime adds. taskgraph replays a captured plan on one lane;
dask gets the same DAG as a ready-made low-level graph; futures submits each op to a pool once its predecessor is
done. Rounds are interleaved; the figure is the median. Peers run on DAGs of up to --peer-nodes nodes.

example:
  python -m benchmarks.overhead --sizes 1000 10000 --json
"""


def nothing(*_: Any) -> None:
    """The empty op."""


def empty_graph(shape: str, nodes: int) -> tg.Graph:
    """`nodes` empty ops in a chain, or side by side."""
    builder = tg.GraphBuilder(f"{shape}-{nodes}")
    first = value = builder.input("x", (1,), "f32")
    work = tg.Work(flops=1)
    for i in range(nodes):
        made = builder.call(nothing, [value], [tg.spec(f"t{i}", (1,), "f32")], work=work, name=f"n{i}")
        value = made if shape == "chain" else first
    builder.output(made)
    return builder.build()


def dask_run(shape: str, nodes: int) -> Callable[[], Any]:
    """The same DAG as a low-level dask graph under the threaded scheduler, ended by one node that needs them all."""
    from dask.threaded import get

    graph: dict[Any, Any] = {"x": 0}
    for i in range(nodes):
        graph[f"n{i}"] = (nothing, f"n{i - 1}" if shape == "chain" and i else "x")
    graph["end"] = (nothing, f"n{nodes - 1}") if shape == "chain" else (nothing, [f"n{i}" for i in range(nodes)])
    return lambda: get(graph, "end")


def futures_run(shape: str, nodes: int, pool: ThreadPoolExecutor) -> Callable[[], Any]:
    """The same DAG on a pool: each op is submitted when its predecessor is done, the usual hand-written executor."""

    def wide() -> None:
        for future in [pool.submit(nothing) for _ in range(nodes)]:
            future.result()

    def chain() -> None:
        ended = threading.Event()
        left = nodes

        def following() -> None:
            nonlocal left
            left -= 1
            if left:
                pool.submit(step)
            else:
                ended.set()

        def step() -> None:
            nothing()
            following()

        pool.submit(step)
        ended.wait()

    return wide if shape == "wide" else chain


def measure(
    sizes: Sequence[int], rounds: int, peer_nodes: int, budget_s: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """All figures, in microseconds a node."""
    cost: dict[str, dict[str, float]] = {shape: {} for shape in SHAPES}
    spreads: dict[str, dict[str, float]] = {shape: {} for shape in SHAPES}
    peers: dict[str, dict[str, dict[str, float]]] = {peer: {shape: {} for shape in SHAPES} for peer in PEERS}
    prepare: dict[str, dict[str, float]] = {shape: {} for shape in SHAPES}
    with ThreadPoolExecutor() as pool:
        for nodes in sizes:
            for shape in SHAPES:
                say(f"{shape} of {nodes:,} nodes")
                made: list[Any] = []

                def prepared(made: list[Any] = made, shape: str = shape, nodes: int = nodes) -> None:
                    graph = empty_graph(shape, nodes)
                    made.append(tg.compile(graph, tg.plan(graph, "cpu", scheduler="sequential")))

                prepare[shape][str(nodes)] = interleaved({"prepare": prepared}, rounds=1, warmup=0)["prepare"][0]
                with made[0] as executable:
                    runs = {"taskgraph": executable.launch}
                    if nodes <= peer_nodes:
                        runs |= {"dask": dask_run(shape, nodes), "futures": futures_run(shape, nodes, pool)}
                    gc.collect()
                    times = interleaved(runs, rounds=rounds, budget_s=budget_s)
                each = {name: statistics.median(seconds) / nodes * 1e6 for name, seconds in times.items()}
                cost[shape][str(nodes)] = each.pop("taskgraph")
                spreads[shape][str(nodes)] = spread(times["taskgraph"])
                for peer, value in each.items():
                    peers[peer][shape][str(nodes)] = value
    cheapest = {
        peer: min((v for row in rows.values() for v in row.values()), default=None) for peer, rows in peers.items()
    }
    return {
        "us_per_node": cost,
        "peers_us_per_node": cheapest,
        "peers_us_per_node_by_dag": peers,
        "spread": spreads,
        "prepare_seconds": prepare,
        "machine": machine(),
    }


def table_of(result: dict[str, Any]) -> Table:
    """Rows by DAG, one column for each contender."""
    table = Table(title="replay overhead, us a node (measured, median)", caption=result["machine"])
    for name in ("DAG", "nodes", "taskgraph", "spread", "dask", "futures", "build + plan + capture"):
        table.add_column(name, justify="left" if name == "DAG" else "right")
    for shape, row in result["us_per_node"].items():
        for nodes, cost in row.items():
            others = [result["peers_us_per_node_by_dag"][peer][shape].get(nodes) for peer in PEERS]
            compared = [f"{v:.1f} ({v / cost:.0f}x)" if v is not None else "not run" for v in others]
            percent = f"{result['spread'][shape][nodes]:.0%}"
            prepared = f"{result['prepare_seconds'][shape][nodes]:.2f} s"
            table.add_row(shape, f"{int(nodes):,}", f"{cost:.3f}", percent, *compared, prepared)
    return table


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.overhead", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=count, nargs="+", default=[1_000, 10_000, 100_000], help="nodes of the DAGs")
    parser.add_argument("--rounds", type=count, default=9, help="interleaved rounds (default 9)")
    parser.add_argument("--peer-nodes", type=whole, default=10_000, help="largest DAG that peers run (default 10000)")
    parser.add_argument(
        "--budget", type=positive, default=4.0, help="stop a DAG's rounds after these seconds (default 4)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    args = parser.parse_args(argv)
    if min(args.sizes) < 1 or args.rounds < 1:
        parser.error("--sizes and --rounds are at least 1.")
    result = measure(
        args.sizes, args.rounds, args.peer_nodes, args.budget, lambda text: print(text, file=sys.stderr, flush=True)
    )
    Console().print(table_of(result))
    if args.json:
        print_json(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
