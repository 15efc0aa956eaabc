"""A captured graph that is the plan passes; each way to differ from it is named."""

from collections.abc import Sequence

import pytest

from taskgraph.errors import CaptureMismatch
from taskgraph.runtime.gpu.captures import GraphFacts, NodeFacts
from taskgraph.runtime.gpu.readback import compare
from tests.schedule.test_verify import packed

# Steps a, left, right, join, last: `right` on lane 1 (context 71), all others on lane 0 (context 70).
CONTEXTS = (70, 71)
EDGES = ((10, 11), (10, 12), (11, 13), (12, 13), (13, 14))
OWNERS = ((10,), (11,), (12,), (13,), (14,))


def kernel(handle: int, context: int = 70) -> NodeFacts:
    return NodeFacts(handle, "kernel", f"k{handle}", context)


NODES = (kernel(10), kernel(11), kernel(12, 71), kernel(13), kernel(14))


def check(
    nodes: Sequence[NodeFacts] = NODES,
    edges: Sequence[tuple[int, int]] = EDGES,
    owners: Sequence[Sequence[int]] = OWNERS,
) -> None:
    compare(packed(), GraphFacts(tuple(nodes), tuple(edges)), owners, CONTEXTS)


def test_a_graph_that_is_the_plan_passes_with_more_edges_than_it_needs() -> None:
    check()
    check(edges=(*EDGES, (10, 14), (12, 14), (10, 13)))


def test_a_step_of_several_nodes_may_order_them_as_it_likes() -> None:
    nodes = (*NODES, kernel(20), NodeFacts(21, "memcpy", context=5), NodeFacts(22, "memset"))
    owners = ((10, 20), (11, 21), (12,), (13, 22), (14,))
    check(nodes, (*EDGES, (20, 10), (11, 21), (13, 22)), owners)


@pytest.mark.parametrize("lost", range(5))
def test_an_op_without_a_node(lost: int) -> None:
    owners = [list(nodes) for nodes in OWNERS]
    owners[lost].clear()
    with pytest.raises(CaptureMismatch, match=f"'{packed().steps[lost].op}' left no node") as caught:
        check(owners=owners)
    assert caught.value.what == "nodes"


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ((*NODES, kernel(15)), "has 6 nodes; the plan made 5"),
        (NODES[:4], "has 4 nodes; the plan made 5"),
        ((*NODES[:4], NodeFacts(99, "memset")), "a memset node that no op"),
    ],
)
def test_a_node_more_or_less(nodes: Sequence[NodeFacts], says: str) -> None:
    with pytest.raises(CaptureMismatch, match=says) as caught:
        check(nodes)
    assert caught.value.what == "nodes"


@pytest.mark.parametrize(("at", "context", "op"), [(2, 70, "right"), (2, 72, "right"), (0, 71, "a"), (4, 69, "last")])
def test_a_kernel_outside_its_partition(at: int, context: int, op: str) -> None:
    nodes = list(NODES)
    nodes[at] = kernel(10 + at, context)
    with pytest.raises(CaptureMismatch, match=rf"'{op}' \(k{10 + at}\) is not in its partition of 64 SMs") as caught:
        check(nodes)
    assert caught.value.what == "partition"


@pytest.mark.parametrize(
    ("edges", "says"),
    [
        (((10, 11), (10, 12), (11, 13), (13, 14)), "'join' does not wait for 'right'"),
        (((10, 11), (10, 12), (12, 13), (13, 14)), "'join' does not wait for 'left'"),
        (((10, 11), (10, 12), (11, 13), (12, 13)), "'last' does not wait for 'join'"),
        (((10, 12), (11, 13), (12, 13), (13, 14)), "'left' does not wait for 'a'"),
        (((10, 11), (11, 13), (12, 13), (13, 14)), "'right' does not wait for 'a'"),
        ((), "'left' does not wait for 'a'"),
        ((*EDGES, (11, 12)), "'right' waits in the graph, but not in the plan, for 'left'"),
        ((*EDGES, (12, 11)), "orders step 2 before step 1, against the plan"),
    ],
)
def test_an_order_that_is_not_the_plans(edges: Sequence[tuple[int, int]], says: str) -> None:
    with pytest.raises(CaptureMismatch, match=says) as caught:
        check(edges=edges)
    assert caught.value.what == "order"
