"""The sections of `benchmarks.gpu`: each yields what it has found so far.

One alone: `python -m benchmarks.gpu_sections NAME`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import util
from typing import Any

import numpy as np
import torch

from taskgraph.graph.device import Device
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig, load_config
from taskgraph.runtime.gpu.ahead.products import TILINGS, Tiling, gemm_launches, shared_bytes
from taskgraph.runtime.gpu.driver import Gpu
from taskgraph.runtime.gpu.virtual import is_virtual
from taskgraph.serving.options import KvMemory
from taskgraph.serving.requests import Completion, Request
from taskgraph.serving.runners.gpu import gpu_engine
from taskgraph.serving.scheduler import Limits
from taskgraph.tune.gpucheck import cases, checks
from taskgraph.tune.gpucheck.cases import Case
from taskgraph.tune.gpucheck.fast import Fast
from taskgraph.tune.gpucheck.gaps import chained, timed
from taskgraph.tune.gpucheck.rig import PartitionStream, Rig
from taskgraph.tune.gpucheck.run import planning_target

Found = Mapping[str, Any]
ENGINE_KEYS = ("tokens_per_s", "step_s", "replay_s", "transformers_tokens_per_s", "vllm_tokens_per_s")
SHARES = (1.0, 0.727, 0.5, 0.25)
"""Parts of the device whose SMs products are timed on: 96 of 132 is the second."""

_MOST_BYTES = 300e6
"""Of a kernel's tensors on a virtual device."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Where a section runs and how long it may."""

    device: str | None
    seconds: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def virtual(self) -> bool:
        """Whether times are simulated."""
        return is_virtual(self.device)

    @property
    def over(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() - self.begin > self.seconds

    def within(self, seconds: float) -> "Asked":
        """The same from now on for so long."""
        return Asked(self.device, seconds)


def about(asked: Asked) -> dict[str, Any]:
    """The device in words."""
    return {"device": Gpu.open(asked.device).capability.describe()}


@dataclass(frozen=True, slots=True)
class _Bed:
    """What timing needs."""

    gpu: Gpu
    device: Device
    rig: Rig
    fast: Fast

    @classmethod
    def of(cls, asked: Asked) -> "_Bed":
        gpu = Gpu.open(asked.device)
        device = planning_target(gpu, asked.device)
        return cls(gpu, device, Rig(gpu), cases.verified(gpu, device))

    def timed(self, case: Case, lane: PartitionStream) -> tuple[float, cases.CaseRunner]:
        """Seconds of one launch, and what was launched."""
        with cases.runner(case, self.gpu, self.device, self.fast) as made, self.rig.loop(made, lane) as loop:
            return self.rig.alone_s(loop), made


# ------------------------------------------------------------------------------------------------- kernels


def run_checks(asked: Asked) -> Iterator[Found]:
    """gpu-check's checks: op kinds against the cpu backend, placement, memory."""
    bed = _Bed.of(asked)
    bench = checks.Bench(bed.gpu, bed.device, asked.device)
    for name, check in checks.CHECKS.items():
        if asked.over:
            return
        made = checks.checked(name, check, bench)
        yield {"checks": {name: {"holds": made.passed, "asked": made.asked, "seen": made.seen}}}


def kernels(asked: Asked) -> Iterator[Found]:
    """Every kernel of a step on the whole device; `share` is the least time that the published rates of arithmetic and
    memory allow over the time that it took: above 1 where the L2 holds what it reads."""
    bed = _Bed.of(asked)
    every = [*cases.rate_cases(cases.LARGE), *cases.step_cases(cases.LARGE), *cases.gemm_cases(cases.LARGE)]
    with bed.rig.lanes(bed.gpu.capability.sm_count) as (lane,):
        for case in every:
            if asked.over:
                return
            if asked.virtual and sum(t.nbytes for t in case.graph.tensors) > _MOST_BYTES:
                yield {"left_out_kernels": {case.name: "more memory than a virtual device should take of its host"}}
                continue
            try:
                seconds, made = bed.timed(case, lane)
            except Exception as error:  # the others are timed all the same
                yield {"failed_kernels": {case.name: " ".join(f"{type(error).__name__}: {error}".split())[:300]}}
                continue
            (op,) = case.graph.ops
            flops = case.fills in ("dense", "blocks")
            done = op.work.flops if flops else op.work.hbm_bytes
            least = op.work.flops / bed.device.rate("bf16"), op.work.hbm_bytes / bed.device.hbm_bytes_per_s
            row = {"seconds": seconds, "per_s": done / seconds, "unit": "FLOP/s" if flops else "B/s"}
            row |= {"rate": made.rate(seconds), "share": max(least) / seconds, "by": made.choice}
            row["limit"] = "arithmetic" if least[0] > least[1] else "memory"
            yield {"kernels": {case.name: row}}


def gaps(asked: Asked) -> Iterator[Found]:
    """Small kernels in a chain: seconds of a launch begun at the end of the one before, and begun while that runs."""
    bed = _Bed.of(asked)
    if not bed.gpu.capability.dependent:
        yield {"gaps": {}}
        return
    for case in [None, *chained(cases.SMALL if asked.virtual else cases.LARGE, bool(bed.gpu.ahead("gemm")))]:
        if asked.over:
            return
        row = timed(bed.rig, bed.device, bed.fast, case)
        saved_s = row.after_end_s - row.dependent_s
        found = {"after_end_s": row.after_end_s, "dependent_s": row.dependent_s, "saved_s": saved_s}
        yield {"gaps": {row.kernel: found}}


def _sizes(bed: _Bed) -> list[int]:
    """The whole device, then parts of it that it can divide into."""
    total, step = bed.gpu.capability.sm_count, max(bed.device.sm_granularity, bed.device.sm_min)
    if not bed.gpu.capability.partitions:
        return [total]
    parts = [total if share == 1.0 else max(step, round(share * total / step) * step) for share in SHARES]
    return list(dict.fromkeys(parts))


def products(asked: Asked) -> Iterator[Found]:
    """The products of a layer on several numbers of SMs, by the library and by our own persistent kernel."""
    bed = _Bed.of(asked)
    named = [case for case in cases.gemm_cases(cases.LARGE) if case.name.endswith(f"_{cases.LARGE.rows}")]
    choices: dict[str, Callable[[Case], Case]] = {"library": lambda case: case}
    if bed.gpu.ahead("gemm"):
        choices["own"] = lambda case: replace(case, rule=gemm_launches)
    made: dict[str, dict[str, dict[str, Any]]] = {}
    for size in _sizes(bed):
        with bed.rig.lanes(size) as (lane,):
            for case in named:
                for choice, of in choices.items():
                    if asked.over:
                        return
                    row = made.setdefault(case.name, {}).setdefault(choice, {"seconds": {}, "of_full": {}})
                    row["seconds"][str(lane.sms)] = bed.timed(of(case), lane)[0]
                    full = made[case.name]["library"]["seconds"][str(bed.gpu.capability.sm_count)]
                    row["of_full"] = {sms: full / seconds for sms, seconds in row["seconds"].items()}
        yield {"products": made}


def tiles(asked: Asked) -> Iterator[Found]:
    """Our own products on three quarters of the device by every tile shape: which should be taken."""
    bed = _Bed.of(asked)
    if not bed.gpu.ahead("gemm"):
        yield {"tiles": {"skipped": "a virtual device has one time for all tile shapes"}}
        return
    limit, (_, size, *_) = shared_bytes(bed.gpu.arch), _sizes(bed)
    fits = [t for t in TILINGS if t.rows >= 64 and t.fits(0, limit)]
    with bed.rig.lanes(size) as (lane,):
        for case in cases.gemm_cases(cases.LARGE):
            rows: dict[str, float] = {}
            for tile in fits:
                if asked.over:
                    return
                rows[_told(tile)] = bed.timed(replace(case, rule=partial(gemm_launches, tile=tile)), lane)[0]
                yield {"tiles": {f"{case.name} on {lane.sms} SMs": dict(sorted(rows.items(), key=lambda row: row[1]))}}


def _told(tile: Tiling) -> str:
    return f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps, {tile.stages} stages, {tile.blocks} an SM"


# -------------------------------------------------------------------------------------------------- engine


@dataclass(frozen=True, slots=True)
class Serving:
    """A model, and how many sequences of how many tokens in and out."""

    config: ModelConfig
    sequences: int
    tokens_in: int
    tokens_out: int

    @classmethod
    def of(cls, asked: Asked) -> "Serving":
        """Llama 3.2 1B; a tiny one on a virtual device, where a host computes all."""
        config = load_config("llama-3.2-1b")
        if not asked.virtual:
            return cls(config, 256, 256, 64)
        small = {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate_size": 96}
        return cls(replace(config, vocab_size=160, **small), 4, 24, 6)

    def prompts(self) -> list[list[int]]:
        """The same every time."""
        draw = np.random.default_rng(5)
        return draw.integers(0, self.config.vocab_size, (self.sequences, self.tokens_in)).tolist()

    def weights(self) -> dict[str, torch.Tensor]:
        """Random, bf16: pieces of one block of numbers, which is quicker than to draw a billion."""
        graph = llama.step_graph(self.config, batch=1, tokens=1, cache=8, dtype="bf16").flat()
        block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(5)).bfloat16()
        made = {}
        for i, t in enumerate(graph.with_role("weight")):
            count = int(np.prod(t.shape))
            whole = block.roll(977 * i).repeat(-(-count // len(block)))[:count].reshape(t.shape)
            made[t.name] = whole / np.sqrt(t.shape[-1]) if len(t.shape) > 1 else torch.ones_like(whole)
        return made


_WARM_S = 30.0
"""Seconds to plan and capture steps in; of a virtual device those are captured that the requests come to."""


_TPOT_S = {"mixed": None, "apart": 0.03}
"""Seconds a token that the engine is asked for, by the way that is measured: `apart` chooses, and may stay mixed."""


def engine(asked: Asked) -> Iterator[Found]:
    """Tokens/s of the engine, its median decode step, and the replay of that step's graph alone; then the same requests
    with a wanted time a token, so that prompts may run beside what decodes."""
    serving = Serving.of(asked)
    ways: dict[str, dict[str, Any]] = {}
    for way, tpot_s in _TPOT_S.items():
        found, ways[way] = _engine(asked, serving, tpot_s)
        if way == "mixed":
            yield {"engine": found}
        yield {"engine": {"ways": ways}}
        if asked.over:
            return


def _engine(asked: Asked, serving: Serving, tpot_s: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an engine reached, and what tells one way from the other."""
    n, room = serving.sequences, serving.tokens_in + serving.tokens_out
    limits = Limits(sequences=n, tokens=min(2048, n * serving.tokens_in), chunks=min(8, n), context=2 * room)
    pages = n * -(-room // 16) + 8
    requests = [Request(prompt, max_tokens=serving.tokens_out) for prompt in serving.prompts()]
    planner = "list" if asked.virtual else "auto"
    with gpu_engine(
        serving.config, serving.weights(), limits, KvMemory(pages), device=asked.device, planner=planner, tpot_s=tpot_s
    ) as made:
        if not asked.virtual:
            made.runner.warm(_WARM_S)  # nothing is planned or captured from then on
        made.run(requests)
        beside, steps = made.stats.beside, made.stats.steps
        for request in requests:
            made.submit(request)
        begin, each, tokens, done = time.perf_counter(), [], 0, list[Completion]()
        while made.busy:
            at = time.perf_counter()
            output = made.step()
            tokens += len(output.tokens)
            done += output.finished
            each.append(time.perf_counter() - at)
        seconds = time.perf_counter() - begin
        beside, steps = made.stats.beside - beside, made.stats.steps - steps
        runner: Any = made.runner
        last = runner.last.bucket  # all decode in the end
        replay_s = runner.bank[last].replay_seconds(1 if asked.virtual else 20)
    found: dict[str, Any] = {"replay_s": replay_s, "sequences": n, "tokens_in": serving.tokens_in}
    found["tokens_out"] = serving.tokens_out
    way: dict[str, Any] = {"tpot_wanted_s": tpot_s, "steps": steps, "steps_beside": beside}
    if asked.virtual:
        found |= {"tokens_per_s": n / replay_s, "step_s": replay_s, "host": "not counted: simulated"}
        return found, {**way, "seconds": "not counted: simulated"}
    decode = each[len(each) // 4 :]  # prompts come first
    tpot = [(c.end_s - c.first_s) / (len(c.tokens) - 1) for c in done if len(c.tokens) > 1]
    found |= {"tokens_per_s": tokens / seconds, "step_s": statistics.median(decode)}
    way |= {"tokens_per_s": tokens / seconds, "ttft_mean_s": statistics.mean(c.first_s - c.arrival_s for c in done)}
    return found, {**way, "tpot_mean_s": statistics.mean(tpot), "tpot_p99_s": float(np.percentile(tpot, 99))}


def transformers(asked: Asked) -> Iterator[Found]:
    """generate() of all sequences as one batch, the best of two runs."""
    import transformers as library

    serving, place = Serving.of(asked), "cpu" if asked.virtual else "cuda"
    c = serving.config
    config = library.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        max_position_embeddings=c.max_context, tie_word_embeddings=c.tie_embeddings, attn_implementation="sdpa",
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(place):
        model = library.LlamaForCausalLM(config).eval().to(torch.bfloat16)
    ids = torch.tensor(serving.prompts(), device=place)
    best = float("inf")
    for _ in range(1 if asked.virtual else 2):
        begin = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=serving.tokens_out,
                min_new_tokens=serving.tokens_out, do_sample=False,
            )  # fmt: skip
        if place == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    count = int(made.shape[0] * (made.shape[1] - serving.tokens_in))
    yield {"engine": {"transformers_tokens_per_s": count / best, "transformers_on": place}}


def vllm(asked: Asked) -> Iterator[Found]:
    """vLLM with dummy weights of the same shapes, where it is installed and there is a GPU."""
    if asked.virtual or util.find_spec("vllm") is None:
        yield {"engine": {"vllm_tokens_per_s": None}}
        return
    import tempfile

    import transformers as library
    from vllm import LLM, SamplingParams

    serving = Serving.of(asked)
    c = serving.config
    with tempfile.TemporaryDirectory() as folder:
        library.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
            head_dim=c.head_dim, max_position_embeddings=4096, tie_word_embeddings=c.tie_embeddings,
            architectures=["LlamaForCausalLM"], torch_dtype="bfloat16",
        ).save_pretrained(folder)  # fmt: skip
        model = LLM(folder, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=serving.sequences)
        given = [{"prompt_token_ids": prompt} for prompt in serving.prompts()]
        how = SamplingParams(temperature=0.0, max_tokens=serving.tokens_out, ignore_eos=True, detokenize=False)
        model.generate(given[:8], how, use_tqdm=False)
        begin = time.perf_counter()
        made = model.generate(given, how, use_tqdm=False)
        count = sum(len(one.outputs[0].token_ids) for one in made)
        yield {"engine": {"vllm_tokens_per_s": count / (time.perf_counter() - begin)}}


@dataclass(frozen=True, slots=True)
class Section:
    """A section, and the seconds that it gets of a run of four minutes."""

    run: Callable[[Asked], Iterator[Found]]
    weight: float


SECTIONS: dict[str, Section] = {
    "checks": Section(run_checks, 30.0),
    "kernels": Section(kernels, 45.0),
    "products": Section(products, 30.0),
    "gaps": Section(gaps, 10.0),
    "engine": Section(engine, 60.0),
    "transformers": Section(transformers, 25.0),
    "tiles": Section(tiles, 25.0),
    "vllm": Section(vllm, 25.0),
}


def main(argv: Sequence[str] | None = None) -> int:
    """A section in this process: a line of JSON for all that it has found."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_sections", description=__doc__)
    parser.add_argument("section", choices=[*SECTIONS])
    parser.add_argument("--device", help="a virtual device (default: the GPU here)")
    parser.add_argument("--seconds", type=float, default=60.0, help="after so long it begins nothing more")
    args = parser.parse_args(argv)
    try:
        for found in SECTIONS[args.section].run(Asked(args.device, args.seconds)):
            print(json.dumps({"found": found}), flush=True)
    except Exception as error:
        print(json.dumps({"failed": " ".join(f"failed: {type(error).__name__}: {error}".split())[:500]}), flush=True)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
