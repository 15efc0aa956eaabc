"""What torch allocates inside a capture lives as long as the executable whose graph holds its address."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import taskgraph as tg
from taskgraph.runtime.gpu import driver
from taskgraph.runtime.gpu.arrays import DeviceArray
from tests.conftest import Call

DEVICE = "virtual:h100_sxm"


def test_what_torch_allocates_in_a_capture_stays_with_the_executable(on_virtual: Call) -> None:
    on_virtual(allocate_in_a_capture)


@dataclass
class FakePool:
    """torch's allocator as far as a pool of it goes: who allocates now, and which pools were dropped."""

    active: list[int] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)

    @contextmanager
    def use(self, pool: object) -> Iterator[None]:
        self.active.append(id(pool))
        try:
            yield
        finally:
            self.active.pop()


def allocate_in_a_capture() -> None:
    """Every run of a torch function, captured or checked, is inside its executable's pool, which lives until close."""
    fake = FakePool()
    dropped: list[str] = []

    class Pool:
        def __del__(self) -> None:
            dropped.append("pool")

    def function(x: DeviceArray, y: DeviceArray, *, stream: Any) -> None:
        fake.seen.append(list(fake.active))
        driver.copy_on(stream, y.buffer.address, x.buffer.address, x.buffer.nbytes)

    b = tg.GraphBuilder("pooled")
    x = b.input("x", (64,), "f32")
    b.output(b.call(function, [x], [tg.spec("y", (64,), "f32")], work=tg.Work(hbm_bytes=512.0), name="mine"))
    graph = b.build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "MemPool", Pool, raising=False)
        patch.setattr(torch.cuda, "use_mem_pool", fake.use, raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        with tg.compile(graph, tg.plan(graph, "h100_sxm", "sequential"), "cuda", device=DEVICE) as one:
            with tg.compile(graph, tg.plan(graph, "h100_sxm", "sequential"), "cuda", device=DEVICE) as other:
                for executable in (one, other):
                    given = torch.randn(64)
                    assert torch.equal(executable(x=given)[graph.outputs[0]], given)
                one.check()
            assert dropped == ["pool"]
            first, second, *checked = fake.seen
            assert len(first) == len(second) == 1 and first != second and checked and all(c == first for c in checked)
        assert dropped == ["pool"] * 2
