"""taskgraph inside vLLM, without a patch: vLLM gives its decoder to a backend of torch.compile, we run it by plans.

    vllm serve MODEL --compilation-config '{"mode": 2, "backend": "taskgraph"}'

vLLM compiles once and calls with every number of tokens. There is one plan a bucket of tokens; a call is padded to its
bucket. vLLM's own attention and its update of the KV cache are ops of the plan that call vLLM with the rows that are
there. They read its forward context and want its number of threads, so the plan's one lane is the calling thread.
"""

import copy
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from taskgraph.embed import dynamo
from taskgraph.embed.border import refusal, to_aten, warn
from taskgraph.embed.capture import Captured
from taskgraph.embed.dynamo import Compiled
from taskgraph.embed.flow import Source, Unsupported, flow_of
from taskgraph.embed.lower import Lowered, lower
from taskgraph.embed.patterns import recognise
from taskgraph.embed.sizes import bucket_of
from taskgraph.embed.variants import Options, Variant

SUPPORTED: Final = ("0.32",)
"""Releases of vLLM whose graphs and operators these are; others are left to torch."""
MOST_PLANS: Final = 64
ATTENTION: Final = "vllm.unified_attention_with_output"
UPDATE: Final = "vllm.unified_kv_cache_update"


# ------------------------------------------------------------------------------------------- the backend


def is_vllm(gm: fx.GraphModule) -> bool:
    """Whether a graph calls vLLM's attention."""
    return any(op_name(node.target) == ATTENTION for node in gm.graph.nodes)


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Any:
    """What runs a decoder of vLLM's. What cannot be planned runs as torch runs it, and a warning says why."""
    reason = _foreign() or refusal(example_inputs) or _strange(gm)
    if reason:
        warn(reason, options.quiet)
        options = replace(options, verdict="eager")
    decoder = Decoder(gm, example_inputs, replace(options, most_plans=MOST_PLANS), reason or "as asked")
    dynamo.ALL.add(decoder)
    return decoder.call


def planned(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None) -> Any:
    """The backend "taskgraph.embed.vllm.planned": plans without a comparison with eager torch."""
    return backend(gm, example_inputs, replace(Options.of(options), verdict="plan"))


def _foreign() -> str:
    """Why the vLLM that runs is none of ours; empty if it is."""
    version = str(getattr(sys.modules.get("vllm"), "__version__", "unknown"))
    if version.startswith(tuple(f"{known}." for known in SUPPORTED)):
        return ""
    return f"this is vLLM {version}, and taskgraph knows the graphs of vLLM {', '.join(SUPPORTED)}"


def _strange(gm: fx.GraphModule) -> str:
    """Why the tensors of a decoder are none that can be padded; empty if they are."""
    nodes = [n for n in (*gm.graph.find_nodes(op="placeholder"), *_results(gm)) if isinstance(n, fx.Node)]
    values = [n.meta.get("example_value") for n in nodes]
    if any(isinstance(v, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in v.shape[1:]) for v in values):
        return "an input or a result of the decoder has tokens along another axis than its first"
    return "" if any(map(_grows, values)) else "no input of the decoder has a number of tokens that changes"


def calls_of_layers() -> Mapping[str, int]:
    """How often the attention of each layer ran in a plan of ours, by vLLM's name of the layer."""
    return dict(_CALLS)


