"""An engine on this machine's cores from a checkpoint, with its tokenizer."""

from dataclasses import dataclass

from taskgraph.errors import PlanError
from taskgraph.models.engine import Engine, cpu_engine
from taskgraph.models.llama import load_weights
from taskgraph.models.scheduler import Limits
from taskgraph.models.tokenizer import Tokenizer
from taskgraph.models.weights import open_checkpoint

PAGE = 32


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A served checkpoint."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    vocabulary: int


def open_local(
    source: str,
    *,
    dtype: str = "bf16",
    sequences: int = 32,
    tokens: int = 256,
    context: int = 2048,
    pages: int = 0,
    warm: bool = True,
) -> LocalModel:
    """The checkpoint's engine, with `pages` pages of 32 tokens (0: room for a quarter of what all sequences may have).

    With `warm` every step is planned and captured now. PlanError for a dtype that is none; RequestError for limits."""
    if dtype not in ("bf16", "f32"):
        raise PlanError(f"dtype is bf16 or f32; got {dtype!r}.")
    with open_checkpoint(source) as checkpoint:
        config, tokenizer = checkpoint.config, checkpoint.tokenizer()
        weights = load_weights(config, checkpoint, dtype)
    limits = Limits(sequences, tokens, chunks=min(16, sequences), context=min(context, config.max_context))
    pages = pages or max(sequences * limits.context // PAGE // 4, limits.context // PAGE)
    engine = cpu_engine(config, weights, limits, pages=pages, page_size=PAGE, dtype=dtype)
    if warm:
        engine.runner.warm()  # type: ignore[attr-defined]
    return LocalModel(config.name, engine, tokenizer, config.vocab_size)
