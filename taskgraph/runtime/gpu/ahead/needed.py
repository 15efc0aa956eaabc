"""Which cubins a graph needs, known without a GPU: the launch rules are asked with buffers that are nowhere."""

from collections.abc import Iterator

from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op
from taskgraph.runtime.gpu.ahead.cubins import Specialisation
from taskgraph.runtime.gpu.kinds import AHEAD_KINDS, Buffer, DrySite, Launches, seen

_NOWHERE = 1 << 20


def dry_launches(graph: Graph, site: DrySite) -> Iterator[tuple[Op, Launches]]:
    """The launches of every op of `graph` that Triton functions take there."""
    flat = graph.flat()
    buffers = {t.name: Buffer(_NOWHERE, t.shape, t.dtype) for t in flat.tensors}
    for op in flat.ops:
        kind = AHEAD_KINDS.get(op.kind)
        ins, outs = seen(op, [buffers[n] for n in op.inputs]), [buffers[n] for n in op.outputs]
        if kind is not None and kind.takes(op, ins, outs):
            yield op, kind.launches(op, ins, outs, site)


def needed(graph: Graph, site: DrySite) -> dict[Specialisation, str]:
    """What must be compiled for `graph`, and the kind of op that each is for."""
    found: dict[Specialisation, str] = {}
    for op, made in dry_launches(graph, site):
        for one in made:
            source = getattr(one, "source", None)
            if isinstance(source, Specialisation):
                found.setdefault(source, op.kind)
    return found
