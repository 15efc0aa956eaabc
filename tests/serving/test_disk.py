"""Blocks on disk: what comes back, what is deleted, and that a failure costs a recomputation and nothing else."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskgraph.models import llama
from taskgraph.models.config import ModelConfig
from taskgraph.models.paged import PageShape
from taskgraph.serving.cache.disk import DiskTier
from taskgraph.serving.cache.pages import PagedCache
from taskgraph.serving.engine import Engine
from taskgraph.serving.options import Policy
from taskgraph.serving.requests import Request
from taskgraph.serving.runners.cpu import CpuRunner
from taskgraph.serving.scheduler import Limits
from tests.serving.test_engine import Drawn, empty, prompts, tiny  # noqa: F401 - a fixture

SIZE, CONTEXT = 32, 128


def tier(folder: Path, pages: int, memory: dict[int, bytes]) -> DiskTier:
    return DiskTier(folder, pages, memory.__getitem__, memory.__setitem__)


def settled(disk: DiskTier) -> tuple[list[tuple[int, bytes, bool]], list[tuple[int, bytes, bool]]]:
    written, read = [], []
    while disk._writing or disk._reading:
        done = disk.finished(wait=True)
        written += done.written
        read += done.read
    return written, read


def test_the_longest_unused_block_is_deleted(tmp_path: Path) -> None:
    memory = {page: bytes([page]) * 9 for page in range(4)}
    disk = tier(tmp_path / "kv", 2, memory)
    for page in (0, 1):
        disk.store(page, b"k%d" % page)
    assert settled(disk)[0] == [(0, b"k0", True), (1, b"k1", True)]
    disk.load(3, b"k0")
    assert settled(disk)[1] == [(3, b"k0", True)]
    assert memory[3] == memory[0]
    disk.store(2, b"k2")
    settled(disk)
    assert [key in disk for key in (b"k0", b"k1", b"k2")] == [True, False, True]
    assert len(list((tmp_path / "kv").iterdir())) == 2
    disk.close()
    assert not list((tmp_path / "kv").iterdir())


def test_a_damaged_block_is_forgotten_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = {0: b"good"}
    disk = tier(tmp_path, 4, memory)
    disk.store(0, b"k")
    settled(disk)
    (file,) = tmp_path.iterdir()
    file.unlink()
    disk.load(1, b"k")
    with caplog.at_level(logging.WARNING):
        assert settled(disk)[1] == [(1, b"k", False)]
    assert "cannot be read" in caplog.text
    assert b"k" not in disk
    disk.close()


Make = Callable[..., Engine]


@pytest.fixture
def engines(tiny: ModelConfig, tmp_path: Path) -> Iterator[Make]:  # noqa: F811
    """Engines with few pages, few of them on the host, and a disk behind."""
    weights = llama.load_weights(tiny, Drawn(tiny), "f32")
    made: list[Engine] = []

    def make(
        pages: int = 5,
        host_pages: int = 6,
        disk_pages: int = 40,
        broken: bool = False,
        sequences: int = 4,
        **options: Any,
    ) -> Engine:
        limits = Limits(sequences=sequences, tokens=96, chunks=8, context=CONTEXT)
        runner = CpuRunner(tiny, weights, PageShape(pages, SIZE, CONTEXT, host_pages), limits)

        def refuse(page: int) -> bytes:
            raise OSError("no space left on device")

        disk = DiskTier(
            tmp_path / str(len(made)), disk_pages, refuse if broken else runner.read_page, runner.write_page
        )
        cache = PagedCache(pages, SIZE, host_pages, disk)
        made.append(Engine(runner, cache, limits, vocabulary=tiny.vocab_size, policy=Policy(**options)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def rounds(engine: Engine) -> tuple[int, ...]:
    """A conversation whose first round is followed by others' requests; the tokens of its second round."""
    (first,) = prompts(5, 1, 40, least=40)
    answer = engine.run([Request(first, 30)])[0].tokens
    for prompt in prompts(6, 9, 60, least=40):
        engine.run([Request(prompt, 30)])
    while engine.cache.disk is not None and engine.cache.disk.writing:
        engine.cache.settle()
    return engine.run([Request([*first, *answer, 3, 1, 4], 20)])[0].tokens


def test_a_conversation_comes_back_from_disk(engines: Make) -> None:
    wanted = rounds(engines(pages=64, host_pages=1))
    engine = engines()
    assert rounds(engine) == wanted
    assert engine.cache.disk is not None
    assert len(engine.cache.disk) > 6
    assert engine.stats.prompt_tokens == 40 + sum(map(len, prompts(6, 9, 60, least=40))) + 73 - 2 * SIZE
    assert empty(engine)


