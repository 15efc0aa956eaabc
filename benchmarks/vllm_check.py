"""Greedy tokens of vLLM with and without taskgraph: python -m benchmarks.vllm_check (`make test-vllm` sets it up).

A random Llama of two layers is served by vLLM on the CPU in processes of their own: eager, with every call by a plan of
ours, and with the verdict by measurement. The tokens must be the same, and every layer must have run in our plans.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LAYERS = 2
WAYS = {"eager": "", "plans": "taskgraph.embed.vllm.planned", "measured": "taskgraph"}
"""The backend of each way; vLLM's own eager mode without one."""


def make_model(folder: Path) -> None:
    """Random weights and a tokenizer whose words are numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(512)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)


def generate(folder: Path, backend: str, tokens: int) -> dict[str, Any]:
    """The tokens of a few prompts of random lengths, and what ran through taskgraph."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    chance = random.Random(0)
    prompts = [[chance.randrange(512) for _ in range(chance.randint(1, 60))] for _ in range(6)]
    how: dict[str, Any] = {"compilation_config": {"mode": 2, "backend": backend, "ir_enable_torch_wrap": True}}
    llm = LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=4,
        **(how if backend else {"enforce_eager": True}),
    )
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    made = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], sampling, use_tqdm=False)
    found: dict[str, Any] = {"tokens": [list(one.outputs[0].token_ids) for one in made], "report": [], "layers": {}}
    if backend:
        from taskgraph.embed import report, vllm

        found |= {"report": [told(piece) for piece in report().pieces], "layers": dict(vllm.calls_of_layers())}
    return found


def told(piece: Any) -> str:
    """A bucket for people."""
    how = f"plan of {piece.ops} ops" if piece.way == "plan" else f"eager torch ({piece.reason})"
    if piece.way == "plan" and piece.eager_s:
        how += f", {1e6 * piece.plan_s:.0f} us against {1e6 * piece.eager_s:.0f} us eager (measured)"
    return f"up to {piece.shape} tokens: {piece.calls} calls, {how}"


def run(way: str, folder: Path, tokens: int) -> dict[str, Any]:
    """`generate` in a process of its own."""
    out = folder / f"{way}.json"
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "benchmarks.vllm_check", "--tokens", str(tokens), "--one", way, str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if ended.returncode:
        raise SystemExit(f"vLLM did not run ({way}):\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
    made: dict[str, Any] = json.loads(out.read_text())
    return made


def main() -> int:
    """0 where all tokens are equal and every layer ran through us."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each prompt (default 32)")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        way, folder = given.one[0], Path(given.one[1])
        (folder / f"{way}.json").write_text(json.dumps(generate(folder, WAYS[way], given.tokens)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        made = {way: run(way, folder, given.tokens) for way in WAYS}
    wanted = made["eager"]["tokens"]
    count, right = sum(map(len, wanted)), True
    print(f"vLLM without taskgraph: {count} tokens of {len(wanted)} prompts")
    for way in ("plans", "measured"):
        equal = sum(a == b for x, y in zip(wanted, made[way]["tokens"], strict=True) for a, b in zip(x, y, strict=True))
        layers = made[way]["layers"]
        print(f"with taskgraph, {way}: {equal} of {count} tokens equal")
        print(
            f"{len(layers)} of {LAYERS} layers ran in plans: {', '.join(f'{k} {n} times' for k, n in layers.items())}"
        )
        print("\n".join(made[way]["report"]))
        right &= equal == count and len(layers) == LAYERS
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
