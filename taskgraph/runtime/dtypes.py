"""Which dtype a model runs in on this machine, when nobody says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from taskgraph.errors import PlanError
from taskgraph.runtime.cpu import choose
from taskgraph.runtime.cpu.ways import Ways

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "bf16", "f32")

_STEPS = (1, 32, 512)
"""Rows of products that stand for a step: decode alone, decode of a batch, prefill. All were measured by the probe."""
_WORTH_TWICE = 1.1
"""bf16 may take so much more time in the mean: f32 needs twice the memory, and probes differ by as much."""


@dataclass(frozen=True, slots=True)
class Picked:
    """A dtype, and why it is that one: one line, for people."""

    dtype: str
    why: str


def pick(dtype: str = "auto", backend: str = "cpu", device: str | None = None) -> Picked:
    """`dtype` itself, or for "auto" the one that is faster here: on the CPU by the products that were measured, on a
    GPU (`device` as for `tg.compile`) by the rates of its spec. PlanError for what is no dtype."""
    if dtype not in DTYPES:
        raise PlanError(f"dtype is {', '.join(DTYPES[:-1])} or {DTYPES[-1]}; got {dtype!r}.")
    if dtype != "auto":
        return Picked(dtype, "as asked")
    if backend == "cpu":
        return by_ways(choose.here())
    from taskgraph.runtime.gpu.spec import planning_device

    rates = dict(planning_device(device).flops_per_s)
    if rates.get("bf16", 0.0) > rates.get("f32", 0.0):
        fast, slow = (rates.get(kind, 0.0) / 1e12 for kind in ("bf16", "f32"))
        return Picked("bf16", f"auto: {fast:.0f} TFLOP/s against {slow:.0f} in f32 (published)")
    return Picked("f32", "auto: this GPU does not multiply bf16 faster")


def by_ways(ways: Ways) -> Picked:
    """The dtype whose products take less time, each number of rows counted alike: f32 only if that is worth twice the
    memory, and bf16 where nothing was measured."""
    shares = []
    for rows in _STEPS:
        half, full = ways.rate("bf16", rows), ways.rate("f32", rows)
        if not half or not full:
            return Picked("bf16", "auto: half of f32's bytes; its products were not measured, others use the cores")
        shares.append(full / half)
    said = ", ".join(f"{share:.2f}" for share in shares)
    sizes = ", ".join(map(str, _STEPS))
    kind = "bf16" if sum(shares) <= _WORTH_TWICE * len(shares) else "f32"
    how = {ways.product(kind, n, fixed=True): None for n in _STEPS}
    return Picked(
        kind, f"auto: products of {sizes} rows take {said} of f32's time in bf16 (measured); by way {', '.join(how)}"
    )


def dtype_of(weights: "Mapping[str, torch.Tensor]") -> str:
    """The dtype of a model's weights, "bf16" or "f32". PlanError for another."""
    import torch

    kind = weights["embed"].dtype
    if kind not in (torch.bfloat16, torch.float32):
        raise PlanError(f"weights are {kind}; a step runs in bf16 or f32, so load them in one of these.")
    return "bf16" if kind == torch.bfloat16 else "f32"


def torch_dtype(name: str) -> "torch.dtype":
    """torch's dtype of that name: "bf16" is torch.bfloat16. PlanError for a name that is none."""
    from taskgraph.runtime.cpu.kinds import TORCH_DTYPE

    if name not in TORCH_DTYPE:
        raise PlanError(f"no dtype {name!r}; use one of {', '.join(TORCH_DTYPE)}.")
    return TORCH_DTYPE[name]
