"""Two gloo ranks, each a process: collectives, a sharded step equal to the whole one, order, and lost ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_llama
import torch

import taskgraph as tg
from taskgraph.models import llama
from taskgraph.models.parallel import mixed_step
from taskgraph.models.ranks import Ranks
from taskgraph.models.shards import load_shard
from taskgraph.models.weights import open_checkpoint
from taskgraph.runtime.distributed import Group, one_plan

Tensors = dict[str, torch.Tensor]
RANK = tg.devices.make("h100_sxm", "rank", kind="cpu", sm_count=1, sm_granularity=1, sm_min=1)
"""What a rank's steps are planned for: one core, and a link."""
SHAPE: dict[str, Any] = {
    "decode_tokens": 3, "decode_context": 24, "prefill_tokens": 8, "prefill_context": 24, "prefill_sequences": 2,
    "dtype": "f32",
}  # fmt: skip


class Lab:
    """What a rank of these tests can do."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def mixed(self, folder: Path, given: Tensors, options: dict[str, Any]) -> Tensors:
        """This rank's outputs and states of one mixed step of the checkpoint."""
        with open_checkpoint(folder) as checkpoint:
            config = checkpoint.config
            weights = load_shard(
                config, checkpoint, "f32", self.group.rank, self.group.size, collectives=options.get("collectives")
            )
        graph = mixed_step(config, tensor_parallel=self.group.size, **SHAPE, **options)
        return run(graph, weights, given, self.group)


def run(graph: tg.Graph, weights: Tensors, given: Tensors, group: Group | None = None) -> Tensors:
    """Outputs and states after two replays."""
    made = tg.plan(graph, "cpu", "list") if group is None else one_plan(graph, group, lambda: tg.plan(graph, RANK))
    states = {t.name: torch.zeros(t.shape) for t in graph.flat().with_role("state")}
    wanted = {t.name for t in graph.flat().with_role("weight")}
    with tg.compile(graph, made, group=group) as exe:
        exe.bind({name: weights[name] for name in wanted} | states)
        for _ in range(2):
            outputs = exe(given)
    return outputs | states


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2, Lab) as started:
        yield started


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_two_ranks_equal_one(family: str, ranks: Ranks, tmp_path: Path) -> None:
    test_llama.tiny(family).save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        config, weights = checkpoint.config, llama.load_weights(checkpoint.config, checkpoint, "f32")
    given = {
        "tokens": torch.randint(0, config.vocab_size, (11,)), "decode_positions": torch.tensor([4, 0, 17]),
        "prefill_positions": torch.tensor([0, 9]),
    }  # fmt: skip
    whole = run(mixed_step(config, **SHAPE), weights, given)
    parts = ranks.call("mixed", tmp_path, given, {})
    for name, wanted in whole.items():
        if "keys" in name or "values" in name:
            torch.testing.assert_close(torch.cat([part[name] for part in parts], 1), wanted, rtol=1e-4, atol=1e-4)
            continue
        assert torch.equal(parts[0][name], parts[1][name])  # every rank samples the same token
        torch.testing.assert_close(parts[0][name], wanted, rtol=1e-4, atol=1e-4)
