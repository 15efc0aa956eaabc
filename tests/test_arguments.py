"""Every public function and method takes what it should, and answers anything else by one line that is a
TaskgraphError: each argument of each is replaced by values of every wrong kind."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import taskgraph as tg
from taskgraph import ops
from taskgraph.cost.profiles import OpKey, OpTime, Platform
from taskgraph.runtime.sim import SimExecutable
from taskgraph.tune.autotune import Trial

WRONG: tuple[Any, ...] = (
    None, object(), [], {}, (), -1, 0, 2**70, -(2**70), 1.5, math.nan, math.inf, "", "x", "a\nb", "\ud800", b"x", True,
    lambda: 0, [None], {"x": None}, ["x"], 10**400, type,
)  # fmt: skip

Call = tuple[Callable[..., Any], dict[str, Any]]


class Shop:
    """Fresh values of every kind, as a user has them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        b = self.builder = tg.GraphBuilder("shop")
        self.tokens = b.input("tokens", (8,), "i64")
        self.places, self.starts = b.input("places", (2,), "i64"), b.input("starts", (3,), "i32")
        self.rows32, self.lengths = b.input("rows32", (8,), "i32"), b.input("lengths", (2,), "i32")
        self.each, self.blocks = b.input("each", (8,), "i32"), b.input("blocks", (8, 4), "i32")
        self.tables, self.pairs = b.input("tables", (2, 4), "i32"), b.input("pairs", (3, 2), "i32")
        self.x, self.y = b.input("x", (8, 64), "f32"), b.input("y", (8, 64), "f32")
        self.q, self.qkv = b.input("q", (8, 4, 16), "f32"), b.input("qkv", (8, 128), "f32")
        self.w, self.bias, self.norm = (b.weight(n, s, "f32") for n, s in (("w", (64, 64)), ("c", (64,)), ("n", (64,))))
        self.keys, self.values = b.state("keys", (2, 2, 32, 16), "f32"), b.state("values", (2, 2, 32, 16), "f32")
        self.kv = b.state("kv", (2, 8, 32, 2, 16), "f32")
        self.pages, self.pages2 = b.state("pages", (6, 2, 32, 16), "f32"), b.state("pages2", (6, 2, 32, 16), "f32")
        self.latents, self.latent_pages = b.state("latents", (2, 32, 40), "f32"), b.state("lp", (6, 32, 40), "f32")
        self.kv_latent, self.rank = b.input("kvl", (8, 40), "f32"), b.weight("rank", (32,), "f32")
        self.up = b.weight("up", (4 * 24, 32), "f32")
        self.logits, self.routing = b.input("logits", (8, 4), "f32"), b.input("routing", (8, 4), "f32")
        self.gate_up, self.down = b.weight("gu", (4, 32, 64), "f32"), b.weight("dn", (4, 64, 16), "f32")
        self.gate = b.input("gate", (8, 1), "f32")
        self.shares, self.heats = b.input("shares", (8,), "f64"), b.input("heats", (8,), "f32")
        self.kept = b.state("kept", (9,), "i64")
        self.out, self.work = tg.spec("out", (8, 64), "f32"), tg.Work(flops=1e6)


def two_ops() -> tg.Graph:
    b = tg.GraphBuilder("two")
    x = b.input("x", (64, 64), "f32")
    b.output(ops.add(x, x, name="a"), ops.add(x, x, name="b"))
    return b.build()


def fills(x: Any, out: Any) -> None:
    """A custom op of one input and one output."""
    out.copy_(x)


GRAPH = two_ops()
PLAN = tg.plan(GRAPH, "h100_sxm", "list")
SIDE = tg.Side.of(GRAPH, "h100_sxm")
PLATFORM = Platform("cpu", "m", "none", "v", "cpu")
ROW = OpTime(OpKey("add", "4", "f32"), 1, 1e-3, 0.0, 3)
TRIAL = Trial("list", 1, (132,), 1e-3, 1e-3, 1e-3, 0.1, 1, "pass 1")
TUNED = tg.Tuned(PLAN, (TRIAL,), "so", "simulated", "here", 0, 1.0)


