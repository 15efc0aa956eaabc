"""Replicas of a model on a Ray cluster (extra `ray`): placed by Ray, each on one rank or several, requests to the
least loaded.

A replica that dies fails the requests that it has with RankLost and gets no more; the others go on.
"""

import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import taskgraph as tg
from taskgraph.errors import BackendUnavailable, RankLost

Make = Callable[[Optional["tg.distributed.Group"]], Any]


@dataclass(frozen=True, slots=True)
class Placement:
    """What each rank of a replica reserves, and how ranks and replicas are placed.

    Ranks of one replica go to one node where they fit ("PACK"), or must ("STRICT_PACK"); replicas go where there is
    room. `start_s` is how long placing and loading may take, `timeout_s` how long a rank waits for another.
    """

    ranks: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    strategy: str = "PACK"
    start_s: float = 600.0
    timeout_s: float = 60.0


class Replicas(AbstractContextManager["Replicas"]):
    """`count` replicas of the actor that `make(group)` builds, on the Ray cluster at `address`.

    The group is None for replicas of one rank. With more, `make` runs on each, and a call on all of them in one order.
    A Ray that is already running in this process is used and left running; without an address a local one is started.
    """

    def __init__(
        self, count: int, make: Make, placement: Placement | None = None, *, address: str | None = None
    ) -> None:
        self._ray = _ray()
        self._guard = threading.Lock()
        self._settler, self._closed = ThreadPoolExecutor(1, "taskgraph-replicas"), False
        self._started = not self._ray.is_initialized()
        if self._started:
            self._ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self._replicas: list[_Replica] = []
        try:
            self._place(count, make, placement or Placement())
        except BaseException:
            self.close()
            raise

    def _place(self, count: int, make: Make, wanted: Placement) -> None:
        """All replicas at once: they load their weights side by side."""
        member = self._ray.remote(_Member)
        for _ in range(count):
            needs = {"CPU": wanted.cpus, "GPU": wanted.gpus}
            room = self._ray.util.placement_group([needs] * wanted.ranks, strategy=wanted.strategy)
            placed = partial(self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy, room)
            reserved = partial(member.options, num_cpus=wanted.cpus, num_gpus=wanted.gpus)
            members = [reserved(scheduling_strategy=placed(i)).remote() for i in range(wanted.ranks)]
            self._replicas.append(_Replica(members, room))
        urls = self._all([r.members[0].url.remote() for r in self._replicas], wanted)
        self._all(
            [
                m.start.remote(make, url, rank, wanted.ranks, wanted.timeout_s)
                for r, url in zip(self._replicas, urls, strict=True)
                for rank, m in enumerate(r.members)
            ],
            wanted,
        )

    def _all(self, refs: Sequence[Any], wanted: Placement) -> list[Any]:
        try:
            made: list[Any] = self._ray.get(list(refs), timeout=wanted.start_s)
        except self._ray.exceptions.GetTimeoutError as error:
            raise RankLost(
                f"{len(self._replicas)} replicas of {wanted.ranks} ranks did not start within {wanted.start_s:g} s; "
                f"the cluster has {self._ray.cluster_resources()}, each rank asks for {wanted.cpus:g} CPUs and "
                f"{wanted.gpus:g} GPUs."
            ) from error
        except self._ray.exceptions.RayError as error:
            raise self._typed(error, "A replica") from error
        return made

    # -- requests ----------------------------------------------------------------------------------

    @property
    def loads(self) -> tuple[int | None, ...]:
        """Requests that each replica has and has not answered; None for one that is dead."""
        return tuple(None if r.dead else len(r.open) for r in self._replicas)

    def submit(self, method: str, *args: Any, **named: Any) -> "Future[Any]":
        """Call the method on the replica with the fewest open requests; RankLost if none is left.

        The future gives the result of its rank 0, what it raised, or RankLost if the replica dies first."""
        answer: Future[Any] = Future()
        with self._guard:  # all ranks of a replica get its calls in one order
            alive = [r for r in self._replicas if not r.dead]
            if not alive:
                raise RankLost("no replica is left; start them again.")
            replica = min(alive, key=lambda r: (len(r.open), r.served))
            replica.open.add(answer)
            replica.served += 1
            parts = [m.call.remote(method, args, named).future() for m in replica.members]
        for part in parts:
            part.add_done_callback(lambda _: self._later(replica, parts, answer))
        return answer

    def _later(self, replica: "_Replica", parts: Sequence["Future[Any]"], answer: "Future[Any]") -> None:
        """Leave it to the settler: this is Ray's own thread, which waits for itself when it calls Ray."""
        with self._guard:
            if not self._closed:
                self._settler.submit(self._settle, replica, parts, answer)

    def _settle(self, replica: "_Replica", parts: Sequence["Future[Any]"], answer: "Future[Any]") -> None:
        """The answer, once all ranks have theirs or one has failed."""
        errors = [error for p in parts if p.done() and (error := p.exception()) is not None]
        if not errors and not all(p.done() for p in parts):
            return
        error = self._typed(errors[0], f"Replica {self._replicas.index(replica)}") if errors else None
        with self._guard:
            if answer not in replica.open:
                return  # another rank's end settled it
            replica.open.remove(answer)
            dying = isinstance(error, RankLost) and not replica.dead
            replica.dead = replica.dead or dying
        if dying:
            self._end(replica)  # its other ranks may wait for the dead one
        if error is None:
            answer.set_result(parts[0].result())
        else:
            answer.set_exception(error)

    def _typed(self, error: BaseException, who: str) -> BaseException:
        """Ray's errors as what they mean: what the actor raised, or RankLost."""
        if isinstance(error, self._ray.exceptions.RayTaskError):
            cause: BaseException = error.cause
            return cause
        if isinstance(error, self._ray.exceptions.RayActorError):
            lost = RankLost(f"{who} died with requests open; send them again, the other replicas go on.")
            lost.__cause__ = error
            return lost
        return error

    # -- life --------------------------------------------------------------------------------------

    def _end(self, replica: "_Replica") -> None:
        for member in replica.members:
            self._ray.kill(member)
        self._ray.util.remove_placement_group(replica.room)

    def close(self) -> None:
        """End all replicas, and the Ray that was started for them; a second call does nothing.

        Requests that are still open get RankLost."""
        with self._guard:
            alive = [] if self._closed else [replica for replica in self._replicas if not replica.dead]
            self._closed = True
        self._settler.shutdown()
        for replica in alive:
            replica.dead = True
            self._end(replica)
            while replica.open:
                replica.open.pop().set_exception(RankLost("the replicas were closed; start them again."))
        if self._started:
            self._started = False
            self._ray.shutdown()

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True, eq=False)
class _Replica:
    """Its ranks' actors, the placement group that they are in, and its requests."""

    members: list[Any]
    room: Any
    open: set["Future[Any]"] = field(default_factory=set)
    served: int = 0
    dead: bool = False


class _Member:
    """One rank of a replica, in a process of Ray's."""

    def url(self) -> str:
        """Where the ranks may meet, were this rank 0."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def start(self, make: Make, url: str, rank: int, ranks: int, timeout_s: float) -> None:
        self._actor = make(tg.distributed.connect(url, rank, ranks, timeout_s=timeout_s) if ranks > 1 else None)

    def call(self, method: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return getattr(self._actor, method)(*args, **named)


def _ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise BackendUnavailable("replicas need Ray: pip install 'taskgraph-gpu[ray]'.") from error
    return ray
