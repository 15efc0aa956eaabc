"""Collectives of several ranks on the cuda backend: NCCL by torch.distributed, captured on the op's lane.

A process is a rank with one device. NCCL's kernels follow the lane's stream into its partition; they run at the same
time on all ranks, so every rank must replay the same plan (`distributed.one_plan`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op
from taskgraph.runtime.distributed import Group
from taskgraph.runtime.gpu.arrays import DeviceArray
from taskgraph.runtime.gpu.interop import torch_stream


def collective(op: Op, source: DeviceArray, target: DeviceArray, group: Group) -> Callable[[Any], None]:
    """What launches the collective of `group` on a stream; BackendUnavailable where it cannot be NCCL's."""
    what = f"op {op.name!r}: {op.kind} over {group.size} ranks"
    if "nccl" not in group.backend or not torch.cuda.is_available():
        raise BackendUnavailable(
            f"{what} needs NCCL on a GPU; the group's backend is {group.backend!r}. Join the ranks with "
            "distributed.connect(backend='cpu:gloo,cuda:nccl') and a torch that has CUDA."
        )
    if op.kind != "all_reduce" and op.integer("axis") != 0:
        raise BackendUnavailable(f"{what} joins along axis {op.integer('axis')}; NCCL joins along axis 0.")
    x, out, run = source.torch(), target.torch(), _CALLS[op.kind]

    def on_stream(stream: Any) -> None:
        with torch_stream(stream):
            run(group.handle, out, x)

    return on_stream


def _all_reduce(handle: dist.ProcessGroup, out: torch.Tensor, x: torch.Tensor) -> None:
    out.copy_(x)
    dist.all_reduce(out, group=handle)


_CALLS: dict[str, Callable[[dist.ProcessGroup, torch.Tensor, torch.Tensor], Any]] = {
    "all_reduce": _all_reduce,
    "all_gather": lambda handle, out, x: dist.all_gather_single(out, x, group=handle),
    "reduce_scatter": lambda handle, out, x: dist.reduce_scatter_single(out, x, group=handle),
}
