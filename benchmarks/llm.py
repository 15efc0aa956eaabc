"""Tokens/s of SmolLM2-135M: taskgraph's plan and sequential plan, transformers eager, torch.compile, one process."""

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import taskgraph as tg
from benchmarks import interleaved, machine, print_json, spread
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig
from taskgraph.models.weights import open_checkpoint

if TYPE_CHECKING:
    import torch

    from taskgraph.models.weights import Checkpoint

PROMPT = CONTEXT = 512
BATCHES = (1, 8, 32)
CASES = ("prefill_512", *(f"decode_{batch}" for batch in BATCHES))
TOKENS = {"prefill_512": PROMPT, **{f"decode_{batch}": batch for batch in BATCHES}}
TORCH_DTYPES = ("bfloat16", "float32")
EPILOG = f"""\
Cases: prefill of {PROMPT} tokens, batch 1, logits of the last token only; one decode step of batch 1, 8 and 32 with
{CONTEXT} tokens in the cache. All contenders use the same dequantised weights and all cores. Transformers runs under
inference_mode with its sdpa attention and a dynamic cache, in bf16 and in fp32; "transformers" is the better of
the two, case by case. Within a case all contenders take turns, round by round, with a pause between them; the
figure is the median and the spread is half the interquartile range.

--compile adds torch.compile of the transformers model (minutes of compilation; null for what fails, or takes longer
than --compile-limit). Without it the key "torch_compile" is null.

examples:
  python -m benchmarks.llm --json
  python -m benchmarks.llm --cases decode_1 --rounds 30 --dtype f32
"""


def model_runs(
    config: ModelConfig, weights: Mapping[str, "torch.Tensor"], dtype: str, case: str
) -> tuple[dict[str, tg.Executable], dict[str, tg.Plan]]:
    """Executables of the best and of the sequential plan of one case, with everything bound."""
    import torch

    batch, tokens = (1, PROMPT) if case == "prefill_512" else (TOKENS[case], 1)
    room = PROMPT if tokens > 1 else CONTEXT + 1
    graph = llama.step_graph(config, batch=batch, tokens=tokens, cache=room, dtype=dtype)
    cache = llama.make_cache(config, batch, room, dtype)
    if tokens == 1:
        for tensor in cache.values():
            tensor.normal_(std=0.5)
    names = {t.name for t in graph.flat().tensors}
    made: dict[str, tg.Executable] = {}
    plans = {"taskgraph": tg.plan(graph, "cpu"), "sequential": tg.plan(graph, "cpu", scheduler="sequential")}
    for name, plan in plans.items():
        made[name] = tg.compile(graph, plan)
        made[name].bind({k: v for k, v in {**weights, **cache}.items() if k in names})
        made[name].bind(tokens=prompt(config, batch * tokens))
        made[name].bind(positions=torch.full((batch,), 0 if tokens > 1 else CONTEXT, dtype=torch.int64))
    return made, plans


def prompt(config: ModelConfig, count: int) -> "torch.Tensor":
    """Fixed pseudo-random token numbers."""
    import torch

    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))


