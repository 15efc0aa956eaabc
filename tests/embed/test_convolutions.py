"""Convolutions by ways of our own: results of torch's, however operands lie."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taskgraph as tg
from taskgraph.embed import convolutions

AXES = {1: (nn.Conv1d, torch.randn), 2: (nn.Conv2d, torch.randn)}


def same(module: nn.Module, x: torch.Tensor) -> None:
    """As eager torch, twice, and after the weights changed."""
    fast = tg.embed.wrap(module.eval(), verdict="plan")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
            for p in module.parameters():
                p.mul_(-1.5)


@given(
    axes=st.sampled_from([1, 2]), channels=st.sampled_from([2, 3, 40]), kernel=st.integers(1, 4),
    stride=st.integers(1, 3), padding=st.integers(0, 3), dilation=st.integers(1, 2), bias=st.booleans(),
    size=st.integers(7, 10), last=st.booleans(), batch=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_channels_by_themselves(
    axes: int, channels: int, kernel: int, stride: int, padding: int, dilation: int, bias: bool, size: int, last: bool,
    batch: int,
) -> None:  # fmt: skip
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": channels, "bias": bias}
    made = (nn.Conv1d, nn.Conv2d)[axes - 1](channels, channels, kernel, **how)
    x = torch.randn(batch, *[size] * axes, channels)

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x.movedim(-1, 1))
            return y if last else y.movedim(1, -1)

    same(Turned(), x)


@given(
    high=st.integers(1, 4), wide=st.integers(1, 4), batch=st.integers(1, 3), ins=st.integers(1, 5),
    outs=st.sampled_from([1, 8, 33]), bias=st.booleans(), turned=st.booleans(),
)  # fmt: skip
@settings(max_examples=5, deadline=None)
def test_patches(high: int, wide: int, batch: int, ins: int, outs: int, bias: bool, turned: bool) -> None:
    x = torch.randn(batch, ins, 9, 11)
    if turned:
        x = x.to(memory_format=torch.channels_last)
    same(nn.Conv2d(ins, outs, (high, wide), (high, wide), bias=bias), x)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 8, 2, 2, groups=4), nn.Conv2d(4, 4, 2, 2, padding=1),
        nn.Conv2d(4, 4, 3, padding="same", groups=4), nn.Conv2d(4, 4, 2, 2, dilation=2),
    ],
)  # fmt: skip
def test_others_are_torchs(module: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_depthwise", "_patches"):
        monkeypatch.delattr(convolutions, name)
    same(module, torch.randn(1, 4, 8, 8))
