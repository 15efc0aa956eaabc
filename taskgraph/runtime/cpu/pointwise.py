"""How pointwise formulas run on a CPU: compiled for f32, bf16, f16 and bool, by torch step by step for wider types."""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch

from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op, Tensor
from taskgraph.ops.formula import Formula
from taskgraph.ops.pointwise import computes_in, formula_of
from taskgraph.ops.signatures import Attrs
from taskgraph.runtime.cpu import kernels_pointwise
from taskgraph.runtime.cpu.arguments import ready
from taskgraph.runtime.cpu.kinds import COMPILED, TORCH_DTYPE, CpuSite, Entry, Tensors, register
from taskgraph.runtime.program import TYPES, axes_of, rows_of, single, steps_of

_A_THREAD = 1 << 15
"""Elements that are worth a thread: torch's GRAIN_SIZE."""
_NAMES = {kind: name for name, kind in TORCH_DTYPE.items()}


def bind_elementwise(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    made, out = formula_of(Attrs(op.attrs)), outs[0]
    kinds = [_NAMES[t.dtype] for t in (*ins, out)]
    seen = [Tensor(f"x{i}", tuple(t.shape), kind) for i, (t, kind) in enumerate(zip(ins, kinds, strict=False))]
    axes = [axes_of(tuple(out.shape), tuple(t.shape), t.stride()) for t in (*ins, out)]
    wide = computes_in(seen, made) != "f32" or not {*kinds} <= {*TYPES} or not out.is_contiguous()
    if wide or None in axes or kinds[-1] in ("i32", "i64"):
        return _by_torch(op, made, ins, out, TORCH_DTYPE[computes_in(seen, made)])
    operands = rows_of(list(zip(kinds, axes, strict=True)))
    addresses = np.array([t.data_ptr() for t in (*ins, out)], np.int64)
    threads = min(site.threads, 1 + out.numel() // _A_THREAD)
    steps, numbers = steps_of(made)
    run = ready(
        kernels_pointwise.pointwise, steps, single(numbers), operands, addresses, np.int64(out.numel()), threads
    )
    kept = (ins, out)  # the kernel knows addresses alone

    def entry(held: object = kept) -> None:
        run()

    return entry


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _rounded(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(dtype).to(x.dtype)


_TORCH: Final[Mapping[str, Callable[..., torch.Tensor]]] = {
    "copy": torch.clone, "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div,
    "maximum": torch.maximum, "minimum": torch.minimum, "pow": torch.pow, "neg": torch.neg, "abs": torch.abs,
    "exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "sin": torch.sin, "cos": torch.cos, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "erf": torch.erf, "relu": torch.relu, "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
    "gelu_tanh": _gelu_tanh, "floor": torch.floor, "ceil": torch.ceil, "round": torch.round, "trunc": torch.trunc,
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "and": torch.logical_and, "or": torch.logical_or, "not": torch.logical_not,
    "bf16": _rounded(torch.bfloat16), "f16": _rounded(torch.float16),
}  # fmt: skip


def _by_torch(op: Op, made: Formula, ins: Tensors, out: torch.Tensor, dtype: torch.dtype) -> Entry:
    """Step by step on whole tensors of `dtype`."""
    if not dtype.is_floating_point and any(step.name not in (*_TORCH, "where") for step in made.steps):
        raise BackendUnavailable(f"op {op.name!r}: the formula {made.text!r} cannot run on integers.")
    numbers = {
        a: torch.tensor(a if dtype.is_floating_point else int(a), dtype=dtype)
        for step in made.steps
        for a in step.arguments
        if isinstance(a, float)
    }

    def run() -> None:
        done: list[torch.Tensor] = []
        for step in made.steps:
            given = [
                numbers[a] if isinstance(a, float) else done[int(a[1:])] if a[0] == "s" else ins[int(a[1:])].to(dtype)
                for a in step.arguments
            ]
            if step.name == "where":
                result = torch.where(given[0] != 0, given[1], given[2])
            else:
                result = _TORCH[step.name](*given)
            done.append(result.to(dtype))
        out.copy_(done[-1])

    return run


register("elementwise", bind_elementwise, COMPILED)
