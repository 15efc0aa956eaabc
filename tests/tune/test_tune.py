"""autotune: candidates, honest verdicts, budget, memory. Doubles stand in for executables where time must be known."""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph import ops
from taskgraph.cost.profiles import ProfileDB, measured_costs
from taskgraph.errors import BackendUnavailable, ExecutionError, PlanError
from taskgraph.graph import device as specs
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import Work, spec
from taskgraph.schedule.plan import Plan, Span, Timeline
from taskgraph.tune import autotune as tuning
from taskgraph.tune import measure
from taskgraph.tune.autotune import autotune, candidates
from taskgraph.tune.fill import fill
from taskgraph.tune.measure import Countdown, noise_floor, on_partition
from tests.cost.test_profiles import profiles_of
from tests.strategies import devices, graphs

CPU = specs.make("h100_sxm", name="two cores", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)
Seconds = Callable[[Plan], float]


def nap(x: torch.Tensor, out: torch.Tensor) -> None:
    time.sleep(0.002)
    out.copy_(x)


def sleep(x: torch.Tensor, out: torch.Tensor) -> None:
    time.sleep(0.05)
    out.copy_(x)


def explode(x: torch.Tensor, out: torch.Tensor) -> None:
    raise KeyError("broken")


def chains(function: Callable[..., Any] = nap, width: int = 2, depth: int = 3) -> Graph:
    """Independent chains, which any two lanes can share out."""
    b = GraphBuilder("chains")
    ends = []
    for i in range(width):
        x = b.input(f"x{i}", (16,), "f32")
        for level in range(depth):
            work, out = Work(flops=1e9), [spec(f"n{level}_{i}.out", (16,), "f32")]
            x = b.call(function, [x], out, work=work, name=f"n{level}_{i}")
        ends.append(x)
    b.output(*ends)
    return b.build()


# ------------------------------------------------------------------------------------------ doubles


@dataclass
class World:
    """A made-up machine: what a launch of a plan takes, with noise, on a clock of its own."""

    seconds: Seconds
    noise: float = 0.0
    seed: int = 0
    now_s: float = 0.0
    opened: int = 0
    alive: int = 0

    def __post_init__(self) -> None:
        self.draw = np.random.default_rng(self.seed)

    def compile(
        self, graph: Graph, plan: Plan, backend: str = "cpu", functions: Any = None, device: str | None = None
    ) -> "Double":
        tg.verify(plan, graph)
        self.opened += 1
        self.alive += 1
        return Double(self, plan)


