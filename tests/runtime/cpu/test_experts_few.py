"""Experts and routing of few tokens by the compiled kernels: results of the way by torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph.runtime.cpu import experts
from taskgraph.runtime.cpu.choose import FEW
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE, CpuSite, Tensors
from taskgraph.runtime.cpu.standard import bind
from taskgraph.runtime.cpu.ways import Choice, Ways

TILED = Ways(tuple(Choice(dtype, True, 1, "tile") for dtype in ("f32", "bf16", "f16")))
CLOSE = {"f32": 1e-5, "bf16": 2e-2, "f16": 2e-3}


def ran(op: tg.Op, ins: Tensors, like: torch.Tensor, threads: int, constants: frozenset[str]) -> torch.Tensor:
    out = torch.full_like(like, float("nan"))
    bind(op, ins, [out], CpuSite(threads, constants, None, TILED), {})()
    return out


@given(
    dtype=st.sampled_from(["f32", "bf16", "f16"]), tokens=st.sampled_from([1, 2, 13, FEW, FEW + 1]),
    count=st.integers(1, 6), hidden=st.sampled_from([2, 34, 70]), inner=st.sampled_from([32, 96, 40]),
    threads=st.integers(1, 3), residual=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_experts_of_few_tokens(
    dtype: str, tokens: int, count: int, hidden: int, inner: int, threads: int, residual: bool, seed: int
) -> None:
    kind, chance = TORCH_DTYPE[dtype], torch.Generator().manual_seed(seed)
    b = tg.GraphBuilder("one")
    x, routing = b.input("x", (tokens, hidden), dtype), b.input("routing", (tokens, count), "f32")
    up, down = b.weight("up", (count, 2 * inner, hidden), dtype), b.weight("down", (count, hidden, inner), dtype)
    more = b.input("more", (tokens, hidden), dtype) if residual else None
    b.output(tg.ops.experts(x, routing, up, down, top_k=1, residual=more, name="made"))
    (op,) = b.build().ops

    def some(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=chance)

    chosen = some(tokens, count).abs() * (some(tokens, count) > 0)
    ins = [some(tokens, hidden).to(kind), chosen, *((some(*w.shape) / 8).to(kind) for w in (up, down))]
    ins += [some(tokens, hidden).to(kind)] if residual else []
    want = ran(op, ins, ins[0], 1, frozenset())
    got = ran(op, ins, ins[0], threads, frozenset({"up", "down"}))
    most = 1.0 + float(want.float().abs().max())
    torch.testing.assert_close(got.float() / most, want.float() / most, rtol=0, atol=CLOSE[dtype])
    alone = [t[:1] if t.shape[0] == tokens and i not in (2, 3) else t for i, t in enumerate(ins)]
    if 1 < tokens <= FEW and inner % 32 == 0:
        first = ran(op, alone, alone[0], threads, frozenset({"up", "down"}))
        assert torch.equal(first, got[:1]), "a token's result does not depend on who is beside it"


@pytest.mark.parametrize("sigmoid", [False, True])
def test_routing_by_the_kernel_is_that_of_torch(sigmoid: bool) -> None:
    for tokens, count, top_k, slotted in ((1, 4, 2, False), (9, 7, 3, True), (64, 16, 1, False)):
        router = experts._Router(sigmoid, top_k, True, 1.5, None)
        logits, added = torch.randn(tokens, count), torch.randn(count) / 8
        slots = torch.randint(-1, 3, (tokens,), dtype=torch.int32) if slotted else None
        got, want = torch.empty(tokens, count), torch.empty(tokens, count)
        experts._routed(router, logits, added, slots, got)()
        router.route(logits, added, slots, want)
        torch.testing.assert_close(got, want)
