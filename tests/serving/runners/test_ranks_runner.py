"""The engine over two gloo ranks: what one process gives, also from disk; and no rank outlives its parent."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from taskgraph.errors import GraphError, PlanError, RankLost, TaskgraphError, WeightsError
from taskgraph.models import llama
from taskgraph.models.config import load_config
from taskgraph.models.weights import open_checkpoint
from taskgraph.serving.engine import Engine
from taskgraph.serving.http.status import PlanBook, status_of
from taskgraph.serving.local import load_rank, open_local
from taskgraph.serving.options import Hardware, KvMemory
from taskgraph.serving.requests import Request, Sampling
from taskgraph.serving.runners.cpu import cpu_engine
from taskgraph.serving.runners.parallel import RanksRunner, packed, ranks_engine
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.service import Service
from tests.engine_cases import told
from tests.models.test_parallel import saved
from tests.serving.http.test_serve_local import alone, call
from tests.serving.http.test_serve_local import folder as folder
from tests.serving.test_engine import empty, prompts

ROOT = Path(__file__).parents[3]
LIMITS = Limits(sequences=3, tokens=16, chunks=2, context=128)


def over_ranks(folder: Path, limits: Limits, whole_experts: bool = False, **options: Any) -> Engine:
    load = partial(load_rank, str(folder), "f32", whole_experts)
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config
    return ranks_engine(config, load, limits, ranks=2, whole_experts=whole_experts, **told(**options))


def over_one(folder: Path, limits: Limits, **options: Any) -> Engine:
    with open_checkpoint(folder) as checkpoint:
        weights = llama.load_weights(checkpoint.config, checkpoint, "f32")
    return cpu_engine(checkpoint.config, weights, limits, **told(**options))


# --------------------------------------------------------------------------------------- equality


def mixed(engine: Engine, stop: int) -> list[tuple[tuple[int, ...], str]]:
    """Requests that join while others run, end by a stop token or their length, are cancelled, and make room."""
    requests = [Request(p, 40 - 3 * i) for i, p in enumerate(prompts(1, 8, 40))]
    requests[3] = replace(requests[3], sampling=Sampling(temperature=0.9, top_p=0.9, seed=7))
    requests[5] = replace(requests[5], stop=frozenset({stop}))
    for request in requests[:5]:
        engine.submit(request)
    done = [c for _ in range(9) for c in engine.step().finished]
    engine.cancel(engine.submit(Request([5] * 30, 60)))
    done += engine.run(requests[5:])
    return [(c.tokens, c.reason) for c in sorted(done, key=lambda c: c.request)]


def stop_of(engine: Engine) -> int:
    """A token that one of those requests gives."""
    return engine.run([Request(prompts(1, 8, 40)[5], 25)])[0].tokens[6]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "whole_experts"), [("mixtral", False), ("qwen2_moe sparse", True), ("deepseek plain", False)]
)
def test_two_ranks_give_what_one_gives(case: str, whole_experts: bool, tmp_path: Path) -> None:
    saved(case, tmp_path)
    with over_one(tmp_path, LIMITS, pages=64) as one:
        stop = stop_of(one)
        wanted = mixed(one, stop)
    with over_ranks(tmp_path, LIMITS, whole_experts, pages=5, host_pages=12, expected_output=1.0) as two:
        check_mixed(two, stop, wanted)
        two.runner.warm()
        planned = two.runner.planned
        two.run(Request(p, 4) for p in prompts(3, 4, 20))
        assert two.runner.planned == planned >= 7  # one to three rows that decode, and none to three beside a prefill


def check_mixed(engine: Engine, stop: int, wanted: list[tuple[tuple[int, ...], str]]) -> None:
    """It gives this, with pre-emptions, and holds nothing afterwards; its own work is done beside the ranks'."""
    assert {reason for _, reason in wanted} == {"length", "stop", "cancelled"}
    assert mixed(engine, stop) == wanted
    assert engine.scheduler.preemptions > engine.scheduler.recomputed == 0
    assert empty(engine)
    assert engine.stats.hidden_s > 0.3 * engine.stats.host_s


