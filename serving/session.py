"""Generation on the runtime: one captured plan for each step shape, a static KV cache, greedy tokens."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import taskgraph as tg
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig
from taskgraph.runtime.cpu.executable import CpuExecutable
from taskgraph.runtime.distributed import Group, one_plan, rank_device
from taskgraph.runtime.dtypes import dtype_of
from taskgraph.serving.known_plans import Planner

if TYPE_CHECKING:
    import torch

    from taskgraph.runtime.gpu.executable import CudaExecutable


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A step shape with its graph, its plan and its executable."""

    graph: tg.Graph
    plan: tg.Plan
    executable: "CpuExecutable | CudaExecutable"

    @property
    def kind(self) -> str:
        """What the times of its replays are: "measured", or "simulated" on a virtual device."""
        return "measured" if isinstance(self.executable, CpuExecutable) else self.executable.kind


class Session:
    """Weights and KV cache of `batch` sequences, and the captured steps that work on them.

    `dtype` is "bf16" or "f32", "auto" that of the weights; `cache` the most tokens a sequence may have. Steps are
    planned and captured at first use and kept. With a `group` this is one rank's session and `weights` are its shard
    (`shards.load_shard`); all ranks of the group must make the same calls, and all get the same results.
    `whole_experts`: ranks share out the experts of a layer, not the features of each. With backend "cuda" they run on
    this machine's GPU, or on the virtual `device`; weights and cache are on it once. `planner` makes the plans, or
    knows them (`KnownPlans`).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, "torch.Tensor"],
        *,
        dtype: str = "auto",
        batch: int = 1,
        cache: int = 512,
        scheduler: str = "auto",
        group: Group | None = None,
        whole_experts: bool = False,
        backend: str = "cpu",
        device: str | None = None,
        planner: Planner | None = None,
    ) -> None:
        if not 1 <= cache <= config.max_context:
            raise tg.PlanError(f"cache is {cache} tokens; {config.name} takes 1 to {config.max_context}.")
        dtype = dtype_of(weights, dtype)
        self.config, self.dtype, self.batch, self.cache, self.scheduler = config, dtype, batch, cache, scheduler
        self._group, self._ranks = group, 1 if group is None else group.size
        self._expert_rank = group.rank if group is not None and whole_experts else None
        self.backend, self._run_on, self._plan = backend, device, planner or tg.plan
        self._device: str | tg.Device = "cpu" if group is None else rank_device(group)
        share = config.share(self._ranks, self._expert_rank)
        self._bound: Mapping[str, Any] = {**weights, **llama.make_cache(share, batch, cache, dtype)}
        if backend == "cuda":
            from taskgraph.runtime.gpu.arrays import DeviceTensors
            from taskgraph.runtime.gpu.spec import planning_device

            self._device, self._bound = planning_device(device), DeviceTensors(self._bound, device)
        self._steps: dict[tuple[int, bool, str], CapturedStep] = {}

    def step(self, tokens: int, all_logits: bool = False, scheduler: str | None = None) -> CapturedStep:
        """The captured step of `tokens` new tokens a sequence (1 is decode)."""
        chosen = scheduler or self.scheduler
        key = (tokens, all_logits, chosen)
        if key not in self._steps:
            graph = llama.step_graph(
                self.config, batch=self.batch, tokens=tokens, cache=self.cache, dtype=self.dtype,
                all_logits=all_logits, tensor_parallel=self._ranks, expert_rank=self._expert_rank,
            )  # fmt: skip
            plan = one_plan(graph, self._group, lambda: self._plan(graph, self._device, chosen))
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
        if self.backend == "cuda":
            self._bound.close()  # type: ignore[attr-defined]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def step_seconds(steps: Sequence[CapturedStep]) -> list[float]:
    """Seconds of a replay of each step as its inputs stand: a GPU times itself by events, a CPU by the clock."""
    timed = [step.executable for step in steps if not isinstance(step.executable, CpuExecutable)]
    if timed:
        return [executable.replay_seconds(7) for executable in timed]
    return median_seconds([step.executable.launch for step in steps])


def median_seconds(runs: Sequence[Callable[[], object]], rounds: int = 7) -> list[float]:
    """Median seconds of each callable over `rounds` interleaved rounds, so that drift hits all alike."""
    import statistics
    import time

    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for row, run in zip(times, runs, strict=True):
            begin = time.perf_counter()
            run()
            row.append(time.perf_counter() - begin)
    return [statistics.median(row) for row in times]