def op_calls(s: Shop) -> dict[str, Call]:
    cache = {"keys": s.pages, "values": s.pages2}
    paged = {**cache, "context": 64}
    latent = {"spec": ops.LatentSpec(8, 0.1, 32)}
    yarn, llama3 = ops.YarnStretch(2.0, 1.0, 3.0, 1.0), ops.Llama3Stretch(8.0, 1.0, 4.0, 8192.0)
    rope, latent_rope = {"spec": ops.RopeSpec(4, stretch=yarn)}, {"spec": ops.LatentRopeSpec(4, 8, stretch=yarn)}
    at = ops.TokenPlaces(s.rows32, s.each, 64)
    shared = {"ranks": 2, "axis": 0, "demand": tg.demand(sm=(1, 8))}
    calls: dict[str, dict[str, Any]] = {
        "embedding": {"tokens": s.tokens, "table": s.w, "out_dtype": "f32"},
        "gemm": {"x": s.x, "w": s.w, "bias": s.bias, "residual": s.y, "transpose_w": False, "out_dtype": "f32",
                 "demand": tg.demand(sm=4)},
        "rmsnorm": {"x": s.x, "weight": s.norm, "eps": 1e-5},
        "rope": {"x": s.q, "positions": s.tokens, "theta": 1e4},
        "rope_kv": {"qkv": s.qkv, "positions": s.places, "keys": s.keys, "values": s.values, "norms": (),
                    **rope},
        "attention": {"q": s.q, "positions": s.places, "keys": s.keys, "values": s.values, "context": 32},
        "decode_attention": {"q": s.q, "kv": s.kv},
        "swiglu": {"gate_up": s.qkv},
        "add": {"a": s.x, "b": s.y, "after": []},
        "argmax": {"x": s.x},
        "draw": {"logits": s.x, "likeliest": s.tokens, "temperature": s.heats, "top_k": s.rows32, "top_p": s.shares,
                 "uniform": s.shares, "kept": s.kept},
        "feed": {"tokens": s.tokens, "sources": s.rows32, "kept": s.kept, "vocabulary": 9},
        "copy": {"x": s.x, "direction": "h2d", "demand": None},
        "concat_rows": {"parts": [s.x, s.y]},
        "slice_rows": {"x": s.x, "start": 0, "stop": 4, "step": 2},
        "all_gather": {"x": s.x, **shared}, "all_reduce": {"x": s.x, **shared}, "reduce_scatter": {"x": s.x, **shared},
        "route": {"logits": s.logits, "correction": None, "slots": s.rows32, "spec": ops.RouteSpec(2)},
        "experts": {"x": s.x, "routing": s.routing, "gate_up": s.gate_up, "down": s.down, "residual": s.y, "top_k": 2,
                    "ranks": 1},
        "gated_add": {"x": s.x, "gate": s.gate, "base": s.y},
        "latent_rope": {"q": s.x, "kv": s.kv_latent, "norm": s.rank, "positions": s.places, "latents": s.latents,
                        **latent_rope},
        "latent_attention": {"q": s.q, "positions": s.places, "latents": s.latents, "up": s.up, **latent},
        "paged_latent_rope": {"q": s.x, "kv": s.kv_latent, "norm": s.rank, "places": at,
                              "latents": s.latent_pages, **latent_rope},
        "paged_latent_decode": {"q": s.q, "lengths": s.each, "blocks": s.blocks, "latents": s.latent_pages,
                                "up": s.up, **latent},
        "paged_latent_prefill": {"q": s.q, "starts": s.starts, "lengths": s.lengths, "blocks": s.tables,
                                 "latents": s.latent_pages, "up": s.up, **latent},
        "paged_rope": {"qkv": s.qkv, "places": at, **cache, "norms": [], "spec": ops.RopeSpec(4, stretch=llama3)},
        "paged_decode": {"q": s.q, "lengths": s.each, "blocks": s.blocks, **paged},
        "paged_prefill": {"q": s.q, "starts": s.starts, "lengths": s.lengths, "blocks": s.tables, **paged},
        "copy_pages": {"source": s.pages, "target": s.pages2, "pairs": s.pairs, "direction": "d2d",
                       "expected_pages": 1.5},
        **{kind: {"a": s.x, "b": s.y} for kind in ("sub", "mul", "div", "maximum", "minimum")},
        **{kind: {"x": s.x} for kind in ("relu", "silu", "tanh", "sigmoid", "exp", "log", "sqrt", "rsqrt", "neg")},
        "elementwise": {"formula": "mul x0 x1", "inputs": [s.x, s.y], "out_dtype": "f32"},
        "where": {"condition": s.x, "a": s.y, "b": 0.5}, "cast": {"x": s.x, "dtype": "i32"},
        "gelu": {"x": s.x, "approximate": "tanh"},
        "layer_norm": {"x": s.x, "weight": s.norm, "bias": s.bias, "eps": 1e-5},
        "softmax": {"x": s.x, "axis": 1, "log": False},
        "matmul": {"a": s.x, "b": s.w, "transpose_b": True, "out_dtype": "f32", "demand": None},
        "reduce": {"operation": "min", "x": s.x, "axes": (0, 1), "keep_axes": False},
        **{f"reduce_{kind}": {"x": s.x, "axes": -1, "keep_axes": True} for kind in ("sum", "mean", "max")},
        "reshape": {"x": s.x, "shape": (4, -1)}, "permute": {"x": s.q, "axes": (1, 0, 2), "shape": (4, -1)},
        "transpose": {"x": s.x, "a": 0, "b": 1}, "expand": {"x": s.gate, "shape": (8, 3)},
        "concat": {"parts": [s.x, s.y], "axis": 1}, "index_select": {"x": s.x, "index": s.places, "axis": 1},
        "slice_axis": {"x": s.x, "axis": 1, "start": 0, "stop": 4, "step": 2},
        "take_along": {"x": s.x, "index": s.blocks, "axis": 1},
        "register": {"kind": ops.KINDS["add"]},
        "apply": {"kind": "add", "inputs": [s.x, s.y], "attrs": {}, "demand": None, "after": [], "writes": []},
    }  # fmt: skip
    named = {name: given if name == "register" else {**given, "name": "op"} for name, given in calls.items()}
    return {f"ops.{name}": (getattr(ops, name), given) for name, given in named.items()}


