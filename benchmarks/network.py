"""Routings of a torus: saturation by routing and pattern, simulated, beside bounds and what is published."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import count, machine, one_line, print_json, whole
from taskgraph.network import (
    PATTERNS,
    ROUTINGS,
    Topology,
    capacity,
    saturation,
    simulate,
    throughput_bound,
    torus,
    traffic,
)

EPILOG = """\
Throughputs are fractions of the capacity, at which the links of the torus are full under uniform traffic: simulated,
the highest load of which 97 % is delivered. `bound` is derived from expected loads of links (taskgraph/network/
bounds.py). `published` holds what could be read at its source only. packets_per_s is measured on this machine: hops of
packets that the simulator makes in a second of CPU time, the least over the routings of the medians of three runs.

example:
  python -m benchmarks.network --shape 8 8 --json
"""
ROUTINGS_OF_A_TORUS = tuple(name for name, each in ROUTINGS.items() if not each.graphs)
PUBLISHED = {
    "goal over valiant, nearest-neighbour, best case": {
        "value": 4.6,
        "source": "Singh, Dally, Gupta, Towles: GOAL, ISCA 2003, abstract",
    }
}


def measure(topology: Topology, cycles: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures; throughputs and bounds by routing and pattern."""
    full = capacity(topology)
    found: dict[str, dict[str, float]] = {}
    bounds: dict[str, dict[str, float]] = {}
    for routing in ROUTINGS_OF_A_TORUS:
        say(f"{routing} on {topology.name}")
        sent = {name: traffic(topology, name) for name in PATTERNS}
        found[routing] = {
            name: round(saturation(topology, routing, each, cycles=cycles, seed=seed), 3) for name, each in sent.items()
        }
        bounds[routing] = {
            name: round(throughput_bound(topology, routing, each) / full, 3) for name, each in sent.items()
        }
    return {
        "throughput": found,
        "throughput_kind": f"simulated on {topology.name}, fraction of capacity, seed {seed}",
        "bound": bounds,
        "published": PUBLISHED,
        "packets_per_s": min(hops_per_second(topology, routing, cycles) for routing in ROUTINGS_OF_A_TORUS),
        "fluid_error_p90": None,  # there is no fluid model yet
        "machine": machine(),
    }


def hops_per_second(topology: Topology, routing: str, cycles: int) -> float:
    """Hops of packets simulated in a second of CPU time under uniform traffic at 0.4 of capacity; measured."""
    sent, load = traffic(topology, "uniform"), 0.4 * capacity(topology)
    simulate(topology, routing, sent, load, 10, 0)
    rates = []
    for seed in range(3):
        start = time.process_time()
        hops = simulate(topology, routing, sent, load, 10 * cycles, 0, seed=seed).hops
        rates.append(hops / (time.process_time() - start))
    return statistics.median(rates)


def table_of(result: dict[str, Any]) -> Table:
    """A row a routing, a column a pattern: simulated, and the bound behind it."""
    table = Table(title=f"throughput / bound: {result['throughput_kind']}", caption=result["machine"])
    table.add_column("routing")
    for pattern in PATTERNS:
        table.add_column(pattern, justify="right")
    for routing, row in result["throughput"].items():
        table.add_row(routing, *(f"{row[name]:.2f} / {result['bound'][routing][name]:.2f}" for name in PATTERNS))
    return table


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", type=count, nargs="+", default=[8, 8], help="sizes of the torus, all equal (8 8)")
    parser.add_argument("--cycles", type=count, default=2000, help="cycles measured a run (2000)")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(argv)
    result = measure(torus(*args.shape), args.cycles, args.seed, lambda text: print(text, file=sys.stderr))
    if args.json:
        print_json(result)
    else:
        Console().print(table_of(result))
        Console().print(f"{result['packets_per_s'] / 1e6:.1f} million hops of packets a second of CPU time (measured)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
