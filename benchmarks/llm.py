"""Tokens/s of SmolLM2-135M: taskgraph, the same ops one by one, transformers, torch.compile, llama.cpp; one process."""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

import taskgraph as tg
from benchmarks import count, interleaved, machine, measured_main, one_line, positive, spread
from benchmarks.peers import (
    CONTEXT,
    PREFILL,
    PROMPT,
    TOKENS,
    TORCH_DTYPES,
    LlamaCpp,
    Run,
    compiled_run,
    has_llama_cpp,
    plain_gguf,
    prompt,
    transformers_models,
    transformers_run,
)
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig
from taskgraph.models.hub import smollm2_path
from taskgraph.models.weights import open_checkpoint
from taskgraph.runtime.cpu.executable import CpuExecutable
from taskgraph.runtime.dtypes import DTYPES, pick

if TYPE_CHECKING:
    import torch

EPILOG = f"""\
Cases: prefill of {PROMPT} tokens, batch 1, logits of the last token only; one decode step of batch 1, 8 and 32 with
{CONTEXT} tokens in each sequence's cache. All contenders use the same dequantised weights and all cores.

  taskgraph     the plan, captured and replayed
  sequential    the sequential plan, captured and replayed
  eager         the ops of the sequential plan, called one by one from Python, each on all cores
  transformers  under inference_mode with its sdpa attention and a dynamic cache, in bf16 and in fp32; in the JSON
                the better of the two, case by case
  llama_cpp     llama.cpp through llama-cpp-python, where it is installed: the weights as a BF16 GGUF (made once, in
                the user's cache), flash attention on; null where it is absent, or for a model that is no GGUF
  llama_cpp_f32 the same with an F32 GGUF
  torch_compile the better transformers model under torch.compile, with --compile (minutes of compilation; null for
                what fails, or takes longer than --compile-limit)

Within a case all contenders take turns, round by round, with a pause between them, so that the threads of one are
asleep when the next begins, and an untimed decode step before each timed one; the figure is the median and the
spread is half the interquartile range. "eager" has a pool of threads beside the lanes' and pays for it:
"sequential" is the stricter yardstick of a plan.

examples:
  python -m benchmarks.llm --json
  python -m benchmarks.llm --cases decode_1 --rounds 30 --dtype f32
"""


LLAMA_CPP = {"llama_cpp": "bf16", "llama_cpp_f32": "f32"}
"""Contenders that are llama.cpp, and the dtype of their GGUF."""


def model_runs(
    config: ModelConfig, weights: Mapping[str, "torch.Tensor"], dtype: str, case: str
) -> tuple[dict[str, CpuExecutable], dict[str, tg.Plan]]:
    """Executables of the best and of the sequential plan of one case, with everything bound."""
    import torch

    batch, tokens = (1, PROMPT) if case == PREFILL else (TOKENS[case], 1)
    room = PROMPT if tokens > 1 else CONTEXT + 1
    graph = llama.step_graph(config, batch=batch, tokens=tokens, cache=room, dtype=dtype)
    cache = llama.make_cache(config, batch, room, dtype)
    if tokens == 1:
        for tensor in cache.values():
            tensor.normal_(std=0.5)
    names = {t.name for t in graph.flat().tensors}
    made: dict[str, CpuExecutable] = {}
    plans = {"taskgraph": tg.plan(graph, "cpu"), "sequential": tg.plan(graph, "cpu", scheduler="sequential")}
    for name, plan in plans.items():
        executable = tg.compile(graph, plan)
        assert isinstance(executable, CpuExecutable)
        made[name] = executable
        made[name].bind({k: v for k, v in {**weights, **cache}.items() if k in names})
        made[name].bind(tokens=torch.tensor(prompt(config, batch * tokens)))
        made[name].bind(positions=torch.full((batch,), 0 if tokens > 1 else CONTEXT, dtype=torch.int64))
    return made, plans


