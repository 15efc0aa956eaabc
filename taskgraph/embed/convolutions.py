"""Convolutions that torch takes long for: of each channel by itself where a position's channels lie side by side (50 to
100 us for 1 to 10 us of arithmetic), and of patches that do not overlap, which are products."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from taskgraph.embed.kernels import _row
from taskgraph.graph.op import Op
from taskgraph.runtime.cpu import products
from taskgraph.runtime.cpu.arguments import ready
from taskgraph.runtime.cpu.kinds import CpuSite, Entry
from taskgraph.runtime.cpu.products import Product
from taskgraph.runtime.cpu.tile import fork, kernel

_NAMES: Final = ("conv1d", "conv2d")
_DEFAULTS: Final = (None, None, None, 1, 0, 1, 1)
_A_THREAD: Final = 1 << 14
"""Multiplications that are worth a thread."""


@kernel
def _convolve(like: Any, at: Any, sizes: Any, steps: Any, moves: Any, weights: Any, part: Any, parts: Any) -> None:
    taps, bias = weights
    channels, high, wide, out_high, out_wide = sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    tasks = sizes[0] * out_high * out_wide
    sums = np.empty(channels, np.float32)
    for task in range(tasks * part // parts, tasks * (part + 1) // parts):
        b, i, j = task // (out_high * out_wide), task // out_wide % out_high, task % out_wide
        for c in range(channels):
            sums[c] = bias[c]
        for p in range(taps.shape[0]):
            y = i * moves[0, 0] + p * moves[2, 0] - moves[1, 0]
            if y < 0 or y >= high:
                continue
            for q in range(taps.shape[1]):
                x = j * moves[0, 1] + q * moves[2, 1] - moves[1, 1]
                if x < 0 or x >= wide:
                    continue
                tap = taps[p, q]
                row = _row(at[0], b * steps[0, 0] + y * steps[0, 2] + x * steps[0, 3], channels, like)
                for c in range(channels):
                    sums[c] += tap[c] * row[c]
        first, step = b * steps[1, 0] + i * steps[1, 2] + j * steps[1, 3], steps[1, 1]
        out = _row(at[1], first, (channels - 1) * step + 1, like)
        for c in range(channels):
            out[c * step] = sums[c]


@kernel
def convolve(like: Any, at: Any, sizes: Any, steps: Any, moves: Any, taps: Any, bias: Any, threads: Any) -> None:
    """out[b, c, i, j] = bias[c] + the sum over p, q of taps[p, q, c] x[b, c, i s + p d - a, j s + q d - a], zero beyond
    x's edges: at (2,) int64 addresses of x and out, float32; sizes (6,) are b, c, x's and out's heights and widths;
    steps (2, 4) the strides, x's along c is 1; moves (3, 2) the strides s, paddings a and dilations d of both axes."""
    fork(_convolve, (like, at, sizes, steps, moves, (taps, bias)), threads)


def bind_convolution(
    op: Op, call: str, args: Sequence[Any], out: torch.Tensor, fixed: bool, site: CpuSite
) -> Entry | None:
    """How a convolution of torch's runs, by its name and arguments; None for one that torch is to run. `fixed`: no
    replay changes its weight."""
    if call not in _NAMES or not fixed or len(args) < 2:
        return None
    given = _Convolution.of(args)
    if given is None or not given.x.dtype == given.weight.dtype == out.dtype or given.x.dim() != out.dim():
        return None
    if given.channelwise:
        return _depthwise(given, out, site)
    return _patches(op, given, out, site) if given.apart else None


@dataclass(frozen=True, slots=True)
class _Convolution:
    """The arguments of a convolution, all with two axes: a line has a height of one."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    moves: tuple[tuple[int, int], ...]
    """Strides, paddings and dilations."""
    groups: int

    @staticmethod
    def of(args: Sequence[Any]) -> "_Convolution | None":
        given: list[Any] = [*args, *_DEFAULTS[len(args) :]]
        x, weight, bias, stride, padding, dilation, groups = given
        axes = x.dim() - 2
        if isinstance(padding, str) or axes not in (1, 2) or weight.dim() != x.dim():
            return None
        moves = tuple(_pair(value, axes, none) for value, none in ((stride, 1), (padding, 0), (dilation, 1)))
        return _Convolution(x, weight, bias, moves, groups)

    @property
    def channelwise(self) -> bool:
        """Whether the kernel takes it."""
        alone = self.groups == self.x.shape[1] == self.weight.shape[0] and self.groups > 1
        return alone and self.x.stride(1) == 1 and self.x.dtype == torch.float32

    @property
    def apart(self) -> bool:
        """Whether its patches neither overlap nor leave gaps nor reach over an edge."""
        stride, padding, dilation = self.moves
        same = self.weight.dim() == 4 and tuple(self.weight.shape[2:]) == stride
        return same and (padding, dilation, self.groups) == ((0, 0), (1, 1), 1)


def _depthwise(given: _Convolution, out: torch.Tensor, site: CpuSite) -> Entry:
    x, w, made = ((t if t.dim() == 4 else t.unsqueeze(2)) for t in (given.x, given.weight, out))
    taps = np.ascontiguousarray(w[:, 0].permute(1, 2, 0).detach().numpy())
    added = np.zeros(given.groups, np.float32) if given.bias is None else given.bias.detach().numpy()
    sizes = np.array([*x.shape, *made.shape[2:]], np.int64)
    steps = np.array([[*x.stride()], [*made.stride()]], np.int64)
    at = np.array([x.data_ptr(), out.data_ptr()], np.int64)
    threads = min(site.threads, 1 + out.numel() * taps.shape[0] * taps.shape[1] // _A_THREAD)
    moves = np.array(given.moves, np.int64)
    run = ready(convolve, np.empty(0, np.float32), at, sizes, steps, moves, taps, added, threads)

    def entry(kept: object = (given, out)) -> None:
        run()

    return entry


def _patches(op: Op, given: _Convolution, out: torch.Tensor, site: CpuSite) -> Entry:
    """A patch a row, times the weight."""
    high, wide = given.moves[0]
    cut = given.x.unfold(2, high, high).unfold(3, wide, wide).permute(0, 2, 3, 1, 4, 5)
    lines, made = torch.empty(cut.shape, dtype=out.dtype), out.permute(0, 2, 3, 1)
    rows = made if made.is_contiguous() else torch.empty(made.shape, dtype=out.dtype)
    count, filters = made.numel() // len(given.weight), given.weight.detach().reshape(len(given.weight), -1)
    product = Product(
        lines.view(count, -1), filters, given.bias, None, rows.view(count, -1), True, site.threads_for(count)
    )
    multiply, fill = products.entry(op.name, product, site.ways), partial(lines.copy_, cut)
    put = None if rows is made else partial(made.copy_, rows)

    def run() -> None:
        fill()
        multiply()
        if put is not None:
            put()

    return run


def _pair(value: Any, axes: int, none: int) -> tuple[int, int]:
    """Of a number or a list of one for each axis, that of the height (`none` where there is no such axis) and width."""
    numbers = [value] * axes if isinstance(value, int) else [*value] * (axes if len(value) == 1 else 1)
    return (numbers[0], numbers[1]) if axes == 2 else (none, numbers[0])
