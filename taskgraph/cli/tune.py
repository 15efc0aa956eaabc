"""The command `taskgraph tune`: a model's step or a graph file, tuned on a backend of this machine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import taskgraph as tg
from taskgraph.cli.console import check_outputs, show, status
from taskgraph.cli.steps import StepSize, graph_of, is_graph

EPILOG = """
Planned candidates run in interleaved repeats beside the sequential graph; what differs by less than the noise is no
win, and a win must repeat itself. The times of single ops stay in a database, and the planner plans again with them.
The winner is remembered for this machine: the next call returns at once, until --fresh.

taskgraph tune smollm2-135m --batch 1 --context 256 --budget 30

taskgraph run smollm2-135m.gguf                       # uses what was found for its decode step

taskgraph tune step.json --backend sim --device h100_sxm --out best.json
"""


def summary(tuned: "tg.Tuned") -> dict[str, Any]:
    """What --json prints: the verdict, its reason, and every trial. All seconds are of `kind`."""
    verdict = tuned.verdict
    return {
        "graph": tuned.plan.graph_name,
        "device": tuned.plan.device.name,
        "kind": tuned.kind,
        "origin": tuned.origin,
        "choice": verdict.choice,
        "made_by": tuned.plan.made_by,
        "packed_s": verdict.packed_s,
        "sequential_s": verdict.sequential_s,
        "gain": verdict.gain,
        "noise": verdict.error_band,
        "reason": tuned.reason,
        "op_times": tuned.op_times,
        "seconds": tuned.seconds,
        "remembered": tuned.remembered,
        "trials": [asdict(trial) for trial in tuned.trials],
    }


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog=EPILOG)(tune)


def tune(
    model: Annotated[str, typer.Argument(help="a known size, a config.json, its folder, or a graph as JSON")],
    backend: Annotated[str, typer.Option(help="cpu (measured here), cuda, or sim (simulated)")] = "cpu",
    device: Annotated[str, typer.Option(help="device to plan for; empty: this machine's")] = "",
    batch: Annotated[int, typer.Option(min=1, help="sequences in the step")] = 1,
    context: Annotated[int, typer.Option(min=1, help="tokens that each sequence has in its cache")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="new tokens a sequence: 1 is decode, more is prefill")] = 1,
    dtype: Annotated[
        str, typer.Option(help="of weights, cache and products: auto (the faster one here), bf16, f16 or f32")
    ] = "auto",
    budget: Annotated[float, typer.Option(help="seconds for all of it")] = 60.0,
    seed: Annotated[int, typer.Option(help="of the search and of the tensors' values")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure anew whatever is remembered")] = False,
    database: Annotated[Path | None, typer.Option(help="profile database; default: in the user's data")] = None,
    out: Annotated[Path | None, typer.Option(help="write the winning plan as JSON here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON on the last line")] = False,
) -> None:
    """Find the plan that is fastest on this machine by running the best candidates, and say why it won."""
    from taskgraph.runtime.dtypes import pick

    def progress(what: str, share: float) -> None:
        status.print(f"{100 * share:3.0f} %  {what}")

    check_outputs(out)
    kind = "bf16" if dtype == "auto" else dtype
    if dtype == "auto" and backend != "sim" and not is_graph(model):
        found = pick("auto", backend, device or None)
        kind = found.dtype
        status.print(f"dtype {found.dtype} ({found.why})")
    graph = graph_of(model, StepSize(batch, context, tokens, kind))
    tuned = tg.autotune(
        graph, backend, budget, device=device or None, seed=seed, database=database, fresh=fresh, progress=progress
    )
    show(tg.explain_tuned(tuned))
    if out is not None:
        tuned.plan.save(out)
        show(f"plan: {out}")
    if as_json:
        show(json.dumps(summary(tuned)))
