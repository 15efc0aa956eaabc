"""The commands `taskgraph serve`, `taskgraph api-key` and `taskgraph bench-serve`."""

import dataclasses
import inspect
import json
import logging
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from taskgraph.errors import BackendUnavailable, PlanError, RequestError
from taskgraph.serving.engine import Engine
from taskgraph.serving.known_plans import KnownPlans
from taskgraph.serving.simulate.traces import DATASETS, Arrival, Percentiles, Report, poisson, read_trace, replay

if TYPE_CHECKING:
    from taskgraph.serving.http.keys import KeyRing

_screen = Console(highlight=False, emoji=False)
_status = Console(stderr=True, highlight=False, emoji=False)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(help=_unwrapped(serve))(serve)
    app.command("api-key", help=_unwrapped(api_key))(api_key)
    app.command("bench-serve", help=_unwrapped(bench_serve))(bench_serve)


def _unwrapped(command: Callable[..., None]) -> str:
    """The docstring with a line a paragraph, for the terminal to wrap; those that begin with \\b stay as they are."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(p if p.startswith("\b") else " ".join(p.split("\n")) for p in paragraphs)


# -------------------------------------------------------------------------------------------- serve


def serve(
    model: Annotated[str, typer.Argument(help="smollm2, a .gguf or .safetensors file, a folder, or a hub id org/name")],
    host: Annotated[str, typer.Option(help="address to listen on; others than loopback need keys")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and says which")] = 8000,
    name: Annotated[str, typer.Option(help="the model's name in requests (default: the checkpoint's)")] = "",
    dtype: Annotated[str, typer.Option(help="auto (the faster one here), bf16 or f32")] = "auto",
    context: Annotated[int, typer.Option(min=1, help="most tokens of a prompt and its answer")] = 2048,
    sequences: Annotated[int, typer.Option(min=1, help="most sequences in a step")] = 32,
    step_tokens: Annotated[int, typer.Option(min=2, help="most tokens in a step: decode, then prefill")] = 256,
    pages: Annotated[int, typer.Option(min=0, help="pages of the KV cache, 32 tokens each; 0 chooses")] = 0,
    device: Annotated[str, typer.Option(help="cpu, gpu, or a virtual one: virtual:h100_sxm (slow)")] = "cpu",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="ranks: processes that share every layer out")] = 1,
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="ranks hold whole experts, not a part of each")
    ] = False,
    most_open: Annotated[int, typer.Option(min=1, help="requests that may run and wait; one more gets 429")] = 256,
    most_body: Annotated[int, typer.Option(min=1, help="bytes of a request's body; more gets 413")] = 1 << 20,
    warm: Annotated[bool, typer.Option(help="plan and capture every step before the first request")] = True,
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", help="use this plan for the step whose it is; may be repeated")
    ] = None,
    remembered: Annotated[
        bool, typer.Option("--remembered/--no-remembered", help="use the winners that `taskgraph tune` found here")
    ] = True,
    drain: Annotated[float, typer.Option(min=0, help="seconds that requests get to end at shutdown")] = 30.0,
    api_key_file: Annotated[Path | None, typer.Option(help="take only the keys in this file (see `api-key`)")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="a site whose pages may call this server, https://chat.example; repeatable")
    ] = None,
    access_log: Annotated[bool, typer.Option(help="a line on stderr for every request")] = True,
) -> None:
    """Serve a model on this machine with the OpenAI API: completions and chat, streamed or whole.

    \b
    taskgraph serve smollm2 --name smollm2
    curl localhost:8000/v1/completions -d '{"model": "smollm2", "prompt": "Hi"}'
    taskgraph serve mixtral-folder --tensor-parallel 2 --expert-parallel
    taskgraph serve llama-folder --device gpu --sequences 256 --step-tokens 2048

    Requests are batched continuously over a paged KV cache; those that find it full wait. GET /v1/models names the
    model, GET /health says whether requests are taken, GET /metrics is for Prometheus. SIGINT or SIGTERM waits for what
    runs, for --drain seconds at most; a second one cancels it.

    Without --api-key-file the server answers to this machine only, and not to pages of other sites in its browsers.

    With --tensor-parallel every rank has its own cores and its share of weights and cache; when a rank's process dies,
    all requests fail and the command ends with exit code 2, naming the rank.
    """
    if any(find_spec(module) is None for module in ("fastapi", "uvicorn", "prometheus_client")):
        raise BackendUnavailable(
            "serving needs FastAPI, uvicorn and prometheus-client: pip install 'taskgraph-gpu[serve]'."
        )
    from taskgraph.serving.http.access import access_of
    from taskgraph.serving.http.app import Served, run_server
    from taskgraph.serving.local import open_local
    from taskgraph.serving.service import Service

    keys = None if api_key_file is None else _key_ring(api_key_file)
    access = access_of(host, keys, tuple(cors_origin or ()))
    with _status.status("load weights, plan and capture steps"):
        tokens = max(step_tokens, sequences + 1)
        local = open_local(
            model, dtype=dtype, sequences=sequences, tokens=tokens, context=context, pages=pages, warm=warm,
            device=device, tensor_parallel=tensor_parallel, expert_parallel=expert_parallel,
            planner=_known(plans, remembered, device),
        )  # fmt: skip
    _status.print(f"dtype {local.picked.dtype} ({local.picked.why})", soft_wrap=True)
    with Service(local.engine, most_open) as service:
        served = Served(service, local.tokenizer, name or local.name, most_body)

        def started(at: int) -> None:
            if local.processes:
                _status.print(f"ranks: processes {', '.join(map(str, local.processes))}", soft_wrap=True)
            where = f"[{host}]" if ":" in host else host
            _say(f"serving {served.name} at http://{where}:{at}/v1 (ctrl-c to stop)")

        if access_log:
            _log_access()
        run_server(served, host, port, drain_s=drain, access=access, started=started, say=_say)
    _status.print("stopped")


def _say(text: str) -> None:
    _status.print(text, markup=False, soft_wrap=True)


def _log_access() -> None:
    log, handler = logging.getLogger("taskgraph.access"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s access %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _key_ring(path: Path) -> "KeyRing":
    from taskgraph.serving.http.keys import KeyRing, readable_by_others

    ring = KeyRing.load(path)
    if readable_by_others(path):
        _say(f"warning: others than you can read {path} (it holds hashes, not keys); chmod 600 it")
    return ring


def api_key(
    name: Annotated[str, typer.Argument(help="whose key it is, as the access log will say")],
    file: Annotated[Path, typer.Option(help="the file of keys that the server is given")],
    role: Annotated[str, typer.Option(help="all, or metrics: may read /metrics only")] = "all",
) -> None:
    """Make an API key, add its hash to a file of keys, and print the key, once.

    \b
    taskgraph api-key alice --file keys.txt
    taskgraph api-key prometheus --role metrics --file keys.txt
    taskgraph serve smollm2 --host 0.0.0.0 --api-key-file keys.txt

    The file has a line a key: name, role and a salted SHA-256. To end a key remove its
    line and send the server SIGHUP, or start it again.
    """
    from taskgraph.serving.http.keys import add_key

    secret = add_key(file, name, role)
    _say(f"{name}'s key, role {role}; {file} has its hash. It will not be shown again:")
    typer.echo(secret)


# -------------------------------------------------------------------------------------- bench-serve


def bench_serve(
    model: Annotated[str, typer.Argument(help="a checkpoint as for `serve`; with --device a size as for `plan`")],
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV: arrival_s,input_tokens,output_tokens, then lines like 0.5,120,64; or JSON lines"),
    ] = None,
    dataset: Annotated[str, typer.Option(help=f"or lengths drawn like those of {', '.join(DATASETS)}")] = "",
    requests: Annotated[int, typer.Option(min=1, help="how many to draw")] = 1000,
    rate: Annotated[float, typer.Option(min=0, help="requests a second that are drawn; 0: all at once")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu runs the model (measured); others, see `devices`, simulate")] = "cpu",
    ranks: Annotated[int, typer.Option(min=1, help="tensor-parallel devices, or on the cpu processes")] = 1,
    context: Annotated[int, typer.Option(min=1, help="most tokens of a request")] = 4096,
    sequences: Annotated[int, typer.Option(min=0, help="most sequences in a step; 0 chooses: cpu 32, else 1024")] = 0,
    step_tokens: Annotated[int, typer.Option(min=0, help="most tokens in a step; 0 chooses: cpu 256, else 2048")] = 0,
    variant: Annotated[str, typer.Option(help="simulated: taskgraph, sequential or nanobatch_only")] = "taskgraph",
    dtype: Annotated[str, typer.Option(help="measured: auto (the faster one here), bf16 or f32")] = "auto",
    plan_seconds: Annotated[float, typer.Option(help="simulated: search for the plan of a step")] = 0.5,
    seed: Annotated[int, typer.Option(help="of prompts, drawn lengths and arrivals")] = 0,
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", help="use this plan for the step whose it is; may be repeated")
    ] = None,
    remembered: Annotated[
        bool, typer.Option("--remembered/--no-remembered", help="use the winners that `taskgraph tune` found here")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Replay a trace of requests offline and report throughput, TTFT, TPOT and latency.

    Give --trace or --dataset. TTFT is the time to a request's first token, TPOT the time of each one after it.

    \b
    taskgraph bench-serve smollm2 --trace trace.csv
    taskgraph bench-serve llama-2-70b --device a100_sxm --ranks 8 --dataset sharegpt --rate 20

    Prompts are random tokens, and every request gives all its output tokens. On the cpu the engine runs the model and
    times are measured; for another device steps take the time of their plans, and all times are simulated.
    """
    arrivals = _arrivals(trace, dataset, requests, rate, context, seed)
    if device == "cpu":
        known = _known(plans, remembered, device)
        sizes = (ranks, context, sequences or 32, step_tokens or 256, seed)
        report = _measured(model, arrivals, *sizes, dtype, known)
    else:
        if plans:
            raise PlanError("--plan is for steps that run; a simulated replay plans its own. Leave it out.")
        report = _simulated(
            model, arrivals, device, ranks, context, sequences or 1024, step_tokens or 2048, variant, plan_seconds, seed
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        here = "this machine" if ranks == 1 else f"{ranks} ranks of this machine"
        where = here if device == "cpu" else f"{ranks} x {device}, {variant}"
        _screen.print(_table(report, f"{model} on {where} ({report.kind})"))


def _known(plans: list[Path] | None, remembered: bool, device: str) -> KnownPlans:
    """The plans of an engine on `device`, as `open_local` names it."""
    backend, run_on = ("cpu", None) if device == "cpu" else ("cuda", None if device == "gpu" else device)
    return KnownPlans(plans or (), backend=backend, run_on=run_on, use_remembered=remembered, say=_status.print)


def _arrivals(trace: Path | None, dataset: str, requests: int, rate: float, context: int, seed: int) -> list[Arrival]:
    if (trace is None) == (not dataset):
        raise RequestError("give --trace FILE or --dataset NAME, one of them.")
    if trace is not None:
        return read_trace(trace)
    if dataset not in DATASETS:
        raise RequestError(f"no dataset {dataset!r}; there are {', '.join(DATASETS)}.")
    return poisson(DATASETS[dataset].draw(requests, context, seed), rate or math.inf, seed)


def _measured(
    model: str, arrivals: list[Arrival], ranks: int, context: int, sequences: int, tokens: int, seed: int,
    dtype: str, known: KnownPlans,
) -> Report:  # fmt: skip
    from taskgraph.serving.local import open_local

    with _status.status("load weights, plan and capture steps"):
        tokens = max(tokens, sequences + 1)
        local = open_local(
            model, dtype=dtype, sequences=sequences, tokens=tokens, context=context, tensor_parallel=ranks,
            planner=known,
        )  # fmt: skip
    _status.print(f"dtype {local.picked.dtype} ({local.picked.why})", soft_wrap=True)
    with local.engine as engine, _status.status("replay"):
        return replay(engine, arrivals, "measured", vocabulary=local.vocabulary, seed=seed)


def _simulated(
    model: str, arrivals: list[Arrival], device: str, ranks: int, context: int, sequences: int, tokens: int,
    variant: str, plan_seconds: float, seed: int,
) -> Report:  # fmt: skip
    from taskgraph.models.config import load_config
    from taskgraph.serving.scheduler import Limits
    from taskgraph.serving.simulate.simulate import pages_of, simulated_engine
    from taskgraph.serving.simulate.stepgrid import StepGrid

    config = load_config(model)
    limits = Limits(sequences, max(tokens, sequences + 1), chunks=64, context=min(context, config.max_context))
    mean = sum(a.input_tokens for a in arrivals) / len(arrivals)
    grid = StepGrid(config, device, tensor_parallel=ranks, prompt_tokens=mean, budget_s=plan_seconds, seed=seed)
    pages = pages_of(config, device, tensor_parallel=ranks)
    engine: Engine = simulated_engine(config, grid.of(variant), pages=pages, limits=limits)
    with engine, _status.status("plan and replay"):
        return replay(engine, arrivals, "simulated", vocabulary=config.vocab_size, seed=seed)


def _table(report: Report, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("", "mean", "p50", "p90", "p99"):
        table.add_column(column, justify="right" if column else "left")

    def times(what: str, p: Percentiles | None) -> None:
        cells = [] if p is None else [p.mean_s, p.p50_s, p.p90_s, p.p99_s]
        table.add_row(what, *(f"{1e3 * cell:,.1f} ms" for cell in cells))

    table.add_row("requests", f"{report.requests:,} in {report.seconds:,.1f} s")
    table.add_row("requests/s", f"{report.requests_per_s:,.2f}")
    table.add_row("tokens/s", f"{report.tokens_per_s:,.0f}")
    table.add_row("tokens/s, middle half", f"{report.steady_tokens_per_s:,.0f}")
    table.add_row("output tokens/s", f"{report.output_tokens_per_s:,.0f}")
    table.add_row("steps", f"{report.steps:,}")
    times("TTFT", report.ttft)
    times("TPOT", report.tpot)
    times("latency", report.latency)
    return table
