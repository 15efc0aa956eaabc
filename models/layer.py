"""A decoder layer's scope: it names the ops, weights and states of one layer in a graph, and where layers repeat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import taskgraph as tg
from taskgraph.models.config import ModelConfig
from taskgraph.models.stretch import RopeScaling

Names = tuple[str, ...]
Sources = dict[str, Names | tuple[Names, ...]]
"""Our weight of a layer -> the Hugging Face tensors that it joins along the first axis; a tuple of such, one an
expert, is stacked on an axis of its own."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Appends to `builder`; `mark` begins every name, and `number` is the layer's in the model.

    Tokens whose entry of `slots`, if given, is below 0 stand for nothing.
    """

    builder: tg.GraphBuilder
    config: ModelConfig
    dtype: str
    mark: str = ""
    number: int = 0
    slots: tg.Value | None = None

    def name(self, name: str) -> str:
        """The name of an op of this layer."""
        return self.mark + name

    def weight(self, name: str, *shape: int, dtype: str | None = None) -> tg.Value:
        """A weight of this layer."""
        return self.builder.weight(self.mark + name, shape, dtype or self.dtype)

    def state(self, name: str, *shape: int) -> tg.Value:
        """A state of this layer."""
        return self.builder.state(self.mark + name, shape, self.dtype)

    def norm(self, x: tg.Value, weight: str, name: str) -> tg.Value:
        """The RMS norm of x."""
        return tg.ops.rmsnorm(x, self.weight(weight, x.shape[-1]), eps=self.config.norm_eps, name=self.name(name))

    def product(
        self,
        x: tg.Value,
        weight: str,
        features: int,
        name: str,
        *,
        bias: tg.Value | None = None,
        residual: tg.Value | None = None,
        out_dtype: str | None = None,
    ) -> tg.Value:
        """x times the weight (features, columns of x) transposed, plus bias and residual."""
        w = self.weight(weight, features, x.shape[1])
        return tg.ops.gemm(x, w, bias, residual, transpose_w=True, out_dtype=out_dtype, name=self.name(name))

    def summed(self, x: tg.Value, weight: str, residual: tg.Value) -> tg.Value:
        """residual + x times the weight (hidden, columns of x) transposed, summed over ranks, which share columns."""
        if self.config.ranks == 1:
            return self.product(x, weight, self.config.hidden_size, f"{weight}_proj", residual=residual)
        return self.reduced(self.product(x, weight, self.config.hidden_size, f"{weight}_proj"), weight, residual)

    def reduced(self, part: tg.Value, name: str, residual: tg.Value) -> tg.Value:
        """residual + the sum of `part` over ranks."""
        total = tg.ops.all_reduce(part, ranks=self.config.ranks, name=self.name(f"{name}_reduce"))
        return tg.ops.add(total, residual, name=self.name(f"{name}_add"))


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """The queries of a layer whose keys are in pages, a row a token, and what attends with some of them: `decode` takes
    (queries, lengths, blocks, name=) and `prefill` (queries, starts, lengths, blocks, name=)."""

    q: tg.Value
    decode: Callable[..., tg.Value]
    prefill: Callable[..., tg.Value]


@dataclass(frozen=True, slots=True)
class LayerPattern:
    """Which layers a graph writes out, the `first` ones, and which period of layers it then repeats `count` times."""

    first: int
    period: int
    count: int

    def marks(self) -> list[str]:
        """What begins the flat names of each layer of the model."""
        head = [self.head(i) for i in range(self.first)]
        return head + [f"layer.{i}/{self.body(j)}" for i in range(self.count) for j in range(self.period)]

    def head(self, number: int) -> str:
        """What begins the names of a layer before the repeat."""
        return f"first.{number}/"

    def body(self, place: int) -> str:
        """What begins the names of a layer within the repeat."""
        return f"{place}." if self.period > 1 else ""


def pattern_of(kinds: Sequence[object]) -> LayerPattern:
    """The pattern with the fewest layers stored, for layers of these kinds."""
    n = len(kinds)
    choices = ((first, period) for first in range(n) for period in range(1, n - first + 1))
    first, period = min((c for c in choices if _repeats(kinds[c[0] :], c[1])), key=lambda c: (sum(c), c[1]))
    return LayerPattern(first, period, (n - first) // period)


def _repeats(kinds: Sequence[object], period: int) -> bool:
    return len(kinds) % period == 0 and kinds[period:] == kinds[:-period]


def stretch(config: ModelConfig) -> tg.ops.Llama3Stretch | tg.ops.YarnStretch | None:
    """The stretch of the model's rotary frequencies as ops take it."""
    s = config.rope_scaling
    if isinstance(s, RopeScaling):
        return tg.ops.Llama3Stretch(s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_position)
    return s if s is None else tg.ops.YarnStretch(s.factor, s.low, s.high, s.attention)