def spec_calls(s: Shop) -> dict[str, Call]:
    """The fields of what stands for several arguments of an op, each with the op that takes it."""
    cache = {"keys": s.keys, "values": s.values}

    def rope(**fields: Any) -> tg.Value:
        return ops.rope_kv(s.qkv, s.places, **cache, spec=ops.RopeSpec(**fields), name="op")

    def latent_rope(**fields: Any) -> tg.Value:
        spec = ops.LatentRopeSpec(**fields)
        return ops.latent_rope(s.x, s.kv_latent, s.rank, s.places, s.latents, spec=spec, name="op")

    def latent(**fields: Any) -> tg.Value:
        return ops.latent_attention(s.q, s.places, s.latents, s.up, spec=ops.LatentSpec(**fields), name="op")

    def places(**fields: Any) -> tg.Value:
        at = ops.TokenPlaces(**fields)
        return ops.paged_rope(s.qkv, at, s.pages, s.pages2, spec=ops.RopeSpec(4), name="op")

    def route(**fields: Any) -> tg.Value:
        return ops.route(s.logits, spec=ops.RouteSpec(**fields), name="op")

    turn = {"theta": 1e4, "eps": 1e-6, "stretch": None}
    moe = {"top_k": 2, "scoring": "softmax", "normalize": True, "scale": 1.0, "groups": 1, "top_groups": 1}
    whole = {name: getattr(ops.KINDS["embedding"], name) for name in inspect.signature(ops.Kind).parameters}
    return {
        "RopeSpec": (rope, {"heads": 4, **turn}),
        "LatentRopeSpec": (latent_rope, {"heads": 4, "rotary": 8, "interleaved": True, **turn}),
        "LatentSpec": (latent, {"rotary": 8, "scale": 0.1, "context": 32}),
        "TokenPlaces": (places, {"positions": s.rows32, "slots": s.each, "context": 64}),
        "RouteSpec": (route, {**moe, "first": 0, "held": 4}),
        "YarnStretch": (ops.YarnStretch, {"factor": 2.0, "low": 1.0, "high": 3.0, "attention": 1.0}),
        "Llama3Stretch": (
            ops.Llama3Stretch, {"factor": 8.0, "low_freq": 1.0, "high_freq": 4.0, "original_context": 8192.0},
        ),
        "Kind": (ops.Kind, whole),
        "Signature": (ops.Signature, {"axes": "22+", "must": {}, "may": {}, "groups": (), "spare": 1, "many": False}),
    }  # fmt: skip


