"""An engine on this machine from a checkpoint, with its tokenizer."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from taskgraph.errors import BackendUnavailable, PlanError
from taskgraph.models.llama import load_weights
from taskgraph.models.shards import load_shard
from taskgraph.models.tokenizer import Tokenizer
from taskgraph.models.weights import open_checkpoint
from taskgraph.runtime.dtypes import Picked, pick
from taskgraph.serving.engine import Engine, Options, cpu_engine
from taskgraph.serving.known_plans import KnownPlans, Planner
from taskgraph.serving.runners.ranked import RanksRunner, ranks_engine
from taskgraph.serving.scheduler import Limits

if TYPE_CHECKING:
    import torch

    from taskgraph.runtime.distributed import Group

PAGE = 32


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A served checkpoint."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    vocabulary: int
    picked: Picked

    @property
    def processes(self) -> tuple[int | None, ...]:
        """The ids of its ranks' processes, if it has several ranks."""
        runner = self.engine.runner
        return runner.ranks.pids if isinstance(runner, RanksRunner) else ()


def open_local(
    source: str,
    *,
    dtype: str = "auto",
    sequences: int = 32,
    tokens: int = 256,
    context: int = 2048,
    pages: int = 0,
    warm: bool = True,
    device: str = "cpu",
    tensor_parallel: int = 1,
    expert_parallel: bool = False,
    planner: Planner | None = None,
) -> LocalModel:
    """The checkpoint's engine, with `pages` pages of 32 tokens (0: room for a quarter of what all sequences may have).

    With `warm` every step is planned and captured now. `dtype` is "bf16", "f32", or "auto" for the faster one here.
    `device` is "cpu", "gpu" for this machine's, or a virtual one ("virtual:h100_sxm"), which computes on the CPU what a
    GPU would. With `tensor_parallel` ranks each is a process that loads its shard, or with `expert_parallel` its whole
    experts. PlanError for a dtype that is none; RequestError for limits; GraphError for ranks that cannot share the
    model; BackendUnavailable without the GPU, or for ranks on GPUs. `planner` makes the plans of the steps of one rank,
    or knows them (`KnownPlans`).
    """
    if expert_parallel and tensor_parallel < 2:
        raise PlanError("experts are shared out between ranks, and there is one; choose tensor_parallel of 2 or more.")
    if isinstance(planner, KnownPlans) and planner.files and (tensor_parallel > 1 or not warm):
        raise PlanError("plan files are for one rank whose steps are planned at the start; leave --plan out.")
    if device != "cpu" and tensor_parallel > 1:
        raise BackendUnavailable("ranks are processes on CPUs; serving over several GPUs is not built. Give one rank.")
    picked = pick(dtype, "cpu" if device == "cpu" else "cuda", None if device in ("cpu", "gpu") else device)
    dtype = picked.dtype
    with open_checkpoint(source) as checkpoint:
        config, tokenizer = checkpoint.config, checkpoint.tokenizer()
        weights = load_weights(config, checkpoint, dtype) if tensor_parallel == 1 else {}
    limits = Limits(sequences, tokens, chunks=min(16, sequences), context=min(context, config.max_context))
    room: Options = {
        "pages": pages or max(sequences * limits.context // PAGE // 4, limits.context // PAGE), "page_size": PAGE,
    }  # fmt: skip
    if device != "cpu":
        from taskgraph.serving.runners.gpu import gpu_engine

        run_on = None if device == "gpu" else device
        engine = gpu_engine(config, weights, limits, dtype=dtype, device=run_on, planner=planner, **room)
    elif tensor_parallel == 1:
        engine = cpu_engine(config, weights, limits, dtype=dtype, planner=planner, **room)
    else:
        load = partial(load_rank, source, dtype, expert_parallel)
        engine = ranks_engine(config, load, limits, tensor_parallel, dtype=dtype, whole_experts=expert_parallel, **room)
    if warm:
        _warm(engine, planner)
    return LocalModel(config.name, engine, tokenizer, config.vocab_size, picked)


def _warm(engine: Engine, planner: Planner | None) -> None:
    """The engine's owner has it only when this has gone well, and every plan that was given is used."""
    try:
        engine.runner.warm()
        if isinstance(planner, KnownPlans):
            planner.check_used()
    except BaseException:
        engine.close()
        raise


def load_rank(source: str, dtype: str, whole_experts: bool, group: "Group") -> "dict[str, torch.Tensor]":
    """The shard of a checkpoint that the group's rank has."""
    with open_checkpoint(source) as checkpoint:
        return load_shard(checkpoint.config, checkpoint, dtype, group.rank, group.size, whole_experts=whole_experts)
