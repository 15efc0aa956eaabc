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
from taskgraph.runtime.cpu import kernels, kernels_attention
from taskgraph.runtime.cpu.arguments import Cache, Rope, ready
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


def test_rmsnorm(dtype: torch.dtype, threads: int) -> None:
    x, weight = torch.randn(7, 72).to(dtype), torch.randn(72).to(dtype)
    out = torch.empty_like(x)
    kernels.rmsnorm(bits(x), bits(weight), bits(out), 1e-5, threads)
    close(out, F.rms_norm(x.float(), (72,), weight.float(), 1e-5))


def test_swiglu(dtype: torch.dtype, threads: int) -> None:
    x, out = (4 * torch.randn(5, 144)).to(dtype), torch.empty(5, 72, dtype=dtype)
    x[0, 0], x[0, 1] = 200.0, -200.0
    kernels.swiglu(bits(x), bits(out), threads)
    gate, up = x.float().chunk(2, dim=1)
    close(out, F.silu(gate) * up)


def test_argmax(dtype: torch.dtype, threads: int) -> None:
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
    cache, rope = Cache(bits(keys), bits(values)), Rope(cos.numpy(), sin.numpy(), *weights.numpy(), 1e-5)
    kernels_attention.rope_kv(bits(qkv), positions.numpy(), cache, rope, bits(out), threads)
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
        kernels_attention.rope_kv(bits(qkv), np.array([0, 10]), cache, rope, bits(out), threads)


@pytest.mark.parametrize("each", [1, 31])
def test_attention(each: int, dtype: torch.dtype, threads: int) -> None:
    batch, heads, kv, dim, length = 2, 6, 2, 48, 70
    q = torch.randn(batch * each, heads, dim).to(dtype)
    positions = torch.tensor([39, 0])
    keys, values = torch.randn(2, batch, kv, length, dim).to(dtype)
    out = torch.empty(batch * each, heads * dim, dtype=dtype)
    scratch = np.full(kernels_attention.prefill_scratch_size(length, dim, threads), np.nan, np.float32)
    buffers = (bits(q), positions.numpy(), Cache(bits(keys), bits(values)), bits(out), scratch)
    mask = torch.arange(length) <= positions[:, None, None, None] + torch.arange(each)[:, None]
    queries = q.float().view(batch, each, heads, dim).transpose(1, 2)
    want = F.scaled_dot_product_attention(queries, keys.float(), values.float(), mask, enable_gqa=True)
    for dot in {False, DOT}:
        out.fill_(np.nan)
        if each == 1:
            kernels_attention.decode_attention(*buffers, threads)
        else:
            kernels_attention.prefill_attention(*buffers, dot, threads)
        close(out, want.transpose(1, 2).reshape(batch * each, heads * dim))


def test_a_ready_kernel_does_what_a_call_of_it_does(dtype: torch.dtype, threads: int) -> None:
    """Also when its arrays have other values by then, and for the errors that it raises."""
    q, keys, values = torch.randn(3, 4, 32).to(dtype), *torch.randn(2, 3, 2, 40, 32).to(dtype)
    positions, cache = torch.tensor([7, 0, 39]), Cache(bits(keys), bits(values))
    outs = [torch.empty(3, 128, dtype=dtype) for _ in range(2)]
    scratch = np.empty(40 * threads, np.float32)
    given = [(bits(q), positions.numpy(), cache, bits(out), scratch, threads) for out in outs]
    run = ready(kernels_attention.decode_attention, *given[0])
    keys.normal_()
    run()
    kernels_attention.decode_attention(*given[1])
    assert torch.equal(*outs)
    positions[1] = 40
    with pytest.raises(ValueError, match="KV cache"):
        run()


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
