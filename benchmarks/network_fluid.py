"""Collectives on networks: how far the fluid model is from packets, and what an open choice of them is worth."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np

import taskgraph as tg
from taskgraph.models.config import load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step
from taskgraph.network import (
    COLLECTIVES,
    ROUTINGS,
    Call,
    Network,
    fluid_cost,
    fluid_together,
    network,
    packet_run,
    packets_together,
)

FLUID_TOPOLOGIES = (
    "torus:4x4", "torus:8x4", "torus:3x5", "torus:4x4x4", "torus:2x4x4", "mesh:4x4", "ring:6", "ring:8", "switch:8",
    "switch:16", "fat-tree:4x4+2", "fat-tree:4x4+4", "machines:2x8@450GB/s,500ns+50GB/s,2us",
    "machines:4x4@450GB/s,500ns+50GB/s,2us", "switch:2*8@450GB/s,500ns+50GB/s,2us",
    "torus:2x4*4@450GB/s,500ns+50GB/s,2us",
)  # fmt: skip
LEAST_BYTES, MOST_BYTES, MOST_CYCLES, TOGETHER_CYCLES = 4e3, 64e6, 20_000, 10_000


def fluid_errors(cases: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """How far the fluid model is from the simulator of packets, relative, over drawn networks, routings, collectives,
    algorithms, ranks and sizes (4 KB to 64 MB, less where that takes packets more than 20 000 cycles)."""
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


def together_errors(cases: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """How far the fluid model of two collectives that begin at once is from packets, relative, at the end of the last:
    over cases as of `fluid_errors`, in two fifths of which both are the same."""
    drawn, errors = random.Random(seed), []
    for i in range(cases):
        made, collective, algorithm, ranks = drawn_case(drawn)
        other = collective if drawn.random() < 0.4 else drawn.choice(COLLECTIVES)
        by = algorithm if other == collective else drawn.choice(made.algorithms(other, ranks))
        nbytes = LEAST_BYTES * (MOST_BYTES / LEAST_BYTES) ** drawn.random()
        less = nbytes * drawn.choice((1, 1, 0.5, 0.2))
        calls = [Call(collective, algorithm, ranks, nbytes), Call(other, by, ranks, less)]
        part = TOGETHER_CYCLES * 4096 / made.topology.bytes_per_s / max(fluid_together(made, calls))
        calls = [call._replace(nbytes=call.nbytes * min(1.0, part)) for call in calls]
        seen = packets_together(made, calls, packet_of(made, calls[0].nbytes / ranks**1.5), i)
        errors.append(abs(max(fluid_together(made, calls)) / seen.seconds - 1))
        if i % 50 == 49:
            say(f"{i + 1} of {cases} pairs of collectives")
    p50, p90 = (round(float(np.quantile(errors, q)), 4) for q in (0.5, 0.9))
    return {"together_error_p90": p90, "together_error_p50": p50, "together_cases": cases}


CHOICE_NETWORKS = ("", "switch:8", "torus:2x2x2", "machines:2x4")


def choices(device: str, budget_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """A mixed step of llama-3-70b on one of eight GPUs: planned with the collectives open, beside the best and the
    worst choice that is fixed. Simulated."""
    share = load_config("llama-3-70b").share(8)
    graph = mixed_step(share, Decode(1024, 1024), Prefill(1024, 1024))
    found = {}
    for text in CHOICE_NETWORKS:
        say(f"llama-3-70b on 8 GPUs, {text or 'their own links'}")
        on = tg.devices.networked(device, text) if text else tg.devices.get(device)
        made = tg.plan_collectives(graph, on, "search", budget_s=budget_s)
        fixed = {name: round(1e3 * seconds, 3) for name, seconds in made.makespans_s.items()}
        found[text or "own links"] = {
            "chosen": made.label,
            "open_ms": round(1e3 * made.plan.makespan_s, 3),
            "as_given_ms": fixed["as given"],
            "worst_fixed_ms": max(fixed.values()),
            "choices": len(fixed),
        }
    return {"collective_choice": found, "collective_choice_kind": f"simulated on {device}, search of {budget_s} s each"}
