"""Every CPU kernel against torch, in both dtypes and with one and two threads."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

import taskgraph as tg
from taskgraph.runtime.cpu import kernels
from taskgraph.runtime.cpu.tile import DOT

TASKS = Path("/proc/self/task")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def bits(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.manual_seed(0)
    yield request.param


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 96, 64), (5, 70, 32), (29, 64, 128), (130, 33, 64)])
@pytest.mark.parametrize("extra", [False, True])
def test_gemm(m: int, n: int, k: int, extra: bool, dtype: torch.dtype, threads: int) -> None:
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).div(k**0.5).to(dtype)
    bias = torch.randn(n if extra else 0).to(dtype)
    residual = torch.randn(m if extra else 0, n if extra else 0).to(dtype)
    out = torch.empty(m, n, dtype=dtype)
    packed = kernels.pack_weight(bits(w))
    want = x.double() @ w.double().T
    for dot in {False, DOT}:
        kernels.gemm(bits(x), packed, bits(bias), bits(residual), bits(out.fill_(np.nan)), dot, threads)
        close(out, want + bias.double() + residual.double() if extra else want)


def test_bf16_weight_needs_an_even_inner_size() -> None:
    with pytest.raises(ValueError, match="even"):
        kernels.pack_weight(np.zeros((4, 3), np.uint16))


def test_rmsnorm_and_add(dtype: torch.dtype, threads: int) -> None:
    x, residual, weight = (torch.randn(s).to(dtype) for s in ((7, 72), (7, 72), (72,)))
    out, total = torch.empty_like(x), torch.empty_like(x)
    kernels.rmsnorm(bits(x), bits(weight), bits(out), 1e-5, threads)
    close(out, F.rms_norm(x.float(), (72,), weight.float(), 1e-5))
    kernels.add_rmsnorm(bits(x), bits(residual), bits(weight), bits(total), bits(out), 1e-5, threads)
    assert torch.equal(total, x + residual)
    close(out, F.rms_norm((x + residual).float(), (72,), weight.float(), 1e-5))
    kernels.add(bits(x), bits(residual), bits(out), threads)
    assert torch.equal(out, x + residual)


def test_swiglu(dtype: torch.dtype, threads: int) -> None:
    x, out = (4 * torch.randn(5, 144)).to(dtype), torch.empty(5, 72, dtype=dtype)
    x[0, 0], x[0, 1] = 200.0, -200.0
    kernels.swiglu(bits(x), bits(out), threads)
    gate, up = x.float().chunk(2, dim=1)
    close(out, F.silu(gate) * up)


def test_embedding_and_argmax(dtype: torch.dtype, threads: int) -> None:
    table, tokens, out = torch.randn(11, 40).to(dtype), torch.tensor([3, 10, 0]), torch.empty(3, 40, dtype=dtype)
    kernels.embedding(tokens.numpy(), bits(table), bits(out))
    assert torch.equal(out, table[tokens])
    with pytest.raises(ValueError, match="vocabulary"):
        kernels.embedding(np.array([11]), bits(table), bits(out))
    x, best = torch.randn(5, 3000).to(dtype), torch.empty(5, dtype=torch.int64)
    x[1, 7] = x[1, 2999] = 9.0
    x[2, 2999] = 9.0
    kernels.argmax(bits(x), best.numpy(), threads)
    assert best.tolist() == [int(np.argmax(row.float().numpy())) for row in x]


def test_argmax_of_nan_is_its_first_place_on_every_backend(dtype: torch.dtype, threads: int) -> None:
    """torch's rule: a NaN is the largest, and of several the first."""
    x = torch.randn(64, 515).to(dtype)
    x[torch.rand(x.shape) < 0.004] = float("nan")
    x[0], x[1, 0], x[2, 514], x[3] = float("nan"), float("nan"), float("nan"), float("-inf")
    assert 5 < x.isnan().any(1).sum() < 64
    best = torch.empty(64, dtype=torch.int64)
    kernels.argmax(bits(x), best.numpy(), threads)
    assert torch.equal(best, x.argmax(1))
    b = tg.GraphBuilder("rows")
    b.output(tg.ops.argmax(b.input("x", tuple(x.shape), "bf16" if dtype == torch.bfloat16 else "f32"), name="best"))
    graph = b.build()
    where = {"backend": "cuda", "device": "virtual:h100_sxm"}
    with tg.compile(graph, tg.plan(graph, "h100_sxm", "sequential"), **where) as exe:
        assert exe(x=x)["best.out"].tolist() == x.argmax(1).tolist()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


