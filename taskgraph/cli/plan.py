"""`taskgraph plan`: one step of a model, planned for any device."""

import time
from pathlib import Path
from typing import Annotated

import typer

import taskgraph as tg
from taskgraph.cli.console import check_outputs, planning, screen
from taskgraph.cli.steps import ALGORITHM, NETWORK, RANKS, ROUTING, Links, StepSize, advice, graph_of, named

EPILOG = """
taskgraph plan llama-3-70b --ranks 8 --batch 256 --context 1024

taskgraph plan llama-3-70b --tensor-parallel 16 --network machines:2x8

taskgraph plan llama-3-8b --device a100_sxm --tokens 512 --context 512 --batch 4 --dtype f16

taskgraph plan smollm2 --device cpu --batch 1 --context 256 --out decode.json

taskgraph run smollm2 --plan decode.json

taskgraph plan hf:/models/gemma-2-9b --device h100_sxm --batch 16

taskgraph plan --torch mypackage.models:encoder --device l40s

With --ranks the plan is that of one rank of a tensor-parallel group: its share of heads, features, vocabulary and
cache, and the collectives between them. What it keeps is compared with one device's memory.
"""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EPILOG)(plan)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="a known size such as llama-3-70b, a config.json, its folder, or hf:FOLDER for any of transformers'"
        ),
    ] = "",
    torch: Annotated[str, typer.Option(help="package.module:function, which returns (module, example inputs)")] = "",
    device: Annotated[str, typer.Option(help="see `taskgraph devices`")] = "h100_sxm",
    batch: Annotated[int, typer.Option(min=1, help="sequences in the step")] = 256,
    context: Annotated[int, typer.Option(min=1, help="tokens that each sequence has in its cache")] = 1024,
    tokens: Annotated[int, typer.Option(min=1, help="new tokens a sequence: 1 is decode, more is prefill")] = 1,
    dtype: Annotated[
        str, typer.Option(help="of weights, cache and products: bf16, f16, f32, or auto: bf16, on cpu the faster here")
    ] = "auto",
    ranks: Annotated[int, RANKS] = 1,
    network: Annotated[str, NETWORK] = "",
    routing: Annotated[str, ROUTING] = "",
    algorithm: Annotated[str, ALGORITHM] = "",
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="ranks hold whole experts, not a part of each")
    ] = False,
    open_collectives: Annotated[
        bool, typer.Option("--open-collectives", help="search what all-reduces are made of and run by, too (longer)")
    ] = False,
    scheduler: Annotated[str, typer.Option(help="auto, sequential, list, search or exact")] = "auto",
    out: Annotated[Path | None, typer.Option(help="write the plan as JSON here")] = None,
    trace: Annotated[Path | None, typer.Option(help="write a Perfetto trace here")] = None,
    report: Annotated[Path | None, typer.Option(help="write the HTML report here")] = None,
) -> None:
    """Plan one step of a model on any device: no weights, no GPU; all times are simulated."""
    from taskgraph.schedule.planner import utilisation
    from taskgraph.schedule.sliced import resident_bytes

    check_outputs(out, trace, report)
    if dtype == "auto":
        from taskgraph.runtime.dtypes import pick

        dtype = pick("auto").dtype if device == "cpu" else "bf16"
    model = named(model, torch)
    size = StepSize(batch, context, tokens, dtype, ranks, expert_parallel)
    begin = time.perf_counter()
    with planning():
        graph = graph_of(model, size)
        target = Links(network, routing, algorithm).of(tg.devices.get(device), ranks)
        chosen = tg.plan_collectives(graph, target, scheduler) if open_collectives else None
        graph, made = (graph, tg.plan(graph, target, scheduler)) if chosen is None else (chosen.graph, chosen.plan)
        tg.verify(made, graph, memory=False)
    seconds = time.perf_counter() - begin
    screen.print(tg.explain(made), markup=False)
    rate = 1 / made.makespan_s if torch else batch * tokens / made.makespan_s
    over = "" if made.device.network is None else f" on {made.device.network.name}"
    on = f"one {made.device.name}" if ranks == 1 else f"{ranks} x {made.device.name}{over}"
    screen.print(
        f"{rate:,.0f} {'calls' if torch else 'tokens'}/s (simulated, {on}); planned and verified in {seconds:.2f} s"
    )
    if chosen is not None:
        worst = max(chosen.makespans_s.values()) / made.makespan_s
        screen.print(f"collectives: {chosen.label}; the worst of {len(chosen.makespans_s)} choices takes {worst:.2f}x")
    held, room = resident_bytes(made, graph), made.device.memory_bytes
    each = "the step" if ranks == 1 else f"each of {ranks} ranks"
    if held > room:
        screen.print(
            f"note: {each} keeps {held / 1e9:.0f} GB and one {made.device.name} has {room / 1e9:.0f} GB; the times are "
            f"those of devices with enough memory.{advice(model, size, -(-held * ranks // room))}",
            soft_wrap=True,
        )
    elif ranks > 1:
        screen.print(f"{each} keeps {held / 1e9:.0f} GB of the {room / 1e9:.0f} GB that one {made.device.name} has")
    if out is not None:
        made.save(out)
    if trace is not None:
        tg.write_trace(trace, {"predicted": made.timeline}, made)
    if report is not None:
        tg.write_report(report, made, {"predicted": made.timeline}, utilisation=utilisation(graph, made))
