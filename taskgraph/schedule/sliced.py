"""A plan and its graph, as the rewriter slices it for the plan: what the steps name, what `verify` checks, and bytes.

The checker itself, `schedule.verify`, imports no rewriter. It is handed the sliced graph from here, and takes it for
what somebody claims.
"""

from taskgraph.errors import GraphError, PlanError
from taskgraph.graph.graph import Graph
from taskgraph.record import instance
from taskgraph.rewrite.nanobatch import apply
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.verify import bytes_held, check_made_for, check_plan


def sliced(plan: Plan, graph: Graph) -> Graph:
    """The graph whose ops the steps of `plan` name, from the one that the plan was made for."""
    instance("the graph", graph, Graph, PlanError, "Take what GraphBuilder.build returned.")
    return apply(graph, plan.split) if plan.split.parts and graph.fingerprint == plan.graph else graph


def verify(plan: Plan, graph: Graph, memory: bool = True) -> None:
    """Raise PlanError at the first broken rule, naming the op or tensor.

    What the plan does is checked against the graph: its slices, every op once, edges, partitions, demands, arena,
    memory. Of what it says of itself is checked what needs no prices: all numbers are finite and none negative, spans
    follow order and waits, no bound is above the makespan, a simulated verdict agrees with the timeline, and what a
    planner sealed is unchanged. Whether the times are those of the cost model is for `audit`. `memory=False` leaves
    out the rule that weights, states and arena fit the device: for studies of one device of several that will share
    the model.
    """
    check_made_for(plan, graph)
    try:
        made = sliced(plan, graph)
    except GraphError as error:
        raise PlanError(f"the plan's split does not fit the graph: {error}") from error
    check_plan(plan, graph, made, memory)


def resident_bytes(plan: Plan, graph: Graph) -> int:
    """Bytes on the device while the plan runs: inputs, weights, states, outputs, arena, and a workspace a lane."""
    return bytes_held(plan, sliced(plan, graph).flat())