def builder_calls(s: Shop) -> dict[str, Call]:
    b = s.builder
    made = {"inputs": [s.x], "outputs": [s.out], "work": s.work, "name": "c", "demand": None, "after": []}

    def repeat(count: Any, name: Any) -> None:
        with b.repeat(count, name) as loop:
            loop.next(loop.carry(s.x), s.y)

    def carry(init: Any, name: Any, value: Any, inside: Any) -> None:
        with b.repeat(2) as loop:
            kept = loop.carry(init, name)
            loop.next(kept if inside is ... else inside, value)

    return {
        "GraphBuilder": (tg.GraphBuilder, {"name": "g"}),
        "GraphBuilder.input": (b.input, {"name": "i", "shape": (4, 4), "dtype": "f32"}),
        "GraphBuilder.weight": (b.weight, {"name": "i", "shape": (4, 4), "dtype": "f32"}),
        "GraphBuilder.state": (b.state, {"name": "i", "shape": (4, 4), "dtype": "f32"}),
        "GraphBuilder.op": (b.op, {"kind": "custom", **made}),
        "GraphBuilder.op with attributes": (
            lambda attrs: b.op(("custom", attrs), [s.x], [s.out], s.work),
            {"attrs": {"k": 1}},
        ),
        "GraphBuilder.call": (b.call, {"function": fills, **made}),
        "Splittable": (tg.Splittable, {"function": fills, "axes": [0], "multiple": 1}),
        "GraphBuilder.repeat": (repeat, {"count": 2, "name": "layer"}),
        "Loop": (carry, {"init": s.x, "name": "i", "value": s.y, "inside": ...}),
        "GraphBuilder.output": (lambda value: b.output(value), {"value": s.x}),
        "GraphBuilder.build": (lambda: (b.output(s.x), ops.add(s.x, s.y), b.build()), {}),
        "Value.rows": (s.x.rows, {"start": 0, "stop": 4}),
    }


def value_calls() -> dict[str, Call]:
    span, timeline = {"op": "a", "lane": 0, "start_s": 0.0, "end_s": 1.0}, {"kind": "simulated", "origin": "x"}
    bounds = {f"{name}_s": 0.0 for name in ("chain", "sm", "hbm", "h2d", "d2h", "link", "proved")}
    plan = {name: getattr(PLAN, name) for name in inspect.signature(tg.Plan).parameters}
    device = {name: getattr(PLAN.device, name) for name in inspect.signature(tg.Device).parameters}
    op = {name: getattr(GRAPH.ops[0], name) for name in inspect.signature(tg.Op).parameters}
    work = {f"{name}": 1.0 for name in ("flops", "hbm_bytes", "h2d_bytes", "d2h_bytes", "link_bytes")}
    pinned = {"sm": (1, 2), "cluster_sms": 1, "efficiency": 0.5}
    rates = {"hbm_bytes_per_s": 1.0, "pcie_bytes_per_s": 1.0, "link_bytes_per_s": 1.0, "workspace_bytes": 0}
    units = {
        "sm": 1,
        "hbm": "1GB/s",
        "pcie": 1e9,
        "link": None,
        "workspace": "1MiB",
        "cluster_sms": 1,
        "efficiency": 0.5,
    }
    verdict = {"choice": "packed", "packed_s": 1.0, "sequential_s": 1.0, "error_band": 0.1, "kind": "simulated"}
    tuned = {name: getattr(TUNED, name) for name in inspect.signature(tg.Tuned).parameters}
    return {
        "Work": (tg.Work, work),
        "Demand": (tg.Demand, pinned | rates),
        "demand": (tg.demand, units),
        "Tensor": (tg.Tensor, {"name": "x", "shape": (4,), "dtype": "f32", "role": "input"}),
        "spec": (tg.spec, {"name": "x", "shape": (4,), "dtype": "f32"}),
        "Op": (tg.Op, op),
        "Graph": (tg.Graph, {n: getattr(GRAPH, n) for n in ("name", "tensors", "ops", "outputs", "repeat")}),
        "Partition": (tg.Partition, {"first_sm": 0, "sm_count": 8}),
        "Geometry": (tg.Geometry, {"partitions": (tg.Partition(0, 8),)}),
        "Geometry.of": (lambda size: tg.Geometry.of(size, 8), {"size": 8}),
        "Device": (tg.Device, device),
        "Lane": (tg.Lane, {"geometry": 0, "partition": 0}),
        "Step": (tg.Step, {"op": "a", "lane": 0, "waits": (), "sms": 0}),
        "Span": (tg.Span, span),
        "Timeline": (tg.Timeline, timeline | {"spans": (tg.Span(**span),)}),
        "Bounds": (tg.Bounds, bounds),
        "Period": (tg.Period, {"count": 2, "seconds": 1.0, "prologue_s": 1.0, "epilogue_s": 0.0, "overlap": 1.0}),
        "Verdict": (tg.Verdict, verdict),
        "Plan": (tg.Plan, plan),
        "Tuned": (tg.Tuned, tuned),
        "Chosen": (tg.Chosen, {"label": "as given", "graph": GRAPH, "plan": PLAN, "makespans_s": {"as given": 1.0}}),
    }  # fmt: skip


