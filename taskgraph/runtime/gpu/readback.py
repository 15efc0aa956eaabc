"""A captured graph against its plan: every node in its partition, the plan's order, no node more or less."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from taskgraph.errors import CaptureMismatch
from taskgraph.runtime.gpu.captures import GraphFacts
from taskgraph.schedule.plan import Plan, Step


def compare(
    plan: Plan,
    facts: GraphFacts,
    owners: Sequence[Sequence[int]],
    contexts: Sequence[int],
    early: Collection[int] = (),
) -> None:
    """CaptureMismatch unless the graph is the plan. `owners` are the nodes of each step, `contexts` those of the lanes
    in which its kernels must be, `early` the nodes that may start before the kernel before them has ended: they wait
    for it by themselves, so that it comes before them, and what it waited for too."""
    owner = {node: i for i, nodes in enumerate(owners) for node in nodes}
    empty = next((plan.steps[i].op for i, nodes in enumerate(owners) if not nodes), None)
    if empty is not None:
        raise CaptureMismatch(f"op {empty!r} left no node in the graph: its work escaped the capture.", "nodes")
    if len(facts.nodes) != len(owner):
        raise CaptureMismatch(f"the graph has {len(facts.nodes)} nodes; the plan made {len(owner)}.", "nodes")
    for node in facts.nodes:
        if node.handle not in owner:
            raise CaptureMismatch(f"the graph has a {node.kind} node that no op of the plan made.", "nodes")
        step = plan.steps[owner[node.handle]]
        if node.kind == "kernel" and node.context != contexts[step.lane]:
            size = plan.partition(step.lane).sm_count
            raise CaptureMismatch(f"op {step.op!r} ({node.kernel}) is not in its partition of {size} SMs.", "partition")
    for a, b in sorted(facts.dependent):
        if b not in early:
            after, before = plan.steps[owner[b]].op, plan.steps[owner[a]].op
            raise CaptureMismatch(f"op {after!r} may start before {before!r} has ended, and does not wait.", "order")
    _compare_order(plan.steps, facts, owner)


def _compare_order(steps: Sequence[Step], facts: GraphFacts, owner: Mapping[int, int]) -> None:
    """The steps that must end before each step: by the plan's lanes and waits, and by the graph's edges."""
    planned = _ancestors(_plan_edges(steps), len(steps))
    pairs = ((owner[a], owner[b]) for a, b in facts.edges)
    found = _ancestors(((a, b) for a, b in pairs if a != b), len(steps))
    for i, step in enumerate(steps):
        if planned[i] != found[i]:
            differing = steps[(planned[i] ^ found[i]).bit_length() - 1].op
            less = planned[i] & ~found[i]
            how = "does not wait for" if less else "waits in the graph, but not in the plan, for"
            raise CaptureMismatch(f"op {step.op!r} {how} {differing!r}.", "order")


def _plan_edges(steps: Sequence[Step]) -> Iterable[tuple[int, int]]:
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        if step.lane in last:
            yield last[step.lane], i
        for wait in step.waits:
            yield wait, i
        last[step.lane] = i


def _ancestors(edges: Iterable[tuple[int, int]], count: int) -> list[int]:
    """For each step the set of steps that precede it, as bits; edges lead from lower to higher numbers."""
    before: list[list[int]] = [[] for _ in range(count)]
    for a, b in edges:
        if a >= b:
            raise CaptureMismatch(f"the graph orders step {a} before step {b}, against the plan.", "order")
        before[b].append(a)
    closed: list[int] = []
    for row in before:
        bits = 0
        for a in row:
            bits |= closed[a] | (1 << a)
        closed.append(bits)
    return closed
