"""The program entry of an op on a CPU; importing this registers how every kind of `taskgraph.ops` runs."""

from collections.abc import Callable, Mapping
from typing import Any

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.ops.kinds import CALL
from taskgraph.runtime import custom
from taskgraph.runtime.cpu import algebra, attention, axes, dense, experts, latent, moves, pointwise, sampling  # noqa: F401 - they register their kinds
from taskgraph.runtime.cpu.kinds import CPU_KINDS, CpuSite, Entry, Tensors
from taskgraph.runtime.cpu.native import Native, NativeEntry

__all__ = ["CPU_KINDS", "bind"]


def bind(op: Op, ins: Tensors, outs: Tensors, site: CpuSite, functions: Mapping[str, Callable[..., Any]]) -> Entry:
    """The program entry of one op; BackendUnavailable when the CPU has no implementation of its kind."""
    views = op.views
    if views:
        ins = [t.narrow(v.axis, v.start, v.stop - v.start) if (v := views.get(i)) else t for i, t in enumerate(ins)]
    if op.kind == CALL:
        function = custom.function_of(op, functions)
        if isinstance(function, Native):
            return NativeEntry(op, function, (*ins, *outs))
        return custom.bound(op, function, ins, outs)
    if op.kind not in CPU_KINDS:
        raise BackendUnavailable(
            f"op {op.name!r}: the cpu backend has no implementation of kind {op.kind!r}; register one by "
            "taskgraph.runtime.cpu.kinds.register, or use GraphBuilder.call."
        )
    return CPU_KINDS[op.kind].bind(op, ins, outs, site)
