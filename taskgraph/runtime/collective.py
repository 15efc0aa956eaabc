"""Collectives of several ranks on the cuda backend: torch.distributed's NCCL group, captured on the op's lane.

A process is a rank with one device. NCCL's kernels follow the lane's stream into its partition; they run at the same
time on all ranks, so every rank must replay the same plan.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from taskgraph.errors import BackendUnavailable, PlanError
from taskgraph.graph.op import Op
from taskgraph.runtime.arrays import DeviceArray


def collective(op: Op, source: DeviceArray, target: DeviceArray) -> Callable[[Any], None]:
    """What launches the collective on a stream; BackendUnavailable without a NCCL process group of its ranks."""
    _check_group(op)
    x, out = source.torch(), target.torch()
    run = _CALLS[op.kind]

    def on_stream(stream: Any) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(int(stream.handle))):  # type: ignore[no-untyped-call]
            run(out, x)

    return on_stream


def _check_group(op: Op) -> None:
    ranks = op.integer("ranks")
    what = f"op {op.name!r}: {op.kind} over {ranks} ranks"
    if not (dist.is_available() and dist.is_initialized()):
        raise BackendUnavailable(
            f"{what} needs a process group; this process has none: torch.distributed.init_process_group('nccl')."
        )
    if dist.get_backend() != "nccl" or not torch.cuda.is_available():
        raise BackendUnavailable(f"{what} needs NCCL on a GPU; the process group is {dist.get_backend()!r}.")
    if dist.get_world_size() != ranks:
        raise PlanError(f"{what}, but the process group has {dist.get_world_size()}. Plan for that many.")
    if op.kind != "all_reduce" and op.integer("axis") != 0:
        raise BackendUnavailable(f"{what} joins along axis {op.integer('axis')}; NCCL joins along axis 0.")


def _all_reduce(out: torch.Tensor, x: torch.Tensor) -> None:
    out.copy_(x)
    dist.all_reduce(out)


_CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "all_reduce": _all_reduce,
    "all_gather": dist.all_gather_into_tensor,
    "reduce_scatter": dist.reduce_scatter_tensor,
}
