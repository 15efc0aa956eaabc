"""Two gloo ranks, each a process: collectives, sharded steps equal to whole ones, one order, and lost ranks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import taskgraph as tg
from taskgraph import ops, rewrite
from taskgraph.errors import BackendUnavailable, ExecutionError, GraphError, PlanError, RankLost
from taskgraph.models import llama
from taskgraph.models.config import load_config
from taskgraph.models.parallel import Decode, Prefill, mixed_step
from taskgraph.models.shards import Shard, load_shard
from taskgraph.models.weights import open_checkpoint
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.runtime.distributed import Group, connect, group, one_plan
from taskgraph.schedule import planner
from taskgraph.schedule.solve import packing
from taskgraph.schedule.verify import collectives_in_order
from taskgraph.serving.ranks.processes import Ranks
from taskgraph.serving.session import Session
from taskgraph.serving.simulate.runner import page_bytes, pages_of
from tests.models import test_families, test_llama

Tensors = dict[str, torch.Tensor]
RANK = tg.devices.make("h100_sxm", "rank", kind="cpu", sm_count=1, sm_granularity=1, sm_min=1)
"""What a rank's steps are planned for: one core, and a link."""
SHAPE = (Decode(3, context=24), Prefill(8, context=24, sequences=2))


# ------------------------------------------------------------------------------ what a rank does


class Lab:
    """What a rank of these tests can do."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def exchange(self, kind: str, axis: int, parts: list[torch.Tensor], rows: tuple[int, int] | None) -> torch.Tensor:
        """The collective of the ranks' parts, or of some rows of each."""
        x = parts[self.group.rank]
        dtype = next(name for name, torch_dtype in TORCH_DTYPE.items() if torch_dtype == x.dtype)
        b = tg.GraphBuilder("exchange")
        given = b.input("x", tuple(x.shape), dtype)
        seen = given if rows is None else given.rows(*rows)
        b.output(getattr(ops, kind)(seen, ranks=self.group.size, axis=axis, name="exchange"))
        graph = b.build()
        with tg.compile(graph, tg.plan(graph, RANK), group=self.group) as exe:
            return exe(x=x)["exchange.out"]

    def mixed(self, folder: Path, given: Tensors, whole_experts: bool, collectives: dict[str, str]) -> Tensors:
        """This rank's outputs and states of one mixed step of the checkpoint."""
        rank, size = self.group.rank, self.group.size
        with open_checkpoint(folder) as checkpoint:
            config = checkpoint.config
            share = config.share(size, rank if whole_experts else None)
            weights = load_shard(share, checkpoint, "f32", rank, collectives=collectives)
        graph = mixed_step(share, *SHAPE, dtype="f32", collectives=collectives)
        return run(graph, weights, given, self.group)

    def generate(self, folder: Path, prompt: list[int], tokens: int) -> list[int]:
        with open_checkpoint(folder) as checkpoint:
            share = checkpoint.config.share(self.group.size)
            weights = load_shard(share, checkpoint, "f32", self.group.rank)
        with Session(share, weights, cache=48, group=self.group) as session:
            return list(session.generate(prompt, tokens))

    def compile(self, ranks: int = 2, races: tuple[int, ...] = (), swapped: bool = False) -> None:
        """Two collectives on two lanes; on the ranks of `races` nothing orders them, `swapped` turns them on rank 1."""
        graph = two_collectives(ranks)
        made = on_two_lanes(graph, self.group.rank not in races, swapped and self.group.rank == 1)
        tg.compile(graph, made, group=self.group).close()

    def fail_on(self, rank: int) -> str:
        """What this rank gets from an all-reduce, in a group of its own, after an op that raises on one rank."""
        b = tg.GraphBuilder("fails")
        y = b.call(
            stumble, [b.input("x", (4,), "f32")], [tg.spec("y", (4,), "f32")], name="stumble", work=tg.Work(flops=1)
        )
        b.output(ops.all_reduce(y, ranks=2, axis=0, name="total"))
        graph, small = b.build(), group(range(self.group.size), timeout_s=60.0)
        with (
            tg.compile(graph, tg.plan(graph, RANK), group=small) as exe,
            pytest.raises((ExecutionError, RankLost)) as caught,
        ):
            exe(x=torch.full((4,), float(self.group.rank == rank)))
        assert small.broken
        return f"{type(caught.value).__name__}: {caught.value}"

    def late(self) -> list[str]:
        """In a group of its own, which waits a second, rank 1 comes too late: what each then gets, twice."""
        small = group(range(self.group.size), timeout_s=1.0)
        time.sleep(2.0 * self.group.rank)
        errors = []
        for _ in range(2):
            with pytest.raises(RankLost) as caught:
                small.all_reduce(torch.ones(2))
            errors.append(str(caught.value))
        assert small.broken and not self.group.broken
        return errors

    def sums(self, count: int) -> float:
        """So many all-reduces, and the last sum."""
        for i in range(count):
            x = torch.full((8,), float(i))
            self.group.all_reduce(x)
        return float(x[0])


