"""Generation on the runtime: one captured plan for each step shape, a static KV cache, greedy tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import taskgraph as tg
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig
from taskgraph.runtime.cpu import CpuExecutable
from taskgraph.runtime.distributed import Group, one_plan, rank_device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A step shape with its graph, its plan and its executable."""

    graph: tg.Graph
    plan: tg.Plan
    executable: CpuExecutable


class Session:
    """Weights and KV cache of `batch` sequences, and the captured steps that work on them.

    `dtype` is "bf16" or "f32"; `cache` the most tokens a sequence may have. Steps are planned and captured at
    first use and kept. With a `group` this is one rank's session and `weights` are its shard (`shards.load_shard`);
    all ranks of the group must make the same calls, and all get the same results. `whole_experts`: ranks share out
    the experts of a layer, not the features of each.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, "torch.Tensor"],
        *,
        dtype: str = "bf16",
        batch: int = 1,
        cache: int = 512,
        scheduler: str = "auto",
        group: Group | None = None,
        whole_experts: bool = False,
    ) -> None:
        if not 1 <= cache <= config.max_context:
            raise tg.PlanError(f"cache is {cache} tokens; {config.name} takes 1 to {config.max_context}.")
        self.config, self.dtype, self.batch, self.cache, self.scheduler = config, dtype, batch, cache, scheduler
        self._group, self._ranks = group, 1 if group is None else group.size
        self._expert_rank = group.rank if group is not None and whole_experts else None
        self._device: str | tg.Device = "cpu" if group is None else rank_device(group)
        share = config.share(self._ranks, self._expert_rank)
        self._bound = {**weights, **llama.make_cache(share, batch, cache, dtype)}
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
            plan = one_plan(graph, self._group, lambda: tg.plan(graph, self._device, chosen))
            executable = tg.compile(graph, plan, "cpu", group=self._group)
            assert isinstance(executable, CpuExecutable)
            wanted = {t.name for t in graph.flat().with_role("weight", "state")}
            executable.bind({name: t for name, t in self._bound.items() if name in wanted})
            self._steps[key] = CapturedStep(graph, plan, executable)
        return self._steps[key]

    def run(self, ids: Sequence[int], start: Sequence[int], all_logits: bool = False) -> Mapping[str, "torch.Tensor"]:
        """One step: `ids` of all sequences one after another, `start` the place of each sequence's first new token.

        Returns the output buffers, which the next step of this shape overwrites. PlanError beyond the cache."""
        import torch

        tokens = len(ids) // self.batch
        if max(start) + tokens > self.cache:
            raise tg.PlanError(f"{max(start) + tokens} tokens do not fit the cache of {self.cache}; make it larger.")
        executable = self.step(tokens, all_logits).executable
        executable.inputs["tokens"].copy_(torch.tensor(ids))
        executable.inputs["positions"].copy_(torch.tensor(start))
        executable.launch()
        return executable.outputs

    def generate(self, prompt: Sequence[int], max_new_tokens: int, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Greedy tokens after `prompt` (one sequence), until `max_new_tokens` or a token of `stop`."""
        if self.batch != 1 or not prompt:
            raise tg.PlanError("generate() takes one sequence with at least one token; use run() for batches.")
        token = int(self.run(prompt, [0])[llama.NEXT][0])
        for place in range(len(prompt), len(prompt) + max_new_tokens):
            yield token
            if token in stop or place + 1 == len(prompt) + max_new_tokens:
                return
            token = int(self.run([token], [place])[llama.NEXT][0])

    def close(self) -> None:
        """Close every captured step."""
        for step in self._steps.values():
            step.executable.close()
        self._steps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
