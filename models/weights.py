"""Checkpoints: tensors by their Hugging Face names from GGUF or safetensors, whatever the source."""

import hashlib
import math
import re
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from taskgraph.errors import WeightsError
from taskgraph.models.config import ModelConfig, load_config
from taskgraph.models.documents import json_object
from taskgraph.models.gguf.config import DIVISORS, read_config, unused
from taskgraph.models.gguf.config import hf_name as hf_name
from taskgraph.models.gguf.file import MappedGguf, StoredTensor
from taskgraph.models.hub import smollm2_path, snapshot_path
from taskgraph.models.shapes import shape_of
from taskgraph.models.stretch import rope_scaling_of as rope_scaling_of
from taskgraph.models.text.tokenizer import Tokenizer
from taskgraph.record import shown

if TYPE_CHECKING:
    import torch


class Checkpoint(AbstractContextManager["Checkpoint"]):
    """An opened model: its configuration, tensors by Hugging Face name, and tokenizer."""

    config: ModelConfig

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors."""

    @abstractmethod
    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor of that name (float32 from GGUF, as stored from safetensors); WeightsError if there is none."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    def close(self) -> None:
        """Drop the mapped files."""

    def __exit__(self, *_: object) -> None:
        self.close()


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


def _strange(file: str, name: str) -> WeightsError:
    return WeightsError(
        f"{file}: tensor {shown(name)} is none that the model has and is not known to be harmless; this version would "
        "leave it out. Use a checkpoint of a supported model."
    )


def _fitting(config: ModelConfig, name: str, shape: tuple[int, ...], file: str) -> None:
    """WeightsError for a tensor whose shape is not the model's."""
    wanted = shape_of(config, name)
    if wanted is not None and shape != wanted:
        raise WeightsError(f"{file}: tensor {shown(name)} is {shape}, and the model's is {wanted}; fetch it again.")


# -------------------------------------------------------------------------------------------- GGUF

_CHUNK_BLOCKS = 8192
_THREADS = 4


class GgufCheckpoint(Checkpoint):
    """A GGUF file, dequantised on demand by the rules of the gguf package."""

    def __init__(self, path: Path) -> None:
        self._file = MappedGguf(path)
        try:
            header = self._file.header
            self.metadata: dict[str, Any] = header.metadata
            self._path, tensors = path, header.tensors
            divisors = self._values(tensors[DIVISORS]) if DIVISORS in tensors else None
            self.config = read_config(self.metadata, path, "output.weight" not in tensors, divisors)
            self._tensors: dict[str, StoredTensor] = {}
            for tensor in tensors.values():
                name = hf_name(tensor.name)
                if name is not None and shape_of(self.config, name) is not None:
                    _quantisation(tensor, str(path))
                    self._tensors[name] = tensor
                elif not unused(tensor.name):
                    raise _strange(str(path), tensor.name)
        except BaseException:
            self._file.close()
            raise

    @property
    def identity(self) -> str:
        """Tells the opened file from every other and from itself after a change, for weights that are made of it:
        device, inode, size, times, and the digest of its header."""
        info = self._file.info
        head = hashlib.sha256(self._file.head()).hexdigest()
        return f"{info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns} {head}"

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors."""
        return tuple(self._tensors)

    def tensor(self, name: str) -> "torch.Tensor":
        """float32 tensor in Hugging Face layout; WeightsError if there is none of that name and the model's shape."""
        import torch

        if name not in self._tensors:
            raise WeightsError(f"{self._path} has no tensor {name!r}; it does not hold this model.")
        stored = self._tensors[name]
        _fitting(self.config, name, stored.shape, str(self._path))
        data = torch.from_numpy(self._values(stored)).reshape(stored.shape)
        heads = {"q_proj.weight": self.config.heads, "k_proj.weight": self.config.kv_heads}
        part = next((h for suffix, h in heads.items() if name.endswith(suffix)), None)
        return data if part is None or self.config.family != "llama" else _unpermuted(data, part)

    def _values(self, stored: StoredTensor) -> npt.NDArray[np.float32]:
        """All values of a tensor in one row."""
        return dequantised(self._file.raw(stored), stored, str(self._path))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file's metadata."""
        return Tokenizer.from_gguf(self.metadata, str(self._path))

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()


def _quantisation(stored: StoredTensor, file: str) -> Any:
    """The gguf package's class for a tensor's type; WeightsError names a type that it cannot turn into numbers."""
    import gguf

    kind = gguf.GGMLQuantizationType(stored.kind)
    found = getattr(gguf.quants, kind.name, None)
    if found is None and kind.name not in ("F32", "F16"):
        raise WeightsError(
            f"{file}: tensor {shown(stored.name)} is stored as {kind.name}, which is not supported; use a file of "
            "another quantisation (Q4_K_M, Q8_0, F16, BF16)."
        )
    return found


