"""autotune(): plan, run the best candidates, measure their ops, plan again; keep the winner and say why."""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

from taskgraph import cache, ops
from taskgraph.cost.model import Costs, op_table
from taskgraph.cost.profiles import Platform, Profile, ProfileDB, measured_costs, points_of, shape_key
from taskgraph.errors import PlanError, ProfileError
from taskgraph.graph.device import Device, Geometry, get
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.record import Typed, instance, integer, one_of, parse, read_text
from taskgraph.record import function as callable_of
from taskgraph.record import number as number_of
from taskgraph.runtime.backend import BACKENDS
from taskgraph.runtime.cpu import probe
from taskgraph.runtime.gpu.virtual import is_virtual
from taskgraph.schedule.bounds import lower_bounds
from taskgraph.schedule.plan import TUNED, Lane, Plan, Step, Verdict
from taskgraph.schedule.planner import candidate, plan, retimed
from taskgraph.schedule.problem import Budget, make_problem
from taskgraph.schedule.rcpsp.exact import available
from taskgraph.schedule.sliced import sliced, verify
from taskgraph.schedule.solve.auto import AUTO_OP_S
from taskgraph.tune.measure import LEAST_ROUNDS, Countdown, PlanRuns, Timings
from taskgraph.units import format_seconds

MOST = 4
"""Candidates that run beside the sequential plan in one session: those that are predicted best."""
PASSES = 4
SEARCH_SHARE, EXACT_OPS = 0.03, 12
REPEAT, SAME = "repeat", "A/A"
"""Sessions beside those of the planning passes: the win once more; the sequential plan against itself."""
Progress = Callable[[str, float], None]
"""Told what happens and the share of the budget that is spent."""


@dataclass(frozen=True, slots=True)
class Trial(Typed, error=PlanError):
    """One candidate in one session of interleaved repeats.

    `measured_s` is its median and `sequential_s` that of the sequential plan between the same repeats; both None where
    the budget left no time for it. `noise` is relative: a smaller difference is no difference. `partitions` are the
    SMs that its lanes are bound to, `session` is "pass 1", "pass 2", ..., REPEAT or SAME.
    """

    made_by: str
    lanes: int
    partitions: tuple[int, ...]
    predicted_s: float
    measured_s: float | None
    sequential_s: float | None
    noise: float
    repeats: int
    session: str

    @property
    def ratio(self) -> float:
        """Time over that of the sequential plan; infinite where it did not run."""
        if self.measured_s is None or not self.sequential_s:
            return math.inf
        return self.measured_s / self.sequential_s

    @property
    def wins(self) -> bool:
        """Faster than the sequential plan by more than the noise."""
        return self.ratio < 1 - self.noise


@dataclass(frozen=True, slots=True)
class Tuned(Typed, error=PlanError):
    """What autotune found. All times are of `kind` ("measured" or "simulated") and come from `origin`."""

    plan: Plan
    trials: tuple[Trial, ...]
    reason: str
    kind: str
    origin: str
    op_times: int
    seconds: float
    remembered: bool = False
    at: str = ""
    """When it was found, by this machine's clock: "2026-05-17 14:03"."""

    @property
    def verdict(self) -> Verdict:
        return self.plan.verdict


class Options(TypedDict, total=False):
    """The keyword arguments of `autotune`."""

    device: str | Device | None
    """What to plan for; the cuda backend takes this machine's GPU without it, the cpu backend this machine's cores."""
    seed: int
    """What tensors and searches are drawn from; 0 without it."""
    tensors: Mapping[str, Any] | None
    """Values for inputs, weights and states by name, used in place except states, which are copied."""
    functions: Mapping[str, Callable[..., Any]] | None
    """Python functions for custom ops whose function cannot be imported by name."""
    database: ProfileDB | str | Path | None
    """Where measured times and winners are kept; the user's own profile database without it."""
    fresh: bool
    """Whether to measure anew what an earlier call found."""
    progress: Progress | None
    """Told what happens."""