def rounds(engine: Engine) -> tuple[int, ...]:
    """A conversation whose first round goes to disk behind others' requests; the tokens of its second round."""
    (first,) = prompts(5, 1, 40, least=40)
    answer = engine.run([Request(first, 30)])[0].tokens
    for prompt in prompts(6, 5, 60, least=60):
        engine.run([Request(prompt, 5)])
        while engine.cache.disk is not None and engine.cache.disk.writing:
            engine.cache.settle()
    return engine.run([Request([*first, *answer, 3, 1, 4], 8)])[0].tokens


@pytest.mark.slow
def test_ranks_with_a_disk_give_what_one_gives_and_an_idle_rank_is_missed(folder: Path, tmp_path: Path) -> None:
    """A page on disk has the parts of all ranks. At last one is killed while there is nothing to do."""
    with over_one(folder, LIMITS, pages=64, prefix_sharing=False) as one:
        conversation, stop = rounds(one), stop_of(one)
        wanted = mixed(one, stop)
    tiers: dict[str, Any] = {"pages": 5, "host_pages": 6, "disk": tmp_path, "disk_pages": 40}
    engine = over_ranks(folder, LIMITS, expected_output=1.0, **tiers)
    runner, tier = engine.runner, engine.cache.disk
    assert isinstance(runner, RanksRunner) and tier is not None
    with engine:
        assert rounds(engine) == conversation
        assert len(tier) > 1
        assert engine.stats.prompt_tokens == 40 + 5 * 60 + 73 - 32  # a page of the first round came back
        engine.scheduler.expected_output = 1.0
        check_mixed(engine, stop, wanted)
        data = runner.read_page(3)
        runner.write_page(3, data[::-1])
        assert runner.read_page(3) == data[::-1] != data
        for wrong in (data[:-2], data[:-1]):
            with pytest.raises(ValueError, match="bytes"):
                runner.write_page(3, wrong)
        with Service(engine) as service:
            assert service.ready
            last = status_of(service).last
            shown = None if last is None else PlanBook(service).of(last)
            assert last is not None and last.seconds is not None and last.seconds > 0
            assert shown is not None and "all_reduce" in {kind for _, kind, *_ in shown[0].spans}
            os.kill(runner.ranks.pids[0] or 0, signal.SIGKILL)
            assert service.stopped.wait(20)
            assert "Rank 0 of 2 died (exit code -9)" in str(service.failure)
        with pytest.raises(RankLost, match="Rank 0 of 2 died"):
            runner.check()
        assert runner.planned_step(last.bucket) is None  # whoever watches hears nothing of it


def test_a_batch_is_small_on_its_way(folder: Path) -> None:
    """A few bytes a row, whatever the scheduler keeps beside."""
    limits = Limits(sequences=32, tokens=64, chunks=8, context=128)
    with over_one(folder, limits, pages=200) as engine:
        for prompt in prompts(2, 32, 2):
            engine.submit(Request(prompt, 50))
        for _ in range(10):
            engine.step()
        assert engine._running is not None and engine._running.decode == 32
        assert len(packed(engine._running)) < 4096


# ---------------------------------------------------------------------------------------- refusals


