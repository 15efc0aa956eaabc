"""Sizes that change: results of eager torch, few plans, and no padding where it could be seen."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from taskgraph.embed import FallbackWarning, Report, backend, report
from taskgraph.embed.sizes import bucket_of
from taskgraph.embed.variants import MOST_TURNS

SIZES = (2, 3, 9, 10, 11, 12, 17, 20)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@given(st.integers(1, 1 << 20))
def test_a_bucket_is_little_more_than_a_size(size: int) -> None:
    made = bucket_of(size)
    assert size <= made <= 1.25 * size
    assert bucket_of(made) == made
    assert bucket_of(size + 1) >= made


def compared(module: Callable[..., Any], *shapes: tuple[Any, ...]) -> Report:
    """What is reported of a module that was called with tensors of these shapes, "n" being sizes in a random order."""
    fast = torch.compile(module, backend=backend, options={"verdict": "plan"})
    order = random.sample(SIZES, len(SIZES))
    for n in [*order, *order]:
        given = [torch.randn(*(n if size == "n" else size for size in shape)) for shape in shapes]
        for tensor, shape in zip(given, shapes, strict=True):
            if "n" in shape:
                torch._dynamo.maybe_mark_dynamic(tensor, shape.index("n"))
        made, wanted = fast(*given), module(*given)
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
        assert made.stride() == wanted.stride()
    return report(fast)


class Causal(nn.Module):
    """Attention of tokens that see those before them, with embedded positions."""

    def __init__(self, positions: int = 32) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.places = nn.Embedding(positions, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        x = self.norm(x + self.places(torch.arange(tokens)))
        q, k, v = self.qkv(x).view(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(batch, tokens, 16))  # type: ignore[no-any-return]


class Encoder(Causal):
    """Attention of tokens that see all others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(*x.shape))  # type: ignore[no-any-return]


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.head = nn.Linear(36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.head(self.body(x)), -1)


PADDED: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "mlp": (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), (("n", 8),)),
    "causal tokens": (Causal(), ((2, "n", 16),)),
    "causal batch": (Causal(), (("n", 5, 16),)),
    "encoder batch": (Encoder(), (("n", 5, 16),)),
    "convolutions": (Convs().eval(), (("n", 3, 8, 8),)),
    "two inputs": (lambda x, y: (x @ y).softmax(0), ((4, 8), (8, "n"))),
    "first row": (lambda x: x[0] + x * 2, (("n", 4),)),
    "rows joined": (lambda x: torch.cat([x.sin(), x[:, :2]], 1).reshape(-1, 3), (("n", 4),)),
    "transposed": (lambda x: x.t().contiguous() + 1, (("n", 4),)),
    "largest": (lambda x: x.topk(2, dim=1).values + x.amax(1, keepdim=True), (("n", 4),)),
    "looked up": (lambda x: torch.arange(4.0)[(x > 0).long()], (("n", 4),)),
}
MIXED: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "mean": (lambda x: x - x.mean(0), (("n", 4),)),
    "softmax": (lambda x: x.softmax(0), (("n", 4),)),
    "encoder tokens": (Encoder(), ((2, "n", 16),)),
    "last row": (lambda x: x[-1] + x, (("n", 4),)),
    "flipped": (lambda x: x.flip(0), (("n", 4),)),
    "shifted": (lambda x: x[1:] * x[:-1], (("n", 4),)),
    "times the size": (lambda x: x * x.shape[0], (("n", 4),)),
    "times half the size": (lambda x: x * (x.shape[0] // 2), (("n", 4),)),
    "by what size it is": (lambda x: x * (1 if x.shape[0] % 3 else 2), (("n", 4),)),
    "gram": (lambda x: x @ x.t(), (("n", 4),)),
    "summed": (lambda x: x.t() @ x, (("n", 4),)),
    "largest of all": (lambda x: (x * 2).argmax(), (("n", 4),)),
    "from the last": (lambda x: torch.arange(x.shape[0] - 1, -1, -1)[:, None] + x, (("n", 4),)),
    "how many": (lambda x: x + (torch.arange(x.shape[0]) >= 9).sum(), (("n", 4),)),
    "turned": (lambda x: x.t().reshape(-1) * 2, (("n", 4),)),
}


@pytest.mark.parametrize("name", PADDED)
def test_sizes_share_the_plans_of_buckets(name: str) -> None:
    module, shapes = PADDED[name]
    made = compared(module, *shapes)
    assert made.hit_rate == 1.0
    assert made.captures <= len({bucket_of(n) for n in SIZES})
    assert any(piece.padded for piece in made.pieces)
    assert "for sizes up to" in str(made)


@pytest.mark.parametrize("name", MIXED)
def test_results_are_eager_ones_where_rows_are_mixed(name: str) -> None:
    module, shapes = MIXED[name]
    made = compared(module, *shapes)
    if name != "by what size it is":  # Dynamo guards that, and each of its graphs may be padded
        assert not any(piece.padded for piece in made.pieces)


def test_a_table_that_ends_within_a_bucket_is_not_read_beyond() -> None:
    module = Causal(17)
    fast = torch.compile(module, backend=backend, options={"verdict": "plan"}, dynamic=True)
    for n in random.sample((9, 17, 16, 13), 4):
        x = torch.randn(2, n, 16)
        torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)
    assert "beyond its table" in str(report(fast)) or "cannot trace" in str(report(fast))