def autotune(graph: Graph, backend: str = "cpu", budget_s: float = 60.0, **options: Unpack[Options]) -> Tuned:
    """The plan of `graph` that is fastest on `backend`, as measured there; the sequential one unless another wins.

    Candidates run in interleaved repeats beside two copies of the sequential plan, whose difference is noise and no
    win. The times of single ops go into the profile database, the planner plans again with them, until no new
    candidate comes or `budget_s` seconds are over; no repeat begins that would exceed them. A win must repeat itself
    in a second session. The winner is kept beside the database: the next call with the same graph, device, backend
    and versions returns it at once, unless `fresh`. After a change of a custom op's code ask for `fresh`.

    The options are keyword arguments, each of which may be left out: `device`, `seed`, `tensors`, `functions`,
    `database`, `fresh` and `progress` (see `Options`). Tensors that are not given are drawn from `seed` (see `fill`).
    On the device "virtual:h100_sxm", as on the sim backend, nothing is measured: times are simulated, they say so and
    stay out of the database. PlanError for a budget that is not positive, and for an option that there is not;
    ExecutionError when an op raises, and then nothing is stored.
    """
    instance("the graph", graph, Graph, PlanError, "Take what GraphBuilder.build returned.")
    BACKENDS[backend]  # known, and to be had
    for name in options:
        one_of("an option of autotune", name, Options.__annotations__, PlanError)
    seed = integer("seed", options.get("seed", 0), PlanError, 0)
    budget_s = number_of("budget_s, a positive number of seconds such as 60,", budget_s, PlanError, 0, above=True)
    tensors, functions = options.get("tensors"), options.get("functions")
    for name, given in (("tensors", tensors), ("functions", functions)):
        if given is not None:
            instance(name, given, Mapping, PlanError, "It is by name.")
    fresh = instance("fresh", options.get("fresh", False), bool, PlanError)
    progress = options.get("progress")
    if progress is not None:
        callable_of("progress", progress, PlanError)
    target, run_on = _target(backend, options.get("device"))
    store = _store(options.get("database"))
    platform = here(backend, target)
    winner = _winner_path(store, graph, target, platform)
    found = None if fresh else _remembered(winner, graph)
    if found is not None:
        return found
    _compile_planner(target)
    budget = Countdown(budget_s)
    bench = PlanRuns(graph, backend, functions or {}, tensors or {}, seed, run_on)
    profiles = None if backend == "sim" or run_on is not None else (store, platform)
    tuned = _Tuner(graph, target, bench, budget, seed, profiles, progress).run(fresh)
    if any(trial.measured_s is not None for trial in tuned.trials):
        with cache.keeping("the winner", winner):
            cache.write_atomically(winner, _to_json(tuned))
    return tuned


def _store(database: ProfileDB | str | Path | None) -> ProfileDB:
    return database if isinstance(database, ProfileDB) else ProfileDB(database)


def remembered(
    graph: Graph,
    backend: str = "cpu",
    device: str | Device | None = None,
    database: ProfileDB | str | Path | None = None,
) -> Tuned | None:
    """The winner that `autotune` keeps for this graph, backend and device, whatever the graph is called; None if none.

    Nothing is planned, run or measured."""
    target, _ = _target(backend, device)
    store = _store(database)
    return _remembered(_winner_path(store, graph, target, here(backend, target)), graph)


def _compile_planner(device: Device) -> None:
    """Plan two ops, so that numba compiles the planner before the budget begins: cold, that takes many seconds."""
    b = GraphBuilder("two")
    x = b.input("x", (8, 8), "f32")
    b.output(ops.add(x, x), ops.add(x, x))
    plan(b.build(), device, "search", budget_s=1e-3)


def _target(backend: str, device: str | Device | None) -> tuple[Device, str | None]:
    """The device to plan for, and the virtual one to run on: "virtual:h100_sxm" is both."""
    if backend != "cuda":
        return get(device or "cpu"), None
    from taskgraph.runtime.gpu.spec import planning_device

    run_on = device if isinstance(device, str) and is_virtual(device) else None
    return planning_device(run_on) if run_on or device is None else get(device), run_on


# --------------------------------------------------------------------------------------- candidates


def candidates(graph: Graph, device: Device, budget_s: float, seed: int, costs: Costs = op_table) -> Sequence[Plan]:
    """Distinct plans of `graph`, the sequential one first: one of each scheduler that may find another, and for those
    whose lanes share the device the same lanes in partitions of their own. Schedulers that search get `seed`, and
    SEARCH_SHARE of `budget_s` each at most; the exact one, of a GPU's small graphs, where OR-Tools is installed."""
    search_s = max(min(SEARCH_SHARE * budget_s, AUTO_OP_S * len(graph.ops)), 1e-3)
    small = device.kind == "gpu" and len(graph.flat().ops) <= EXACT_OPS and available()
    names = ("sequential", "list", "auto", "search", *(("exact",) if small else ()))
    budget = Budget(search_s, seed)
    made = [candidate(graph, device, name, budget, costs) for name in names]
    made += [apart for shared in made for apart in _isolated(shared, graph, costs)]
    distinct: dict[Course, Plan] = {}
    for each in made:
        distinct.setdefault(Course.of(each), each)
    return list(distinct.values())