class Double:
    """An Executable of that machine."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.plan, self.elapsed_s = world, plan, 0.0

    @property
    def outputs(self) -> Mapping[str, Any]:
        return {}

    def bind(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> None:
        self.bound = {**(tensors or {}), **named}

    def __call__(self, tensors: Mapping[str, Any] | None = None, **named: Any) -> dict[str, Any]:
        self.launch()
        return {}

    def launch(self, stream: object = None) -> None:
        took = self.world.seconds(self.plan) * float(np.exp(self.world.noise * self.world.draw.standard_normal()))
        self.elapsed_s += took
        self.world.now_s += took

    def check(self, kinds: Collection[str] | None = None) -> None:
        """Its ops do nothing that could be seen."""

    def timeline(self) -> Timeline:
        self.launch()
        each = self.world.seconds(self.plan) / len(self.plan.steps)
        spans = (Span(s.op, s.lane, i * each, (i + 1) * each) for i, s in enumerate(self.plan.steps))
        return Timeline("measured", "a double", tuple(spans))

    def close(self) -> None:
        self.world.alive -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_sequential(plan: Plan) -> bool:
    return len(plan.lanes) == 1


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    """Make a world in which tune runs: its executables are doubles and its budget follows their clock."""
    made: list[World] = []

    def make(seconds: Seconds, noise: float = 0.0, seed: int = 0) -> World:
        here = World(seconds, noise, seed)
        made.append(here)
        monkeypatch.setattr(measure, "compile", here.compile)
        monkeypatch.setattr(tuning, "SEARCH_SHARE", 0.0)  # real seconds; those of the world are made up
        monkeypatch.setattr(tuning, "Countdown", lambda budget_s: Countdown(budget_s, lambda: here.now_s))
        return here

    yield make
    assert all(here.alive == 0 for here in made), "every executable was closed"


def tuned(tmp_path: Path, graph: Graph | None = None, **options: Any) -> tg.Tuned:
    options = {"device": CPU, "database": tmp_path / "p.sqlite3", "budget_s": 60.0, **options}
    return autotune(graph or chains(), **options)


# -------------------------------------------------------------------------------------------- noise


def test_the_noise_floor_holds_what_chance_does() -> None:
    """Two rows of one distribution differ by more than their floor hardly ever; 5 % of a quiet machine is seen."""
    false_wins = missed = 0
    for seed in range(300):
        draw = np.random.default_rng(seed)
        first, second, same = np.exp(0.05 * draw.standard_normal((3, 21)))
        floor = max(noise_floor(first, second), noise_floor(same))
        pooled = np.median([*first, *second])
        false_wins += np.median(same) < pooled * (1 - floor)
        faster = 0.8 * same
        missed += not np.median(faster) < pooled * (1 - max(noise_floor(first, second), noise_floor(faster)))
    assert false_wins <= 3
    assert missed <= 3


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30), st.floats(1e-3, 1e3))
def test_the_noise_floor_is_relative_and_repeatable(row: list[float], scale: float) -> None:
    floor = noise_floor(row)
    assert floor >= 0
    assert noise_floor(row) == floor
    assert noise_floor([scale * x for x in row]) == pytest.approx(floor, rel=1e-6, abs=1e-12)
    assert noise_floor([row[0]] * len(row)) == 0.0


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_two_equal_plans_give_no_win(world: Callable[..., World], tmp_path: Path, noise: float) -> None:
    """Packed plans that take as long as the sequential one: whatever the noise, sequential stays and says why."""
    for seed in range(12):
        world(lambda plan: 1e-3, noise, seed)
        found = tuned(tmp_path / str(seed), seed=seed)
        assert found.trials
        assert found.verdict.choice == "sequential"
        assert is_sequential(found.plan)
        assert "no win" in found.reason or "did not repeat" in found.reason or "loses" in found.reason


def test_a_real_win_is_found_through_noise(world: Callable[..., World], tmp_path: Path) -> None:
    for seed in range(8):
        world(lambda plan: 1e-3 if is_sequential(plan) else 0.6e-3, 0.05, seed)
        found = tuned(tmp_path / str(seed), seed=seed)
        assert found.verdict.choice == "packed"
        assert found.verdict.kind == found.kind == "measured"
        assert found.verdict.gain == pytest.approx(1 / 0.6, rel=0.15)
        assert found.trials[-1].session == tuning.REPEAT
        assert len(found.plan.lanes) > 1
        tg.verify(found.plan, chains())


def test_the_fastest_candidate_wins_even_where_it_is_predicted_slower(
    world: Callable[..., World], tmp_path: Path
) -> None:
    def seconds(plan: Plan) -> float:
        return 1e-3 if is_sequential(plan) else 0.5e-3 if len(plan.geometries[0].partitions) == 2 else 0.7e-3

    world(seconds)
    assert len(tuned(tmp_path).plan.geometries[0].partitions) == 2


def test_a_win_that_does_not_repeat_is_none(world: Callable[..., World], tmp_path: Path) -> None:
    said: list[str] = []
    world(lambda plan: 1e-3 if is_sequential(plan) or "repeating the win" in said else 0.5e-3)
    found = tuned(tmp_path, progress=lambda what, _: said.append(what))
    assert found.trials[0].wins
    assert found.verdict.choice == "sequential"
    assert "did not repeat itself" in found.reason


def test_where_nothing_can_be_packed_the_plan_runs_against_itself(world: Callable[..., World], tmp_path: Path) -> None:
    world(lambda plan: 1e-3, 0.01)
    found = tuned(tmp_path, chains(width=1))
    assert [t.session for t in found.trials] == [tuning.SAME]
    assert found.verdict.kind == "measured"
    assert found.verdict.packed_s == found.verdict.sequential_s == pytest.approx(1e-3, rel=0.05)
    assert "no packing" in found.reason


# ------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("budget_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_is_none(tmp_path: Path, budget_s: float) -> None:
    with pytest.raises(PlanError, match=r"budget_s.*positive"):
        tuned(tmp_path, budget_s=budget_s)


@given(st.floats(0.1, 100.0), st.lists(st.floats(0.0, 10.0), max_size=20), st.floats(0.0, 1.0))
def test_a_part_ends_within_its_budget(seconds: float, steps: list[float], share: float) -> None:
    now = [0.0]
    budget = Countdown(seconds, lambda: now[0])
    part = budget.part(share)
    for step in steps:
        if part.allows(step):
            assert budget.allows(step * (1 - 1e-9))
        now[0] += step
    assert budget.spent_s == pytest.approx(sum(steps))


@pytest.mark.parametrize("budget_s", [0.5, 3.0, 20.0])
def test_the_budget_is_kept(world: Callable[..., World], tmp_path: Path, budget_s: float) -> None:
    here = world(lambda plan: 20e-3 if is_sequential(plan) else 12e-3)
    tuned(tmp_path, budget_s=budget_s)
    opening_s = here.opened * 3 * 20e-3  # two launches to warm up, one to size the samples: those are not repeats
    assert here.now_s <= budget_s + opening_s


def test_a_budget_too_small_to_compare_says_so_and_is_not_remembered(
    world: Callable[..., World], tmp_path: Path
) -> None:
    world(lambda plan: 1.0)
    found = tuned(tmp_path, budget_s=0.01)
    assert found.verdict.choice == "sequential"
    assert found.verdict.kind == found.kind == "simulated", "nothing was measured, so nothing says so"
    assert "budget ended" in found.reason
    assert not (tmp_path / "plans").exists()


def test_progress_rises(world: Callable[..., World], tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    world(lambda plan: 1e-3 if is_sequential(plan) else 0.5e-3)
    tuned(tmp_path, progress=lambda what, share: told.append((what, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert [what for what, _ in told][-2:] == ["repeating the win", "done"]


# ------------------------------------------------------------------------------- what is kept, and errors


def test_the_winner_is_remembered(world: Callable[..., World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = world(lambda plan: 1e-3 if is_sequential(plan) else 0.5e-3)
    first = tuned(tmp_path)
    opened = here.opened
    second = tuned(tmp_path)
    assert here.opened == opened
    assert second == replace(first, remembered=True)
    assert tuned(tmp_path, chains(depth=4)).remembered is False, "another graph"
    assert tuned(tmp_path, device=replace(CPU, name="other")).remembered is False
    assert tuned(tmp_path, fresh=True).remembered is False
    assert here.opened > opened


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', '{"schema": 1, "plan": 3}'])
def test_a_damaged_memory_is_tuned_anew(world: Callable[..., World], tmp_path: Path, text: str) -> None:
    world(lambda plan: 1e-3 if is_sequential(plan) else 0.5e-3)
    first = tuned(tmp_path)
    (kept,) = (tmp_path / "plans").glob("*.json")
    kept.write_text(text)
    assert tuned(tmp_path).remembered is False
    assert json.loads(kept.read_text())["kind"] == first.kind


def test_op_times_are_kept_and_spare_the_next_graph(world: Callable[..., World], tmp_path: Path) -> None:
    world(lambda plan: 1e-3 if is_sequential(plan) else 0.5e-3)
    first = tuned(tmp_path)
    assert first.op_times == 2, "one kind of op, on one core and on two"
    (platform,) = ProfileDB(tmp_path / "p.sqlite3").platforms()
    ((key, points),) = ProfileDB(tmp_path / "p.sqlite3").table(platform).items()
    assert key.kind == "call"
    assert [sms for sms, _, _ in points] == [1, 2]
    assert tuned(tmp_path, chains(depth=5)).op_times == 0, "the same op was measured before"
    assert tuned(tmp_path, fresh=True).op_times == 2


def test_measured_op_times_change_the_prediction(world: Callable[..., World], tmp_path: Path) -> None:
    graph = chains()

    def seconds(plan: Plan) -> float:
        """So an op takes 1 ms, and not what the formula says; two cores side by side halve the whole."""
        return 6e-3 if is_sequential(plan) else 3e-3 if len(plan.geometries[0].partitions) == 2 else 4e-3

    world(seconds)
    found = tuned(tmp_path, graph)
    assert found.plan.makespan_s == pytest.approx(3e-3, rel=0.01)
    assert found.plan.timeline.kind == "simulated"
    assert "measured" in found.plan.timeline.origin
    assert found.trials[0].predicted_s < 1e-3


def test_an_op_that_raises_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match="broken"):
        tuned(tmp_path, chains(explode))
    assert not (tmp_path / "plans").exists()
    assert ProfileDB(tmp_path / "p.sqlite3").platforms() == ()


def test_an_unknown_backend(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="tpu"):
        tuned(tmp_path, backend="tpu")


# -------------------------------------------------------------------------------------- candidates


@settings(max_examples=12, deadline=None)
@given(st.data(), graphs(max_ops=8), devices())
def test_candidates_are_distinct_and_pass_the_checker(data: st.DataObject, graph: Graph, device: Device) -> None:
    plans, costs = candidates(graph, device, 0.2, 0), measured_costs(data.draw(profiles_of(graph, device)))
    assert is_sequential(plans[0])
    assert len({tuning.Course.of(p) for p in plans}) == len(plans)
    for p in plans:
        tg.verify(p, graph)
        tg.verify(tuning._predicted(p, graph, costs), graph)


@settings(max_examples=25, deadline=None)
@given(st.data(), graphs(), devices())
def test_ops_are_measured_where_they_may_run(data: st.DataObject, graph: Graph, device: Device) -> None:
    sms = data.draw(st.sampled_from(device.partition_sizes()))
    moved = on_partition(tg.plan(graph, device, "sequential"), graph, sms)
    tg.verify(moved, graph)
    need = {op.name: op.demand.sm[0] for op in graph.flat().ops if op.demand.sm}
    for i, step in enumerate(moved.steps):
        assert moved.sms(i) == (sms if need.get(step.op, 1) <= sms else device.sm_count)


# -------------------------------------------------------------------------------------------- fill


def decode() -> Graph:
    b = GraphBuilder("decode")
    ids, at = b.input("ids", (2,), "i64"), b.input("at", (2,), "i64")
    x = ops.embedding(ids, b.weight("table", (11, 128), "f32"))
    keys, values = b.state("keys", (2, 2, 32, 16), "f32"), b.state("values", (2, 2, 32, 16), "f32")
    q = ops.rope_kv(x, at, keys, values, spec=ops.RopeSpec(4))
    b.output(
        ops.attention(q, at, keys, values, context=20), ops.add(b.input("n", (5,), "i32"), b.input("m", (5,), "i32"))
    )
    return b.build()


def test_tensors_that_nobody_gave() -> None:
    made, again = fill(decode(), {}, 3), fill(decode(), {}, 3)
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert set(made) == {t.name for t in decode().with_role("input", "weight", "state")}
    assert made["at"].tolist() == [19, 19], "the context that the cost counts, full"
    assert ((made["ids"] >= 0) & (made["ids"] < 11)).all()
    assert made["n"].dtype == torch.int32
    assert all(made[name].abs().min() > 0 for name in ("n", "m", "keys", "table"))
    other = fill(decode(), {}, 4)
    assert not torch.equal(made["table"], other["table"])


def test_given_states_are_copied_and_the_rest_is_used_in_place() -> None:
    mine = {"keys": torch.ones(2, 2, 32, 16), "table": torch.ones(11, 128)}
    made = fill(decode(), mine, 0)
    assert made["table"] is mine["table"]
    assert torch.equal(made["keys"], mine["keys"])
    assert made["keys"].data_ptr() != mine["keys"].data_ptr()


def test_tuning_does_not_change_the_callers_states(tmp_path: Path) -> None:
    b = GraphBuilder("counter")
    x, total = b.input("x", (2,), "f32"), b.state("total", (2,), "f32")
    b.output(b.call(accumulate, [x, total.written()], [spec("out", (2,), "f32")], work=Work(flops=1.0)))
    mine = torch.ones(2)
    tuned(tmp_path, b.build(), tensors={"total": mine}, budget_s=0.3)
    assert mine.tolist() == [1.0, 1.0]


def accumulate(x: torch.Tensor, total: torch.Tensor, out: torch.Tensor) -> None:
    total.add_(x)
    out.copy_(total)


# --------------------------------------------------------------------------------------- for real


def test_on_real_cores(tmp_path: Path) -> None:
    """Ops that sleep long overlap on any machine, however busy: packing wins, and by the plan measured best."""
    found = tuned(tmp_path, chains(sleep), budget_s=30)
    assert found.verdict.choice == "packed"
    assert found.verdict.kind == "measured"
    assert found.verdict.gain > 1.3
    assert all(t.measured_s is not None for t in found.trials)
    best = min(t.measured_s for t in found.trials if t.measured_s)
    assert found.verdict.packed_s <= best * (1 + 2 * max(t.noise for t in found.trials))
    with tg.compile(chains(sleep), found.plan) as executable:
        given = {f"x{i}": torch.randn(16) for i in range(2)}
        assert all(torch.equal(out, given[f"x{i}"]) for i, out in enumerate(executable(given).values()))
    text = tg.explain_tuned(found)
    assert "measured" in text
    assert found.reason.split(";")[0][:40] in text.replace("\n", " ")


def test_the_sim_backend_measures_nothing(tmp_path: Path) -> None:
    found = tuned(tmp_path, backend="sim", device="h100_sxm")
    assert found.kind == found.verdict.kind == "simulated"
    assert "measured" not in tg.explain_tuned(found)
    assert found.verdict.choice == "packed"
    assert all(t.measured_s == pytest.approx(t.predicted_s) for t in found.trials)
    assert not (tmp_path / "p.sqlite3").exists(), "simulated times never enter the database"
    assert tuned(tmp_path, backend="sim", device="h100_sxm").remembered