def stumble(x: torch.Tensor, out: torch.Tensor) -> None:
    if x[0]:
        raise FloatingPointError("this rank stumbles")
    out.copy_(x)


def run(graph: tg.Graph, weights: Tensors, given: Tensors, group: Group | None = None) -> Tensors:
    """Outputs and states after two replays."""
    made = one_plan(graph, group, lambda: tg.plan(graph, RANK))
    states = {t.name: torch.zeros(t.shape) for t in graph.flat().with_role("state")}
    wanted = {t.name for t in graph.flat().with_role("weight")}
    with tg.compile(graph, made, group=group) as exe:
        exe.bind({name: weights[name] for name in wanted} | states)
        for _ in range(2):
            outputs = exe(given)
    return outputs | states


def two_collectives(ranks: int = 2) -> tg.Graph:
    b = tg.GraphBuilder("two")
    for name in ("left", "right"):
        b.output(ops.all_reduce(b.input(f"x_{name}", (4, 4), "f32"), ranks=ranks, name=name))
    return b.build()


def on_two_lanes(graph: tg.Graph, waits: bool, swapped: bool = False) -> tg.Plan:
    """Each collective on a lane of its own, by hand."""
    made = tg.plan(graph, RANK, "sequential")
    first, second = reversed(made.steps) if swapped else made.steps
    steps = (replace(first, lane=0), replace(second, lane=1, waits=(0,) if waits else ()))
    spans = [replace(s, op=step.op, lane=step.lane) for s, step in zip(made.timeline.spans, steps, strict=True)]
    timeline = replace(made.timeline, spans=tuple(spans))
    return replace(made, lanes=made.lanes * 2, steps=steps, timeline=timeline).sealed()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2, Lab) as started:
        yield started


# ---------------------------------------------------------------------------------- collectives