def function_calls(s: Shop) -> dict[str, Call]:
    store, timelines = tg.ProfileDB(s.folder / "p.sqlite3"), {"predicted": PLAN.timeline}
    sim = SimExecutable(GRAPH, PLAN)
    report = {"facts": {"a": "b"}, "table": [("x", "y"), ("1", "2")], "utilisation": {"sm": [(0.0, 0.5)]}}
    search = {"budget_s": 0.01, "seed": 0, "nano_batches": True}
    planned = {"graph": GRAPH, "device": "h100_sxm", "scheduler": "list", **search}
    tune = {"backend": "sim", "budget_s": 0.2, "device": "h100_sxm", "seed": 0, "database": store, "tensors": {},
            "functions": {}, "fresh": True, "progress": None}  # fmt: skip
    changes = {"sm_count": 64, "flops_per_s": {"f32": 1e12}}
    paths = {name: s.folder / f"{name}.out" for name in ("trace", "report")}
    made = {"functions": None, "device": None, "group": None, "ways": None, "check": False}
    return {
        "devices.get": (tg.devices.get, {"device": "h100_sxm"}),
        "devices.make": (tg.devices.make, {"base": "h100_sxm", "name": "x", **changes}),
        "Device.rate": (PLAN.device.rate, {"dtype": "bf16"}),
        "Device.compute_share": (PLAN.device.compute_share, {"sms": 8}),
        "Device.from_dict": (tg.Device.from_dict, {"body": PLAN.device.to_dict()}),
        "Device.from_json": (tg.Device.from_json, {"text": "{}"}),
        "Graph.from_json": (tg.Graph.from_json, {"text": GRAPH.to_json()}),
        "Graph.with_role": (GRAPH.with_role, {}),
        "Plan.from_json": (tg.Plan.from_json, {"text": PLAN.to_json()}),
        "Plan.load": (tg.Plan.load, {"path": s.folder / "plan.json"}),
        "Plan.save": (PLAN.save, {"path": s.folder / "plan.json"}),
        "Plan.partition": (PLAN.partition, {"lane": 0}),
        "Plan.sms": (PLAN.sms, {"step": 0}),
        "plan": (tg.plan, planned),
        "plan_collectives": (tg.plan_collectives, planned),
        "halves": (tg.halves, {"device": "h100_sxm"}),
        "plan_beside": (tg.plan_beside, {"graph": GRAPH, "device": "h100_sxm", "sizes": (64, 64), "side": 0}),
        "Side.of": (tg.Side.of, {"graph": GRAPH, "device": "h100_sxm"}),
        "Side.alone_s": (SIDE.alone_s, {"sms": 64}),
        "beside": (tg.beside, {"first": SIDE, "second": SIDE, "sizes": (64, 64)}),
        "devices.networked": (tg.devices.networked, {"device": "h100_sxm", "value": "torus:2x2", "routing": "goal",
                                                     "algorithm": "ring"}),
        "verify": (tg.verify, {"plan": PLAN, "graph": GRAPH, "memory": True}),
        "audit": (tg.audit, {"plan": PLAN, "graph": GRAPH}),
        "compile": (tg.compile, {"graph": GRAPH, "plan": PLAN, "backend": "sim", **made}),
        "explain": (tg.explain, {"plan": PLAN, "color": False, "measured_s": 1.0}),
        "explain_tuned": (tg.explain_tuned, {"tuned": TUNED, "color": False}),
        "write_trace": (tg.write_trace, {"path": paths["trace"], "timelines": timelines, "plan": PLAN}),
        "write_report": (tg.write_report, {"path": paths["report"], "plan": PLAN, "timelines": timelines, **report}),
        "autotune": (tg.autotune, {"graph": GRAPH, **tune}),
        "costs_known": (tg.costs_known, {"backend": "cpu", "device": "cpu", "database": s.folder / "r.sqlite3"}),
        "GraphBank": (tg.GraphBank, {"make": lambda key: sim, "budget_bytes": 1e9}),
        "KnownPlans": (tg.KnownPlans, {"files": (), "backend": "cpu", "device": None, "use_remembered": False,
                                       "say": print}),
        "ProfileDB": (tg.ProfileDB, {"path": s.folder / "q.sqlite3"}),
        "ProfileDB.record": (store.record, {"platform": PLATFORM, "rows": [ROW]}),
        "ProfileDB.table": (store.table, {"platform": PLATFORM}),
        "ProfileDB.platforms": (store.platforms, {}),
        "Executable.bind": (sim.bind, {"tensors": None}),
        "Executable.launch": (sim.launch, {"stream": None}),
        "Executable.timeline": (sim.timeline, {}),
    }  # fmt: skip


