"""The command `taskgraph tune`: a model's step or a graph file, tuned on a backend of this machine."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import taskgraph as tg

if TYPE_CHECKING:
    from taskgraph.models.config import ModelConfig

EPILOG = """
Planned candidates run in interleaved repeats beside the sequential graph; what differs by less than the noise is no
win, and a win must repeat itself. The times of single ops stay in a database, and the planner plans again with them.
The winner is remembered for this machine: the next call returns at once, until --fresh.

taskgraph tune smollm2-135m --batch 1 --context 256 --budget 30

taskgraph run smollm2-135m.gguf                       # uses what was found for its decode step

taskgraph tune step.json --backend sim --device h100_sxm --out best.json
"""


DTYPES = ("bf16", "f16", "f32")


@dataclass(frozen=True, slots=True)
class StepSize:
    """A step: sequences, tokens that each has in its cache, new tokens of each, dtype, and the ranks that share it.

    PlanError for sizes that contradict each other."""

    batch: int
    context: int
    tokens: int
    dtype: str = "bf16"
    ranks: int = 1
    whole_experts: bool = False

    def __post_init__(self) -> None:
        if self.context < self.tokens:
            raise tg.PlanError(
                f"context is {self.context}; it counts the {self.tokens} new tokens too, so make it larger."
            )
        if self.dtype not in DTYPES:
            raise tg.PlanError(f"dtype is one of {', '.join(DTYPES)}; got {self.dtype!r}.")
        if self.whole_experts and self.ranks < 2:
            raise tg.PlanError("experts are shared out between ranks, and there is one; give --ranks 2 or more.")


def graph_of(model: str, size: StepSize) -> tg.Graph:
    """The graph in a file that `Graph.to_json` wrote, or one step of a model: what one rank does of it."""
    from taskgraph.models.llama import step_graph

    if is_graph(model):
        return tg.Graph.from_json(Path(model).read_text())
    return step_graph(
        config_of(model), batch=size.batch, tokens=size.tokens, cache=size.context, dtype=size.dtype,
        tensor_parallel=size.ranks, expert_rank=0 if size.whole_experts else None,
    )  # fmt: skip


def is_graph(model: str) -> bool:
    """Whether it is a file that holds a graph, not a model."""
    path = Path(model)
    return path.suffix == ".json" and path.is_file() and '"ops"' in path.read_text()


def advice(model: str, size: StepSize, least: int) -> str:
    """ " --ranks N would share it out.", with the fewest ranks from `least` on that can share the model; or nothing."""
    config = None if is_graph(model) else config_of(model)
    if config is None:
        return ""
    for ranks in range(max(least, size.ranks + 1), 65):
        try:
            config.share(ranks, 0 if size.whole_experts else None)
        except tg.TaskgraphError:
            continue
        return f" --ranks {ranks} would share it out."
    return ""


def config_of(model: str) -> "ModelConfig":
    """Of a known size, a config.json or its folder, or a checkpoint file, of which no weights are read."""
    from taskgraph.models.config import load_config
    from taskgraph.models.weights import open_checkpoint

    if Path(model).suffix not in (".gguf", ".safetensors"):
        return load_config(model)
    with open_checkpoint(model) as checkpoint:
        return checkpoint.config


def summary(tuned: tg.Tuned) -> dict[str, Any]:
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


def add_to(app: typer.Typer, show: Callable[[str], None], say: Callable[[str], None]) -> None:
    """Register the command; `show` prints results, `say` what happens meanwhile."""

    @app.command(epilog=EPILOG)
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
            say(f"{100 * share:3.0f} %  {what}")

        kind = "bf16" if dtype == "auto" else dtype
        if dtype == "auto" and backend != "sim" and not is_graph(model):
            found = pick("auto", backend, device or None)
            kind = found.dtype
            say(f"dtype {found.dtype} ({found.why})")
        graph = graph_of(model, StepSize(batch, context, tokens, kind))
        tuned = tg.autotune(
            graph, backend, budget, device=device or None, seed=seed, database=database, fresh=fresh, progress=progress
        )
        show(tg.explain_tuned(tuned))
        if out is not None:
            try:
                tuned.plan.save(out)
            except OSError as error:
                raise tg.PlanError(f"cannot write {str(out)!r}: {error.strerror}. Choose another place.") from error
            show(f"plan: {out}")
        if as_json:
            show(json.dumps(summary(tuned)))
