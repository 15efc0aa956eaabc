"""Generation on the runtime: one captured plan for each step shape, a static KV cache, greedy tokens."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import taskgraph as tg
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig
from taskgraph.models.shards import check_share
from taskgraph.serving.options import Hardware, Planner, planner_of

if TYPE_CHECKING:
    import torch


@runtime_checkable
class SelfTimed(Protocol):
    """An executable that times its own replays: a GPU's, by events."""

    @property
    def kind(self) -> str:
        """What its times are: "measured" or "simulated"."""
        ...

    def replay_seconds(self, launches: int) -> float:
        """Seconds of a replay, the mean of so many in a row."""
        ...


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A step shape with its graph, its plan and its executable."""

    graph: tg.Graph
    plan: tg.Plan
    executable: tg.Executable

    @property
    def kind(self) -> str:
        """What the times of its replays are: "measured", or "simulated" on a virtual device."""
        return self.executable.kind if isinstance(self.executable, SelfTimed) else "measured"


class Session(AbstractContextManager["Session"]):
    """Weights and KV cache of `batch` sequences, and the captured steps that work on them.

    The weights' dtype, bf16 or f32, is that of the cache and of all products; a sequence may have `cache` tokens at
    most. Steps are planned by `planner`, the name of a scheduler or a function like `tg.KnownPlans`, and captured at
    first use, and kept. `device` is "cpu", "gpu" for this machine's, or a virtual one ("virtual:h100_sxm"); a GPU holds
    weights and cache once.

    With a `group` this is one rank's session: `config` is its share of the model (`ModelConfig.share`), and `weights`
    are that share's (`shards.load_shard`). All ranks of the group must make the same calls, and get the same results.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, "torch.Tensor"],
        *,
        batch: int = 1,
        cache: int = 512,
        planner: str | Planner = "auto",
        device: str = "cpu",
        group: "tg.distributed.Group | None" = None,
    ) -> None:
        if not 1 <= cache <= config.max_context:
            raise tg.PlanError(f"cache is {cache} tokens; {config.name} takes 1 to {config.max_context}.")
        check_share(config, group)
        self.config, self.dtype, self.batch, self.cache = config, tg.dtypes.dtype_of(weights), batch, cache
        self._group, self._planner = group, planner
        hardware = Hardware(device)
        self.backend, self._run_on = hardware.backend, hardware.run_on
        self._device: str | tg.Device = "cpu" if group is None else tg.distributed.rank_device(group)
        self._bound: Mapping[str, Any] = {**weights, **llama.make_cache(config, batch, cache, self.dtype)}
        self._on_gpu: tg.gpu.DeviceTensors | None = None
        if self.backend == "cuda":
            self._device = tg.gpu.planning_device(self._run_on)
            self._bound = self._on_gpu = tg.gpu.DeviceTensors(self._bound, self._run_on)
        self._steps: dict[tuple[int, bool, str | Planner], CapturedStep] = {}

    def step(self, tokens: int, all_logits: bool = False, planner: str | Planner | None = None) -> CapturedStep:
        """The captured step of `tokens` new tokens a sequence (1 is decode); `planner` if not the session's."""
        chosen = planner or self._planner
        key = (tokens, all_logits, chosen)
        if key not in self._steps:
            graph = llama.step_graph(
                self.config, batch=self.batch, tokens=tokens, cache=self.cache, dtype=self.dtype, all_logits=all_logits
            )
            plan = tg.distributed.one_plan(graph, self._group, lambda: planner_of(chosen)(graph, self._device))
            executable: Any = tg.compile(graph, plan, self.backend, device=self._run_on, group=self._group)
            wanted = {t.name for t in graph.flat().with_role("weight", "state")}
            executable.bind({name: t for name, t in self._bound.items() if name in wanted})
            self._steps[key] = CapturedStep(graph, plan, executable)
        return self._steps[key]

    def run(self, ids: Sequence[int], start: Sequence[int], all_logits: bool = False) -> Mapping[str, "torch.Tensor"]:
        """One step: `ids` of all sequences one after another, `start` the place of each sequence's first new token.

        Returns the output buffers, which the next step of this shape overwrites, or copies of those on a GPU.
        PlanError beyond the cache."""
        tokens = len(ids) // self.batch
        if max(start) + tokens > self.cache:
            raise tg.PlanError(f"{max(start) + tokens} tokens do not fit the cache of {self.cache}; make it larger.")
        step = self.step(tokens, all_logits)
        self.feed(step, ids, start)
        step.executable.launch()
        return {name: made.cpu() for name, made in step.executable.outputs.items()}

    def feed(self, step: CapturedStep, ids: Sequence[int], start: Sequence[int]) -> None:
        """Write tokens and places into the step's inputs."""
        import torch

        step.executable.inputs["tokens"].copy_(torch.tensor(ids))
        step.executable.inputs["positions"].copy_(torch.tensor(start))

    def generate(self, prompt: Sequence[int], max_new_tokens: int, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Greedy tokens after `prompt` (one sequence), until `max_new_tokens` or a token of `stop`.

        ExecutionError when logits are NaN or infinite."""
        if self.batch != 1 or not prompt:
            raise tg.PlanError("generate() takes one sequence with at least one token; use run() for batches.")
        token = self._likeliest(self.run(prompt, [0]))
        for place in range(len(prompt), len(prompt) + max_new_tokens):
            yield token
            if token in stop or place + 1 == len(prompt) + max_new_tokens:
                return
            token = self._likeliest(self.run([token], [place]))

    def _likeliest(self, made: Mapping[str, "torch.Tensor"]) -> int:
        """The next token of the only sequence; ExecutionError where its logit is no finite number."""
        token = int(made[llama.NEXT][0])
        if not math.isfinite(float(made[llama.LOGITS].reshape(-1)[token])):
            raise tg.ExecutionError(
                f"the logits of {self.config.name} are no finite numbers (NaN or infinity), so that there is no "
                "likeliest token. Check the weights, or compute in f32."
            )
        return token

    def close(self) -> None:
        """Close every captured step."""
        for step in self._steps.values():
            step.executable.close()
        self._steps.clear()
        if self._on_gpu is not None:
            self._on_gpu.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def step_seconds(steps: Sequence[CapturedStep]) -> list[float]:
    """Seconds of a replay of each step as its inputs stand: a GPU times itself by events, a CPU by the clock."""
    timed = [step.executable for step in steps if isinstance(step.executable, SelfTimed)]
    if timed:
        return [executable.replay_seconds(7) for executable in timed]
    return median_seconds([step.executable.launch for step in steps])


def median_seconds(runs: Sequence[Callable[[], object]], rounds: int = 7) -> list[float]:
    """Median seconds of each callable over `rounds` interleaved rounds, so that drift hits all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for seconds, run in zip(times, runs, strict=True):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in times]