def calls(folder: Path) -> dict[str, Call]:
    shop = Shop(folder)
    torch_calls: dict[str, Call] = {
        "from_torch": (
            tg.from_torch, {"module": torch.nn.Linear(2, 3), "example_inputs": (torch.ones(1, 2),), "dynamic": None},
        ),
    }  # fmt: skip
    return {
        **torch_calls,
        **op_calls(shop),
        **spec_calls(shop),
        **builder_calls(shop),
        **value_calls(),
        **function_calls(shop),
    }


NAMES = sorted(calls(Path("/nowhere")))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_refused_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a path may be any text
    call, given = calls(tmp_path)[name]
    if name == "Plan.load":
        PLAN.save(given["path"])
    if name not in ("Device.from_json",):
        call(**given)
    for argument, value in damage(name, given):
        call, fresh = calls(tmp_path)[name]
        try:
            call(**{**fresh, argument: value})
        except tg.TaskgraphError as error:
            assert "\n" not in str(error) and str(error), f"{argument}={value!r}: {error}"
            str(error).encode()
        except Exception as error:
            pytest.fail(f"{name}({argument}={value!r}) raises {type(error).__name__}: {error}")


def damage(name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for argument in given:
        for value in WRONG:
            if name == "costs_known" and argument == "database" and value is None:
                continue  # the user's own database
            if name == "autotune" and argument in ("budget_s", "database") and value in (1.5, None):
                continue  # that is right, and takes its time, or the user's own database
            if argument == "progress" and callable(value):
                continue  # what a user's own function raises is raised
            yield argument, value


def parameters(call: Callable[..., Any]) -> set[str]:
    """The names of its parameters, and those of the typed dictionary that its keyword arguments are of."""
    found = inspect.signature(call).parameters
    options = found.get("options")
    if options is None or options.kind != options.VAR_KEYWORD:
        return {*found}
    return {*found} - {"options"} | {*get_args(options.annotation)[0].__annotations__}


def test_the_table_holds_every_public_name() -> None:
    held = {name.partition(".")[0] for name in NAMES}
    public = {name for name in tg.__all__ if callable(getattr(tg, name)) and name not in ("Value", "Executable")}
    errors = {
        name for name in public if isinstance(getattr(tg, name), type) and issubclass(getattr(tg, name), Exception)
    }
    assert public - errors <= held, public - errors - held
    functions = {name for name, value in vars(ops).items() if inspect.isfunction(value)}
    inner = {
        "active_experts",
        "latent_flops",
        "batch_axes",
        "check_op",
        "moved",
        "need",
        "need_floats",
        "work_of",
    }  # for rules
    assert functions - inner <= {name.partition(".")[2] for name in NAMES if name.startswith("ops.")}
    for name, (call, given) in calls(Path("/nowhere")).items():
        if hasattr(ops, name):
            assert {*given} == {*inspect.signature(getattr(ops, name)).parameters}, name
        elif inspect.isfunction(call) and call.__name__ not in ("repeat", "carry", "<lambda>"):
            assert {*given} <= parameters(call) | {"sm_count", "flops_per_s"}, name
            left = parameters(call) - {*given} - {"costs", "changes"}
            assert not left, f"{name} has arguments that nothing here replaces: {left}"