def wanted(kind: str, axis: int, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """By the definition, in double precision where it sums."""
    if kind == "all_gather":
        return [torch.cat(parts, axis)] * len(parts)
    total = torch.stack([p.double() for p in parts]).sum(0).to(parts[0].dtype)
    return [total] * len(parts) if kind == "all_reduce" else list(total.chunk(len(parts), axis))


@pytest.mark.parametrize("kind", ops.COLLECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [None, (2, 6)])
def test_collectives_follow_their_definition(
    kind: str, dtype: torch.dtype, axis: int, rows: tuple[int, int] | None, ranks: Ranks
) -> None:
    torch.manual_seed(len(kind) + axis)
    parts = [(torch.randn(8, 6) * 50).to(dtype) for _ in range(2)]
    seen = [p if rows is None else p[slice(*rows)] for p in parts]
    got = ranks.call("exchange", kind, axis, parts, rows)
    for mine, right in zip(got, wanted(kind, axis, seen), strict=True):
        torch.testing.assert_close(mine, right)
    if kind != "reduce_scatter":
        assert torch.equal(*got)


# ---------------------------------------------------------------------------------- sharded steps


def saved(case: str, folder: Path) -> None:
    family, _, few = case.partition(", ")
    if family in test_families.CASES:
        test_families.tiny(family).save_pretrained(folder)
    else:
        test_llama.tiny(family, **({"num_key_value_heads": 1} if few else {})).save_pretrained(folder)


@pytest.mark.parametrize(
    ("case", "whole_experts", "collectives"),
    [
        ("llama", False, {}),
        ("llama", False, {"o": "gather", "down": "scatter"}),
        ("llama, one kv head", False, {"o": "gather"}),
        ("qwen2", False, {}),
        ("qwen2, one kv head", False, {}),
        ("qwen3", False, {"down": "gather"}),
        ("mixtral", False, {}),
        ("mixtral", True, {}),
        ("qwen2_moe sparse", True, {}),
        ("deepseek", False, {}),
        ("deepseek", True, {}),
    ],
)
def test_two_ranks_equal_one(
    case: str, whole_experts: bool, collectives: dict[str, str], ranks: Ranks, tmp_path: Path
) -> None:
    saved(case, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        config, weights = checkpoint.config, llama.load_weights(checkpoint.config, checkpoint, "f32")
    given = {
        "tokens": torch.randint(0, config.vocab_size, (11,)), "decode_positions": torch.tensor([4, 0, 17]),
        "prefill_positions": torch.tensor([0, 9]),
    }  # fmt: skip
    whole = run(mixed_step(config, *SHAPE, dtype="f32"), weights, given)
    parts = ranks.call("mixed", tmp_path, given, whole_experts, collectives)
    for name, right in whole.items():
        shared = name.endswith(("keys", "values"))
        if not shared or config.kv_heads == 1:
            assert torch.equal(parts[0][name], parts[1][name])  # every rank samples the same token
        mine = torch.cat([part[name] for part in parts[: config.kv_heads]], 1) if shared else parts[0][name]
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("heads", "ranks"), [(2, 4), (2, 8), (4, 2), (1, 8)])
def test_each_kv_head_is_on_the_ranks_whose_queries_take_it(heads: int, ranks: int) -> None:
    """Rank r of `ranks` has 16 / ranks of 16 query heads; query head q takes key-value head q // (16 / heads)."""

    class Numbered:
        """Every row of a product has the number of its head."""

        def tensor(self, name: str) -> torch.Tensor:
            count = heads if name.split(".")[-2] in ("k_proj", "v_proj") else 16
            return torch.arange(count).repeat_interleave(4)

    whole = replace(load_config("llama-3-8b"), heads=16, kv_heads=heads)
    share = whole.share(ranks)
    assert share.kv_copies * heads == max(ranks, heads) and share.kv_heads == max(heads // ranks, 1)
    for rank in range(ranks):
        shard = Shard(Numbered(), rank, ranks, kv_copies=share.kv_copies)
        q, k, v = (shard.tensor(f"layers.0.self_attn.{n}_proj.weight")[::4].tolist() for n in "qkv")
        assert k == v == sorted({each // (16 // heads) for each in q})
        assert (len(q), len(k)) == (share.heads, share.kv_heads)
    assert share.heads % share.kv_heads == 0


def test_pages_of_more_ranks_than_heads_hold_each_head_several_times() -> None:
    """16 ranks keep in each page twice the 8 heads, and twice the products of keys and values; 8 ranks once."""
    whole, memory = load_config("llama-3-70b"), tg.devices.get("h100_sxm").memory_bytes
    doubled = replace(whole, kv_heads=16)
    assert page_bytes(whole.share(16), 16) * 16 == page_bytes(doubled, 16) == 2 * page_bytes(whole, 16)
    for ranks, held in ((8, whole), (16, doubled)):
        room = 0.9 * ranks * memory - 2 * held.parameters
        assert pages_of(whole, "h100_sxm", tensor_parallel=ranks) == int(room // page_bytes(held, 16))


@pytest.mark.parametrize("case", ["llama", "mixtral", "llama, one kv head"])
def test_a_session_of_two_ranks_generates_what_one_does(case: str, ranks: Ranks, tmp_path: Path) -> None:
    saved(case, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        weights = llama.load_weights(checkpoint.config, checkpoint, "f32")
    prompt = torch.randint(0, 160, (9,)).tolist()
    with Session(checkpoint.config, weights, cache=48) as session:
        alone = list(session.generate(prompt, 12))
    assert ranks.call("generate", tmp_path, prompt, 12) == [alone, alone]


# -------------------------------------------------------------------------------------- one order


@pytest.mark.parametrize("races", [(0,), (1,), (0, 1)])
def test_collectives_that_could_race_are_refused(races: tuple[int, ...], ranks: Ranks) -> None:
    """On every rank at once, also where only one rank's plan races."""
    graph = two_collectives()
    with pytest.raises(PlanError, match=r"'left' and 'right' may run at the same time"):
        collectives_in_order(on_two_lanes(graph, waits=False), graph)
    collectives_in_order(on_two_lanes(graph, waits=True), graph)
    with pytest.raises(PlanError, match=r"'left' and 'right' may run at the same time|rank 1 runs other"):
        ranks.call("compile", races=races)
    ranks.call("compile")


@pytest.mark.parametrize("sizes", [(512, 512), (256, 256, 256, 256)])
def test_the_planner_leaves_no_race_between_nano_batches(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = mixed_step(
        replace(load_config("llama-3-8b"), layers=2).share(2), Decode(512, context=2048), Prefill(512, context=512)
    )
    graph = rewrite.split_batch(step, sizes)
    ordered = tg.plan(graph, "h100_sxm", "list")
    collectives_in_order(ordered, graph.flat())
    tg.verify(ordered, graph)
    assert len(ordered.lanes) > 1
    for module in (packing, planner):
        monkeypatch.setattr(module, "collectives_ordered", lambda found: found)
    with pytest.raises(PlanError, match="may run at the same time"):
        collectives_in_order(tg.plan(graph, "h100_sxm", "list"), graph.flat())


def test_ranks_with_other_orders_are_refused(ranks: Ranks) -> None:
    with pytest.raises(PlanError, match="rank 1 runs other collectives"):
        ranks.call("compile", swapped=True)


def test_another_number_of_ranks_is_refused(ranks: Ranks) -> None:
    with pytest.raises(GraphError, match=r"'left' is over 3 ranks; the group has 2"):
        ranks.call("compile", ranks=3)


# -------------------------------------------------------------------------------------- lost ranks


def test_a_rank_that_comes_too_late_is_lost(ranks: Ranks) -> None:
    """Only in the group that gave up on it."""
    for first, again in ranks.call("late"):
        assert "lost another rank, or waited for it longer than 1 s" in first
        assert "has left its group" in again
    assert ranks.call("sums", 3) == [4.0, 4.0]


def test_no_group_without_its_ranks(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="connect"):
        group([0])
    with pytest.raises(RankLost, match=r"not all of 2 ranks met at 'file:.*' within 0.5 s"):
        connect((tmp_path / "meet").as_uri(), 0, 2, timeout_s=0.5)
    with pytest.raises(BackendUnavailable, match="connect"):
        group([0])


def test_an_op_that_fails_on_one_rank_breaks_the_group(ranks: Ranks) -> None:
    """At once: the other rank sees the first leave, long before it would stop waiting."""
    begin = time.monotonic()
    lost, failed = ranks.call("fail_on", 1)
    assert time.monotonic() - begin < 30
    assert failed.startswith("ExecutionError: op 'stumble' failed: FloatingPointError: this rank stumbles")
    assert lost.startswith("RankLost: op 'total' failed: all_reduce: rank 0 of 2 lost another rank")


def test_a_killed_rank_fails_all_requests_and_the_process() -> None:
    """As a server would see it: requests wait while a step runs, one rank is killed, each gets RankLost, exit 1."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == ["3 requests failed: RankLost"]
    assert "RankLost: Rank 1 of 2 died (exit code -9)" in done.stderr


def serve_until_killed() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with Ranks(2, Lab) as started, ThreadPoolExecutor(1) as engine:
        requests = [engine.submit(started.call, "sums", 10**9) for _ in range(3)]
        time.sleep(0.3)
        os.kill(started.pids[1] or 0, signal.SIGKILL)
        errors = [request.exception(600) for request in requests]
        print(f"{len(errors)} requests failed: {', '.join({type(e).__name__ for e in errors})}", flush=True)
        assert started.exitcodes in [(1, -9), (-9, -9)]
        requests[0].result()


if __name__ == "__main__":
    serve_until_killed()
