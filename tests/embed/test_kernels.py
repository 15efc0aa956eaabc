"""Attention over views by our kernel: results of torch's own, for any sizes, masks, strides and threads."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgraph.embed import kernels
from taskgraph.runtime.cpu.kinds import bits

CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 3), group=st.integers(1, 3), rows=st.sampled_from([1, 2, 5, 51]),
    keys=st.sampled_from([1, 7, 32, 33, 100]), dim=st.sampled_from([1, 8, 24, 64]), wide=st.sampled_from([2, 32, 40]),
    mask=st.sampled_from([kernels.NO_MASK, kernels.TRUTHS, kernels.ADDED]), causal=st.booleans(),
    dtype=st.sampled_from([*CLOSE]), threads=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_attention_is_that_of_torch(
    batch: int, kv_heads: int, group: int, rows: int, keys: int, dim: int, wide: int, mask: int, causal: bool,
    dtype: torch.dtype, threads: int, seed: int,
) -> None:  # fmt: skip
    chance = torch.Generator().manual_seed(seed)
    heads, causal = kv_heads * group, causal and mask == kernels.NO_MASK

    def some(count: int, length: int, size: int) -> torch.Tensor:
        made = torch.randn(batch, length, count, size + seed % 2, generator=chance).to(dtype)
        return made[..., :size].transpose(1, 2)

    q, k, v = some(heads, rows, dim), some(kv_heads, keys, dim), some(kv_heads, keys, wide)
    out = torch.full_like(some(heads, rows, wide), float("nan"))
    given_mask = None
    if mask == kernels.TRUTHS:
        given_mask = torch.rand(batch, 1, rows, keys, generator=chance) > 0.4
    elif mask == kernels.ADDED:
        given_mask = torch.randn(1, heads, rows, keys, generator=chance)
        given_mask[torch.rand(1, heads, rows, keys, generator=chance) > 0.7] = -torch.inf
    seen = None if given_mask is None else given_mask.expand(batch, heads, rows, keys)
    at = np.array([*(t.data_ptr() for t in (q, k, v, out)), 0 if seen is None else seen.data_ptr()], np.int64)
    steps = np.array(
        [*([*t.stride()] for t in (q, k, v, out)), [0] * 4 if seen is None else [*seen.stride()]], np.int64
    )
    sizes = np.array([batch, heads, rows, dim, kv_heads, keys, wide], np.int64)
    how = kernels.Scores(0.3, mask, causal)
    kernels.attend(bits(torch.empty(0, dtype=dtype)), at, sizes, steps, how, threads)
    wide_q, wide_k, wide_v = (t.double() for t in (q, k, v))
    added = seen.double() if mask == kernels.ADDED and seen is not None else seen
    want = torch.nn.functional.scaled_dot_product_attention(
        wide_q, wide_k, wide_v, added, 0.0, causal, scale=0.3, enable_gqa=True
    )
    if seen is not None:  # torch's is NaN for a query that sees nothing, in some of its kernels
        none = ~(seen if mask == kernels.TRUTHS else seen > -torch.inf).any(-1, keepdim=True)
        want = want.masked_fill(none, 0.0)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=CLOSE[dtype] * (1 + float(want.abs().max())))