class Course(NamedTuple):
    """What a plan does: two plans that differ in nothing else run alike."""

    geometries: tuple[Geometry, ...]
    lanes: tuple[Lane, ...]
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, plan: Plan) -> "Course":
        return cls(plan.geometries, plan.lanes, plan.steps)


def _isolated(shared: Plan, graph: Graph, costs: Costs) -> Iterator[Plan]:
    """`shared`, lane by lane in the partitions of every split of its device that has one for each lane."""
    if len(shared.lanes) < 2 or len(shared.geometries) != 1 or len(shared.geometries[0].partitions) != 1:
        return
    need = {op.name: op.demand.sm[0] for op in sliced(shared, graph).flat().ops if op.demand.sm}
    lanes = tuple(Lane(0, i) for i in range(len(shared.lanes)))
    for split in shared.device.splits():
        fits = len(split.partitions) == len(lanes) and all(
            max(need.get(step.op, 1), step.sms) <= split.sizes[step.lane] for step in shared.steps
        )
        if fits:
            apart = retimed(replace(shared, geometries=(split,), lanes=lanes), graph, costs)
            label = f"{shared.made_by}, each in its own of {' + '.join(map(str, split.sizes))} SMs"
            yield replace(apart, made_by=label).sealed()


def _predicted(plan: Plan, graph: Graph, costs: Costs) -> Plan:
    """`plan` as it stands, with the timeline and the bounds that `costs` give it."""
    sizes = {*_sizes(plan.device), *(plan.sms(i) for i in range(len(plan.steps)))}
    problem = make_problem(sliced(plan, graph), plan.device, sorted(sizes), costs)
    return replace(retimed(plan, graph, costs), bounds=lower_bounds(problem)).sealed()


def costs_known(
    backend: str = "cpu",
    device: str | Device | None = None,
    database: ProfileDB | str | Path | None = None,
) -> Costs:
    """Prices by the op times that autotune measured on `backend` here, custom ops' among them, and by formulas where it
    measured none: what `plan` and `audit` take as `costs`."""
    target, run_on = _target(backend, device)
    if backend == "sim" or run_on is not None:
        return op_table
    return measured_costs(Profile(_store(database).table(here(backend, target))))


# --------------------------------------------------------------------------------------------- loop


