"""Indices that are data, and wrong: one rule on the cpu and the cuda backend, and no memory is touched outside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import taskgraph as tg
from taskgraph import ops
from taskgraph.errors import ExecutionError
from taskgraph.graph import device as specs
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.schedule.planner import plan
from taskgraph.tune.fill import fill

CPU = specs.make("h100_sxm", name="two cores", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)
Make = Callable[[GraphBuilder], Any]


def _embedding(b: GraphBuilder) -> Any:
    return ops.embedding(b.input("ids", (3,), "i64"), b.weight("table", (11, 8), "f32"), name="op")


def _embedding_i32(b: GraphBuilder) -> Any:
    return ops.embedding(b.input("ids", (3,), "i32"), b.weight("table", (11, 8), "bf16"), out_dtype="f32", name="op")


def _caches(b: GraphBuilder) -> list[Any]:
    return [b.state(name, (2, 1, 8, 32), "f32") for name in ("k", "v")]


def _pages(b: GraphBuilder) -> list[Any]:
    return [b.state(name, (4, 1, 32, 32), "f32") for name in ("k", "v")]


def _rope_kv(b: GraphBuilder) -> Any:
    return ops.rope_kv(
        b.input("qkv", (4, 128), "f32"), b.input("at", (2,), "i64"), *_caches(b), spec=ops.RopeSpec(2), name="op"
    )


def _attention(rows: int) -> Make:
    def make(b: GraphBuilder) -> Any:
        return ops.attention(b.input("q", (rows, 2, 32), "f32"), b.input("at", (2,), "i64"), *_caches(b), name="op")

    return make


def _ints(b: GraphBuilder, **shapes: tuple[int, ...]) -> list[Any]:
    return [b.input(name, shape, "i32") for name, shape in shapes.items()]


def _paged_rope(b: GraphBuilder) -> Any:
    places = _ints(b, at=(2,), slots=(2,))
    return ops.paged_rope(
        b.input("qkv", (2, 128), "f32"), ops.TokenPlaces(*places, 64), *_pages(b), spec=ops.RopeSpec(2), name="op"
    )


def _paged_decode(b: GraphBuilder) -> Any:
    tables = _ints(b, lengths=(2,), blocks=(2, 2))
    return ops.paged_decode(b.input("q", (2, 2, 32), "f32"), *tables, *_pages(b), context=64, name="op")


def _paged_prefill(b: GraphBuilder) -> Any:
    tables = _ints(b, starts=(3,), lengths=(2,), blocks=(2, 2))
    return ops.paged_prefill(b.input("q", (6, 2, 32), "f32"), *tables, *_pages(b), context=64, name="op")


def _latent_rope(b: GraphBuilder) -> Any:
    given = [b.input("q", (4, 64), "f32"), b.input("kv", (4, 24), "f32"), b.weight("norm", (16,), "f32")]
    return ops.latent_rope(
        *given, b.input("at", (2,), "i64"), b.state("c", (2, 8, 24), "f32"), spec=ops.LatentRopeSpec(2, 8), name="op"
    )


def _latent_attention(b: GraphBuilder) -> Any:
    q, at, c = b.input("q", (4, 2, 16), "f32"), b.input("at", (2,), "i64"), b.state("c", (2, 8, 24), "f32")
    return ops.latent_attention(q, at, c, b.weight("up", (32, 16), "f32"), spec=ops.LatentSpec(8, 0.3), name="op")


def _paged_latent_rope(b: GraphBuilder) -> Any:
    given = [b.input("q", (2, 64), "f32"), b.input("kv", (2, 24), "f32"), b.weight("norm", (16,), "f32")]
    places = _ints(b, at=(2,), slots=(2,))
    pages = b.state("c", (4, 32, 24), "f32")
    return ops.paged_latent_rope(*given, ops.TokenPlaces(*places, 64), pages, spec=ops.LatentRopeSpec(2, 8), name="op")


def _paged_latent_decode(b: GraphBuilder) -> Any:
    q, tables, c = (
        b.input("q", (2, 2, 16), "f32"),
        _ints(b, lengths=(2,), blocks=(2, 2)),
        b.state("c", (4, 32, 24), "f32"),
    )
    up = b.weight("up", (32, 16), "f32")
    return ops.paged_latent_decode(q, *tables, c, up, spec=ops.LatentSpec(8, 0.3, context=64), name="op")


def _paged_latent_prefill(b: GraphBuilder) -> Any:
    q, tables = b.input("q", (6, 2, 16), "f32"), _ints(b, starts=(3,), lengths=(2,), blocks=(2, 2))
    c, up = b.state("c", (4, 32, 24), "f32"), b.weight("up", (32, 16), "f32")
    return ops.paged_latent_prefill(q, *tables, c, up, spec=ops.LatentSpec(8, 0.3, context=64), name="op")


def _copy_pages(b: GraphBuilder) -> Any:
    source, target = b.state("from", (4, 8), "f32"), b.state("to", (3, 8), "f32")
    return ops.copy_pages(source, target, *_ints(b, pairs=(2, 2)), direction="d2d", name="op")


# fmt: off
DECODE = {"lengths": [33, 5], "blocks": [[0, 1], [2, 3]]}
PREFILL = {"starts": [0, 2, 5], **DECODE}
FAR, LONG = 100_000, 10**11
CASES: dict[str, tuple[Make, dict[str, Any], list[tuple[str, Any, int]]]] = {
    "embedding": (_embedding, {"ids": [0, 10, 3]}, [("ids", [1, 11, 2], 11), ("ids", [1, 2, -1], -1)]),
    "embedding to f32": (_embedding_i32, {"ids": [0, 10, 3]}, [("ids", [FAR, 0, 2], FAR)]),
    "rope_kv": (_rope_kv, {"at": [0, 6]}, [("at", [0, 8], 8), ("at", [-1, 0], -1), ("at", [0, LONG], 0)]),
    "attention, one token": (_attention(2), {"at": [0, 7]},
        [("at", [0, 8], 8), ("at", [LONG, 0], 0), ("at", [-1, 0], -1)]),
    "attention": (_attention(4), {"at": [0, 6]}, [("at", [0, 7], 7), ("at", [FAR, 0], FAR), ("at", [0, -3], -3)]),
    "paged_rope": (
        _paged_rope, {"at": [0, 63], "slots": [-1, 127]},
        [("slots", [0, 128], 128), ("at", [-1, 0], -1), ("at", [0, 64], 64)],
    ),
    "paged_decode": (
        _paged_decode, DECODE,
        [("lengths", [65, 1], 65), ("lengths", [-1, 1], -1),
         ("blocks", [[0, 4], [0, 0]], 4), ("blocks", [[-1, 0]] * 2, -1)],
    ),
    "paged_prefill": (
        _paged_prefill, PREFILL,
        [("lengths", [65, 5], 65),
         ("blocks", [[0, FAR], [0, 0]], FAR), ("starts", [0, 2, 7], 7), ("lengths", [33, 2], 5)],
    ),
    "latent_rope": (_latent_rope, {"at": [0, 6]}, [("at", [0, 8], 8), ("at", [-1, 0], -1), ("at", [LONG, 0], 0)]),
    "latent_attention": (_latent_attention, {"at": [0, 6]},
        [("at", [0, 7], 7), ("at", [-2, 0], -2), ("at", [0, FAR], FAR)]),
    "paged_latent_rope": (
        _paged_latent_rope, {"at": [0, 63], "slots": [-1, 127]},
        [("slots", [0, 128], 128), ("at", [-1, 0], -1), ("at", [0, 64], 64)],
    ),
    "paged_latent_decode": (
        _paged_latent_decode, DECODE,
        [("lengths", [65, 1], 65), ("lengths", [-1, 1], -1), ("blocks", [[0, 4], [0, 0]], 4)],
    ),
    "paged_latent_prefill": (
        _paged_latent_prefill, PREFILL,
        [("lengths", [65, 5], 65),
         ("blocks", [[0, FAR], [0, 0]], FAR), ("starts", [0, 2, 7], 7), ("lengths", [33, 2], 5)],
    ),
    "copy_pages": (_copy_pages, {"pairs": [[3, 2], [-1, 0]]},
        [("pairs", [[0, 3], [0, 0]], 3), ("pairs", [[4, 0], [1, 1]], 4)]),
}
# fmt: on


def made(case: str) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The graph and values that fit."""
    b = tg.GraphBuilder("places")
    make, places, _ = CASES[case]
    b.output(make(b))
    graph = b.build()
    values = fill(graph, {}, seed=0)
    return graph, values | {name: torch.tensor(v).to(values[name].dtype) for name, v in places.items()}