class Decoder(Compiled):
    """A decoder: as any graph of Dynamo's, but with a plan a bucket in place of one a shape."""

    def __init__(self, gm: fx.GraphModule, examples: Sequence[Any], options: Options, reason: str) -> None:
        super().__init__(gm, examples, options, reason)
        self.unpadded = {}  # tokens are padded by what vLLM says of them, not by a proof
        nodes = gm.graph.find_nodes(op="placeholder")
        seen = [node.meta.get("example_value", ex) for node, ex in zip(nodes, examples, strict=True)]
        self._counts = [i for i, value in enumerate(seen) if isinstance(value, torch.SymInt)]
        self._moving = [i for i, value in enumerate(seen) if _grows(value)]
        self._sliced = [isinstance(r, fx.Node) and _grows(r.meta.get("example_value")) for r in _results(gm)]

    def _variant(self, args: tuple[Any, ...]) -> Variant:
        return self._kept(self._key(args), args)

    def _key(self, args: Sequence[Any]) -> Any:
        counts = self._tokens(args)
        return bucket_of(max(counts)) if len(counts) == 1 else "uneven"

    def _tokens(self, args: Sequence[Any]) -> set[int]:
        """The number of tokens by each input that has one; all are the same."""
        return {int(args[i]) for i in self._counts} | {int(args[i].shape[0]) for i in self._moving}

    def _captured(self, args: tuple[Any, ...]) -> Captured:
        counts = self._tokens(args)
        if len(counts) != 1:
            raise Unsupported(f"the decoder's inputs have different numbers of tokens, {sorted(counts)}.")
        bucket = bucket_of(max(counts))
        given = list(args)
        for i in self._counts:
            given[i] = bucket
        for i in self._moving:
            given[i] = args[i].new_zeros((bucket, *args[i].shape[1:]))
        gm = rewritten(self._gm, args)
        given = [v if isinstance(v, (torch.Tensor, int, float)) else 0 for v in given]
        sources = [
            Source(name, "input" if i in self._moving else "weight", v)
            for i, (name, v) in enumerate(zip(self._names, given, strict=True))
        ]
        flow = flow_of(to_aten(gm, given), sources)
        return Bucket(lower("vllm", flow, recognise(flow)), given, self)

    def slices(self, made: Any, tokens: int) -> list[Any]:
        """Of the results of a padded call those of the tokens."""
        return [one[:tokens] if grows else one for one, grows in zip(made, self._sliced, strict=True)]

    def padded(self, args: Sequence[Any], given: list[Any]) -> int:
        """Copy the rows of a call into `given`, which is of a bucket; how many there are."""
        tokens = max(self._tokens(args))
        for i in range(len(given)):
            if i in self._moving:
                given[i][:tokens].copy_(args[i])
            elif isinstance(given[i], torch.Tensor):
                given[i] = args[i]
        return tokens


class Bucket(Captured):
    """The plan of a number of tokens, run on the calling thread; calls of fewer tokens are padded."""

    def __init__(self, lowered: Lowered, given: list[Any], decoder: Decoder) -> None:
        super().__init__(lowered, given, "sequential", alone=False)
        self.launch = self._exe.eager
        self._given, self._decoder = given, decoder

    @property
    def cores(self) -> int:
        """One lane; no plan for fewer cores is tried."""
        return 1

    def run(self, args: Sequence[Any]) -> Any:
        """One call, of at most as many tokens as the bucket has."""
        _HERE.tokens = self._decoder.padded(args, self._given)
        made = super().run(self._given)
        return None if made is None else self._decoder.slices(made, _HERE.tokens)