class _Tuner:
    """One run of autotune: every plan seen so far as last predicted, the trials, and the candidate that leads."""

    def __init__(
        self,
        graph: Graph,
        device: Device,
        bench: PlanRuns,
        budget: Countdown,
        seed: int,
        profiles: tuple[ProfileDB, Platform] | None,
        progress: Progress | None,
    ) -> None:
        self.graph, self.device, self.bench, self.budget, self.seed = graph, device, bench, budget, seed
        self.profiles, self.progress = profiles, progress
        self.profile = Profile({})
        self.trials: list[Trial] = []
        self.leader: Course | None = None
        self.recorded = 0

    def run(self, fresh: bool) -> Tuned:
        """Plan, compete, measure ops; again while new candidates come; then the win must repeat itself."""
        self.say("planning, pass 1")
        if self.profiles is not None and not fresh:
            self.profile = Profile(self.profiles[0].table(self.profiles[1]))
        sequential = plan(self.graph, self.device, "sequential", costs=measured_costs(self.profile))
        self.first = Course.of(sequential)
        self.known = {self.first: sequential}
        for number in range(1, PASSES + 1):
            new = self.planned(number)
            if new:
                self.say(f"running {len(new)} candidates")
                self.compete([*([self.leader] if self.leader else []), *new], f"pass {number}", 0.4)
            if self.profiles is None or (number > 1 and not new) or not self.budget.allows(0.0):
                break
            if number == 1:
                self.measure_ops(*self.profiles)
        self.settle()
        self.say("done")
        return self.result()

    def say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, min(self.budget.spent_s / self.budget.seconds, 1.0))

    def planned(self, number: int) -> list[Course]:
        """Plan with the op times known by now; what the best few plans do that have not run yet."""
        if number > 1:
            self.say(f"planning, pass {number}")
        left_s = max(self.budget.seconds - self.budget.spent_s, 0.0)
        made = {Course.of(p): p for p in self.candidates(left_s)}
        new = sorted((key for key in made if key not in self.known), key=lambda key: made[key].makespan_s)[:MOST]
        self.known |= {key: made[key] for key in new}
        return new

    def candidates(self, left_s: float) -> Sequence[Plan]:
        return candidates(self.graph, self.device, left_s, self.seed, measured_costs(self.profile))

    def compete(self, contenders: Sequence[Course], name: str, share: float) -> list[Trial]:
        """A session of these plans; the fastest of those that win leads from now on, unless the budget held none."""
        plans = [self.known[key] for key in contenders]
        session = self.bench.session(self.known[self.first], plans, self.budget.part(share))
        rows = _trials(session, plans, name)
        self.trials += rows
        if session is not None:
            wins = [(row.measured_s or math.inf, i) for i, row in enumerate(rows) if row.wins]
            self.leader = contenders[min(wins)[1]] if wins else None
        return rows

    def measure_ops(self, store: ProfileDB, platform: Platform) -> None:
        """Put the times of all ops on all partition sizes into the database, unless they are there."""
        if _covered(self.profile, self.graph, self.device):
            return
        self.say("measuring ops")
        sizes = _sizes(self.device)[::-1]
        times = self.bench.op_times(self.known[self.first], sizes, self.budget.part(0.5))
        try:
            self.recorded = store.record(platform, times)
            self.profile = Profile(store.table(platform))
        except ProfileError as error:  # a disk that is full by now: this run goes on with what it measured
            cache.warn(f"op times are not kept: {error}")
            self.profile = Profile({**self.profile.times, **points_of(times)})

    def settle(self) -> None:
        """A measured win must repeat itself; where nothing competed, the sequential plan runs against itself.

        Both plans are predicted once more, with the op times that are measured by now.
        """
        for key in {self.first, self.leader or self.first} if self.profile.times else ():
            self.known[key] = _predicted(self.known[key], self.graph, measured_costs(self.profile))
        if self.leader is not None and self.bench.kind == "measured":
            self.say("repeating the win")
            self.compete([self.leader], REPEAT, 0.9)
        if not self.trials:
            self.say("running the sequential plan")
            self.compete([self.first], SAME, 0.9)
            self.leader = None

    def result(self) -> Tuned:
        verdict, reason = judged(self.trials, self.leader is not None, self.bench.kind)
        chosen = self.known[self.leader or self.first]
        chosen = replace(
            chosen,
            verdict=verdict or replace(chosen.verdict, choice="sequential"),
            made_by=f"{TUNED}{chosen.made_by}",
        ).sealed()
        kind = chosen.verdict.kind
        origin = self.bench.origin if verdict else chosen.timeline.origin
        at = time.strftime("%Y-%m-%d %H:%M")
        return Tuned(chosen, tuple(self.trials), reason, kind, origin, self.recorded, self.budget.spent_s, at=at)


def _sizes(device: Device) -> list[int]:
    """The SM counts that ops are measured on: those of the partitions that planning starts from."""
    return sorted({size for geometry in device.splits() for size in geometry.sizes})


def _covered(profile: Profile, graph: Graph, device: Device) -> bool:
    """Whether every op has been measured on all sizes that its demand allows."""
    flat, sizes = graph.flat(), _sizes(device)
    for op in {shape_key(op, flat.tensor): op for op in flat.ops}.values():
        low = op.demand.sm[0] if op.demand.sm else 1
        if not {s for s in sizes if s >= low} <= {point[0] for point in profile.points(op, flat.tensor)}:
            return False
    return True


def _trials(session: Timings | None, plans: Sequence[Plan], name: str) -> list[Trial]:
    return [
        Trial(
            made_by=each.made_by,
            lanes=len(each.lanes),
            partitions=_partitions(each),
            predicted_s=each.makespan_s,
            measured_s=statistics.median(session.candidates[i]) if session else None,
            sequential_s=statistics.median(session.sequential) if session else None,
            noise=session.floor[i] if session else 0.0,
            repeats=len(session.candidates[i]) if session else 0,
            session=name,
        )
        for i, each in enumerate(plans)
    ]


