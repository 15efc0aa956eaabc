"""Converted weights in the user's cache, so that a GGUF file is dequantised once and mapped from then on.

A file's name is a digest of what was converted (`key_of`), and its metadata holds a digest of its tensors. Files are
written beside their place and moved there in one step, so that processes may race; the longest unused are deleted.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from taskgraph import cache
from taskgraph.record import shown

if TYPE_CHECKING:
    import torch

log = logging.getLogger("taskgraph.models")

CONVERTER = 1
"""Raised with every change of what the conversion gives."""
LIMIT_BYTES = 16 << 30
"""The most that all files have together; a model with more is not kept."""
LEAST_BYTES = 1 << 20
"""Weights with less are converted in no time."""
_STALE_SECONDS = 24 * 3600.0
_WORDS = 512


def place_of(key: str) -> Path:
    """Where the weights of a key are, or can be written."""
    return cache.place("weights", f"{key}.safetensors")


def key_of(*parts: object) -> str:
    """The name of a file for weights that depend on nothing but these."""
    text = json.dumps([CONVERTER, *map(str, parts)])
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def load(key: str) -> "dict[str, torch.Tensor] | None":
    """The weights stored under `key`, mapped from their file; None if there are none, or they are damaged."""
    from safetensors import SafetensorError, safe_open

    path = place_of(key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            told = (opened.metadata() or {}).get("digest")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        _discarded(path, shown(error))
        return None
    if told != digest(weights):
        _discarded(path, "its digest is another")
        return None
    try:
        os.utime(path)  # the longest unused are the first to go
    except OSError:
        log.debug("%s cannot be touched", path)
    return weights


def _discarded(path: Path, reason: str) -> None:
    log.warning("%s is damaged (%s); the weights are converted again.", path, reason)
    try:
        path.unlink(missing_ok=True)
    except OSError:
        log.debug("%s cannot be deleted", path)


def store(key: str, weights: "Mapping[str, torch.Tensor]") -> None:
    """Keep weights under `key`; one warning where the cache cannot be written, and no error."""
    nbytes = sum(t.nbytes for t in weights.values())
    if not LEAST_BYTES <= nbytes <= LIMIT_BYTES:
        return
    target = place_of(key)
    with cache.keeping("converted weights", target):
        _prune(target.parent, LIMIT_BYTES - nbytes)
        _write(target, weights)


def _write(target: Path, weights: "Mapping[str, torch.Tensor]") -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(dict(weights), name, {"digest": digest(weights)})
        Path(name).replace(target)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _prune(place: Path, room: int) -> None:
    """Delete the longest unused files until the others fit into `room`, and what writers that died left behind."""
    kept: list[tuple[float, int, Path]] = []
    for path in place.iterdir():
        try:
            info = path.stat()
        except FileNotFoundError:  # another process was faster
            continue
        if path.suffix == ".part" and time.time() - info.st_mtime > _STALE_SECONDS:
            path.unlink(missing_ok=True)
        elif path.suffix == ".safetensors":
            kept.append((info.st_mtime, info.st_size, path))
    total = sum(size for _, size, _ in kept)
    for _, size, path in sorted(kept):
        if total <= room:
            return
        path.unlink(missing_ok=True)
        total -= size


def digest(weights: "Mapping[str, torch.Tensor]") -> str:
    """A digest of names, shapes, types and contents: SHA-256 over the sums of blocks of 4 KiB, at memory's speed."""
    import torch

    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        raw = tensor.view(-1).view(torch.uint8).numpy()
        whole = raw.size // (8 * _WORDS) * 8 * _WORDS
        if raw.ctypes.data % 8:
            found.update(raw.tobytes())
            continue
        found.update(raw[:whole].view(np.uint64).reshape(-1, _WORDS).sum(1, dtype=np.uint64).tobytes())
        found.update(raw[whole:].tobytes())
    return found.hexdigest()