def test_a_disk_that_fails_costs_a_recomputation_and_a_warning(engines: Make, caplog: pytest.LogCaptureFixture) -> None:
    wanted = rounds(engines(pages=64, host_pages=1))
    engine = engines(broken=True)
    with caplog.at_level(logging.WARNING):
        assert rounds(engine) == wanted
    assert "no space left on device" in caplog.text
    assert engine.stats.prompt_tokens == 40 + sum(map(len, prompts(6, 9, 60, least=40))) + 73
    assert empty(engine)


def test_a_full_disk_drops_the_oldest_and_nothing_is_wrong(engines: Make) -> None:
    wanted = rounds(engines(pages=64, host_pages=1))
    engine = engines(disk_pages=2)
    assert rounds(engine) == wanted
    assert engine.cache.disk is not None
    assert len(engine.cache.disk) <= 2
    assert empty(engine)


def test_a_prefix_longer_than_the_host_is_read_as_far_as_it_goes(engines: Make) -> None:
    engine = engines(host_pages=3)
    (prompt,) = prompts(8, 1, 110, least=110)
    expected = engine.run([Request(prompt, 10)])[0].tokens
    for other in prompts(9, 9, 60, least=40):
        engine.run([Request(other, 30)])
    assert engine.run([Request(prompt, 10)])[0].tokens == expected
    assert empty(engine)


def crowd(engine: Engine) -> list[tuple[int, ...]]:
    """What a trace of requests gets that need four times the device's pages; most of them come while others run."""
    requests = [Request(p, 60) for p in prompts(1, 14, 40)]
    return [c.tokens for c in engine.replay([(0.002 * i, request) for i, request in enumerate(requests)])]


@pytest.mark.parametrize("sharing", [True, False])
def test_preempted_sequences_go_to_disk_when_the_host_is_full(engines: Make, sharing: bool) -> None:
    """And come back: nothing is computed twice, nothing is left anywhere."""
    wanted = crowd(engines(pages=64, host_pages=1, sequences=8))
    engine = engines(pages=8, host_pages=4, sequences=8, expected_output=1.0, prefix_sharing=sharing)
    disk, written = engine.cache.disk, []
    assert disk is not None
    store = disk.store
    disk.store = lambda page, key, *, pinned=False: (written.append(pinned), store(page, key, pinned=pinned))[1]  # type: ignore[method-assign]
    assert crowd(engine) == wanted
    assert any(written)
    assert engine.scheduler.preemptions > 0
    assert engine.scheduler.recomputed == 0
    assert (len(engine.cache.parking), disk.room) == (0, disk.pages)
    assert empty(engine)


@pytest.mark.parametrize("broken", [True, False])
def test_only_without_room_on_disk_is_a_sequence_computed_again(
    engines: Make, broken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = crowd(engines(pages=64, host_pages=1, sequences=8))
    engine = engines(pages=8, host_pages=4, disk_pages=2, broken=broken, sequences=8, expected_output=1.0)
    with caplog.at_level(logging.WARNING):
        assert crowd(engine) == wanted
    assert engine.scheduler.recomputed > 0
    assert "they are computed again" in caplog.text
    assert engine.cache.disk is not None
    assert (len(engine.cache.parking), engine.cache.disk.room) == (0, 2)
    assert empty(engine)


def test_cancelled_sequences_leave_nothing_on_disk(engines: Make) -> None:
    engine = engines(pages=8, host_pages=4, sequences=8, expected_output=1.0)
    numbers = [engine.submit(Request(p, 60)) for p in prompts(1, 14, 40)]
    disk = engine.cache.disk
    assert disk is not None
    while disk.room == disk.pages:
        engine.step()
    for number in numbers:
        engine.cancel(number)
    engine.run()
    while disk.busy:
        engine.cache.settle()
    assert (len(engine.cache.parking), disk.room) == (0, disk.pages)
    assert empty(engine)


def test_pages_are_read_and_written_whole(engines: Make) -> None:
    runner = engines().runner
    assert isinstance(runner, CpuRunner)
    size = len(runner.read_page(0))
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    runner.write_page(2, data)
    assert runner.read_page(2) == data
    assert runner.read_page(1) == bytes(size)
    with pytest.raises(ValueError, match=f"3 bytes where a page has {size}"):
        runner.write_page(1, b"abc")
