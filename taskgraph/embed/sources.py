"""Modules that a command line names: a factory in somebody's package, or a Hugging Face config without weights."""

import importlib
import sys
from pathlib import Path
from typing import Any, Final

import torch

from taskgraph.embed.importer import Imported, arguments, from_torch
from taskgraph.errors import ConfigError, GraphError
from taskgraph.record import shown

_DTYPES: Final = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def made_by(spec: str) -> tuple[torch.nn.Module, Any]:
    """The module and its example inputs, which the factory "package.module:function" returns, in evaluation mode.

    GraphError for a factory that cannot be imported or returns something else. Modules in the current folder are found.
    """
    package, _, name = spec.partition(":")
    if not name:
        raise GraphError(f"a factory is written as package.module:function; got {shown(spec)}.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        factory: Any = importlib.import_module(package)
        for part in name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise GraphError(f"the factory {spec!r} cannot be imported: {error}.") from error
    made = factory() if callable(factory) else factory
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        raise GraphError(f"the factory {spec!r} returned {shown(made)}; it returns (module, example inputs).")
    module, inputs = made
    arguments(inputs)
    return module.eval(), inputs


def imported_by(spec: str) -> Imported:
    """The graph of what the factory "package.module:function" returns."""
    module, inputs = made_by(spec)
    return from_torch(module, inputs)


class _Decoder(torch.nn.Module):
    """One step of a causal language model over a static cache, which is its buffers: the logits of each sequence's last
    token."""

    def __init__(self, model: Any, batch: int, context: int, dtype: torch.dtype) -> None:
        from transformers import StaticCache

        super().__init__()
        self.model, text = model, model.config.get_text_config()
        self.cache = StaticCache(config=text, max_cache_len=context)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.cache.early_initialization(batch, heads, width, dtype, torch.device("meta"))
        self.places: list[tuple[Any, str, str]] = []
        for i, layer in enumerate(self.cache.layers):
            for name, value in list(vars(layer).items()):
                if isinstance(value, torch.Tensor):
                    self.register_buffer(f"cache_{i}_{name}", value)
                    self.places.append((layer, name, f"cache_{i}_{name}"))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        for layer, name, buffer in self.places:  # the buffers, which torch.export has replaced by its own
            setattr(layer, name, getattr(self, buffer))
        made = self.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = made.logits
        return logits


def hugging_face(source: str, *, batch: int, context: int, tokens: int, dtype: str = "bf16") -> Imported:
    """One step of the model of a config.json or its folder, without weights: `tokens` new tokens of each of `batch`
    sequences over a static cache of `context`.

    A causal language model, as transformers writes it, on the meta device. ConfigError for a source that transformers
    cannot read or that is no such model, and for one whose code cannot be exported.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError("hf: needs transformers; install it, or give a known size.") from error
    path = Path(source)
    try:
        config = AutoConfig.from_pretrained(str(path.parent if path.suffix == ".json" else path), local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=_DTYPES[dtype]).eval()
            step = _Decoder(model, batch, context, _DTYPES[dtype])
    except Exception as error:  # transformers raises anything
        text = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"transformers makes no causal language model of {source!r} ({type(error).__name__}: {text})."
        ) from error
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device="meta")
    return from_torch(step, (ids,))
