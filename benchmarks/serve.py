"""Tokens/s of SmolLM2-135M serving the same requests: taskgraph's engine, transformers, llama.cpp; one process."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from benchmarks import count, interleaved, machine, measured_main, one_line, positive, spread
from benchmarks.peers import TORCH_DTYPES, LlamaCpp, has_llama_cpp, plain_gguf, transformers_models
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig, load_config
from taskgraph.models.hub import smollm2_path
from taskgraph.models.weights import open_checkpoint
from taskgraph.runtime.dtypes import DTYPES, pick
from taskgraph.serving.engine import Engine
from taskgraph.serving.options import KvMemory, Policy
from taskgraph.serving.requests import Request
from taskgraph.serving.runners.cpu import cpu_engine
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.simulate.runner import simulated_engine

if TYPE_CHECKING:
    import torch

EPILOG = """\
Requests: random tokens, prompts of 8 to 128, outputs of 8 to 64, all there at the start, greedy, no stop token. The
figure of each contender is the output tokens of all requests over the seconds until the last one has ended.

  taskgraph     the serving engine: continuous batching, chunked prefill, paged cache; in the
                dtype that is faster here, or in --dtype; plans made before
  transformers  generate() on left-padded batches of equal size in the order of the requests, each until its longest
                output is done; the best of the batch sizes, in the better dtype of a short trial
  llama_cpp     llama.cpp through llama-cpp-python, where it is installed: the weights as a BF16 GGUF (made once, in
                the user's cache), continuous batching as in its server, flash attention on; the best of the numbers
                of parallel slots; null where it is absent, or for a model that is no GGUF

Contenders take turns, round by round; the figure is the median, the spread half the interquartile range (of fewer than
three rounds half the range). Greedy tokens of different arithmetic part ways sooner or later: llama_cpp_alike is the
share of requests whose first token is the same as ours.

examples:
  python -m benchmarks.serve --json
  python -m benchmarks.serve --requests 96 --batches 16 32 64 --slots 16 32 96 --rounds 5
"""


def make_requests(config: ModelConfig, count: int) -> list[Request]:
    """The same requests every time."""
    draw = np.random.default_rng(0)
    lengths = zip(draw.integers(8, 129, count).tolist(), draw.integers(8, 65, count).tolist(), strict=True)
    return [Request(draw.integers(0, config.vocab_size, p), o) for p, o in lengths]


def engine_of(config: ModelConfig, weights: Mapping[str, "torch.Tensor"], sequences: int) -> Engine:
    """The engine, with room for every running sequence's longest length; blocks are not shared between rounds."""
    limits = Limits(sequences=sequences, tokens=sequences + 448, chunks=16, context=256)
    return cpu_engine(config, weights, limits, KvMemory(sequences * 8), policy=Policy(prefix_sharing=False))


def static_batches(model: Any, requests: Sequence[Request], size: int) -> Callable[[], None]:
    """transformers' generate on batches of `size`, left-padded."""
    import torch

    def run() -> None:
        for first in range(0, len(requests), size):
            group = requests[first : first + size]
            most, longest = max(len(r.prompt) for r in group), max(r.max_tokens for r in group)
            ids = torch.zeros(len(group), most, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, request in enumerate(group):
                ids[row, most - len(request.prompt) :] = torch.from_numpy(np.asarray(request.prompt))
                mask[row, most - len(request.prompt) :] = 1
            with torch.inference_mode():
                model.generate(
                    ids, attention_mask=mask, do_sample=False, max_new_tokens=longest, min_new_tokens=longest,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip

    return run


def better_dtype(models: Mapping[str, Any], config: ModelConfig, size: int) -> str:
    """The dtype in which a short batch is done sooner."""
    short = [Request(np.full(32, 7 + i), 4) for i in range(size)]
    runs = {dtype: static_batches(models[dtype], short, size) for dtype in TORCH_DTYPES}
    seconds = interleaved(runs, rounds=1)
    return min(seconds, key=lambda dtype: min(seconds[dtype]))


def llama_cpp_runs(
    stack: ExitStack, source: Path, requests: Sequence[Request], slots: Sequence[int]
) -> dict[str, "Kept"]:
    """llama.cpp with each number of slots, on all cores; `stack` frees it."""
    model = LlamaCpp(plain_gguf(source), len(os.sched_getaffinity(0)))
    stack.callback(model.close)
    longest, runs = max(len(r.prompt) + r.max_tokens for r in requests), {}
    for slot in slots:
        run, close = model.serve(requests, min(slot, len(requests)), longest)
        runs[f"llama_cpp_{slot}"] = Kept(run)
        stack.callback(close)
    return runs


@dataclass(slots=True)
class Kept:
    """A run that keeps its last answers."""

    run: Callable[[], list[list[int]]]
    answers: Sequence[Sequence[int]] = ()

    def __call__(self) -> None:
        self.answers = self.run()


def first_alike(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of requests that both begin with the same token."""
    return float(np.mean([a[0] == b[0] for a, b in zip(ours, theirs, strict=True)]))


def engine_seconds(sequences: int, steps: int) -> float:
    """Median seconds of the engine's own work in a step of about `sequences` decoding sequences, nothing executed."""
    config = load_config("smollm2-135m")
    limits = Limits(sequences=sequences, tokens=2 * sequences, chunks=16, context=1024)
    draw, times = np.random.default_rng(0), []
    with simulated_engine(config, lambda shape: 1.0, pages=sequences * 64, limits=limits) as engine:
        for p, o in zip(draw.integers(1, 512, steps).tolist(), draw.integers(1, 512, steps).tolist(), strict=True):
            engine.submit(Request(np.ones(p, np.int32), o))
        for _ in range(steps):
            begin = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - begin)
    return float(np.median(times[steps // 4 : -steps // 4]))


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens/s of every contender."""
    import torch

    picked = pick(args.dtype)
    say(f"taskgraph in {picked.dtype} ({picked.why})")
    say("loading weights")
    source = smollm2_path() if args.model == "smollm2" else Path(args.model)
    with open_checkpoint(source) as checkpoint:
        config = checkpoint.config
        weights = llama.load_weights(config, checkpoint, picked.dtype)
        models = {} if args.no_peers else transformers_models(checkpoint)
    requests = make_requests(config, args.requests)
    tokens = sum(r.max_tokens for r in requests)
    dtype, other = None, dict[str, Kept]()
    with ExitStack() as stack:
        engine = stack.enter_context(engine_of(config, weights, args.sequences))
        say("planning and capturing")
        answers = [c.tokens for c in engine.run(requests)]
        planned = engine.runner.planned
        runs: dict[str, Callable[[], Any]] = {"taskgraph": lambda: engine.run(requests)}
        if models:
            dtype = better_dtype(models, config, args.batches[0])
            say(f"transformers in {dtype}")
            runs |= {f"transformers_{n}": static_batches(models[dtype], requests, n) for n in args.batches}
        if models and has_llama_cpp() and source.suffix == ".gguf":
            other = llama_cpp_runs(stack, source, requests, args.slots)
            runs |= other
        before = engine.stats.host_s, engine.stats.hidden_s, engine.stats.steps
        say(f"measuring {tokens} tokens of {len(requests)} requests")
        seconds = interleaved(runs, rounds=args.rounds, warmup=0, budget_s=args.budget, pause_s=0.01)
        host, hidden, steps = (a - b for a, b in zip(
            (engine.stats.host_s, engine.stats.hidden_s, engine.stats.steps), before, strict=True))  # fmt: skip
        again = engine.runner.planned - planned
    rate = {name: tokens / float(np.median(times)) for name, times in seconds.items()}
    by_size = {
        peer: {n.rpartition("_")[2]: r for n, r in rate.items() if n.startswith(peer)}
        for peer in ("transformers", "llama_cpp")
    }
    return {
        "taskgraph_tok_s": rate["taskgraph"],
        **{f"{peer}_tok_s": max(rates.values(), default=None) for peer, rates in by_size.items()},
        "transformers_by_batch": by_size["transformers"],
        "llama_cpp_by_slots": by_size["llama_cpp"],
        "transformers_dtype": dtype,
        "dtype": picked.dtype,
        "dtype_why": picked.why,
        "llama_cpp_alike": next((first_alike(answers, each.answers) for each in other.values()), None),
        "engine_us_per_step_256": 1e6 * engine_seconds(256, args.engine_steps),
        "host_s_per_step": host / steps,
        "host_hidden": hidden / host,
        "planned_while_serving": again,
        "requests": len(requests),
        "tokens": tokens,
        "lengths": [(len(r.prompt), r.max_tokens) for r in requests],
        "spread": {name: spread(times) for name, times in seconds.items()},
        "machine": f"{machine()}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} threads",
    }


def table_of(result: Mapping[str, Any]) -> Table:
    """One row for each contender."""
    title = f"SmolLM2-135M, {result['requests']} requests, {result['tokens']} output tokens (measured, median)"
    table = Table(title=title, caption=result["machine"])
    for name in ("contender", "tokens/s", "taskgraph over it"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    ours = result["taskgraph_tok_s"]
    table.add_row(f"taskgraph, {result['dtype']}", f"{ours:,.1f}", "")
    peers = {f"transformers, batch {n}, {result['transformers_dtype']}": r
             for n, r in result["transformers_by_batch"].items()}  # fmt: skip
    peers |= {f"llama.cpp, {n} slots, bf16": r for n, r in result["llama_cpp_by_slots"].items()}
    for name, rate in peers.items():
        table.add_row(name, f"{rate:,.1f}", f"{ours / rate:.2f}x")
    table.add_row(
        "host time a step", f"{1e6 * result['host_s_per_step']:,.0f} us", f"{result['host_hidden']:.0%} hidden"
    )
    table.add_row("the engine's own time a step at 256 sequences", f"{result['engine_us_per_step_256']:,.0f} us", "")
    return table


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.serve", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, or a checkpoint of the Llama family")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of taskgraph (default: the faster one here)")
    parser.add_argument("--requests", type=count, default=64, help="how many (default 64)")
    parser.add_argument(
        "--sequences", type=count, default=48, help="sequences that the engine runs at once (default 48)"
    )
    parser.add_argument(
        "--batches",
        type=count,
        nargs="+",
        default=[32],
        help="transformers' batch sizes (default 32, the best of 16, 32, 64 on 2 cores)",
    )
    parser.add_argument(
        "--slots",
        type=count,
        nargs="+",
        default=[64],
        help="llama.cpp's numbers of parallel slots (default 64, the best of 8, 16, 32, 64 on 2 cores)",
    )
    parser.add_argument("--rounds", type=count, default=2, help="interleaved rounds (default 2)")
    parser.add_argument(
        "--engine-steps", type=count, default=3000, help="steps for the engine's own time (default 3000)"
    )
    parser.add_argument(
        "--budget", type=positive, default=30.0, help="stop after these seconds, but not before round 3"
    )
    parser.add_argument("--no-peers", action="store_true", help="taskgraph alone")
    return measured_main(parser, argv, measure, table_of, width=110)


if __name__ == "__main__":
    sys.exit(main())
