"""Replicas on a local Ray: least-loaded routing, several ranks a replica, and dead replicas as typed errors."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import pytest

from taskgraph.errors import GraphError, RankLost
from taskgraph.serving.ranks.replicas import Placement, Replicas

if TYPE_CHECKING:  # workers of one rank start without torch
    from taskgraph.runtime.distributed import Group

ray = pytest.importorskip("ray")


class Worker:
    """Waits for a file, sums over its ranks, raises, or dies."""

    def __init__(self, group: Optional["Group"]) -> None:
        self.group = group

    def wait_for(self, path: Path) -> int:
        while not path.exists():
            time.sleep(0.01)
        return os.getpid()

    def total(self, numbers: list[float]) -> list[float]:
        """numbers + 2 * numbers, of two ranks."""
        import torch

        assert self.group is not None
        mine = torch.tensor(numbers) * (self.group.rank + 1)
        self.group.all_reduce(mine)
        return mine.tolist()

    def refuse(self, reason: str) -> None:
        raise GraphError(reason)

    def die(self, rank: int = 0) -> None:
        if self.group is None or self.group.rank == rank:
            os._exit(3)
        self.total([1.0])


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A Ray that the host has started: replicas use it and leave it running."""
    paths = os.pathsep.join(sys.path)
    ray.init(
        num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    yield
    assert ray.is_initialized()
    ray.shutdown()


def test_requests_go_to_the_least_loaded_and_a_dead_replica_is_named(tmp_path: Path) -> None:
    with Replicas(2, Worker) as replicas:
        first = [replicas.submit("wait_for", tmp_path / "go") for _ in range(4)]
        assert replicas.loads == (2, 2)
        (tmp_path / "go").touch()
        pids = [f.result(30) for f in first]
        assert sorted(map(pids.count, set(pids))) == [2, 2]
        assert replicas.loads == (0, 0)
        with pytest.raises(GraphError, match="too odd"):
            replicas.submit("refuse", "too odd").result(30)
        doomed = replicas.submit("die")
        with pytest.raises(RankLost, match=r"Replica [01] died"):
            doomed.result(30)
        assert sorted(replicas.loads, key=str) == [0, None]
        survivor = {replicas.submit("wait_for", tmp_path / "go").result(30) for _ in range(3)}
        assert len(survivor) == 1
        with pytest.raises(RankLost):
            replicas.submit("die").result(30)
        with pytest.raises(RankLost, match="no replica is left"):
            replicas.submit("refuse", "")


def test_a_replica_of_two_ranks_answers_as_one_and_dies_as_one() -> None:
    with Replicas(1, Worker, Placement(ranks=2, timeout_s=30.0)) as replicas:
        answers = [replicas.submit("total", [0.25, i]) for i in range(4)]
        assert [answer.result(30) for answer in answers] == [[0.75, 3.0 * i] for i in range(4)]
        with pytest.raises(RankLost):
            replicas.submit("die", 1).result(30)
        assert replicas.loads == (None,)


def test_closing_fails_what_is_open(tmp_path: Path) -> None:
    with Replicas(1, Worker) as replicas:
        request = replicas.submit("wait_for", tmp_path / "never")
    with pytest.raises(RankLost, match="closed"):
        request.result(5)
    replicas.close()


def test_replicas_that_find_no_room_say_what_they_asked_for() -> None:
    with pytest.raises(RankLost, match=r"asks for 64 CPUs"):
        Replicas(1, Worker, Placement(cpus=64.0, start_s=1.0))
