"""The backend "taskgraph" of torch.compile, which pip's entry point names: a graph goes to whoever knows it best."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from taskgraph.embed import dynamo, vllm
from taskgraph.embed.variants import Options


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: Any = None) -> Any:
    """What Dynamo calls with each graph. PlanError for options that do not exist."""
    if mode is None and vllm.is_vllm(gm):
        return vllm.backend(gm, example_inputs, Options.of(options))
    return dynamo.backend(gm, example_inputs, options=options, mode=mode)
