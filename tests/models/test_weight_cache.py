"""The cache of converted weights: the same weights the second time, whatever happened to files in between."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from taskgraph.models import llama, shards, weight_cache, weights
from taskgraph.models.weights import open_checkpoint
from tests.model_files import gguf_tensors, write_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that keeps small files too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_cache, "LEAST_BYTES", 1)
    return tmp_path / "cache" / "taskgraph" / "weights"


def load(path: Path, dtype: str = "f32") -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return llama.load_weights(checkpoint.config, checkpoint, dtype)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are converted."""
    names: list[str] = []
    original = weights.GgufCheckpoint.tensor

    def tensor(self: weights.GgufCheckpoint, name: str) -> torch.Tensor:
        names.append(name)
        return original(self, name)

    monkeypatch.setattr(weights.GgufCheckpoint, "tensor", tensor)
    return names


def test_the_second_time_nothing_is_converted(tmp_path: Path, cache: Path, converted: list[str]) -> None:
    path = tmp_path / "x.gguf"
    made = write_gguf(path)
    first = load(path)
    assert torch.equal(first["embed"], torch.from_numpy(made["token_embd.weight"]))
    assert len(converted) == len(made)
    second = load(path)
    assert len(converted) == len(made), "the second load converts nothing"
    assert equal(first, second)
    assert load(path, "bf16")["embed"].dtype == torch.bfloat16, "another dtype has its own file"
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_file_of_the_same_size_is_converted_again(tmp_path: Path, cache: Path, keep_times: bool) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path)
    before, info = load(path), path.stat()
    made = write_gguf(path, tensors=gguf_tensors(seed=1))
    assert path.stat().st_size == info.st_size
    if keep_times:
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    after = load(path)
    assert torch.equal(after["embed"], torch.from_numpy(made["token_embd.weight"]))
    assert not torch.equal(after["embed"], before["embed"])


def test_a_file_that_is_replaced_while_open_keeps_its_weights(tmp_path: Path, cache: Path) -> None:
    """The opened file's weights are loaded, and not kept as those of the file that has its path now."""
    path, other = tmp_path / "x.gguf", tmp_path / "y.gguf"
    old, new = write_gguf(path), write_gguf(other, tensors=gguf_tensors(seed=1))
    with open_checkpoint(path) as checkpoint:
        other.replace(path)
        first = llama.load_weights(checkpoint.config, checkpoint, "f32")["embed"]
    assert torch.equal(first, torch.from_numpy(old["token_embd.weight"]))
    assert torch.equal(load(path)["embed"], torch.from_numpy(new["token_embd.weight"]))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "swapped", "header", "not a file"])
def test_a_damaged_cache_file_is_made_again(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path)
    first = {name: tensor.clone() for name, tensor in load(path).items()}
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    match damage:
        case "truncated":
            del data[-100:]
        case "emptied":
            data.clear()
        case "flipped":
            data[len(data) // 2] ^= 1
        case "swapped":
            half = len(data) - 8192
            data[half : half + 4096], data[half + 4096 :] = data[half + 4096 :], data[half : half + 4096]
        case "header":
            data[20] ^= 1
        case _:
            data[:] = b"something else entirely"
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING, "taskgraph.models"):
        assert equal(load(path), first)
    assert "damaged" in caplog.text
    caplog.clear()
    assert equal(load(path), first) and not caplog.text, "the file was made again"


def test_two_processes_may_start_at_once(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path)
    code = (
        "import sys\n"
        "from taskgraph.models import llama, weight_cache; from taskgraph.models.weights import open_checkpoint\n"
        "weight_cache.LEAST_BYTES = 1\n"
        "with open_checkpoint(sys.argv[1]) as c: w = llama.load_weights(c.config, c, 'f32')\n"
        "print(weight_cache.digest(w))\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=100)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert set(told) == {weight_cache.digest(load(path))}
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


def test_old_files_make_room(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{number}.gguf" for number in range(4)]
    for number, path in enumerate(files):
        write_gguf(path, tensors=gguf_tensors(seed=number))
    load(files[0])
    size = next(cache.iterdir()).stat().st_size
    monkeypatch.setattr(weight_cache, "LIMIT_BYTES", 3 * size)
    first = next(cache.iterdir()).name
    load(files[1])
    second = next(file.name for file in cache.iterdir() if file.name != first)
    for age, name in ((200, first), (100, second)):
        os.utime(cache / name, (1e9 - age, 1e9 - age))
    load(files[0])  # used again, so that the other one is the longest unused
    load(files[2]), load(files[3])
    names = {file.name for file in cache.iterdir()}
    assert first in names and second not in names and len(names) <= 3
    monkeypatch.setattr(weight_cache, "LIMIT_BYTES", size // 2)
    (tmp_path / "5.gguf").write_bytes(files[0].read_bytes())
    load(tmp_path / "5.gguf")
    assert {file.name for file in cache.iterdir()} == names, "what is larger than all room is not kept"


def test_what_a_dead_writer_left_goes(tmp_path: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    old, new = cache / "old.part", cache / "new.part"
    old.write_bytes(b"x"), new.write_bytes(b"x")
    os.utime(old, (1e9, 1e9))
    write_gguf(tmp_path / "x.gguf")
    load(tmp_path / "x.gguf")
    assert not old.exists() and new.exists()


def test_without_a_cache_it_works_with_one_warning(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskgraph import cache as places

    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setattr(places, "temporary_folder", lambda: None)
    monkeypatch.setattr(places, "_warned", False)
    path = tmp_path / "x.gguf"
    made = write_gguf(path)
    with pytest.warns(places.CacheWarning) as caught:
        assert torch.equal(load(path)["embed"], torch.from_numpy(made["token_embd.weight"]))
        load(path)
    assert len(caught) == 1


def test_ranks_keep_their_own_shards(tmp_path: Path, cache: Path, converted: list[str]) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, keys={"attention.head_count_kv": ("uint32", 2)}, tensors={
        f"blk.0.attn_{n}.weight": np.random.default_rng(3).standard_normal((32, 32)).astype(np.float32) for n in "kv"
    } | {"token_embd.weight": np.random.default_rng(4).standard_normal((259, 32)).astype(np.float32)},
    )  # fmt: skip

    def shard(rank: int) -> dict[str, torch.Tensor]:
        from dataclasses import replace

        with open_checkpoint(path) as checkpoint:
            source = shards.Shard(checkpoint, rank, 2, tied=False)
            mine = replace(checkpoint.config, heads=1, kv_heads=1, intermediate_size=16)
            return llama.load_weights(mine, shards.Shard(source.source, rank, 2), "f32")

    first = [shard(rank) for rank in range(2)]
    count = len(converted)
    second = [shard(rank) for rank in range(2)]
    assert len(converted) == count and equal(first[0], second[0]) and equal(first[1], second[1])
    assert not torch.equal(first[0]["layer.0/o"], first[1]["layer.0/o"])


@pytest.mark.parametrize("elements", [1, 511, 4096, 100_003])
def test_the_digest_sees_every_byte(elements: int) -> None:
    torch.manual_seed(elements)
    tensor = torch.randn(elements)
    told = weight_cache.digest({"a": tensor})
    for place in {0, elements // 2, elements - 1}:
        changed = tensor.clone()
        changed.view(torch.uint8)[4 * place] ^= 1
        assert weight_cache.digest({"a": changed}) != told
    assert weight_cache.digest({"b": tensor}) != told and weight_cache.digest({"a": tensor}) == told
    assert weight_cache.digest({"a": tensor.view(torch.int32)}) != told
