"""Routings of a torus: saturation by routing and pattern, simulated, beside bounds and what is published."""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import count, machine, one_line, print_json, whole
from taskgraph.network import (
    COLLECTIVES,
    PATTERNS,
    ROUTINGS,
    Network,
    Topology,
    capacity,
    fluid_cost,
    network,
    packet_run,
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
        **fluid_errors(FLUID_CASES, seed, say),
        "machine": machine(),
    }


FLUID_CASES = 200
FLUID_TOPOLOGIES = (
    "torus:4x4", "torus:8x4", "torus:3x5", "torus:4x4x4", "torus:2x4x4", "mesh:4x4", "ring:6", "ring:8", "switch:8",
    "switch:16", "fat-tree:4x4+2", "fat-tree:4x4+4", "machines:2x8@450GB/s,500ns+50GB/s,2us",
    "machines:4x4@450GB/s,500ns+50GB/s,2us",
)  # fmt: skip
LEAST_BYTES, MOST_BYTES, MOST_CYCLES = 4e3, 64e6, 60_000


def fluid_errors(cases: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """How far the fluid model is from the simulator of packets, relative, over drawn networks, routings, collectives,
    algorithms, ranks and sizes (4 KB to 64 MB, less where that takes packets more than 60 000 cycles)."""
    drawn = random.Random(seed)
    errors: dict[str, list[float]] = {}
    for i in range(cases):
        made, collective, algorithm, ranks = drawn_case(drawn)
        cost = fluid_cost(made, collective, algorithm, ranks)
        cycle_s = 4096 / made.topology.bytes_per_s
        nbytes = LEAST_BYTES * (MOST_BYTES / LEAST_BYTES) ** drawn.random()
        nbytes *= min(1.0, MOST_CYCLES * cycle_s / cost.seconds(nbytes))
        seen = packet_run(made, collective, algorithm, ranks, nbytes, packet_of(made, nbytes / ranks**1.5), i)
        errors.setdefault(made.routing, []).append(abs(cost.seconds(nbytes) / seen.seconds - 1))
        if i % 50 == 49:
            say(f"{i + 1} of {cases} collectives")
    every = [error for some in errors.values() for error in some]
    return {
        "fluid_error_p90": round(float(np.quantile(every, 0.9)), 4),
        "fluid_error_p50": round(float(np.quantile(every, 0.5)), 4),
        "fluid_error_p90_by_routing": {name: round(float(np.quantile(some, 0.9)), 4) for name, some in errors.items()},
        "fluid_cases": cases,
    }


def drawn_case(drawn: random.Random) -> tuple[Network, str, str, int]:
    """A network with a routing, a collective, an algorithm and ranks."""
    bare = network(drawn.choice(FLUID_TOPOLOGIES))
    topology = bare.topology
    fitting = [name for name, each in ROUTINGS.items() if each.graphs == bool(topology.links)]
    made = Network(topology, drawn.choice([name for name in fitting if topology.wrap or not ROUTINGS[name].weighted]))
    ranks = max(2, topology.hosts // drawn.choice((1, 1, 2, 4)))
    collective = drawn.choice(COLLECTIVES)
    return made, collective, drawn.choice(made.algorithms(collective, ranks)), ranks


def packet_of(made: Network, message: float) -> float:
    """Bytes of a packet: a sixteenth of a message, from 256 to 4096, and a hop of at most 200 of its cycles."""
    least = max(256.0, float((made.topology.rates_by_place() * made.topology.latencies_by_place()).max()) / 200)
    return max(least, min(message / 16, 4096.0))


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
