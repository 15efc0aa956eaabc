"""The shapes of steps: which there are within the limits of a batch, which of them a batch takes, and how a batch is
written into the inputs of one."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from taskgraph.models.paged import Bucket
from taskgraph.serving.batch import Batch
from taskgraph.serving.sampling import Ints
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.ways import Split

T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """The shapes of a step in a partition of a split: side 0 decodes, side 1 prefills."""

    bucket: Bucket
    split: Split
    side: int


Arrays = Mapping[str, npt.NDArray[Any]]


def ladder(most: int) -> tuple[int, ...]:
    """Bucket sizes up to `most`: powers of two and, from 16 on, the halves between them."""
    sizes = [0, *(2**i for i in range(5)), *(n for i in range(4, 24) for n in (3 << (i - 1), 1 << (i + 1)))]
    return (*(n for n in sizes if n < most), most)


def coarse_first(values: Sequence[T]) -> list[T]:
    """The last one, then those that halve the gaps: however few are taken, they are spread."""
    stride = 1 << len(values).bit_length()
    places = [list(range(len(values) - 1, -1, -(stride >> i))) for i in range(stride.bit_length())]
    return [values[i] for i in dict.fromkeys(place for level in places for place in level)]


class Buckets:
    """The buckets of batches within `limits`; with `moves` also those whose steps move pages."""

    def __init__(self, limits: Limits, moves: bool) -> None:
        self._limits, self._moves = limits, moves
        self._decode = ladder(limits.sequences)
        self._prefill = (*(n for n in (16 << i for i in range(16)) if n < limits.tokens), limits.tokens)

    def of(self, batch: Batch) -> Bucket:
        """The smallest bucket that holds the batch."""
        decode = min(n for n in self._decode if n >= batch.decode)
        if not batch.chunks and (decode or not batch.moves):
            return Bucket(decode, moves=bool(batch.moves))
        prefill = min(n for n in self._prefill if n >= batch.prefill and self._chunks(n) >= batch.chunks)
        return Bucket(decode, prefill, self._chunks(prefill), bool(batch.moves))

    def _chunks(self, prefill: int) -> int:
        """Chunks that a bucket of so many tokens of prefill has."""
        return self._limits.chunks if prefill == self._prefill[-1] else min(max(prefill // 16, 1), self._limits.chunks)

    @property
    def prefills(self) -> tuple[int, ...]:
        """Tokens of prefill that a step may have."""
        return self._prefill

    def parts(self, splits: Sequence[Split]) -> list[Part]:
        """Every step of both sides of these splits, the most needed first: of each split the largest two, which hold
        any batch, and then the others, spread."""
        each = [
            [Part(Bucket(d), split, 0) for d in coarse_first(self._decode[1:])]
            + [Part(Bucket(0, p, self._chunks(p)), split, 1) for p in coarse_first(self._prefill)]
            for split in splits
        ]
        largest = {part for mine in each for part in (mine[0], mine[len(self._decode) - 1])}
        spread = [part for turn in zip(*each, strict=True) for part in turn]
        return sorted(spread, key=lambda part: part not in largest)

    def every(self) -> list[Bucket]:
        """Every bucket, the most needed first: that which holds any batch, those that only decode, then the others, and
        at last those that move pages; each sort such that however few are taken, they are spread."""
        sizes = [*coarse_first(self._prefill)]
        mixed = [(d, p) for d in coarse_first(self._decode) for p in sizes]
        rank = {d: i for i, d in enumerate(coarse_first(self._decode))} | {-p: i for i, p in enumerate(sizes)}
        mixed.sort(key=lambda pair: rank[pair[0]] + rank[-pair[1]])
        plain = [Bucket(d) for d in coarse_first(self._decode[1:])]
        plain += [Bucket(d, p, self._chunks(p)) for d, p in mixed]
        moving = [Bucket(b.decode, b.prefill, b.chunks, moves=True) for b in plain] if self._moves else []
        largest = Bucket(self._decode[-1], self._prefill[-1], self._limits.chunks, self._moves)
        return list(dict.fromkeys([largest, *plain, *moving]))


def holding(wanted: Bucket, made: Collection[Bucket]) -> Bucket | None:
    """The smallest bucket of `made` that holds all that `wanted` does."""
    large = (
        b for b in made
        if b.decode >= wanted.decode and b.prefill >= wanted.prefill and b.chunks >= wanted.chunks
        and b.moves >= wanted.moves
    )  # fmt: skip
    return min(large, key=lambda b: (b.tokens, b.samples, b.moves, b), default=None)


def sampled_rows(decode: int, chunks: int, bucket: Bucket) -> Ints:
    """The rows of a bucket's outputs that are the samples of a batch with so many."""
    return np.concatenate([np.arange(decode), bucket.decode + np.arange(chunks)])


_NONE = ("slots", "sources", "page_out", "page_in", "page_copy")


def clear(inputs: Arrays) -> None:
    """Tokens of no sequence everywhere."""
    for name, array in inputs.items():
        array.fill(-1 if name in _NONE else 0)


def fill(at: Arrays, batch: Batch, bucket: Bucket) -> None:
    """Write the batch into the inputs of a step of its bucket."""
    clear(at)
    d, first = batch.decode, bucket.decode
    for name, values in (("tokens", batch.tokens), ("positions", batch.positions), ("slots", batch.slots)):
        at[name][:d] = values[:d]
        at[name][first : first + batch.prefill] = values[d:]
    if bucket.decode:
        at["decode_lengths"][:d] = batch.lengths[:d]
        at["decode_blocks"][:d, : batch.blocks.shape[1]] = batch.blocks[:d]
    if bucket.prefill:
        n = batch.chunks
        at["prefill_starts"][: n + 1] = batch.starts
        at["prefill_starts"][n + 1 :] = batch.starts[-1]
        at["prefill_lengths"][:n] = batch.lengths[d:]
        at["prefill_blocks"][:n, : batch.blocks.shape[1]] = batch.blocks[d:]
        at["samples"][:d] = np.arange(d)
        at["samples"][first : first + n] = first + batch.starts[1:] - 1
    if bucket.moves:
        moves = {"page_out": batch.moves.out, "page_in": batch.moves.back, "page_copy": batch.moves.copies}
        for name, pairs in moves.items():
            if pairs:
                at[name][: len(pairs)] = pairs


def fill_draws(at: Arrays, batch: Batch, bucket: Bucket, before: Ints) -> None:
    """The same for a step that draws its tokens itself, and feeds itself those of the batch before, whose samples are
    the rows `before` of what it keeps."""
    fed = np.where(batch.fed < batch.decode, batch.fed, batch.fed - batch.decode + bucket.decode)
    at["sources"][fed] = before[batch.source]
    if batch.draws is not None:
        how, rows = batch.draws, sampled_rows(batch.decode, batch.chunks, bucket)[batch.draws.samples]
        at["temperature"][rows] = how.temperature
        at["top_k"][rows] = np.minimum(how.top_k, np.iinfo(np.int32).max)
        at["top_p"][rows] = how.top_p
        at["uniform"][rows] = how.uniform
