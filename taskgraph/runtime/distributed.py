"""Ranks: processes that share one model, and the collectives between them, through torch.distributed.

All ranks of a group issue the same collectives in one order. A plan says that order: `check_collectives` refuses one
that leaves it open, and ranks whose plans differ. So no two ranks can ever wait for each other in different orders.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from taskgraph.errors import BackendUnavailable, GraphError, PlanError, RankLost
from taskgraph.graph.device import Device, get, make
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op
from taskgraph.ops import COLLECTIVES
from taskgraph.schedule.plan import Plan
from taskgraph.schedule.verify import collectives_in_order


class Group:
    """Ranks that issue the same collectives in the same order; this process is number `rank` of `size`.

    Every method is collective. RankLost when a rank is gone or does not come within `timeout_s`; from then on, as
    after `leave`, every call raises it. `handle` is torch's process group, and `backend` its kind: gloo or nccl.
    """

    def __init__(self, handle: dist.ProcessGroup, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = dist.get_rank(handle), dist.get_world_size(handle), timeout_s
        self.backend = dist.get_backend(handle)
        self._handle: dist.ProcessGroup | None = handle
        self._left = ""

    @property
    def handle(self) -> dist.ProcessGroup:
        """Torch's process group; RankLost after `leave`."""
        if self._handle is None:
            raise RankLost(f"rank {self.rank} of {self.size} has left its group ({self._left}); start the ranks again.")
        return self._handle

    @property
    def broken(self) -> bool:
        """Whether this rank lost another or left, so that no collective can be made any more."""
        return self._handle is None

    def leave(self, reason: str) -> None:
        """Cut this rank's connections, so that the others see it gone instead of waiting; not collective."""
        if self._handle is not None:
            handle, self._handle, self._left = self._handle, None, reason
            dist.destroy_process_group(handle)

    @contextmanager
    def _together(self, what: str) -> Iterator[dist.ProcessGroup]:
        handle = self.handle
        try:
            yield handle
        except RuntimeError as error:  # all that torch says of a peer; shapes and dtypes were checked before
            reason = str(error).partition("\n")[0]
            self.leave(f"{what} failed")
            raise RankLost(
                f"{what}: rank {self.rank} of {self.size} lost another rank, or waited for it longer than "
                f"{self.timeout_s:g} s ({reason}). Start the ranks again, or with a longer timeout_s."
            ) from error

    def all_reduce(self, x: torch.Tensor) -> None:
        """x becomes the sum of all ranks' x, the same bits on every rank."""
        with self._together("all_reduce") as handle:
            dist.all_reduce(x, group=handle)

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """The x of all ranks, in their order, along the first axis of `out`."""
        with self._together("all_gather") as handle:
            dist.all_gather_single(out, x, group=handle)

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """This rank's part, along the first axis, of the sum of all ranks' x."""
        with self._together("reduce_scatter") as handle:
            dist.reduce_scatter_single(out, x, group=handle)

    def broadcast(self, text: str) -> str:
        """The text of rank 0."""
        body = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        size = torch.tensor([len(body)])
        with self._together("broadcast") as handle:
            dist.broadcast(size, group=handle, group_src=0)
            body = body if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(body, group=handle, group_src=0)
        return bytes(body.numpy()).decode()

    def odd_one(self, text: str) -> int | None:
        """The first rank whose text differs from that of rank 0, the same answer on every rank; None if all agree."""
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
        rows = torch.empty(self.size * len(digest), dtype=torch.uint8)
        self.all_gather(rows, digest)
        first, *others = rows.view(self.size, -1)
        return next((i for i, row in enumerate(others, 1) if not torch.equal(row, first)), None)


def connect(url: str, rank: int, size: int, *, backend: str = "gloo", timeout_s: float = 60.0) -> Group:
    """Join `size` processes as number `rank`, and return the group of all.

    `url` is where they meet: "tcp://host:port" of rank 0, or on one machine also "file:///path", a file that is not
    there yet. RankLost when not all come within `timeout_s`.
    """
    limit = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, init_method=url, rank=rank, world_size=size, timeout=limit)
        return group(range(size), timeout_s=timeout_s)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RankLost(
            f"rank {rank}: not all of {size} ranks met at {url!r} within {timeout_s:g} s ({reason})."
        ) from error


