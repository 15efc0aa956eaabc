"""What a service is doing, as one frozen value, and the plan of its last step: what the page and /v1/status show.

A step keeps a few plain numbers. All else is read, or made and kept, when somebody asks.
"""

from collections import OrderedDict
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any

import taskgraph as tg
from taskgraph.models.paged import Bucket
from taskgraph.serving.runners.runner import Planned, PlanRunner, Ran
from taskgraph.serving.service import Service

READY, FAILED, STOPPING = "ok", "failed", "stopping"
"""States of a service."""
MOST_KEPT = 32
"""Plans that are kept as the page draws them."""


@dataclass(frozen=True, slots=True)
class Status:
    """A service now. Tokens, steps and pre-emptions count since it began; `open` requests run or wait, or have
    an answer that is not taken yet. Pages are the device's; `pages_idle` hold blocks that a later prompt may begin
    with. `last` is the step that ended last, where the runner's steps are plans; `dtype` is empty where it is unknown.
    """

    state: str
    uptime_s: float
    open: int
    running: int
    waiting: int
    most_running: int
    most_open: int
    pages: int
    pages_held: int
    pages_idle: int
    page_size: int
    context: int
    prompt_tokens: int
    tokens: int
    steps: int
    preemptions: int
    recomputed: int
    dtype: str
    last: Ran | None


def status_of(service: Service) -> Status:
    """How the service is now; from any thread, and without waiting for a step."""
    engine, pool = service.engine, service.engine.cache.device
    runner = engine.runner if isinstance(engine.runner, PlanRunner) else None
    return Status(
        state=READY if service.ready else FAILED if service.failure else STOPPING,
        uptime_s=service.uptime_s,
        open=service.open,
        running=engine.running,
        waiting=engine.waiting,
        most_running=engine.limits.sequences,
        most_open=service.most_open,
        pages=pool.pages,
        pages_held=pool.held,
        pages_idle=max(pool.available - pool.free, 0),
        page_size=engine.cache.page_size,
        context=engine.limits.context,
        prompt_tokens=engine.stats.prompt_tokens,
        tokens=engine.stats.tokens,
        steps=engine.stats.steps,
        preemptions=engine.scheduler.preemptions,
        recomputed=engine.scheduler.recomputed,
        dtype="" if runner is None else runner.dtype,
        last=None if runner is None else runner.last,
    )


@dataclass(frozen=True, slots=True)
class PlanView:
    """A plan as the page draws it: a name for each lane, and (op, kind, lane, start_s, end_s) for each op. Its times
    are of `source`: "simulated", or where a measured or published timeline was planned by, that."""

    digest: str
    graph: str
    device: str
    made_by: str
    verdict: str
    source: str
    predicted_s: float
    bound_s: float
    lanes: tuple[str, ...]
    spans: tuple[tuple[str, str, int, float, float], ...]


def view_of(planned: Planned) -> PlanView:
    """The plan, from time 0 on, in the order of its lanes and times."""
    plan = planned.plan
    begin_s = min((span.start_s for span in plan.timeline.spans), default=0.0)
    spans = sorted(plan.timeline.spans, key=lambda span: (span.lane, span.start_s))
    return PlanView(
        digest=plan.digest(),
        graph=plan.graph_name,
        device=plan.device.name,
        made_by=plan.made_by,
        verdict=tg.observe.verdict_sentence(plan),
        source=plan.timeline.kind,
        predicted_s=plan.makespan_s,
        bound_s=plan.bounds.best_s,
        lanes=tuple(tg.observe.lane_place(plan, lane) for lane in range(len(plan.lanes))),
        spans=tuple((s.op, planned.kinds.get(s.op, ""), s.lane, s.start_s - begin_s, s.end_s - begin_s) for s in spans),
    )


class PlanBook:
    """The plans of a service's steps, each made into a view once, when it is first asked for."""

    def __init__(self, service: Service) -> None:
        self._runner = service.engine.runner
        self._guard = Lock()
        self._kept: OrderedDict[Bucket, tuple[Planned, PlanView]] = OrderedDict()

    def of(self, last: Ran) -> tuple[PlanView, str] | None:
        """The view of a step's plan, and a remark where the measured time does not fit the prediction."""
        with self._guard:
            found = self._kept.get(last.bucket)
            if found is None:
                planned = self._runner.planned_step(last.bucket) if isinstance(self._runner, PlanRunner) else None
                if planned is None:
                    return None
                found = self._kept[last.bucket] = planned, view_of(planned)
            self._kept.move_to_end(last.bucket)
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        planned, view = found
        return view, "" if last.seconds is None else tg.observe.remark(planned.plan, last.seconds)


def status_body(service: Service, book: PlanBook, name: str, known: str = "") -> dict[str, Any]:
    """What GET /v1/status gives: the status, the last step, and its plan unless its digest is in
    `known`, which are the client's, with commas."""
    status = status_of(service)
    body: dict[str, Any] = {"model": name, **asdict(status)}
    found = None if status.last is None else book.of(status.last)
    if found is None:
        return {**body, "last": None, "plan": None}
    view, note = found
    body["last"] |= {"digest": view.digest, "predicted_s": view.predicted_s, "remark": note}
    return {**body, "plan": None if view.digest in known.split(",") else asdict(view)}
