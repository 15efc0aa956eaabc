"""`taskgraph serve` and `taskgraph api-key`."""

import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import taskgraph as tg
from taskgraph.cli.console import paragraphs, say, status
from taskgraph.cli.steps import TPOT_MS
from taskgraph.errors import BackendUnavailable

if TYPE_CHECKING:
    from rich.status import Status

    from taskgraph.serving.http.keys import KeyRing
    from taskgraph.serving.options import Hardware
    from taskgraph.serving.scheduler import Limits


_SAY_S = 10.0
"""How often progress is said where there is no terminal to show it."""


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(help=paragraphs(serve))(serve)
    app.command("api-key", help=paragraphs(api_key))(api_key)


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
    tpot_ms: Annotated[float, TPOT_MS] = 0.0,
    warm: Annotated[bool, typer.Option(help="plan and capture steps before the first request")] = True,
    warm_within: Annotated[
        float, typer.Option(min=0, help="seconds for that; batches make do with the steps that there are then")
    ] = 900.0,
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
    taskgraph serve llama-folder --device gpu --sequences 256 --step-tokens 2048 --tpot-ms 25

    Requests are batched continuously over a paged KV cache; those that find it full wait. GET /v1/models names the
    model, GET /health says whether requests are taken, GET /metrics is for Prometheus. SIGINT or SIGTERM waits for what
    runs, for --drain seconds at most; a second one cancels it.

    Before the first request all steps that batches can need are planned and captured, or those that --warm-within
    leaves time for; "ready" says how many. Only then the server listens: /health answers no earlier.

    With --tpot-ms, on a GPU, decode steps and steps of prompts run beside each other in two partitions of the device
    wherever that is predicted to give more tokens a second within that time a token than steps of both kinds; those
    have as much of prompts as the time leaves room for. `bench-serve --tpot-ms` shows what to expect.

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
    from taskgraph.serving.options import Hardware, Warm
    from taskgraph.serving.service import Service

    keys = None if api_key_file is None else _key_ring(api_key_file)
    access = access_of(host, keys, tuple(cors_origin or ()))
    with status.status("load weights") as shown:
        limits, target = limits_of(sequences, step_tokens, context), Hardware(device, tensor_parallel, expert_parallel)
        planner, progress = known(plans, remembered, target), _Progress(shown)
        asked = Warm(warm_within, progress) if warm else None
        local = open_local(
            model, limits, target, dtype=dtype, pages=pages, warm=asked, planner=planner,
            tpot_s=wanted_tpot(tpot_ms, device),
        )  # fmt: skip
    status.print(f"dtype {local.picked.dtype} ({local.picked.why})", soft_wrap=True)
    if warm:
        status.print(progress.summary(*local.shared_bytes), soft_wrap=True)
    with Service(local.engine, most_open) as service:
        served = Served(service, local.tokenizer, name or local.name, most_body)

        def started(at: int) -> None:
            if local.processes:
                status.print(f"ranks: processes {', '.join(map(str, local.processes))}", soft_wrap=True)
            where = f"[{host}]" if ":" in host else host
            say(f"serving {served.name} at http://{where}:{at}/v1 (ctrl-c to stop)")

        if access_log:
            _log_access()
        run_server(served, host, port, drain_s=drain, access=access, started=started, say=say)
    status.print("stopped")


class _Progress:
    """What is said while steps are planned and captured, and when they are."""

    def __init__(self, shown: "Status") -> None:
        self._shown, self._done = shown, (0, 0)
        self._begin_s = self._said_s = time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        self._done, line = (done, of), f"plan and capture steps: {done} of {of}"
        self._shown.update(line)
        if not status.is_terminal and time.monotonic() - self._said_s > _SAY_S:
            self._said_s = time.monotonic()
            say(line)

    def summary(self, shared_bytes: int, asked_bytes: int) -> str:
        """One line: how many steps, in how long, and what memory they share."""
        done, of = self._done
        took_s = time.monotonic() - self._begin_s
        line = f"ready: {done} of {of} steps planned and captured, {took_s:.0f} s after the start"
        if done < of:
            line += "; batches make do with these (more time: --warm-within)"
        if shared_bytes:
            line += f"; they share {shared_bytes / 1e6:,.1f} MB and would hold {asked_bytes / 1e6:,.1f} each on its own"
        return line


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
        say(f"warning: others than you can read {path} (it holds hashes, not keys); chmod 600 it")
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
    say(f"{name}'s key, role {role}; {file} has its hash. It will not be shown again:")
    typer.echo(secret)


def known(plans: list[Path] | None, remembered: bool, target: "Hardware") -> "tg.KnownPlans":
    """The plans of an engine there."""
    return tg.KnownPlans(
        plans or (), backend=target.backend, device=target.run_on, use_remembered=remembered, say=status.print
    )


def wanted_tpot(tpot_ms: float, device: str) -> float | None:
    """Seconds a token that --tpot-ms wants, None for no wish; said once where no GPU could be split for it."""
    from taskgraph.serving.ways import tpot_of

    found = tpot_of(tpot_ms)
    if found is not None and device == "cpu":
        say("warning: --tpot-ms is for GPUs, which can be split; on the cpu steps stay mixed, whatever they take")
        return None
    return found


def limits_of(sequences: int, tokens: int, context: int) -> "Limits":
    """The limits of a batch: beside every sequence that decodes there is room for a token of prefill."""
    from taskgraph.serving.scheduler import Limits

    return Limits(sequences, max(tokens, sequences + 1), min(16, sequences), context)