def test_ranks_that_cannot_share_a_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any process starts."""
    config = load_config(str(folder))
    monkeypatch.setattr("taskgraph.serving.runners.parallel.Ranks", None)
    with pytest.raises(GraphError, match="which 3 ranks cannot share"):
        ranks_engine(config, partial(load_rank, str(folder), "f32", False), LIMITS, KvMemory(8), 3)
    with pytest.raises(GraphError, match="no experts to share out"):
        open_local(str(folder), LIMITS, Hardware(ranks=2, whole_experts=True))
    with pytest.raises(PlanError, match="choose 2 ranks"):
        Hardware(whole_experts=True)
    for command in (["serve", "--tensor-parallel", "3"], ["bench-serve", "--ranks", "3", "--dataset", "lmsys"]):
        assert call(monkeypatch, *command, str(folder)) == 2
        assert "3 ranks cannot share" in capsys.readouterr().err


def test_a_rank_that_cannot_start_says_why_and_leaves_none(folder: Path) -> None:
    before = set(multiprocessing.active_children())
    load = partial(load_rank, str(folder / "nothing"), "f32", False)
    with pytest.raises(WeightsError, match="nothing") as caught:
        ranks_engine(load_config(str(folder)), load, LIMITS, KvMemory(8), 2)
    assert isinstance(caught.value, TaskgraphError)
    assert set(multiprocessing.active_children()) == before


# ------------------------------------------------------------------------------------- the server


class Server:
    """`taskgraph serve` on two ranks, in a session of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.process, said = process, ""
        for line in process.stderr:
            said += line
            if "serving" in line:
                break
        named, url = re.search(r"processes (\d+), (\d+)", said), re.search(r"http://[\d.:]+", said)
        assert named is not None and url is not None, said
        self.ranks, self.url = (int(named[1]), int(named[2])), url[0]
        every = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        self.family = [pid for pid in every if parent(pid) == process.pid]
        assert set(self.ranks) <= set(self.family)

    def ask(self, prompt: str, tokens: int) -> httpx.Response:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=600)

    def interrupted(self, interrupt: Callable[[], None]) -> tuple[str, httpx.Response]:
        """What a streamed request and a plain one get when this happens while both run: a rank stands still until both
        are there, so that neither can end before."""
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 110, "temperature": 0, "stream": True}
        os.kill(self.ranks[1], signal.SIGSTOP)
        with (
            ThreadPoolExecutor(1) as beside,
            httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=600) as response,
        ):
            plain = beside.submit(self.ask, "abc", 110)
            while httpx.get(f"{self.url}/health", timeout=600).json()["open"] < 2:
                time.sleep(0.001)
            interrupt()
            with suppress(ProcessLookupError):  # it was killed, and its end noticed
                os.kill(self.ranks[1], signal.SIGCONT)
            return "\n".join(response.iter_lines()), plain.result()

    def ended(self) -> tuple[int, str]:
        """Its exit code and the rest of what it said, when it and all its processes are gone."""
        _, rest = self.process.communicate(timeout=600)
        until = time.monotonic() + 600
        while time.monotonic() < until and any(parent(pid) is not None for pid in self.family):
            time.sleep(0.05)
        assert [pid for pid in self.family if parent(pid) is not None] == []
        return self.process.returncode, rest.strip()


def parent(pid: int) -> int | None:
    """The parent of a process that runs; None when it is gone, or only its exit code is left."""
    try:
        state, number = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(number)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "taskgraph.cli", "serve", str(folder), "--port", "0", "--dtype", "f32"]
    limits = [
        "--sequences",
        "2",
        "--step-tokens",
        "16",
        "--context",
        "128",
        "--no-warm",
        "--no-access-log",
        "--name",
        "tiny",
        "--drain",
        "600",
    ]
    with subprocess.Popen(
        [*command, *limits, "--tensor-parallel", "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield Server(process)
        finally:
            process.kill()


def test_a_killed_rank_fails_all_requests_and_the_server(folder: Path) -> None:
    with serving(folder) as server:
        answer = server.ask("Hello", 12).json()["choices"][0]["text"]
        assert answer == alone(folder, "Hello", 12)
        streamed, plain = server.interrupted(lambda: os.kill(server.ranks[1], signal.SIGKILL))
        code, said = server.ended()
    assert "Rank 1 of 2 died" in streamed and '"server_error"' in streamed
    assert plain.status_code == 503 and "Rank 1 of 2 died" in plain.json()["error"]["message"]
    assert code == 2
    assert re.fullmatch(r"taskgraph: the engine failed .* Rank 1 of 2 died \(exit code -9\)\..*", said), said


def test_a_signal_to_all_processes_ends_the_server_when_its_requests_have_ended(folder: Path) -> None:
    """As ctrl-c and service managers send it."""
    with serving(folder) as server:
        server.ask("Hello", 2)
        streamed, plain = server.interrupted(lambda: os.killpg(server.process.pid, signal.SIGTERM))
        code, said = server.ended()
    assert streamed.count("data: {") > 50 and "error" not in streamed
    assert plain.status_code in (200, 503)  # accepted before the signal, or after it
    assert (code, said.splitlines()[-1]) == (0, "stopped")


def test_ranks_end_with_the_server_that_is_killed(folder: Path) -> None:
    with serving(folder) as server:
        server.ask("Hello", 2)
        with pytest.raises(httpx.TransportError):
            server.interrupted(server.process.kill)
        code, said = server.ended()
    assert (code, said) == (-signal.SIGKILL, "")