def test_two_sizes_at_a_time() -> None:
    module = Causal(64)
    fast = torch.compile(module, backend=backend, options={"verdict": "plan"}, dynamic=True)
    for n in random.sample(range(2, 40), 5):
        for batch in random.sample(range(2, 12), 2):
            x = torch.randn(batch, n, 16)
            torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-5)


def test_inputs_of_integers_and_other_strides() -> None:
    table = nn.Embedding(11, 8)

    def looked(ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = table(ids - 1) * scale.t()
        return made

    fast = torch.compile(looked, backend=backend, options={"verdict": "plan"}, dynamic=True)
    for n in SIZES:  # ids are never 0, which would be no index
        ids, scale = torch.randint(1, 12, (n,)), torch.randn(8, 2 * n)[:, ::2]
        torch.testing.assert_close(fast(ids, scale), looked(ids, scale))
    assert any(p.padded for p in report(fast).pieces)


def test_there_are_at_most_so_many_plans_and_captures() -> None:
    most = 2

    def mixed(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)

    fast = torch.compile(
        mixed, backend=backend, options={"verdict": "plan", "most_plans": most, "quiet": True}, dynamic=True
    )
    for turn in range(3 * MOST_TURNS):
        for n in SIZES[:5]:
            x = torch.randn(n, 3)
            torch.testing.assert_close(fast(x), mixed(x))
        assert sum(p.way == "plan" for p in report(fast).pieces) <= most, turn
    made = report(fast)
    assert made.captures == MOST_TURNS * most
    assert sum(p.calls for p in made.pieces) == 15 * MOST_TURNS
    assert "is not padded" in str(made)


def test_a_size_that_comes_again_takes_the_place_of_the_oldest() -> None:
    def mixed(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)

    fast = torch.compile(mixed, backend=backend, options={"verdict": "plan", "most_plans": 2}, dynamic=True)
    for n in (2, 3, 2):
        fast(torch.randn(n, 3))
    with pytest.warns(FallbackWarning, match="more than 2 shapes"):
        fast(torch.randn(4, 3))
    fast(torch.randn(4, 3))
    ways = {p.shape[0]: p.way for p in report(fast).pieces}
    assert ways == {2: "plan", 3: "eager", 4: "plan"}


def test_pieces_without_weights_belong_to_what_was_compiled() -> None:
    def one(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2

    def two(x: torch.Tensor) -> torch.Tensor:
        return x.cos() + 1

    fast = [torch.compile(f, backend=backend, options={"verdict": "plan"}) for f in (one, two, nn.Tanh())]
    for calls, f in enumerate(fast, 1):
        for _ in range(calls):
            f(torch.randn(4))
    assert [[p.calls for p in report(f).pieces] for f in fast] == [[1], [2], [3]]
