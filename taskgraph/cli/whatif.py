"""What-if studies: the best plan of a model's step on a device, and on one with more or less of something."""

from collections.abc import Mapping
from dataclasses import dataclass

import taskgraph as tg
from taskgraph.models.config import load_config
from taskgraph.models.llama import step_graph

RESOURCES: Mapping[str, tuple[str, ...]] = {
    "sm": ("sm_count",),
    "flops": ("flops_per_s",),
    "hbm": ("hbm_bytes_per_s",),
    "pcie": ("h2d_bytes_per_s", "d2h_bytes_per_s"),
    "link": ("link_bytes_per_s",),
    "memory": ("memory_bytes",),
}
"""What can be scaled -> the fields of Device. "sm" takes the arithmetic rate along: the SMs stay what they are."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The plan of one device; all times are simulated."""

    device: tg.Device
    plan: tg.Plan
    tokens_per_s: float


def scaled(device: tg.Device, factors: Mapping[str, float]) -> tg.Device:
    """`device` with every resource of `factors` times its factor; DeviceError for an unknown resource."""
    unknown = sorted(set(factors) - set(RESOURCES))
    if unknown or any(not factor > 0 for factor in factors.values()):
        raise tg.DeviceError(f"can scale {', '.join(RESOURCES)} by a factor > 0; got {dict(factors)}.")
    changes: dict[str, object] = {}
    for resource, factor in factors.items():
        for field in RESOURCES[resource]:
            value = getattr(device, field)
            if field == "flops_per_s":
                changes[field] = _times(device, factor * factors.get("sm", 1.0))
            else:
                changes[field] = max(round(value * factor), 1) if isinstance(value, int) else value * factor
    if "sm" in factors:
        changes.setdefault("flops_per_s", _times(device, factors["sm"]))
    named = ", ".join(f"{resource} x{factor:g}" for resource, factor in factors.items())
    return tg.devices.make(device, name=f"{device.name} ({named})", **changes)


def _times(device: tg.Device, factor: float) -> tuple[tuple[str, float], ...]:
    return tuple((dtype, rate * factor) for dtype, rate in device.flops_per_s)


def parse_factor(text: str) -> float:
    """1.5 from "x1.5" or "1.5"; DeviceError if it is no positive number."""
    try:
        factor = float(text.strip().lower().removeprefix("x"))
    except ValueError:
        factor = float("nan")
    if not 0 < factor < float("inf"):
        raise tg.DeviceError(f"a factor is written like x1.5 and is > 0; got {text!r}.")
    return factor


def what_if(
    model: str,
    device: tg.Device,
    factors: Mapping[str, float],
    *,
    batch: int,
    context: int,
    tokens: int,
    scheduler: str,
) -> tuple[Outcome, Outcome]:
    """The outcome on `device` and on its scaled twin."""
    graph = step_graph(load_config(model), batch=batch, tokens=tokens, cache=context)
    before, after = (
        Outcome(target, made, batch * tokens / made.makespan_s)
        for target in (device, scaled(device, factors))
        for made in (tg.plan(graph, target, scheduler),)
    )
    return before, after
