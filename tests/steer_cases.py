"""A tiny model in which some tokens are poison: their embeddings are NaN or infinite, so that what has them in its
prompt has no likeliest token; and requests of every kind for it."""

from typing import Any

import numpy as np
import torch

from taskgraph.models import llama
from taskgraph.models.config import ModelConfig, from_hf
from taskgraph.serving.engine import Engine
from taskgraph.serving.requests import Completion, Request, Sampling
from taskgraph.serving.scheduler import Limits

NAN_TOKEN, INF_TOKEN, SOUND = 159, 158, 150
LIMITS = Limits(sequences=4, tokens=24, chunks=2, context=128)


def config() -> ModelConfig:
    body = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 160, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "tie_word_embeddings": False,
    }  # fmt: skip
    return from_hf(body, "poisoned")


def weights(dtype: str = "f32", poisoned: bool = True) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    shapes = llama.step_graph(config(), batch=1, tokens=1, cache=8, dtype=dtype).flat().with_role("weight")
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    made = {t.name: (torch.randn(t.shape, generator=drawn) * 0.3).to(kind) for t in shapes}
    made["lm_head"][SOUND:] = 0.0  # never among the likeliest twenty, so that no answer comes to have poison
    if poisoned:
        made["embed"][NAN_TOKEN] = float("nan")
        made["embed"][INF_TOKEN, ::2] = float("inf")
    return made


def load(group: Any) -> dict[str, torch.Tensor]:
    """For ranks; there is one."""
    return weights()


def sound(count: int = 10) -> list[Request]:
    """Requests that ask for something different each, in turn."""
    draw = np.random.default_rng(7)
    asks: list[dict[str, Any]] = [
        {},
        {"sampling": Sampling(temperature=0.9, top_p=0.9, top_k=20, seed=5)},
        {"sampling": Sampling(presence_penalty=1.0, frequency_penalty=0.7)},
        {"logprobs": 3},
        {
            "sampling": Sampling(
                temperature=1.1, top_k=20, frequency_penalty=-0.4, seed=9, logit_bias={3: 5.0, 4: -100.0}
            )
        },
        {"sampling": Sampling(logit_bias={11: 2.5}), "logprobs": 0},
    ]
    return [
        Request(draw.integers(0, SOUND, int(draw.integers(1, 45))).tolist(), int(draw.integers(5, 40)), **asks[i % 6])
        for i in range(count)
    ]


def poisoned() -> list[Request]:
    return [
        Request([NAN_TOKEN] * 40, 20),
        Request([1, 2, NAN_TOKEN, 3], 20, Sampling(temperature=1.0)),
        Request([INF_TOKEN, 3], 5, logprobs=2),
        Request([1] * 33 + [NAN_TOKEN], 20, Sampling(presence_penalty=1.0)),
    ]


def told(done: Completion) -> tuple[Any, ...]:
    """What a client sees of a completion."""
    return done.tokens, done.reason, [(c.token, round(c.logprob, 3), [t for t, _ in c.top]) for c in done.chances]


def alone(engine: Engine) -> list[tuple[Any, ...]]:
    return [told(engine.run([request])[0]) for request in sound()]


def beside_poison(engine: Engine) -> list[tuple[Any, ...]]:
    """The sound requests' answers beside the poisoned ones and, in the pages that those leave, after them."""
    bad, mixed = poisoned(), []
    for i, request in enumerate(sound()):
        mixed += [request, bad[i % len(bad)]]
    done = engine.run(mixed)
    for number, completion in enumerate(done[1::2]):
        assert (completion.reason, completion.tokens) == ("failed", ())
        assert f"request {completion.request}: its logits are no finite numbers" in completion.error, number
    after = engine.run(sound())
    assert [told(c) for c in after] == [told(c) for c in done[::2]]
    assert (engine.cache.device.held, engine.cache.host.held, engine.busy) == (0, 0, False)
    return [told(c) for c in after]