def group(ranks: Sequence[int], *, timeout_s: float = 60.0) -> Group:
    """The group of these ranks among the processes that torch.distributed has joined, by `connect` or by a host engine.

    Collective over all processes: each must call it, also one that is in no group. BackendUnavailable before they are
    joined, and for a process that is not in the group.
    """
    if not dist.is_initialized():
        raise BackendUnavailable("torch.distributed has joined no processes here; call distributed.connect() first.")
    handle = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s))
    if handle == dist.GroupMember.NON_GROUP_MEMBER:
        raise BackendUnavailable(f"rank {dist.get_rank()} is not one of the group's {list(ranks)}.")
    return Group(handle, timeout_s)


# ------------------------------------------------------------------------------------------ plans


def rank_device(group: Group) -> Device:
    """This machine as rank 0 sees it: its cores, and the link as all-reduces of the group measure it; collective."""
    x = torch.zeros(_PROBE_BYTES // 4)
    seconds = []
    for _ in range(_PROBES):
        begin = time.perf_counter()
        group.all_reduce(x)
        seconds.append(time.perf_counter() - begin)
    sent = 2 * (group.size - 1) / group.size * _PROBE_BYTES  # by each rank of a ring (Patarasuk and Yuan 2009)

    def text() -> str:
        device = make(get("cpu"), f"cpu of {group.size} ranks", link_bytes_per_s=sent / min(seconds))
        return json.dumps(device.to_dict())

    return Device.from_json(_from_first(group, text))


_PROBE_BYTES, _PROBES = 1 << 20, 4


def one_plan(graph: Graph, group: Group | None, made: Callable[[], Plan]) -> Plan:
    """The plan that `made()` gives on rank 0, on every rank for its own graph, whose ops must be the same; collective.

    A search that ends by the clock would give each rank another plan. Without a group it is just `made()`.
    """
    if group is None:
        return made()
    plan = Plan.from_json(_from_first(group, lambda: made().to_json()))
    return replace(plan, graph=graph.fingerprint, graph_name=graph.name).sealed()


def _from_first(group: Group, text: Callable[[], str]) -> str:
    """What `text()` gives on rank 0; when it raises there, the others raise PlanError instead of waiting for it."""
    try:
        body = f"+{text()}" if group.rank == 0 else ""
    except Exception as error:
        group.broadcast(f"-{error}")
        raise
    body = group.broadcast(body)
    if body[0] == "-":
        raise PlanError(f"rank 0 has no plan for rank {group.rank}: {body[1:]}")
    return body[1:]


def check_collectives(graph: Graph, plan: Plan, group: Group | None) -> None:
    """The flat graph's collectives between ranks fit the group, the plan runs them in one order, and all ranks agree.

    Collective where there is a group. BackendUnavailable without a group, GraphError when the number of ranks is
    another, PlanError when two collectives may race, or a rank runs others.
    """
    shared = {op.name: op for op in graph.ops if op.kind in COLLECTIVES and op.integer("ranks") > 1}
    if group is None:
        if shared:
            op = next(iter(shared.values()))
            raise BackendUnavailable(
                f"op {op.name!r}: {op.kind} over {op.integer('ranks')} ranks needs a process group; give "
                "compile(group=...) one from runtime.distributed, use ranks=1, or the sim backend."
            )
        return
    wrong = _wrong(graph, plan, shared.values(), group)
    issued = [shared[step.op] for step in plan.steps if step.op in shared]
    text = "\n".join(_signature(op, graph) for op in issued)
    stranger = group.odd_one(str(wrong or text))  # also where this rank will raise, for the others must not wait for it
    if wrong is not None:
        raise wrong
    if stranger is not None:
        raise PlanError(
            f"rank {stranger} runs other collectives, or in another order, than rank 0; all ranks must compile one "
            "plan (one_plan hands it on)."
        )


def _wrong(graph: Graph, plan: Plan, shared: Iterable[Op], group: Group) -> GraphError | PlanError | None:
    """What this rank alone can see."""
    odd = next((op for op in shared if op.integer("ranks") != group.size), None)
    if odd is not None:
        return GraphError(f"op {odd.name!r} is over {odd.integer('ranks')} ranks; the group has {group.size}.")
    try:
        collectives_in_order(plan, graph)
    except PlanError as error:
        return error
    return None


def _signature(op: Op, graph: Graph) -> str:
    x = graph.tensor[op.inputs[0]]
    return f"{op.name} {op.kind} {x.dtype} {x.shape} {sorted(op.views.items())} {op.integer('axis')}"
