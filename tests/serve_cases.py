"""A server whose model is a formula: for the tests of the front, and as a process of its own for those of shutdown."""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models as raw_models

from taskgraph.models.text.tokenizer import Tokenizer
from taskgraph.serving.batch import Batch
from taskgraph.serving.cache.pages import PagedCache
from taskgraph.serving.engine import Engine
from taskgraph.serving.http.app import Served, run_server
from taskgraph.serving.runners.runner import Tell
from taskgraph.serving.sampling import Ints
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.service import Service

TEMPLATE = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + ':' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>{% endif %}"
)
VOCABULARY, END = 258, 257
PAGE, CONTEXT = 8, 256


def raw_tokenizer() -> RawTokenizer:
    """A token a byte, and two special ones: 256 begins a turn, 257 ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(raw_models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True) for text in ("<|turn|>", "<|end|>")])
    return raw


def byte_tokenizer() -> Tokenizer:
    """That tokenizer, with a chat template."""
    return Tokenizer(raw_tokenizer(), source="the test", eos_ids=[END], chat_template=TEMPLATE)


LETTERS = byte_tokenizer().encode("abcdefghijklmnopqrstuvwxyz")


def follows(token: int) -> int:
    """The token that this model gives after `token`: the next letter, and "a" after anything else."""
    return LETTERS[(LETTERS.index(token) + 1) % 26] if token in LETTERS else LETTERS[0]


def said(prompt: str, tokens: int) -> str:
    """What the model answers."""
    text, tokenizer = tokenizer_ids(prompt), byte_tokenizer()
    for _ in range(tokens):
        text.append(follows(text[-1]))
    return tokenizer.decode(text[-tokens:])


def tokenizer_ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


@dataclass
class FormulaRunner:
    """A runner of that model. A step takes `step_s`; step number `fails_at` raises; `ends` ends answers after "z"."""

    step_s: float = 0.0
    fails_at: int = -1
    ends: bool = False
    closed: bool = False
    steps: int = 0
    seeds: Any = None

    planned: int = 0

    def warm(self, within_s: float = math.inf, tell: Tell | None = None) -> None:
        """Nothing to plan."""

    def check(self) -> None:
        """Nothing can be lost."""

    def now(self) -> float:
        return time.perf_counter()

    def launch(self, batch: Batch) -> None:
        self.batch = batch

    def wait(self) -> tuple[Ints, float]:
        self.steps += 1
        if self.steps == self.fails_at:
            raise ConnectionError("rank 1 is lost")
        time.sleep(self.step_s)
        b = self.batch
        rows = np.concatenate([np.arange(b.decode), b.decode + b.starts[1:] - 1]).astype(np.int64)
        samples = np.array([self._next(int(token)) for token in b.tokens[rows]], np.int64)
        return samples, self.now()

    def _next(self, token: int) -> int:
        return END if self.ends and token == LETTERS[-1] else follows(token)

    def sleep_until(self, at_s: float) -> None:
        time.sleep(max(at_s - self.now(), 0.0))

    def close(self) -> None:
        self.closed = True


def make_served(
    *, pages: int = 256, most_open: int = 64, most_body_bytes: int = 4096, sequences: int = 8, **runner: Any
) -> Served:
    """What is served; close its service."""
    limits = Limits(sequences=sequences, tokens=64, chunks=8, context=CONTEXT)
    engine = Engine(FormulaRunner(**runner), PagedCache(pages, PAGE), limits, vocabulary=VOCABULARY)
    return Served(Service(engine, most_open), byte_tokenizer(), "formula", most_body_bytes)


def main() -> None:
    """Serve on a free port and print it; arguments: step_s, drain_s, fails_at, and a file of API keys, if any."""
    from taskgraph.errors import TaskgraphError
    from taskgraph.serving.http.access import access_of
    from taskgraph.serving.http.keys import KeyRing

    step_s, drain_s, fails_at = (float(text) for text in sys.argv[1:4])
    served = make_served(step_s=step_s, fails_at=int(fails_at))
    try:
        tell = partial(print, flush=True)
        rules = access_of("127.0.0.1", KeyRing.load(sys.argv[4])) if len(sys.argv) > 4 else None
        run_server(served, "127.0.0.1", 0, drain_s=drain_s, access=rules, started=tell, say=tell)
    except TaskgraphError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print("stopped", flush=True)


if __name__ == "__main__":
    main()