def check(case: str, executable: Any, values: dict[str, torch.Tensor]) -> None:
    want = executable({name: t.clone() for name, t in values.items()})
    for name, wrong, value in CASES[case][2]:
        bad = {**values, name: torch.tensor(wrong).to(values[name].dtype)}
        with pytest.raises(ExecutionError, match=rf"op 'op'.*{value or ''}") as info:
            executable({key: t.clone() for key, t in bad.items()})
        assert info.value.op == "op"
        assert "\n" not in str(info.value)
        again = executable({key: t.clone() for key, t in values.items()})
        assert all(torch.equal(again[key], want[key]) for key in want)


@pytest.mark.parametrize("case", CASES)
def test_on_the_cpu_backend(case: str) -> None:
    graph, values = made(case)
    with tg.compile(graph, plan(graph, CPU)) as exe:
        check(case, exe, values)


@pytest.mark.parametrize("case", CASES)
def test_on_the_cuda_backend(case: str, on_virtual: Callable[..., Any]) -> None:
    on_virtual(on_cuda, case)


def on_cuda(case: str) -> None:
    graph, values = made(case)
    device = "virtual:h100_sxm"
    with tg.compile(graph, tg.plan(graph, "h100_sxm"), "cuda", device=device) as exe:
        check(case, exe, values)
        name, wrong, _ = CASES[case][2][0]
        exe.bind({name: torch.tensor(wrong).to(values[name].dtype)})
        exe.launch(exe.origin)  # type: ignore[attr-defined]
        exe.origin.sync()  # type: ignore[attr-defined]
        with pytest.raises(ExecutionError, match="op 'op'"):
            exe.launch(exe.origin)  # type: ignore[attr-defined]
