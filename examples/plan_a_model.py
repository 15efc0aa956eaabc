"""A decode step of a 70B model, planned for eight GPUs that need not be there; every time is simulated.

One rank's share of the step is the graph: its heads, its features, its vocabulary, and the all-reduces between ranks.
Run it with `python examples/plan_a_model.py`; `taskgraph plan llama-3-70b --ranks 8` does the same.
"""

import taskgraph as tg
from taskgraph.models.config import load_config
from taskgraph.models.llama import step_graph
from taskgraph.schedule.sliced import resident_bytes

BATCH, CONTEXT, RANKS = 256, 1024, 8


def main() -> None:
    config = load_config("llama-3-70b")
    graph = step_graph(config.share(RANKS), batch=BATCH, tokens=1, cache=CONTEXT, dtype="bf16")
    for device in ("a100_sxm", "h100_sxm"):
        plan = tg.plan(graph, device, "list")
        tg.verify(plan, graph)  # also: weights and cache of a rank fit its memory
        held, room = resident_bytes(plan, graph), plan.device.memory_bytes
        print(
            f"{device}: {1e3 * plan.makespan_s:.1f} ms a step, {BATCH / plan.makespan_s:,.0f} tokens/s on {RANKS} "
            f"devices (simulated); {held / 1e9:.0f} of {room / 1e9:.0f} GB each; bound by {plan.bounds.binding}"
        )


if __name__ == "__main__":
    main()
