"""Checkpoints: tensors by their Hugging Face names from GGUF or safetensors, whatever the source."""

import json
import re
import struct
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from taskgraph.errors import WeightsError
from taskgraph.models.config import ModelConfig, RopeScaling, load_config
from taskgraph.models.hub import smollm2_path, snapshot_path
from taskgraph.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class Checkpoint(Protocol):
    """An opened model: its configuration, tensors by Hugging Face name, and tokenizer."""

    @property
    def config(self) -> ModelConfig: ...

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors."""
        ...

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor of that name (float32 from GGUF, as stored from safetensors); WeightsError if there is none."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open "smollm2", a .gguf or .safetensors file, a folder in Hugging Face layout, or a hub id "org/name"."""
    if source == "smollm2":
        return GgufCheckpoint(smollm2_path())
    path = Path(source)
    if path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path.parent, [path])
    if path.is_dir():
        return SafetensorsCheckpoint(path, sorted(path.glob("*.safetensors")))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.exists():
        folder = snapshot_path(str(source))
        return SafetensorsCheckpoint(folder, sorted(folder.glob("*.safetensors")))
    raise WeightsError(
        f"no checkpoint {str(source)!r}: give smollm2, a .gguf or .safetensors file, a folder, or org/name."
    )


class _Closing:
    """Context manager by close()."""

    def close(self) -> None:
        """Drop the mapped file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# -------------------------------------------------------------------------------------------- GGUF

_GGUF_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None for tensors that have none (rope_freqs)."""
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match:
        part = _GGUF_LAYER.get(match[2])
        return f"model.layers.{match[1]}.{part}.{kind}" if part else None
    return f"{_GGUF_TOP[stem]}.{kind}" if stem in _GGUF_TOP else None


