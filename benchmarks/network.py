"""Routings of a torus: saturation by routing and pattern, simulated, beside bounds and what is published."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import count, machine, one_line, print_json, whole
from benchmarks.network_fluid import choices, fluid_errors, together_errors
from benchmarks.network_published import CUBE, compared, derived
from taskgraph.errors import ConfigError
from taskgraph.network import (
    PATTERNS,
    ROUTINGS,
    Routers,
    Topology,
    Traffic,
    capacity,
    saturation,
    simulate,
    throughput_bound,
    torus,
    traffic,
    worst_case,
)

EPILOG = """\
Throughputs are fractions of the capacity, at which the links of the torus are full under uniform traffic: simulated,
the highest load of which 97 % is delivered. `bound` is derived from expected loads of links (taskgraph/network/
bounds.py). `published` holds what could be read at its source only, beside what it is here; of 8 8 alone. packets_per_s
is measured on this machine: hops of packets that the simulator makes in a second of CPU time, the least over the
routings of the medians of three runs.

example:
  python -m benchmarks.network --shape 8 8 --json
"""
ROUTINGS_OF_A_TORUS = tuple(name for name, each in ROUTINGS.items() if not each.graphs)
SENT = (*PATTERNS, "worst-case")


def measure(topology: Topology, cycles: int, seed: int, fluid_cases: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures of routings and of the fluid model; throughputs and bounds by routing and pattern."""
    full = capacity(topology)
    found: dict[str, dict[str, float]] = {}
    bounds: dict[str, dict[str, float]] = {}
    for routing in ROUTINGS_OF_A_TORUS:
        say(f"{routing} on {topology.name}")
        sent = {name: traffic(topology, name) for name in PATTERNS}
        sent["worst-case"] = worst_case(topology, routing)
        found[routing] = {
            name: round(saturation(topology, routing, each, cycles=cycles, seed=seed), 3) for name, each in sent.items()
        }
        bounds[routing] = {
            name: round(throughput_bound(topology, routing, each) / full, 3) for name, each in sent.items()
        }
    named = topology.shape == CUBE.shape  # what is published is of this torus
    return {
        "throughput": found,
        "throughput_kind": f"simulated on {topology.name}, fraction of capacity, seed {seed}",
        "bound": bounds | (derived(PATTERNS) if named else {}),
        "published": compared(found, bounds) if named else {},
        "packets_per_s": min(hops_per_second(topology, routing, cycles) for routing in ROUTINGS_OF_A_TORUS),
        **fluid_errors(fluid_cases, seed, say),
        "machine": machine(),
    }


def hops_per_second(topology: Topology, routing: str, cycles: int) -> float:
    """Hops of packets simulated in a second of CPU time under uniform traffic at 0.4 of capacity; measured."""
    sent, load = traffic(topology, "uniform"), 0.4 * capacity(topology)
    simulate(topology, routing, sent, load, 10, 0)
    rates = []
    for seed in range(3):
        start = time.process_time()
        hops = simulate(topology, routing, sent, load, 5 * cycles, 0, seed=seed).hops
        rates.append(hops / (time.process_time() - start))
    return statistics.median(rates)


def table_of(result: dict[str, Any]) -> Table:
    """A row a routing, a column a pattern: simulated, and the bound behind it."""
    table = Table(title=f"throughput / bound: {result['throughput_kind']}", caption=result["machine"])
    table.add_column("routing")
    for pattern in SENT:
        table.add_column(pattern, justify="right")
    for routing, row in result["throughput"].items():
        table.add_row(routing, *(f"{row[name]:.2f} / {result['bound'][routing][name]:.2f}" for name in SENT))
    return table


def a_million_cycles(seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The 4-ary 2-cube under more than it can carry, with the fewest channels and room for one packet in each: packets
    delivered, and the most cycles in a row in which none moved. A deadlock is a NetworkError."""
    topology, found = torus(4, 4), {}
    for routing in ROUTINGS_OF_A_TORUS:
        say(f"{routing}, a million cycles")
        routers = Routers(ROUTINGS[routing].classes(topology), room=1)
        seen = simulate(topology, routing, traffic(topology, "uniform"), 4.0, 1_000_000, 0, routers, seed)
        found[routing] = {"delivered": seen.delivered, "stalled_cycles": seen.stalled_cycles}
    return found


CURVES = ("uniform", "transpose", "tornado")


def draw_curves(topology: Topology, cycles: int, seed: int, path: Path, say: Callable[[str], None]) -> None:
    """Mean latency over offered load, a panel a pattern and a line a routing, up to where less than 97 % arrives."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib; install the extra `docs`.") from None
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    full = capacity(topology)
    for panel, pattern in zip(figure.subplots(1, len(CURVES), sharey=True), CURVES, strict=True):
        for routing, marker in zip(ROUTINGS_OF_A_TORUS, "osd^", strict=True):
            say(f"{routing}, {pattern}")
            points = curve(topology, routing, traffic(topology, pattern), full, (cycles, seed))
            panel.plot(*zip(*points, strict=True), marker=marker, markersize=3, linewidth=1, label=routing)
        panel.set(title=pattern, xlabel="offered load, fraction of capacity", xlim=(0, 1), ylim=(0, 60))
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean latency, cycles")
    figure.axes[-1].legend(fontsize="small", loc="upper right")
    figure.suptitle(f"{topology.name}, simulated, {cycles} cycles, seed {seed}", fontsize="medium")
    figure.savefig(path, dpi=130)


def curve(
    topology: Topology, routing: str, sent: Traffic, full: float, run: tuple[int, int]
) -> list[tuple[float, float]]:
    """(load, latency) at steps of 4 % of capacity, the last where packets begin to pile up."""
    points = []
    for step in range(1, 26):
        seen = simulate(topology, routing, sent, 0.04 * step * full, run[0], run[0], seed=run[1])
        points.append((0.04 * step, seen.latency_cycles))
        if seen.accepted < 0.97 * seen.offered:
            break
    return points


def say(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr)


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
    parser.add_argument("--cycles", type=count, default=1000, help="cycles measured a run (1000)")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--fluid-cases", type=count, default=60, help="collectives drawn for the fluid model (60)")
    parser.add_argument("--together", type=count, help="draw so many pairs of collectives at once for it, too")
    parser.add_argument("--million", action="store_true", help="look for deadlocks in a million cycles, too (minutes)")
    parser.add_argument("--choices", action="store_true", help="plan a 70B step with its collectives open, too")
    parser.add_argument("--device", default="h200_sxm", help="that --choices plans for (h200_sxm)")
    parser.add_argument("--curves", type=Path, help="write a picture of latency over load here, and nothing else")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(argv)
    topology = torus(*args.shape)
    if args.curves is not None:
        draw_curves(topology, args.cycles, args.seed, args.curves, say)
        return 0
    result = measure(topology, args.cycles, args.seed, args.fluid_cases, say)
    if args.million:
        result["million_cycles"] = a_million_cycles(args.seed, say)
    if args.together:
        result |= together_errors(args.together, args.seed, say)
    if args.choices:
        result |= choices(args.device, 0.2, say)
    if args.json:
        print_json(result)
    else:
        Console().print(table_of(result))
        Console().print(f"fluid model: {100 * result['fluid_error_p90']:.1f} % off at the 90th percentile")
        Console().print(f"{result['packets_per_s'] / 1e6:.1f} million hops of packets a second of CPU time (measured)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
