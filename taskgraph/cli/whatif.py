"""`taskgraph whatif`: the best plan of a step on a device, and on one with more or less of something (simulated)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.table import Table

import taskgraph as tg
from taskgraph.cli.console import planning, screen
from taskgraph.cli.steps import ALGORITHM, NETWORK, RANKS, ROUTING, Links, StepSize, graph_of, named
from taskgraph.units import format_seconds

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

    device: "tg.Device"
    plan: "tg.Plan"
    tokens_per_s: float


OWN_LINKS = Links()


def scaled(device: "tg.Device", factors: Mapping[str, float]) -> "tg.Device":
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


def _times(device: "tg.Device", factor: float) -> tuple[tuple[str, float], ...]:
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
    model: str, device: "tg.Device", factors: Mapping[str, float], size: StepSize, scheduler: str = "auto",
    links: Links = OWN_LINKS,
) -> tuple[Outcome, Outcome]:  # fmt: skip
    """The outcome on `device` and on its scaled twin, with what its ranks talk over."""
    graph = graph_of(model, size)
    other = links.of(scaled(device, factors) if factors or not links.network else device, size.ranks)
    before, after = (
        Outcome(target, made, size.batch * size.tokens / made.makespan_s)
        for target in (device, other)
        for made in (tg.plan(graph, target, scheduler),)
    )
    return before, after


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(whatif)


def whatif(
    model: Annotated[
        str, typer.Argument(help="a known size such as llama-3-70b, a config.json, its folder, or hf:FOLDER")
    ] = "",
    torch: Annotated[str, typer.Option(help="package.module:function, which returns (module, example inputs)")] = "",
    device: Annotated[str, typer.Option(help="the device to start from")] = "h100_sxm",
    sm: Annotated[str, typer.Option(help="SMs (and their arithmetic), as x0.5")] = "x1",
    flops: Annotated[str, typer.Option(help="arithmetic of every SM")] = "x1",
    hbm: Annotated[str, typer.Option(help="memory bandwidth, as x1.5")] = "x1",
    link: Annotated[str, typer.Option(help="bandwidth between devices")] = "x1",
    pcie: Annotated[str, typer.Option(help="bandwidth to the host")] = "x1",
    batch: Annotated[int, typer.Option(min=1, help="sequences in the step")] = 256,
    context: Annotated[int, typer.Option(min=1, help="tokens that each sequence has in its cache")] = 1024,
    tokens: Annotated[int, typer.Option(min=1, help="new tokens a sequence")] = 1,
    ranks: Annotated[int, RANKS] = 1,
    network: Annotated[str, NETWORK] = "",
    routing: Annotated[str, ROUTING] = "",
    algorithm: Annotated[str, ALGORITHM] = "",
    scheduler: Annotated[str, typer.Option(help="as for `plan`")] = "auto",
) -> None:
    """How the best plan of a step and its bounds move on a device with more or less of something, or whose ranks talk
    over a network (simulated).

    taskgraph whatif llama-3-70b --tensor-parallel 8 --network torus:4x4x4 --routing goal
    """
    model = named(model, torch)
    given = {"sm": sm, "flops": flops, "hbm": hbm, "link": link, "pcie": pcie}
    factors = {name: factor for name, text in given.items() if (factor := parse_factor(text)) != 1.0}
    step = StepSize(batch, context, tokens, ranks=ranks)
    with planning():
        pair = what_if(model, tg.devices.get(device), factors, step, scheduler, Links(network, routing, algorithm))
    shared = f", each of {ranks} ranks" if ranks > 1 else ""
    size = "" if torch else f", {batch} x {tokens} tokens, context {context}{shared}"
    table = Table(title=f"{model}{size} (simulated)", title_justify="left")
    for column in ("", *(_named(outcome.device) for outcome in pair), "change"):
        table.add_column(column, overflow="fold")

    def row(what: str, number: Callable[[Outcome], float], show: Callable[[float], str]) -> None:
        before, after = (number(outcome) for outcome in pair)
        table.add_row(what, show(before), show(after), f"x{after / before:.3f}" if before else "")

    row("step", lambda o: o.plan.makespan_s, format_seconds)
    if not torch:
        row("tokens/s", lambda o: o.tokens_per_s, "{:,.0f}".format)
    row("sequential step", lambda o: o.plan.verdict.sequential_s, format_seconds)
    row("lower bound", lambda o: o.plan.bounds.best_s, format_seconds)
    table.add_row("binding bound", *(o.plan.bounds.binding for o in pair), "")
    table.add_row("verdict", *(f"{o.plan.verdict.choice}, {o.plan.verdict.gain:.2f}x" for o in pair), "")
    table.add_row("error band", *(f"±{100 * o.plan.verdict.error_band:.0f} %" for o in pair), "")
    if pair[1].device.network is not None:
        table.add_row("collectives by", *(", ".join(_algorithms(o.plan)) for o in pair), "")
    screen.print(table)


def _named(device: "tg.Device") -> str:
    return device.name if device.network is None else f"{device.name} on {device.network.name}"


def _algorithms(plan: "tg.Plan") -> list[str]:
    return sorted({each.algorithm for each in plan.collectives}) or ["the device's links"]