class GgufCheckpoint(_Closing):
    """A GGUF file, dequantised on demand by the gguf package."""

    def __init__(self, path: Path) -> None:
        import gguf

        if not path.is_file():
            raise WeightsError(f"no GGUF file at {str(path)!r}; check the path.")
        try:
            self._reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {key: f.contents() for key, f in self._reader.fields.items()}
            self.config = self._read_config(path.stem)
        except WeightsError:
            raise  # already says what is wrong; it is a ValueError too
        except (ValueError, IndexError, KeyError, ZeroDivisionError, OSError, struct.error) as error:
            raise WeightsError(f"{path} is truncated or not a GGUF file ({error!r}); fetch it again.") from error
        self._tensors = {n: t for t in self._reader.tensors if (n := hf_name(t.name)) is not None}
        end = max(int(t.data_offset) + int(t.n_bytes) for t in self._reader.tensors)
        if end > path.stat().st_size:
            raise WeightsError(f"{path} is truncated: {path.stat().st_size} bytes of {end}; fetch it again.")

    def _read_config(self, name: str) -> ModelConfig:
        arch = self.metadata["general.architecture"]
        if arch not in ("llama", "qwen2", "qwen3"):
            raise WeightsError(f"{name}: GGUF architecture {arch!r} is not supported; use llama, qwen2 or qwen3.")
        get = {k.removeprefix(f"{arch}."): v for k, v in self.metadata.items()}.get
        heads, hidden = int(get("attention.head_count", 0)), int(get("embedding_length", 0))
        names = {t.name for t in self._reader.tensors}
        head_dim, theta = int(get("attention.key_length", hidden // heads)), float(get("rope.freq_base", 10000.0))
        divisors = next((t.data for t in self._reader.tensors if t.name == "rope_freqs.weight"), None)
        return ModelConfig(
            name=name,
            family=str(arch),
            hidden_size=hidden,
            layers=int(get("block_count", 0)),
            heads=heads,
            kv_heads=int(get("attention.head_count_kv", heads)),
            head_dim=head_dim,
            intermediate_size=int(get("feed_forward_length", 0)),
            vocab_size=len(self.metadata["tokenizer.ggml.tokens"]),
            norm_eps=float(get("attention.layer_norm_rms_epsilon", 1e-5)),
            rope_theta=theta,
            max_context=int(get("context_length", 2048)),
            tie_embeddings="output.weight" not in names,
            rope_scaling=None if divisors is None else rope_scaling_of(np.asarray(divisors), theta, name),
        )

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors."""
        return tuple(self._tensors)

    def tensor(self, name: str) -> "torch.Tensor":
        """float32 tensor in Hugging Face layout; WeightsError if there is none of that name."""
        import gguf
        import torch

        if name not in self._tensors:
            raise WeightsError(f"the GGUF file has no tensor {name!r}; it does not hold this model.")
        stored = self._tensors[name]
        shape = tuple(int(n) for n in reversed(stored.shape))
        data = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy()).reshape(shape).float()
        heads = {"q_proj.weight": self.config.heads, "k_proj.weight": self.config.kv_heads}
        part = next((h for suffix, h in heads.items() if name.endswith(suffix)), None)
        return data if part is None or self.config.family != "llama" else _unpermuted(data, part)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file's metadata."""
        return Tokenizer.from_gguf(self.metadata)


def rope_scaling_of(divisors: npt.NDArray[np.float32], theta: float, name: str) -> RopeScaling | None:
    """The Llama 3 scaling behind a GGUF's rope_freqs, which divide the rotary frequencies one by one.

    Between its two bounds the scaling is 1/divisor = (1 - s)/factor + s with s linear in a frequency's turns over the
    original context (Llama 3.1's reference code), so a line through s gives the bounds. Only their ratios count; the
    lower one is 1, as in the published models. WeightsError when no such line gives the divisors back.
    """
    given = divisors.astype(np.float64).reshape(-1)
    factor = float(given.max())
    if np.allclose(given, 1.0):
        return None
    frequency = theta ** (-np.arange(len(given)) / len(given)) / (2 * np.pi)
    share = (1 / given - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-4) & (share < 1 - 1e-4)
    if between.sum() >= 2:
        slope, zero = np.polyfit(frequency[between], share[between], 1)
        low, high = 1.0, 1.0 - 1.0 / zero
        context = round(float(slope * (high - low)))
        found = ((frequency * context - low) / (high - low)).clip(0, 1)
        if np.allclose(1 / ((1 - found) / factor + found), given, rtol=1e-3):
            return RopeScaling(round(factor, 4), low, round(float(high), 4), context)
    raise WeightsError(
        f"{name}: its rope_freqs are not Llama 3's scaling of rotary frequencies, the one this version knows; "
        "use the safetensors checkpoint."
    )


def _unpermuted(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows of q or k from llama.cpp's interleaved rotary pairs back to Hugging Face's halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


# ------------------------------------------------------------------------------------- safetensors


class SafetensorsCheckpoint(_Closing):
    """A folder with config.json and one or more safetensors files."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        if not files:
            raise WeightsError(f"no .safetensors file in {str(folder)!r}; check the path.")
        index = folder / "model.safetensors.index.json"
        if len(files) != 1 and index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            files = [folder / shard for shard in sorted(shards)]
        self._folder = folder
        self._where: dict[str, Any] = {}
        absent = next((path for path in files if not path.is_file()), None)
        if absent is not None:
            raise WeightsError(f"no safetensors file at {str(absent)!r}; check the path.")
        self.config = load_config(folder)
        for path in files:
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{path} is truncated or not safetensors ({error}); fetch it again.") from error
            self._where.update(dict.fromkeys(opened.keys(), opened))  # type: ignore[no-untyped-call]

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors."""
        return tuple(self._where)

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor as stored; WeightsError if there is none of that name."""
        if name not in self._where:
            raise WeightsError(f"no tensor {name!r} in {str(self._folder)!r}; it does not hold this model.")
        found: torch.Tensor = self._where[name].get_tensor(name)
        return found

    def tokenizer(self) -> Tokenizer:
        """The tokenizer.json of the folder."""
        return Tokenizer.from_folder(self._folder)