def _grows(value: Any) -> bool:
    """Whether a tensor has a row a token."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and isinstance(value.shape[0], torch.SymInt)


def _results(gm: fx.GraphModule) -> list[Any]:
    (output,) = gm.graph.find_nodes(op="output")
    return list(output.args[0])


# ------------------------------------------------------------------------------------------- the graph


def op_name(target: Any) -> str:
    """ "vllm.unified_kv_cache_update" of an operator or one of its overloads; empty for what is none."""
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    return packet._qualified_op_name.replace("::", ".") if isinstance(packet, OpOverloadPacket) else ""


def rewritten(gm: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
    """The graph with our operators in place of those of vLLM's that know layers, and with operators that may or may not
    reuse their arguments as those that do not. Unsupported for what is not known."""
    graph = copy.deepcopy(gm.graph)
    named = dict(zip((n for n in graph.nodes if n.op == "placeholder"), args, strict=True))
    layers = Counter[str]()
    for node in list(graph.nodes):
        name = op_name(node.target)
        if getattr(node.target, "__name__", "") == "_get_data_attr":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif getattr(node.target, "_overloadname", "") == "maybe_inplace":
            node.target = node.target.overloadpacket.default
        elif name in (ATTENTION, UPDATE):
            layers[_layer_op(node, name, named)] += name == ATTENTION
        elif name.startswith("vllm.") and any(_is_layer(named.get(a, a)) for a in (*node.args, *node.kwargs.values())):
            raise Unsupported(
                f"the decoder calls {name}, which looks at vLLM's layers and which taskgraph does not know."
            )
    twice = sorted(layer for layer, count in layers.items() if count != 1)
    if twice:
        raise Unsupported(f"the layers {', '.join(twice[:3])} do not attend once each.")
    graph.lint()
    return fx.GraphModule(gm, graph)


def _is_layer(value: Any) -> bool:
    return isinstance(value, str) or type(value).__name__ == "LayerName"


_TAKES: Final = {ATTENTION: ("query", "key", "value", "output"), UPDATE: ("key", "value")}
_ALSO: Final = ("layer_name", "output_scale", "output_block_scale", "kv_cache_dummy_dep")


def _layer_op(node: fx.Node, name: str, named: Mapping[Any, Any]) -> str:
    """Change a node to our operator for it; the layer's name."""
    tensors = _TAKES[name]
    given: dict[str, Any] = dict(zip((*tensors, *_ALSO), node.args, strict=False)) | node.kwargs
    layer_name, ordered = given.pop("layer_name"), given.pop("kv_cache_dummy_dep", None)
    values = tuple(given.pop(t) for t in tensors)
    if any(v is not None for v in given.values()):
        raise Unsupported(f"{node.name} ({name}) is given {', '.join(given)}, which taskgraph does not know.")
    layer_name = named.get(layer_name, layer_name)
    layer = str(getattr(layer_name, "value", layer_name))
    _LAYERS[layer] = layer_name
    if name == ATTENTION:
        node.target, node.args = torch.ops.taskgraph_vllm.attend.default, (*values, layer, ordered)
    elif node.users:
        node.target, node.args = torch.ops.taskgraph_vllm.update.default, (*values, layer)
    else:
        raise Unsupported(f"nothing waits for {node.name} ({name}), the update of the cache of {layer}.")
    node.kwargs = {}
    return layer


# ------------------------------------------------------------------------------------------- our operators


class _Here(threading.local):
    """How many rows of the plan that this thread runs are tokens."""

    tokens = 0


_HERE = _Here()
_LAYERS: dict[str, Any] = {}
"""What vLLM calls a layer, an object or its name, by the name."""
_CALLS = Counter[str]()

_LIBRARY: Any = torch.library.Library("taskgraph_vllm", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("attend(Tensor query, Tensor key, Tensor value, Tensor(a!) output, str layer, Tensor? ordered) -> ()")
_LIBRARY.define("update(Tensor key, Tensor value, str layer) -> Tensor")


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    layer: str,
    ordered: torch.Tensor | None,
) -> None:
    tokens = _HERE.tokens
    first = (query[:tokens], key[:tokens], value[:tokens], output[:tokens])
    torch.ops.vllm.unified_attention_with_output(*first, _LAYERS[layer])
    output[tokens:].zero_()
    _CALLS[layer] += 1


def _update(key: torch.Tensor, value: torch.Tensor, layer: str) -> torch.Tensor:
    tokens = _HERE.tokens
    torch.ops.vllm.unified_kv_cache_update(key[:tokens], value[:tokens], _LAYERS[layer])
    return key.new_empty(0)


_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("update", _update, "CompositeExplicitAutograd")
torch.library.register_fake("taskgraph_vllm::attend", lambda *_: None, lib=_LIBRARY)
torch.library.register_fake("taskgraph_vllm::update", lambda key, value, layer: key.new_empty(0), lib=_LIBRARY)