def transformers_model(checkpoint: "Checkpoint", dtype: str) -> Any:
    """LlamaForCausalLM with the checkpoint's weights."""
    import torch
    import transformers

    c = checkpoint.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.max_context,
        tie_word_embeddings=c.tie_embeddings,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict({n: checkpoint.tensor(n) for n in checkpoint.names()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not fit transformers: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    return model.eval().to(getattr(torch, dtype))


def transformers_run(model: Any, config: ModelConfig, case: str) -> Callable[[], Any]:
    """One step of transformers; the dynamic cache is filled once, and cut back after each step."""
    import torch
    import transformers

    if case == "prefill_512":
        ids = prompt(config, PROMPT).view(1, PROMPT)

        def prefill() -> Any:
            with torch.inference_mode():
                return model(ids, use_cache=True, logits_to_keep=1).logits

        return prefill
    batch = TOKENS[case]
    ids = prompt(config, batch).view(batch, 1)
    position = torch.full((batch, 1), CONTEXT, dtype=torch.int64)
    cache = transformers.DynamicCache()
    shape = (batch, config.kv_heads, CONTEXT, config.head_dim)
    with torch.inference_mode():
        for layer in range(config.layers):
            cache.update(*(torch.randn(shape, dtype=model.dtype) * 0.5 for _ in range(2)), layer)

    def decode() -> Any:
        with torch.inference_mode():
            made = model(ids, past_key_values=cache, position_ids=position, use_cache=True, logits_to_keep=1).logits
            cache.crop(-1)
        return made

    return decode


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread after `seconds`."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled_run(
    model: Any, config: ModelConfig, case: str, limit_s: float, say: Callable[[str], None]
) -> Callable[[], Any] | None:
    """transformers_run of a torch.compile'd model, already compiled; None when that fails or takes too long."""
    import torch

    try:
        with time_limit(limit_s):
            run = transformers_run(torch.compile(model, dynamic=False), config, case)
            run()
            run()
    except Exception as error:  # any failure of the peer's compiler means "not available", and is reported
        say(f"torch.compile of {case}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return None
    return run


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens/s of every contender and case."""
    import torch

    say("loading weights")
    with open_checkpoint(args.model) as checkpoint:
        config = checkpoint.config
        weights = llama.load_weights(config, checkpoint, args.dtype)
        peers = {} if args.no_transformers else {d: transformers_model(checkpoint, d) for d in TORCH_DTYPES}
    names = ["taskgraph", "sequential", *(f"transformers_{d}" for d in peers), *(["torch_compile"] if peers else [])]
    rate: dict[str, dict[str, float | None]] = {name: dict.fromkeys(args.cases) for name in names}
    spreads: dict[str, dict[str, float]] = {name: {} for name in names}
    verdicts: dict[str, str] = {}
    for case in args.cases:
        say(f"{case}: planning and capturing")
        executables, plans = model_runs(config, weights, args.dtype, case)
        verdicts[case] = plans["taskgraph"].verdict.choice
        runs: dict[str, Callable[[], Any]] = {name: executable.launch for name, executable in executables.items()}
        runs |= {f"transformers_{d}": transformers_run(model, config, case) for d, model in peers.items()}
        if args.compile and peers:
            better = min(peers, key=lambda d: min(interleaved({d: runs[f"transformers_{d}"]}, rounds=2)[d]))
            built = compiled_run(peers[better], config, case, args.compile_limit, say)
            if built is not None:
                runs["torch_compile"] = built
        if case == "prefill_512" and peers:
            executables["taskgraph"].launch()
            ours = executables["taskgraph"].outputs[llama.LOGITS]
            theirs = runs["transformers_float32"]().view_as(ours)
            off = float((ours.float() - theirs).abs().max())
            say(f"{case}: largest difference of logits to transformers fp32 {off:.3f} (range {theirs.abs().max():.1f})")
        say(f"{case}: measuring")
        times = interleaved(runs, rounds=args.rounds, warmup=1, budget_s=args.budget, pause_s=0.01)
        for name, seconds in times.items():
            rate[name][case] = TOKENS[case] / statistics.median(seconds)
            spreads[name][case] = spread(seconds)
        for executable in executables.values():
            executable.close()
    result: dict[str, Any] = {"taskgraph": rate["taskgraph"], "sequential": rate["sequential"]}
    best = {case: max((rate[f"transformers_{d}"][case] or 0.0 for d in peers), default=None) for case in args.cases}
    result["transformers"] = best if peers else None
    result["torch_compile"] = rate.get("torch_compile") if args.compile else None
    result["transformers_by_dtype"] = {d: rate[f"transformers_{d}"] for d in peers}
    return {
        **result,
        "spread": spreads,
        "verdict": verdicts,
        "dtype": args.dtype,
        "machine": f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
    }


def table_of(result: dict[str, Any]) -> Table:
    """One row for each case."""
    table = Table(title="SmolLM2-135M, tokens/s (measured, median)", caption=result["machine"])
    peers = {f"transformers_{d}": row for d, row in result["transformers_by_dtype"].items()}
    columns = {"taskgraph": result["taskgraph"], "sequential": result["sequential"], **peers}
    if result["torch_compile"]:
        columns["torch_compile"] = result["torch_compile"]
    table.add_column("case")
    for name in columns:
        table.add_column(
            name.replace("transformers_", "transformers\n").replace("bfloat16", "bf16").replace("float32", "fp32"),
            justify="right",
        )
    table.add_column("gain over\ntransformers", justify="right")
    table.add_column("plan")
    for case in result["taskgraph"]:
        cells = [
            "-" if row[case] is None else f"{row[case]:,.1f}\n±{result['spread'][name][case]:.0%}"
            for name, row in columns.items()
        ]
        gain = "-" if not result["transformers"] else f"{result['taskgraph'][case] / result['transformers'][case]:.2f}x"
        table.add_row(case, *cells, gain, result["verdict"][case])
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.llm", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, or a checkpoint of the Llama family")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which cases to run")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16", help="of taskgraph's graphs (default bf16)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of a case (default 15)")
    parser.add_argument("--budget", type=float, default=4.0, help="stop a case after these seconds (default 4)")
    parser.add_argument("--no-transformers", action="store_true", help="taskgraph alone")
    parser.add_argument("--compile", action="store_true", help="also torch.compile the transformers model")
    parser.add_argument("--compile-limit", type=float, default=60.0, help="seconds for one compilation (default 60)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    args = parser.parse_args(argv)
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:5.1f} s] {text}", file=sys.stderr, flush=True)

    result = measure(args, say)
    Console(width=max(Console().width, 110)).print(table_of(result))
    if args.json:
        print_json(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