@pytest.mark.parametrize("norms", [False, True])
def test_rope_kv(norms: bool, dtype: torch.dtype, threads: int) -> None:
    batch, each, heads, kv, dim, length = 2, 3, 4, 2, 16, 12
    qkv = torch.randn(batch * each, (heads + 2 * kv) * dim).to(dtype)
    positions = torch.tensor([5, 0])
    keys, values = torch.zeros(2, batch, kv, length, dim, dtype=dtype)
    angle = torch.outer(torch.arange(float(length)), 0.5 ** torch.arange(dim / 2))
    cos, sin, out = angle.cos(), angle.sin(), torch.empty(batch * each, heads, dim, dtype=dtype)
    weights = torch.rand(2, dim if norms else 0)
    tables = (cos.numpy(), sin.numpy(), *weights.numpy(), 1e-5)
    buffers = (bits(qkv), positions.numpy(), bits(keys), bits(values))
    kernels.rope_kv(*buffers, *tables, bits(out), threads)
    split = qkv.view(batch, each, heads + 2 * kv, dim)
    at = positions[:, None] + torch.arange(each)
    q, k, v = split.float().split((heads, kv, kv), dim=2)
    if norms:
        q, k = F.rms_norm(q, (dim,), weights[0], 1e-5), F.rms_norm(k, (dim,), weights[1], 1e-5)
    turn = cos[at][:, :, None], sin[at][:, :, None]
    close(out.view(batch, each, heads, dim), rotated(q, *turn))
    for b in range(batch):
        close(keys[b, :, at[b]].transpose(0, 1), rotated(k, *turn)[b])
        assert torch.equal(values[b, :, at[b]].transpose(0, 1).float(), v[b])
    with pytest.raises(ValueError, match="KV cache"):
        kernels.rope_kv(bits(qkv), np.array([0, 10]), *buffers[2:], *tables, bits(out), threads)


@pytest.mark.parametrize("each", [1, 31])
def test_attention(each: int, dtype: torch.dtype, threads: int) -> None:
    batch, heads, kv, dim, length = 2, 6, 2, 48, 70
    q = torch.randn(batch * each, heads, dim).to(dtype)
    positions = torch.tensor([39, 0])
    keys, values = torch.randn(2, batch, kv, length, dim).to(dtype)
    out = torch.empty(batch * each, heads * dim, dtype=dtype)
    scratch = np.full(kernels.prefill_scratch_size(length, dim, threads), np.nan, np.float32)
    buffers = (bits(q), positions.numpy(), bits(keys), bits(values), bits(out), scratch)
    mask = torch.arange(length) <= positions[:, None, None, None] + torch.arange(each)[:, None]
    queries = q.float().view(batch, each, heads, dim).transpose(1, 2)
    want = F.scaled_dot_product_attention(queries, keys.float(), values.float(), mask, enable_gqa=True)
    for dot in {False, DOT}:
        out.fill_(np.nan)
        if each == 1:
            kernels.decode_attention(*buffers, threads)
        else:
            kernels.prefill_attention(*buffers, dot, threads)
        close(out, want.transpose(1, 2).reshape(batch * each, heads * dim))


def test_each_thread_of_a_pool_gets_its_core() -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    seen: list[set[int]] = []

    def lane() -> None:
        before = {int(task.name) for task in TASKS.iterdir()}
        kernels.bind_threads(cores)
        tasks = {int(task.name) for task in TASKS.iterdir()} - before | {threading.get_native_id()}
        seen.extend(os.sched_getaffinity(task) for task in sorted(tasks))
        kernels.release_threads()

    thread = threading.Thread(target=lane)
    thread.start()
    thread.join()
    assert sorted(map(min, seen)) == cores
    assert all(len(cores) == 1 for cores in seen)
