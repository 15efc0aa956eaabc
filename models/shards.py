"""One rank's shard of a checkpoint (Megatron-LM, Shoeybi et al. 2019): heads and features of products are shared out,
and of a mixture of experts every expert's features, or whole experts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import taskgraph as tg
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig

if TYPE_CHECKING:
    import torch

AXES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj"), 0),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3", "lm_head"), 0),
    **dict.fromkeys(("o_proj", "down_proj", "w2"), 1),
}
"""Hugging Face module -> the axis of its weight and bias that ranks share; the others every rank has whole."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A TensorSource of the part that rank `rank` of `ranks` has of each tensor of another `source`.

    With `whole_experts` the tensors of routed experts are not cut, because each rank has some experts and no others.
    `axes` overrides AXES. With `tied` the embedding is the output head too: its shard is "lm_head.weight". With
    `kv_copies` above 1 so many neighbouring ranks have the same part of the keys' and values' products.
    """

    source: llama.TensorSource
    rank: int
    ranks: int
    whole_experts: bool = False
    axes: Mapping[str, int] | None = None
    tied: bool = False
    kv_copies: int = 1

    @property
    def identity(self) -> str | None:
        """What the shard is, if the source says what it is itself."""
        whole = getattr(self.source, "identity", None)
        part = (self.rank, self.ranks, self.whole_experts, sorted((self.axes or {}).items()), self.tied, self.kv_copies)
        return None if whole is None else f"{whole} {part}"

    def tensor(self, name: str) -> "torch.Tensor":
        """This rank's part of the tensor of that name; WeightsError if the ranks cannot share it."""
        found = self.source.tensor("model.embed_tokens.weight" if self.tied and name == "lm_head.weight" else name)
        module = name.split(".")[-2]
        axis = (AXES | dict(self.axes or {})).get(module)
        if axis is None or (self.whole_experts and ".experts." in name):
            return found
        copies = self.kv_copies if module in ("k_proj", "v_proj") else 1
        size, parts = found.shape[axis], self.ranks // copies
        if size % parts:
            raise tg.WeightsError(
                f"{name!r} has {size} {'columns' if axis else 'rows'}, which {parts} ranks cannot share."
            )
        return found.narrow(axis, self.rank // copies * (size // parts), size // parts).clone()


def load_shard(
    config: ModelConfig,
    source: llama.TensorSource,
    dtype: str,
    rank: int,
    *,
    collectives: Mapping[str, str] | None = None,
) -> dict[str, "torch.Tensor"]:
    """The weights of rank `rank`, whose share of the model is `config` (`ModelConfig.share`), cut out of the whole
    model's tensors in `source`: for a `step_graph`, or a `mixed_step` with these `collectives`."""
    if config.ranks == 1:
        return llama.load_weights(config, source, dtype)
    gathered = [name for name, choice in (collectives or {}).items() if choice == "gather"]
    axes = {f"{name}_proj": 0 for name in gathered}
    e = config.experts
    whole_experts = e is not None and e.ranks > 1
    shard = Shard(source, rank, config.ranks, whole_experts, axes, config.tie_embeddings, config.kv_copies)
    held = replace(e, rank=rank) if e is not None and whole_experts else e
    mine = replace(config, tie_embeddings=False, experts=held)
    weights = llama.load_weights(mine, shard, dtype)
    return {f"{n}.columns" if n.rpartition("/")[2] in gathered else n: w for n, w in weights.items()}


def check_share(config: ModelConfig, group: "tg.distributed.Group | None") -> None:
    """GraphError unless `config` is the share of one of the group's ranks, or without a group the whole model."""
    ranks = 1 if group is None else group.size
    if config.ranks != ranks:
        raise tg.GraphError(
            f"{config.name} is the share of one of {config.ranks} ranks, and {ranks} run it; "
            f"give config.share({ranks}) of the whole model."
        )