def differences(ours: "torch.Tensor", runs: Mapping[str, Run]) -> str:
    """How far the logits of each contender are from transformers' in fp32, in words."""
    import numpy as np
    import torch

    exact = runs["transformers_float32"]().reshape(-1)
    found = {"taskgraph": ours, "transformers bf16": runs["transformers_bfloat16"]()}
    for name in (name for name in LLAMA_CPP if name in runs):
        found[name] = torch.from_numpy(np.ctypeslib.as_array(runs[name](), (len(exact),)).copy())
    parts = [f"{n} {float((t.reshape(-1).float() - exact).norm() / exact.norm()):.2%}" for n, t in found.items()]
    return "logits, distance from transformers fp32 over their norm: " + ", ".join(parts)


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens/s of every contender and case."""
    import torch

    picked = pick(args.dtype)
    say(f"taskgraph in {picked.dtype} ({picked.why})")
    say("loading weights")
    source = smollm2_path() if args.model == "smollm2" else Path(args.model)
    with open_checkpoint(source) as checkpoint:
        config = checkpoint.config
        weights = llama.load_weights(config, checkpoint, picked.dtype)
        models = {} if args.no_peers else transformers_models(checkpoint)
    others: dict[str, LlamaCpp] = {}
    if models and has_llama_cpp() and source.suffix == ".gguf":
        for name, kind in LLAMA_CPP.items():
            others[name] = LlamaCpp(plain_gguf(source, kind), len(os.sched_getaffinity(0)))
    seconds: dict[str, dict[str, list[float]]] = {}
    verdicts: dict[str, str] = {}
    for case in args.cases:
        with ExitStack() as stack:
            say(f"{case}: planning and capturing")
            executables, plans = model_runs(config, weights, picked.dtype, case)
            for executable in executables.values():
                stack.callback(executable.close)
            verdicts[case] = plans["taskgraph"].verdict.choice
            runs: dict[str, Run] = {name: executable.launch for name, executable in executables.items()}
            runs["eager"] = executables["sequential"].eager
            runs |= {f"transformers_{d}": transformers_run(model, config, case) for d, model in models.items()}
            for name, other in others.items():
                runs[name], close = other.run(config, case)
                stack.callback(close)
            if args.compile and models:
                runs |= compiled(runs, models, config, case, args.compile_limit, say)
            if case == PREFILL and models:
                executables["taskgraph"].launch()
                say(differences(executables["taskgraph"].outputs[llama.LOGITS], runs))
            say(f"{case}: measuring")
            lead = 0 if case == PREFILL else 1  # a prefill step is long enough to warm itself
            seconds[case] = interleaved(runs, rounds=args.rounds, budget_s=args.budget, pause_s=0.01, lead=lead)
    for other in others.values():
        other.close()
    return {
        **rates_of(seconds),
        "verdict": verdicts,
        "dtype": picked.dtype,
        "dtype_why": picked.why,
        "machine": f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
    }


def compiled(
    runs: Mapping[str, Run],
    models: Mapping[str, Any],
    config: ModelConfig,
    case: str,
    limit_s: float,
    say: Callable[[str], None],
) -> dict[str, Run]:
    """The torch.compile'd run of the faster transformers model; empty when it is not available."""
    tried = interleaved({d: runs[f"transformers_{d}"] for d in models}, rounds=3)
    better = min(tried, key=lambda d: statistics.median(tried[d]))
    say(f"{case}: compiling transformers {better}")
    built = compiled_run(models[better], config, case, limit_s, say)
    return {} if built is None else {"torch_compile": built}


def rates_of(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """The JSON of the measured seconds by case and contender: tokens/s and their spread."""
    names = dict.fromkeys(name for runs in seconds.values() for name in runs)
    rate = {
        name: {
            case: TOKENS[case] / statistics.median(runs[name]) if name in runs else None
            for case, runs in seconds.items()
        }
        for name in names
    }
    by_dtype = {d: rate.pop(f"transformers_{d}") for d in TORCH_DTYPES if f"transformers_{d}" in rate}
    best = {case: max(row[case] or 0.0 for row in by_dtype.values()) for case in seconds} if by_dtype else None
    spreads = {name: {case: spread(runs[name]) for case, runs in seconds.items() if name in runs} for name in names}
    return {
        **dict.fromkeys(("torch_compile", *LLAMA_CPP)),
        **rate,
        "transformers": best,
        "transformers_by_dtype": by_dtype,
        "spread": spreads,
    }


def table_of(result: dict[str, Any]) -> Table:
    """One row for each case."""
    told = f"{result['machine']}; taskgraph in {result['dtype']} ({result['dtype_why']})"
    table = Table(title="SmolLM2-135M, tokens/s (measured, median)", caption=told)
    peers = {f"transformers_{d}": row for d, row in result["transformers_by_dtype"].items()}
    ours = {name: result[name] for name in ("taskgraph", "sequential", "eager")}
    columns = {**ours, **peers, **{name: result[name] for name in ("torch_compile", *LLAMA_CPP) if result[name]}}
    titles = {"transformers_bfloat16": "transformers\nbf16", "transformers_float32": "transformers\nfp32"}
    table.add_column("case")
    for name in columns:
        table.add_column(titles.get(name, name.replace("_", ".")), justify="right")
    against = [name for name in ("eager", "transformers", *LLAMA_CPP) if result[name]]
    for name in against:
        table.add_column(f"gain over\n{name.replace('_', '.')}", justify="right")
    table.add_column("plan")
    for case, rate in result["taskgraph"].items():
        cells = [
            "-" if row[case] is None else f"{row[case]:,.1f}\n±{result['spread'][name][case]:.0%}"
            for name, row in columns.items()
        ]
        gains = [f"{rate / result[name][case]:.2f}x" for name in against]
        table.add_row(case, *cells, *gains, result["verdict"][case])
    return table


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.llm", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, or a checkpoint of the Llama family")
    parser.add_argument("--cases", nargs="+", choices=list(TOKENS), default=list(TOKENS), help="which cases to run")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of taskgraph's graphs (auto: faster here)")
    parser.add_argument("--rounds", type=count, default=15, help="interleaved rounds of a case (default 15)")
    parser.add_argument("--budget", type=positive, default=4.0, help="stop a case after these seconds (default 4)")
    parser.add_argument("--no-peers", action="store_true", help="taskgraph alone")
    parser.add_argument("--compile", action="store_true", help="also torch.compile the transformers model")
    parser.add_argument("--compile-limit", type=float, default=180.0, help="seconds for one compilation (default 180)")
    return measured_main(parser, argv, measure, table_of, width=150)


if __name__ == "__main__":
    sys.exit(main())
