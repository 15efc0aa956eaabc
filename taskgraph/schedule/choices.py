"""The search over collectives: which ops stand for an all-reduce, and by which algorithm the network runs them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from taskgraph.cost.model import Costs, op_table
from taskgraph.errors import GraphError, PlanError
from taskgraph.graph.device import Device, get
from taskgraph.graph.graph import Graph
from taskgraph.network.collectives import ALGORITHMS, lacking
from taskgraph.ops import COLLECTIVES
from taskgraph.record import Typed, function, instance
from taskgraph.rewrite.collectives import collective_variants
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.planner import plan


@dataclass(frozen=True, slots=True)
class Chosen(Typed, error=PlanError):
    """The best plan found with the collectives open, of `graph`, which is the one given or a rewrite of it.

    `label` says what was chosen, such as "o_reduce=gather, by ring"; `makespans_s` has the seconds of every choice."""

    label: str
    graph: Graph
    plan: Plan
    makespans_s: Mapping[str, float]


def plan_collectives(
    graph: Graph,
    device: str | Device = "cpu",
    scheduler: str = "auto",
    *,
    budget_s: float = 1.0,
    seed: int = 0,
    nano_batches: bool = True,
    costs: Costs = op_table,
) -> Chosen:
    """Plan every choice of collectives as `plan` would, by its arguments, and keep the shortest.

    A choice is a rewrite (`rewrite.collective_variants`: a gather takes weights sharded by columns) and, on a device
    with a network, an algorithm for all collectives, or for each the one that is fastest alone. So the result is never
    worse than any of them planned by itself; it takes as long as all of them. Choices that give every collective the
    same seconds are planned once. Raises what `plan` raises."""
    instance("the graph", graph, Graph, GraphError, "Take what GraphBuilder.build returned.")
    target = get(device)
    function("costs", costs, PlanError)
    variants = {"as given": graph, **collective_variants(graph)}
    found: dict[str, tuple[Graph, Plan]] = {}
    for variant, made in variants.items():
        seen = set[tuple[float, ...]]()
        for label, on in _algorithms(made, target):
            times = _collective_seconds(made, on, costs)
            if times not in seen:
                seen.add(times)
                planned = plan(
                    made, on, scheduler, budget_s=budget_s, seed=seed, nano_batches=nano_batches, costs=costs
                )
                found[f"{variant}{label}"] = made, planned
    label, (best, shortest) = min(found.items(), key=lambda each: each[1][1].makespan_s)
    return Chosen(label, best, shortest, {name: each.makespan_s for name, (_, each) in found.items()})


def _algorithms(graph: Graph, device: Device) -> Iterator[tuple[str, Device]]:
    """The device, and with each algorithm that has a schedule for every collective of the graph."""
    yield "", device
    network = device.network
    if network is None or network.algorithm in ALGORITHMS:
        return
    ops = {(op.kind, op.integer("ranks")) for op in graph.ops if op.kind in COLLECTIVES and op.integer("ranks") > 1}
    for name in ALGORITHMS if ops else ():
        if not any(lacking(kind, name, network.place(ranks)) for kind, ranks in ops):
            yield f", by {name}", replace(device, network=replace(network, algorithm=name))


def _collective_seconds(graph: Graph, device: Device, costs: Costs) -> tuple[float, ...]:
    """Seconds of every collective on each legal partition: what an algorithm changes."""
    table = costs(graph.flat(), device, device.partition_sizes())
    rows = [i for i, op in enumerate(graph.flat().ops) if op.kind in COLLECTIVES]
    return tuple(table.seconds[rows].reshape(-1).tolist())
