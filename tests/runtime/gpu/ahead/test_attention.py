"""Attention by Triton functions in the interpreter, as the launch rules launch it, against the cpu backend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Rows
from taskgraph.runtime.gpu.ahead.attention import decode_attention_launches, decode_attention_taken
from taskgraph.runtime.gpu.kinds import Buffer, DrySite, Launch
from tests.paged_cases import keys_of, values_of
from tests.runtime.gpu.ahead.interpreted import Done, Interpret, by_cpu, jobs

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"f32": 2e-5, "bf16": 1.6e-2}


@dataclass(frozen=True)
class Shape:
    """Heads, kv heads, head dim, tokens of a page."""

    heads: int
    kv: int
    dim: int
    rows: int = 32

    @property
    def wide(self) -> int:
        return -(-self.dim // 32) * 32


def pools(shape: Shape, count: int, dtype: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Keys and values as the cpu backend stores them, and the same in plain order."""
    stored = {n: torch.randn(count, shape.kv, shape.rows, shape.wide).to(TYPES[dtype]) for n in ("k", "v")}
    return stored, {"k": keys_of(stored["k"]), "v": values_of(stored["v"])}


def tables_for(lengths: Sequence[int], rows: int) -> tuple[torch.Tensor, int]:
    """Block tables whose pages are drawn without a second use, and how many pages there are."""
    each = max(1, *(-(-length // rows) for length in lengths))
    order = torch.randperm(each * len(lengths) + 3).to(torch.int32)
    return order[: each * len(lengths)].reshape(len(lengths), each), len(order)


def compared(
    interpret: Interpret,
    graph: Graph,
    stored: Mapping[str, torch.Tensor],
    plain: Mapping[str, torch.Tensor],
    sms: int,
    arch: str = "sm_90",
) -> Done:
    """The op of the graph in the interpreter, after its output was compared with that of the cpu backend."""
    (op,) = graph.ops
    (job,) = jobs(graph, plain, op.kind, sms)
    done = interpret(replace(job, arch=arch))
    (name,) = op.outputs
    wanted = by_cpu(graph, stored)[name].float()
    if "starts" in plain:  # the cpu backend leaves rows before the first chunk as they were
        wanted[: int(plain["starts"][0])] = 0.0
    assert not done.torn and done.fault == 0
    tolerance = TOLERANCE["bf16" if done.tensors[name].dtype == torch.bfloat16 else "f32"]
    torch.testing.assert_close(done.tensors[name].float(), wanted, rtol=tolerance, atol=tolerance)
    return done


# ------------------------------------------------------------------------------------------------ decode


def decode_graph(shape: Shape, batch: int, each: int, count: int, dtype: str) -> Graph:
    b = tg.GraphBuilder("decode")
    q = b.input("q", (batch, shape.heads, shape.dim), dtype)
    tables = b.input("lengths", (batch,), "i32"), b.input("tables", (batch, each), "i32")
    pages = [b.state(n, (count, shape.kv, shape.rows, shape.wide), dtype) for n in ("k", "v")]
    b.output(tg.ops.paged_decode(q, *tables, *pages, context=each * shape.rows, name="mixed"))
    return b.build()


def decoded(
    interpret: Interpret, shape: Shape, lengths: Sequence[int], dtype: str, sms: int, arch: str = "sm_90"
) -> Done:
    torch.manual_seed(sum(lengths) + shape.heads)
    tables, count = tables_for(lengths, shape.rows)
    stored, plain = pools(shape, count, dtype)
    q = torch.randn(len(lengths), shape.heads, shape.dim).to(TYPES[dtype])
    values = {"q": q, "lengths": torch.tensor(lengths, dtype=torch.int32), "tables": tables}
    graph = decode_graph(shape, len(lengths), tables.shape[1], count, dtype)
    return compared(interpret, graph, values | stored, values | plain, sms, arch)


CASES = [
    (Shape(1, 1, 64), [1], 4),
    (Shape(4, 2, 64), [0, 33, 1, 0, 31, 32, 200], 1),
    (Shape(8, 2, 128), [300, 0, 64], 1),
    (Shape(8, 2, 128), [257, 96], 132),
    (Shape(3, 3, 80), [65, 40], 2),
    (Shape(16, 1, 96), [129], 3),
    (Shape(5, 1, 256), [70, 3], 2),
    (Shape(8, 1, 32, 64), [100, 65], 1),
]
"""Shape, keys of the sequences, SMs: one key, none at all, ends of pages, heads cut between blocks, dims and groups."""


@pytest.mark.parametrize("shape, lengths, sms", [case for case in CASES if case[0].dim <= 128])
def test_decode_in_f32(interpret: Interpret, shape: Shape, lengths: list[int], sms: int) -> None:
    decoded(interpret, shape, lengths, "f32", sms)


@pytest.mark.parametrize("shape, lengths, sms", CASES)
def test_decode_in_bf16(interpret: Interpret, shape: Shape, lengths: list[int], sms: int) -> None:
    decoded(interpret, shape, lengths, "bf16", sms)


def test_decode_with_tiles_of_an_older_gpu(interpret: Interpret) -> None:
    """Masked in the loop, without code apart for the last tile."""
    decoded(interpret, Shape(8, 2, 128), [300, 0, 64, 1], "bf16", 1, "sm_80")


@pytest.mark.parametrize(
    "lengths, page, fault, value",
    [([70, 200], None, 5, 200), ([70, -3], None, 5, -3), ([70, 40], -2, 4, -2), ([70, 40], 10_000, 4, 10_000)],
)
def test_decode_says_what_it_cannot_use(
    interpret: Interpret, lengths: list[int], page: int | None, fault: int, value: int
) -> None:
    """A length that the table does not hold, a page that does not exist: in the word of faults as the .cu kernels put
    it there, nothing outside is read or written, and other sequences are what they were."""
    shape = Shape(4, 2, 64)
    tables, count = tables_for([96, 96], shape.rows)
    if page is not None:
        tables[1, 1] = page
    stored, plain = pools(shape, count, "bf16")
    given = {"q": torch.randn(2, 4, 64).bfloat16(), "lengths": torch.tensor(lengths, dtype=torch.int32)}
    (job,) = jobs(decode_graph(shape, 2, 3, count, "bf16"), given | {"tables": tables} | plain, "paged_decode", 2)
    done = interpret(job)
    assert not done.torn
    assert done.fault >> 48 == fault and done.fault & 0xFFFFFFFFFFFF == value & 0xFFFFFFFFFFFF
    good = {"lengths": torch.tensor([70, 0], dtype=torch.int32), "tables": tables_for([96, 96], 32)[0] * 0}
    good["tables"][0] = tables[0]
    wanted = by_cpu(decode_graph(shape, 2, 3, count, "bf16"), given | good | stored)["mixed.out"]
    torch.testing.assert_close(done.tensors["mixed.out"][0], wanted[0], rtol=1.6e-2, atol=1.6e-2)
    assert done.tensors["mixed.out"].isfinite().all()


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_decode_of_any_lengths_on_any_sms(interpret: Interpret, data: st.DataObject) -> None:
    """However the line of work is cut."""
    kv = data.draw(st.integers(1, 3))
    shape = Shape(kv * data.draw(st.integers(1, 3)), kv, 32, data.draw(st.sampled_from([32, 64])))
    lengths = data.draw(st.lists(st.integers(0, 400), min_size=1, max_size=6))
    arch = data.draw(st.sampled_from(["sm_80", "sm_90"]))
    decoded(interpret, shape, lengths, "bf16", data.draw(st.integers(1, 9)), arch)


# ----------------------------------------------------------------------------------------------- prefill


def prefill_graph(shape: Shape, tokens: int, chunks: int, each: int, count: int, dtype: str) -> Graph:
    b = tg.GraphBuilder("prefill")
    q = b.input("q", (tokens, shape.heads, shape.dim), dtype)
    starts, lengths = b.input("starts", (chunks + 1,), "i32"), b.input("lengths", (chunks,), "i32")
    tables = b.input("tables", (chunks, each), "i32")
    pages = [b.state(n, (count, shape.kv, shape.rows, shape.wide), dtype) for n in ("k", "v")]
    b.output(tg.ops.paged_prefill(q, starts, lengths, tables, *pages, context=each * shape.rows, name="mixed"))
    return b.build()


@dataclass(frozen=True)
class Chunks:
    """Where each begins, how many rows and keys it has, and how many rows there are in all."""

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    first: int = 0
    behind: int = 0

    @property
    def tokens(self) -> int:
        return self.first + sum(self.rows) + self.behind

    @property
    def starts(self) -> torch.Tensor:
        ends = [self.first + sum(self.rows[:i]) for i in range(len(self.rows) + 1)]
        return torch.tensor(ends, dtype=torch.int32)


def prefilled(interpret: Interpret, shape: Shape, chunks: Chunks, dtype: str, sms: int, arch: str = "sm_90") -> Done:
    torch.manual_seed(chunks.tokens + shape.heads)
    tables, count = tables_for(chunks.keys, shape.rows)
    stored, plain = pools(shape, count, dtype)
    given = {
        "q": torch.randn(chunks.tokens, shape.heads, shape.dim).to(TYPES[dtype]),
        "starts": chunks.starts,
        "lengths": torch.tensor(chunks.keys, dtype=torch.int32),
        "tables": tables,
    }
    graph = prefill_graph(shape, chunks.tokens, len(chunks.keys), tables.shape[1], count, dtype)
    return compared(interpret, graph, given | stored, given | plain, sms, arch)


CHUNKS = [
    (Shape(1, 1, 64), Chunks((1,), (1,)), 4),
    (Shape(4, 2, 64), Chunks((14, 0, 1, 5), (70, 0, 1, 37), behind=3), 1),
    (Shape(8, 2, 128), Chunks((40, 33), (40, 100)), 2),
    (Shape(6, 2, 80), Chunks((45,), (64,), first=2, behind=1), 1),
    (Shape(16, 1, 96), Chunks((9, 1), (200, 33)), 3),
    (Shape(2, 1, 128, 64), Chunks((130,), (195,)), 132),
    (Shape(2, 2, 256), Chunks((70,), (70,)), 1),
]
"""Shape, chunks, SMs: one row, one key, no chunk, rows of none, ends of tiles and pages, head dims and groups."""


@pytest.mark.parametrize("shape, chunks, sms", [case for case in CHUNKS if case[0].dim <= 128])
def test_prefill_in_f32(interpret: Interpret, shape: Shape, chunks: Chunks, sms: int) -> None:
    prefilled(interpret, shape, chunks, "f32", sms)


@pytest.mark.parametrize("shape, chunks, sms", CHUNKS)
def test_prefill_in_bf16(interpret: Interpret, shape: Shape, chunks: Chunks, sms: int) -> None:
    prefilled(interpret, shape, chunks, "bf16", sms)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_prefill_of_any_chunks_on_any_sms(interpret: Interpret, data: st.DataObject) -> None:
    kv = data.draw(st.integers(1, 2))
    shape = Shape(kv * data.draw(st.integers(1, 3)), kv, 32, data.draw(st.sampled_from([32, 64])))
    rows = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(any))
    keys = [n and n + data.draw(st.integers(0, 150)) for n in rows]
    chunks = Chunks(tuple(rows), tuple(keys), behind=data.draw(st.integers(0, 3)))
    arch = data.draw(st.sampled_from(["sm_80", "sm_90"]))
    prefilled(interpret, shape, chunks, "bf16", data.draw(st.integers(1, 9)), arch)


def test_prefill_with_tiles_of_an_older_gpu(interpret: Interpret) -> None:
    prefilled(interpret, Shape(8, 2, 128), Chunks((40, 33), (40, 100)), "bf16", 2, "sm_80")


@pytest.mark.parametrize(
    "starts, lengths, page, fault, value",
    [
        ([0, 20, 60], [70, 60], None, 6, 60),
        ([0, 20, 50], [70, 20], None, 6, 50),
        ([0, 20, 50], [70, 500], None, 5, 500),
        ([0, 20, 50], [70, 80], 77, 4, 77),
    ],
)
def test_prefill_says_what_it_cannot_use(
    interpret: Interpret, starts: list[int], lengths: list[int], page: int | None, fault: int, value: int
) -> None:
    """Rows that are not there, more rows than keys, keys that the table does not hold, a page that does not exist."""
    shape = Shape(4, 2, 64)
    tables, count = tables_for([96, 96], shape.rows)
    if page is not None:
        tables[1, 1] = page
    stored, plain = pools(shape, count, "bf16")
    given = {"q": torch.randn(50, 4, 64).bfloat16(), "tables": tables}
    places = {"starts": torch.tensor(starts, dtype=torch.int32), "lengths": torch.tensor(lengths, dtype=torch.int32)}
    graph = prefill_graph(shape, 50, 2, 3, count, "bf16")
    (job,) = jobs(graph, given | places | plain, "paged_prefill", 2)
    done = interpret(job)
    assert not done.torn
    assert done.fault >> 48 == fault and done.fault & 0xFFFFFFFFFFFF == value
    good = {"starts": torch.tensor([0, 20, 20]).int(), "lengths": torch.tensor([70, 0]).int(), "tables": tables * 0}
    good["tables"][0] = tables[0]
    wanted = by_cpu(graph, given | good | stored)["mixed.out"]
    torch.testing.assert_close(done.tensors["mixed.out"][:20], wanted[:20], rtol=1.6e-2, atol=1.6e-2)
    assert done.tensors["mixed.out"].isfinite().all()


# -------------------------------------------------------------------------------------- caches of their own


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    "shape, positions, each, length",
    [
        (Shape(4, 2, 64), [0, 69, 31], 1, 70),
        (Shape(8, 2, 128), [5, 200], 1, 201),
        (Shape(3, 1, 80), [0, 40], 33, 75),
        (Shape(4, 4, 64), [100], 2, 102),
    ],
)
def test_attention_over_a_cache(
    interpret: Interpret, shape: Shape, positions: list[int], each: int, length: int, dtype: str
) -> None:
    torch.manual_seed(length)
    batch = len(positions)
    b = tg.GraphBuilder("cache")
    q, places = b.input("q", (batch * each, shape.heads, shape.dim), dtype), b.input("positions", (batch,), "i64")
    kept = [b.state(n, (batch, shape.kv, length, shape.dim), dtype) for n in ("keys", "values")]
    b.output(tg.ops.attention(q, places, *kept, name="mixed"))
    graph = b.build()
    values = {t.name: torch.randn(t.shape).to(TYPES[dtype]) for t in graph.tensors if t.name in ("q", "keys", "values")}
    values["positions"] = torch.tensor(positions)
    compared(interpret, graph, values, values, 2)


@pytest.mark.parametrize("position", [-1, 70])
@pytest.mark.parametrize("each", [1, 3])
def test_attention_says_a_position_outside_its_cache(interpret: Interpret, position: int, each: int) -> None:
    b = tg.GraphBuilder("cache")
    q, places = b.input("q", (2 * each, 4, 64), "bf16"), b.input("positions", (2,), "i64")
    kept = [b.state(n, (2, 2, 70, 64), "bf16") for n in ("keys", "values")]
    b.output(tg.ops.attention(q, places, *kept, name="mixed"))
    graph = b.build()
    values = {t.name: torch.randn(t.shape).bfloat16() for t in graph.tensors if t.name in ("q", "keys", "values")}
    (job,) = jobs(graph, values | {"positions": torch.tensor([7, position])}, "attention", 2)
    done = interpret(job)
    assert not done.torn and done.tensors["mixed.out"].isfinite().all()
    assert done.fault >> 48 == 2 and done.fault & 0xFFFFFFFFFFFF == position & 0xFFFFFFFFFFFF


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("shape, batch, length", [(Shape(4, 2, 64), 3, 75), (Shape(8, 1, 128), 1, 1)])
def test_decode_over_keys_of_heads_beside_each_other(
    interpret: Interpret, shape: Shape, batch: int, length: int, dtype: str
) -> None:
    torch.manual_seed(length)
    b = tg.GraphBuilder("beside")
    q = b.input("q", (batch, shape.heads, shape.dim), dtype)
    b.output(tg.ops.decode_attention(q, b.state("kv", (2, batch, length, shape.kv, shape.dim), dtype), name="mixed"))
    graph = b.build()
    values = {t.name: torch.randn(t.shape).to(TYPES[dtype]) for t in graph.tensors if t.name in ("q", "kv")}
    compared(interpret, graph, values, values, 2)


def test_a_part_of_a_batch_is_taken_where_it_lies() -> None:
    """Keys and values of its sequences, at the distance of the whole; not a part of the keys."""
    b = tg.GraphBuilder("part")
    b.output(tg.ops.decode_attention(b.input("q", (2, 4, 64), "bf16"), b.state("kv", (2, 2, 70, 2, 64), "bf16")))
    (op,) = b.build().ops
    whole = Buffer(1 << 20, (2, 5, 70, 2, 64), "bf16")
    q, out = Buffer(1 << 24, (2, 4, 64), "bf16"), Buffer(1 << 25, (2, 4, 64), "bf16")
    part = whole.part(Rows(1, 3, 5))
    assert decode_attention_taken(op, [q, part], [out])
    (first, _) = decode_attention_launches(op, [q, part], [out], DrySite(4, "sm_90"))
    assert isinstance(first, Launch)
    each = 2 * 70 * 2 * 64
    assert first.args[1:3] == ((1 << 20) + 3 * each, (1 << 20) + 8 * each)
    assert not decode_attention_taken(op, [q, whole.part(Rows(2, 0, 35))], [out])
