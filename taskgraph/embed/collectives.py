"""Functional collectives of torch (`torch.distributed._functional_collectives`) as ours: `all_reduce`, `all_gather`,
`reduce_scatter`."""

from typing import Any, Final

import torch

import taskgraph as tg
from taskgraph.embed.lower import Match, Site, named
from taskgraph.embed.match import Matcher

_SPACE: Final = "_c10d_functional"
_KINDS: Final = {
    "all_reduce": tg.ops.all_reduce,
    "all_gather_into_tensor": tg.ops.all_gather,
    "reduce_scatter_tensor": tg.ops.reduce_scatter,
}


def collective(m: Matcher, i: int) -> Match | None:
    """wait_tensor(a collective of a group): sums over ranks, and joins and shares along the first axis."""
    call = m.call(i)
    if call.target.namespace != _SPACE or call.target._opname != "wait_tensor" or i in m.taken:
        return None
    begun = m.maker(m.arg(i, "tensor"))
    made: Any = None if begun is None or m.call(begun).target.namespace != _SPACE else m.call(begun)
    kind = None if made is None else _KINDS.get(made.target._opname)
    if begun is None or kind is None or m.arg(begun, "reduce_op") not in (None, "sum"):
        return None
    x, ranks = m.arg(begun, "input"), _size(m.arg(begun, "group_name"))
    (leaf,) = call.results if call.results != [None] else (None,)
    if ranks is None or leaf is None or not m.same_rows(x) or not m.layout(m.out(i)).plain:
        return None
    m.want(x, m.layout(x).size)

    def emit(site: Site) -> str:
        value = site.value(x)  # in whatever shape its rows lie: along the first axis memory is joined and shared
        axis = len(value.shape) - 1 if kind is tg.ops.all_reduce else 0
        return named(site, leaf, lambda name: kind(value, ranks=ranks, axis=axis, name=name), made.name)

    return m.match([begun], i, kind.__name__, emit)


def _size(name: str) -> int | None:
    """How many ranks the group of that name has; None where this process does not know it."""
    if not torch.distributed.is_available():
        return None
    try:
        from torch.distributed import distributed_c10d

        resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
        return int(resolve(name).size())
    except (RuntimeError, ValueError, LookupError):
        return None
