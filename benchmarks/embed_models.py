"""The modules of `benchmarks.embed`: architectures of transformers with small random weights, and plain torch modules.

Each is a function that returns a module in evaluation mode and its named inputs.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

Made = tuple[nn.Module, dict[str, torch.Tensor]]
_TEXT: Final[dict[str, Any]] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_IDS: Final = (1, 16)


class Only(nn.Module):
    """The module with fixed options, and only the tensor that it is for."""

    def __init__(self, inner: nn.Module, **options: Any) -> None:
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.inner(**inputs, **self.options)[0]
        return made


def _transformers(
    config: str, model: str, options: dict[str, Any], inputs: Callable[[], dict[str, Any]], **call: Any
) -> Callable[[], Made]:
    def make() -> Made:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**options))
        return Only(made.eval(), **call), inputs()

    return make


def _ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 512, _IDS)}


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, 32, 32)}


def _decoder(name: str, more: dict[str, Any] | None = None, model: str = "") -> Callable[[], Made]:
    return _transformers(
        f"{name}Config", model or f"{name}ForCausalLM", {**_TEXT, **(more or {})}, _ids, use_cache=False
    )


_EXPERTS: Final[dict[str, Any]] = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "experts_implementation": "batched_mm",
}  # fmt: skip
_GPT: Final = {"vocab_size": 512, "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 128}
_BERT: Final = {**_TEXT, "type_vocab_size": 2}
_VISION: Final = {**_TEXT, "image_size": 32, "patch_size": 8}
_T5: Final = {"vocab_size": 512, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4}
_BART: Final = {
    "vocab_size": 512, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "max_position_embeddings": 128,
}  # fmt: skip
_WHISPER: Final = {
    **_BART, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32, "pad_token_id": 0,
    "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MAMBA: Final = {"vocab_size": 512, "hidden_size": 128, "state_size": 8, "num_hidden_layers": 3}


def _pair() -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 512, _IDS), "decoder_input_ids": torch.randint(0, 512, (1, 4))}


def _speech() -> dict[str, Any]:
    return {"input_features": torch.randn(1, 16, 64), "decoder_input_ids": torch.randint(0, 512, (1, 4))}


TRANSFORMERS: Final[dict[str, Callable[[], Made]]] = {
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral"),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", {"head_dim": 32}),
    "gemma2": _decoder("Gemma2", {"head_dim": 32}),
    "phi3": _decoder("Phi3", {"pad_token_id": 0}),
    "gpt2": _transformers("GPT2Config", "GPT2LMHeadModel", _GPT, _ids, use_cache=False),
    "gpt_neox": _decoder("GPTNeoX"),
    "opt": _decoder("OPT", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "mixtral": _decoder("Mixtral", _EXPERTS),
    "qwen3_moe": _decoder("Qwen3Moe", {**_EXPERTS, "head_dim": 32}),
    "bert": _transformers("BertConfig", "BertForMaskedLM", _BERT, _ids),
    "distilbert": _transformers(
        "DistilBertConfig", "DistilBertForMaskedLM",
        {"vocab_size": 512, "dim": 128, "n_layers": 4, "n_heads": 4, "hidden_dim": 256}, _ids,
    ),
    "t5": _transformers("T5Config", "T5ForConditionalGeneration", _T5, _pair, use_cache=False),
    "bart": _transformers("BartConfig", "BartForConditionalGeneration", _BART, _pair, use_cache=False),
    "vit": _transformers("ViTConfig", "ViTForImageClassification", _VISION, _image),
    "dinov2": _transformers("Dinov2Config", "Dinov2Model", _VISION, _image),
    "swin": _transformers(
        "SwinConfig", "SwinModel",
        {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        _image,
    ),
    "convnext": _transformers(
        "ConvNextConfig", "ConvNextModel", {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]}, _image,
    ),
    "whisper": _transformers("WhisperConfig", "WhisperForConditionalGeneration", _WHISPER, _speech, use_cache=False),
    "mamba": _transformers("MambaConfig", "MambaForCausalLM", _MAMBA, _ids, use_cache=False),
    "mamba2": _transformers(
        "Mamba2Config", "Mamba2ForCausalLM",
        {**_MAMBA, "num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 16}, _ids, use_cache=False,
    ),
}  # fmt: skip
"""Decoders, dense and of experts; encoders; encoder-decoders; vision; speech; state spaces."""


# ------------------------------------------------------------------------------------- plain torch


class ConvNet(nn.Module):
    """Convolutions with batch norm, pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.body(x))
        return made


class Lstm(nn.Module):
    """Two layers of an LSTM and a head on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(32, 64, 2, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made, _ = self.rnn(x)
        out: torch.Tensor = self.head(made[:, -1])
        return out


class UNet(nn.Module):
    """Down, across and up again, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.up, self.out = nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.Conv2d(19, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.silu(self.down(x))
        h = self.up(torch.nn.functional.silu(self.middle(h)) + h)
        made: torch.Tensor = self.out(torch.cat([h, x], 1))
        return made


class MaySkip(nn.Module):
    """A layer that is skipped where the data says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = torch.relu(self.layer(x))
        if made.mean() > 0.05:
            return x + made
        return x


class Pruned(nn.Module):
    """Control that depends on data: it has to be compiled, as no one graph holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MaySkip(), MaySkip()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.second(self.first(x))
        return made


class InPlace(nn.Module):
    """Changes in place of its own tensors, whole and in part."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        h.relu_()
        h[:, :32] *= 0.5
        h[:, 32:64].add_(1)
        made: torch.Tensor = self.down(h)
        return made.add_(x)


class Views(nn.Module):
    """Views and aliases of one memory, read before and after it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.mix(x)
        parts = h.view(h.shape[0], 4, 16).transpose(0, 1)
        first, rest = parts[0], parts[1:]
        rest.mul_(first)
        return torch.cat([h.t(), parts.reshape(4, -1).repeat(1, 4).view(64, -1)], 1).t()


def _plain(make: Callable[[], nn.Module], *size: int) -> Callable[[], Made]:
    def made() -> Made:
        torch.manual_seed(0)
        return make().eval(), {"x": torch.randn(*size)}

    return made


PLAIN: Final[dict[str, Callable[[], Made]]] = {
    "conv_net": _plain(ConvNet, 1, 3, 32, 32),
    "lstm": _plain(Lstm, 1, 16, 32),
    "u_net": _plain(UNet, 1, 3, 32, 32),
    "pruned": _plain(Pruned, 4, 64),
    "in_place": _plain(InPlace, 4, 64),
    "views": _plain(Views, 4, 64),
}
"""Plain torch modules; `pruned` has control that depends on data."""

MODELS: Final = {**TRANSFORMERS, **PLAIN}
BY_COMPILE: Final = frozenset({"pruned"})
"""Modules that only torch.compile takes."""