def dequantised(raw: npt.NDArray[np.uint8], stored: StoredTensor, file: str) -> npt.NDArray[np.float32]:
    """The values of a stored tensor, in one row; chunks of its blocks are converted on several threads."""
    found = _quantisation(stored, file)
    if found is None:
        return raw.view(np.float32 if stored.nbytes == 4 * math.prod(stored.shape) else np.float16).astype(np.float32)
    found.init_grid()
    blocks, out = raw.reshape(-1, found.type_size), np.empty(math.prod(stored.shape), np.float32)
    each: int = found.block_size

    def convert(first: int) -> None:
        part = found.dequantize_blocks(blocks[first : first + _CHUNK_BLOCKS])
        out[first * each : first * each + part.size] = part.reshape(-1)

    with np.errstate(all="ignore"):  # strange scales give strange numbers, which are the engine's to refuse
        starts = range(0, len(blocks), _CHUNK_BLOCKS)
        if len(starts) == 1:
            convert(0)
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(convert, starts))
    return out


def _unpermuted(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows of q or k from llama.cpp's interleaved rotary pairs back to Hugging Face's halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


# ------------------------------------------------------------------------------------- safetensors

_HARMLESS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
"""Tables of rotary frequencies, which the config gives."""
_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsCheckpoint(Checkpoint):
    """A folder with config.json and one or more safetensors files."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        if not files:
            raise WeightsError(f"no .safetensors file in {str(folder)!r}; check the path.")
        self._folder = folder
        self._where: dict[str, tuple[Any, Path]] = {}
        indexed = _index(folder) if len(files) != 1 else {}
        files = [folder / name for name in sorted(set(indexed.values()))] or files
        absent = next((path for path in files if not path.is_file()), None)
        if absent is not None:
            raise WeightsError(f"no safetensors file at {str(absent)!r}; check the path.")
        self.config = load_config(folder)
        for path in files:
            try:
                opened: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WeightsError(
                    f"{path} is truncated or not safetensors ({shown(error)}); fetch it again."
                ) from error
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name in self._where:
                    both = f"{self._where[name][1].name} and {path.name}"
                    raise WeightsError(
                        f"{folder}: tensor {shown(name)} is in {both}; keep the files of one checkpoint."
                    )
                self._where[name] = (opened, path)
        self._check(indexed)

    def _check(self, indexed: dict[str, str]) -> None:
        """WeightsError for a tensor that the model does not have, and for one that is not where the index says."""
        for name, file in indexed.items():
            if name not in self._where or self._where[name][1].name != file:
                raise WeightsError(f"{self._folder}: the index says that {shown(file)} has {shown(name)}; it has not.")
        for name, (_, path) in self._where.items():
            if shape_of(self.config, name) is None and not self._harmless(name):
                raise _strange(str(path), name)

    def _harmless(self, name: str) -> bool:
        beyond = re.match(r"model\.layers\.(\d+)\.", name, re.ASCII)
        predicted = beyond is not None and self.config.record.predicts and int(beyond[1]) >= self.config.layers
        tied = name == "lm_head.weight" and self.config.tie_embeddings
        return predicted or tied or _HARMLESS.fullmatch(name) is not None

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors."""
        return tuple(self._where)

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor as stored; WeightsError if there is none of that name, floating type and the model's shape."""
        found = self._stored(name)
        if name == "model.embed_tokens.weight" and self.config.tie_embeddings and "lm_head.weight" in self._where:
            self._same(found)
        return found

    def _stored(self, name: str) -> "torch.Tensor":
        from safetensors import SafetensorError

        if name not in self._where:
            raise WeightsError(f"no tensor {name!r} in {str(self._folder)!r}; it does not hold this model.")
        opened, path = self._where[name]
        try:
            kind = opened.get_slice(name).get_dtype()
            if kind not in _FLOATS:
                raise WeightsError(
                    f"{path}: tensor {name!r} is quantised or no number ({kind}); use a bf16, f16 or f32 checkpoint."
                )
            found: torch.Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: tensor {shown(name)} cannot be read ({shown(error)}).") from error
        _fitting(self.config, name, tuple(found.shape), str(path))
        return found

    def _same(self, table: "torch.Tensor") -> None:
        """A model whose embedding is its output head may have it twice, but not two of them."""
        import torch

        if not torch.equal(table, self._stored("lm_head.weight").to(table.dtype)):
            raise WeightsError(
                f"{self._folder}: tie_word_embeddings is true, and lm_head.weight differs from the embedding; set "
                "it to false in config.json if the model has a head of its own."
            )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer.json of the folder."""
        return Tokenizer.from_folder(self._folder)


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file by the index of a folder, empty when it has none."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return {}
    where = json_object(path, WeightsError).get("weight_map")
    good = isinstance(where, dict) and where
    if not isinstance(where, dict) or not good or not all(_file_name(file) for file in where.values()):
        raise WeightsError(f"{path} has no weight_map from tensors to file names; fetch it again.")
    return where


def _file_name(file: object) -> bool:
    """Whether it is the name of a safetensors file in the same folder."""
    return isinstance(file, str) and file.endswith(".safetensors") and "\0" not in file and Path(file).name == file
