"""The serving engine from Python: several requests at once, streamed, one of them sampled, one cancelled.

The model is tiny and its weights are random; `taskgraph.serving.local.open_local("smollm2", Limits())` opens a real
one.
Run it with `python examples/serving_engine.py`.
"""

from collections import defaultdict
from dataclasses import replace

import torch

from taskgraph.models import llama
from taskgraph.models.config import load_config
from taskgraph.serving.options import KvMemory
from taskgraph.serving.requests import Request, Sampling
from taskgraph.serving.runners.cpu import cpu_engine
from taskgraph.serving.scheduler import Limits


def main() -> None:
    base = load_config("smollm2-135m")
    sizes = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "heads": 4, "kv_heads": 2, "head_dim": 16}
    config = replace(base, name="tiny", layers=2, **sizes)
    torch.manual_seed(0)
    shapes = llama.step_graph(config, batch=1, tokens=1, cache=8, dtype="f32").flat().with_role("weight")
    weights = {t.name: torch.randn(t.shape) * 0.3 for t in shapes}

    streamed: dict[int, list[int]] = defaultdict(list)
    with cpu_engine(config, weights, Limits(4, 32, chunks=2, context=64), KvMemory(12)) as engine:
        engine.submit(Request([7, 1, 4], max_tokens=6))
        engine.submit(Request([7, 1, 4], max_tokens=6, sampling=Sampling(temperature=0.9, top_p=0.9, seed=5)))
        unwanted = engine.submit(Request([2] * 20, max_tokens=40))
        while engine.busy:
            output = engine.step()
            for request, token in zip(output.requests.tolist(), output.tokens.tolist(), strict=True):
                streamed[request].append(token)
            if len(streamed[unwanted]) == 3:
                engine.cancel(unwanted)
            for completion in output.finished:
                print(f"request {completion.request}: {len(completion.tokens)} tokens, {completion.reason}")
        print("pages held:", engine.cache.device.held)


if __name__ == "__main__":
    main()
