"""Layers with experts: Mixtral (Jiang et al. 2024), Qwen2-MoE, Qwen3-MoE and DeepSeek-V3.

The shared expert does not wait for the routed ones, so that a planner may run them side by side.
"""

import taskgraph as tg
from taskgraph.models.config import Experts, ModelConfig
from taskgraph.models.layer import Layer, Names, Sources


def expert_mlp(layer: Layer, x: tg.Value, residual: tg.Value) -> tg.Value:
    """residual + the experts' results of x, which is normalised, summed over ranks."""
    e, hidden = layer.config.experts, x.shape[1]
    if e is None:
        raise tg.GraphError(f"{layer.config.name} has no experts.")
    alone = layer.config.ranks == 1
    routing = _routing(layer, e, x)
    gate_up = layer.weight("experts_gate_up", e.held, 2 * e.inner_size, hidden)
    down = layer.weight("experts_down", e.held, hidden, e.inner_size)
    mixed = tg.ops.experts(
        x, routing, gate_up, down, residual if alone else None, top_k=e.top_k, ranks=e.ranks,
        name=layer.name("experts"),
    )  # fmt: skip
    total = _with_shared(layer, e, x, mixed) if e.shared_size else mixed
    return total if alone else layer.reduced(total, "down", residual)


def _routing(layer: Layer, e: Experts, x: tg.Value) -> tg.Value:
    """Logits are stored in f32: in bf16 near ties would go to another expert. Every rank routes all tokens."""
    correction = layer.weight("router_correction", e.count, dtype="f32") if e.correction else None
    logits = layer.product(x, "router", e.count, "router_proj", out_dtype="f32")
    spec = tg.ops.RouteSpec(
        e.top_k, e.scoring, e.normalize, e.scale, e.groups, e.top_groups, first=e.rank * e.held, held=e.held
    )
    return tg.ops.route(logits, correction, layer.slots, spec=spec, name=layer.name("route"))


def _with_shared(layer: Layer, e: Experts, x: tg.Value, mixed: tg.Value) -> tg.Value:
    gate_up = layer.product(x, "shared_gate_up", 2 * e.shared_size, "shared_gate_up_proj")
    active = tg.ops.swiglu(gate_up, name=layer.name("shared_swiglu"))
    shared = layer.product(active, "shared_down", x.shape[1], "shared_down_proj")
    if not e.shared_gate:
        return tg.ops.add(shared, mixed, name=layer.name("shared_add"))
    gate = layer.product(x, "shared_gate", 1, "shared_gate_proj")
    return tg.ops.gated_add(shared, gate, mixed, name=layer.name("shared_add"))


def expert_sources(config: ModelConfig) -> Sources:
    """The weights of `expert_mlp`, on this rank, and the checkpoint's tensors that they are made of."""
    e = config.experts
    if e is None:
        return {}
    named = config.record.expert_names
    block, shared = named.block, f"{named.block}.{named.shared}"
    mine = range(e.rank * e.held, (e.rank + 1) * e.held)

    def each(*parts: str) -> tuple[Names, ...]:
        return tuple(tuple(f"{block}.experts.{i}.{part}.weight" for part in parts) for i in mine)

    sources: Sources = {
        "router": (f"{block}.gate.weight",), "experts_gate_up": each(named.gate, named.up),
        "experts_down": each(named.down),
    }  # fmt: skip
    if e.correction:
        sources["router_correction"] = (f"{block}.gate.e_score_correction_bias",)
    if e.shared_size:
        sources["shared_gate_up"] = (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight")
        sources["shared_down"] = (f"{shared}.down_proj.weight",)
    if e.shared_gate:
        sources["shared_gate"] = (f"{block}.shared_expert_gate.weight",)
    return sources
