"""An engine on this machine from a checkpoint, with its tokenizer."""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import taskgraph as tg
from taskgraph.errors import BackendUnavailable, PlanError
from taskgraph.models.llama import load_weights
from taskgraph.models.shards import load_shard
from taskgraph.models.text.tokenizer import Tokenizer
from taskgraph.models.weights import open_checkpoint
from taskgraph.serving.engine import Engine
from taskgraph.serving.options import WARM, Hardware, KvMemory, Planner, Warm
from taskgraph.serving.runners.cpu import cpu_engine
from taskgraph.serving.runners.parallel import RanksRunner, ranks_engine
from taskgraph.serving.scheduler import Limits

if TYPE_CHECKING:
    import torch

PAGE = 32
"""Tokens of a page."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A served checkpoint."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    vocabulary: int
    picked: "tg.dtypes.Picked"

    @property
    def processes(self) -> tuple[int | None, ...]:
        """The ids of its ranks' processes, if it has several ranks."""
        runner = self.engine.runner
        return runner.ranks.pids if isinstance(runner, RanksRunner) else ()

    @property
    def shared_bytes(self) -> tuple[int, int]:
        """Bytes of the memory that its captured steps share on a GPU, and those that they would hold if they did not;
        zeros where they share none."""
        runner = self.engine.runner
        lines = [getattr(runner, name) for name in ("pipeline", "beside") if hasattr(runner, name)]
        return sum(line.memory.memory_bytes for line in lines), sum(line.memory.asked_bytes for line in lines)


def open_local(
    source: str,
    limits: Limits,
    target: Hardware | None = None,
    *,
    dtype: str = "auto",
    pages: int = 0,
    warm: Warm | None = WARM,
    planner: str | Planner = "auto",
    tpot_s: float | None = None,
) -> LocalModel:
    """The checkpoint's engine, with `pages` pages of 32 tokens (0: room for a quarter of what all sequences may have).

    `limits` bound its batches; their context is cut to the model's. `target` says where it runs (default: one process
    on this machine's cores). Steps are planned and captured now as `warm` says, or with None when first needed.
    `dtype` is "bf16", "f32", or "auto" for the faster one here. `planner` plans the steps of one rank: a scheduler's
    name, or a function like `tg.KnownPlans`. With `tpot_s`, wanted seconds a token, a GPU runs prompts beside what
    decodes where that is predicted to be better (`serving.ways`); it is for GPUs. PlanError for a dtype that is none;
    GraphError for ranks that cannot share the model; BackendUnavailable without the GPU, or for ranks on GPUs.
    """
    on, known = target or Hardware(), planner if isinstance(planner, tg.KnownPlans) else None
    if known is not None and known.files and (on.ranks > 1 or warm is None):
        raise PlanError("plan files are for one rank whose steps are planned at the start; leave --plan out.")
    if on.device != "cpu" and on.ranks > 1:
        raise BackendUnavailable("ranks are processes on CPUs; serving over several GPUs is not built. Give one rank.")
    picked = tg.dtypes.pick(dtype, on.backend, on.run_on)
    with open_checkpoint(source) as checkpoint:
        config, tokenizer = checkpoint.config, checkpoint.tokenizer()
        weights = load_weights(config, checkpoint, picked.dtype) if on.ranks == 1 else {}
    limits = replace(limits, context=min(limits.context, config.max_context))
    memory = KvMemory(pages or max(limits.sequences * limits.context // PAGE // 4, limits.context // PAGE))
    if on.device != "cpu":
        from taskgraph.serving.runners.gpu import gpu_engine

        engine = gpu_engine(config, weights, limits, memory, device=on.run_on, planner=planner, tpot_s=tpot_s)
    elif on.ranks == 1:
        engine = cpu_engine(config, weights, limits, memory, planner=planner)
    else:
        load = partial(load_rank, source, picked.dtype, on.whole_experts)
        engine = ranks_engine(config, load, limits, memory, on.ranks, whole_experts=on.whole_experts)
    if warm is not None:
        _warm(engine, warm, known)
    return LocalModel(config.name, engine, tokenizer, config.vocab_size, picked)


def _warm(engine: Engine, warm: Warm, known: "tg.KnownPlans | None") -> None:
    """Plan and capture steps, and check that every given plan is used. The engine is closed if either fails."""
    try:
        engine.runner.warm(warm.within_s, warm.tell)
        if known is not None:
            known.check_used()
    except BaseException:
        engine.close()
        raise


def load_rank(source: str, dtype: str, whole_experts: bool, group: "tg.distributed.Group") -> "dict[str, torch.Tensor]":
    """The shard of a checkpoint that the group's rank has."""
    with open_checkpoint(source) as checkpoint:
        share = checkpoint.config.share(group.size, group.rank if whole_experts else None)
        return load_shard(share, checkpoint, dtype, group.rank)