def _partitions(plan: Plan) -> tuple[int, ...]:
    """SMs of each partition that a lane is bound to."""
    used = dict.fromkeys((lane.geometry, lane.partition) for lane in plan.lanes)
    return tuple(plan.geometries[g].partitions[p].sm_count for g, p in used)


def judged(trials: Sequence[Trial], won: bool, kind: str) -> tuple[Verdict | None, str]:
    """The verdict, None where nothing ran, and the reason in words. `won` says that the last session had a winner."""
    ran = [t for t in trials if t.measured_s is not None]
    if not ran:
        return None, f"sequential: the budget ended before {LEAST_ROUNDS} repeats of any plan; nothing was compared."
    last = [t for t in ran if t.session == ran[-1].session]
    shown = min(last if won or last[0].session in (REPEAT, SAME) else ran, key=lambda t: t.ratio)
    packed_s, sequential_s = shown.measured_s or 0.0, shown.sequential_s or 0.0
    verdict = Verdict("packed" if won else "sequential", packed_s, sequential_s, shown.noise, kind)
    how = "simulated" if kind == "simulated" else f"{kind}, medians of {shown.repeats} interleaved repeats"
    if shown.session == SAME:
        verdict = replace(verdict, packed_s=sequential_s)
        took = f"the sequential plan takes {format_seconds(sequential_s)} ({how})"
        return verdict, f"sequential: no packing of this graph was found to try; {took}."
    times = f"{shown.made_by} takes {format_seconds(packed_s)}, the sequential graph {format_seconds(sequential_s)}"
    return verdict, _reason(shown, won, kind, f"{times} ({how})")


def _reason(shown: Trial, won: bool, kind: str, times: str) -> str:
    difference, floor = f"{abs(1 - shown.ratio):.1%}", f"the noise floor of {shown.noise:.1%}"
    if won:
        alone = kind == "measured" and shown.session != REPEAT
        unsure = "; the budget left no time to repeat the win" if alone else ""
        return f"packed: {times}; {1 / shown.ratio:.2f}x faster, beyond {floor}{unsure}."
    if shown.session == REPEAT:
        return f"sequential: a win did not repeat itself; the second time {times}."
    if shown.ratio > 1 + shown.noise:
        return f"sequential: the best packing, {times}; packing loses {difference}."
    return f"sequential: the best packing, {times}; {difference} is inside {floor}, so it is no win."


# ------------------------------------------------------------------------- what is kept between calls

_STORE_SCHEMA = 2


def here(backend: str, device: Device) -> Platform:
    """The platform of measurements on this machine. The sim backend has no machine: only the device counts."""
    packages = ("torch", "numba", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    machine = hashlib.blake2b(repr(device).encode(), digest_size=8).hexdigest()
    if backend == "cuda":
        from taskgraph.runtime.gpu.driver import Gpu

        found = Gpu.open().capability
        return Platform(
            device.name, f"{found.device}, {found.sm_count} SMs", str(found.driver_version), versions, backend
        )
    if backend != "sim":
        machine = probe.identity()
    return Platform(device.name, machine, "none", versions, backend)


def _winner_path(store: ProfileDB, graph: Graph, device: Device, platform: Platform) -> Path:
    text = repr((_STORE_SCHEMA, replace(graph, name="any").fingerprint, device, platform))
    return store.beside("plans", f"{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}.json")


def _to_json(tuned: Tuned) -> str:
    body = {"schema": _STORE_SCHEMA, **asdict(replace(tuned, remembered=True)), "plan": tuned.plan.to_json()}
    return json.dumps(body, sort_keys=True)


def _remembered(path: Path, graph: Graph) -> Tuned | None:
    """The stored winner; None when there is none, or none that this version can read: it is tuned anew."""
    try:
        body = parse(read_text(path, PlanError, "winner"), PlanError, "winner", "It is tuned anew.")
        if body.pop("schema") != _STORE_SCHEMA:
            return None
        trials = tuple(Trial(**{**t, "partitions": tuple(t["partitions"])}) for t in body.pop("trials"))
        plan = replace(Plan.from_json(body["plan"]), graph=graph.fingerprint, graph_name=graph.name).sealed()
        verify(plan, graph)
        return Tuned(**{**body, "plan": plan, "trials": trials})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
