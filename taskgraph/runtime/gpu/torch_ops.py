"""Ops that run through torch where it has CUDA: matrix products, for which cuBLAS has tensor cores and we do not.

Each runs once on its lane before the capture, so that cuBLAS has its handle and the lane's own workspace by then.
Results go into memory of ours; converted operands and workspaces into the executable's pool (torch_memory.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from taskgraph.graph.op import Op
from taskgraph.runtime.gpu.arrays import DeviceArray
from taskgraph.runtime.gpu.interop import torch_op

Tensors = Sequence[torch.Tensor]

TORCH_OPS: dict[str, Callable[[Op, Tensors, torch.Tensor], None]] = {}
"""kind -> what fills the output from the inputs."""


def gemm(op: Op, ins: Tensors, out: torch.Tensor) -> None:
    """`ops.gemm` by cuBLAS; types that it does not mix are converted first."""
    x, w, *extra = (t.to(out.dtype) for t in ins)
    right = w.t() if op.attr("transpose_w") else w
    if not extra:
        torch.mm(x, right, out=out)
        return
    torch.addmm(extra[0], x, right, out=out)
    for more in extra[1:]:
        out.add_(more)


def matmul(op: Op, ins: Tensors, out: torch.Tensor) -> None:
    """`ops.matmul` by cuBLAS; types that it does not mix are converted first."""
    a, b = (t.to(out.dtype) for t in ins)
    torch.matmul(a, b.transpose(-1, -2) if op.attr("transpose_b") else b, out=out)


TORCH_OPS["gemm"] = gemm
TORCH_OPS["matmul"] = matmul


def available() -> bool:
    """Whether torch has the device of this process."""
    return torch.cuda.is_available()


def bound(op: Op, ins: Sequence[DeviceArray], outs: Sequence[DeviceArray], stream: Any) -> Callable[..., None]:
    """The op on a stream, warmed up on its lane's `stream`."""
    run = TORCH_OPS[op.kind]

    def on_tensors(*tensors: torch.Tensor) -> None:
        run(op, tensors[: len(ins)], tensors[len(ins)])

    launch = torch_op(on_tensors)
    launch(*ins, *outs, stream=stream)
    stream.sync()
    return lambda lane: launch(*ins, *outs, stream=lane)
