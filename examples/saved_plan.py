"""Plan once, keep the plan in a file, and use it in another process: a session of a model takes it for its step.

The model is tiny and its weights are random. Run it with `python examples/saved_plan.py`.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import taskgraph as tg
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig, load_config
from taskgraph.serving.session import Session

CACHE = 64


def tiny() -> ModelConfig:
    """A Llama small enough for an example."""
    base = load_config("smollm2-135m")
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "heads": 4, "kv_heads": 2, "head_dim": 16}
    return replace(base, name="tiny", layers=2, **sizes)


def main() -> None:
    config = tiny()
    graph = llama.step_graph(config, batch=1, tokens=1, cache=CACHE, dtype="f32")
    torch.manual_seed(0)
    weights = {t.name: torch.randn(t.shape) * 0.1 for t in graph.flat().with_role("weight")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "decode.json"
        tg.plan(graph, "cpu", "list").save(file)
        known = tg.KnownPlans([file], use_remembered=False, say=lambda line: print(line.replace(folder, "...")))
        with Session(config, weights, cache=CACHE, planner=known) as session:
            print("tokens", list(session.generate([3, 1, 4, 1, 5], 6)))
        known.check_used()
        other = llama.step_graph(config, batch=2, tokens=1, cache=CACHE, dtype="f32")
        try:
            tg.compile(other, tg.Plan.load(file))
        except tg.PlanError as error:
            print("refused:", error)


if __name__ == "__main__":
    main()
