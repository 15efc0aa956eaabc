"""taskgraph as a backend of torch.compile: one captured plan a shape or bucket, torch itself where better or needed.

    torch.compile(module, backend="taskgraph", options={"scheduler": "auto"})

Graphs for training, and graphs that no plan can hold, are run as torch runs them; a warning says so once and why. Each
plan is compared with eager torch over its first calls, all of which are real ones, and given up where it is slower.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from taskgraph.embed.border import owner_now, refusal, to_aten, warn
from taskgraph.embed.capture import Captured, Padded, Padding
from taskgraph.embed.flow import Flow, Source, flow_of
from taskgraph.embed.lower import lower
from taskgraph.embed.padding import rows_of_results
from taskgraph.embed.padding_rules import Rows, Unpadded
from taskgraph.embed.patterns import recognise
from taskgraph.embed.sizes import Symbol, Symbols, bucket_of, proportional
from taskgraph.embed.variants import Options, Shapes, Variant
from taskgraph.errors import PlanError, TaskgraphError
from taskgraph.record import shown

ALL: WeakSet[Shapes] = WeakSet()
"""What is alive of what the backend made."""


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: Any = None) -> Any:
    """What Dynamo calls with each graph. PlanError for options that do not exist."""
    if mode is not None:
        raise PlanError(f"the backend taskgraph has no mode {shown(mode)}; leave it out.")
    made = Options.of(options)
    reason = refusal(example_inputs)
    if reason:
        warn(reason, made.quiet)
        made = replace(made, verdict="eager")
    compiled = Compiled(gm, example_inputs, made, reason or "as asked")
    ALL.add(compiled)
    return compiled.call


class Compiled(Shapes):
    """A graph of Dynamo's: what torch.compile calls in its place."""

    def __init__(self, gm: fx.GraphModule, examples: Sequence[Any], options: Options, reason: str) -> None:
        super().__init__(options, reason)
        getattr(gm, "real_recompile", list)()  # torch writes the code late; `forward` would look at each call for it
        self.eager: Callable[..., Any] = gm.forward
        self._gm = gm
        self._static = [_is_static(node, ex) for node, ex in zip(_placeholders(gm), examples, strict=True)]
        self._names = [str(node.target) for node in _placeholders(gm)]
        weights = [ex for ex, static in zip(examples, self._static, strict=True) if static and _is_real(ex)]
        self.addresses = frozenset(ex.data_ptr() for ex in weights)
        self.owner = owner_now()
        self._weights = [ref(ex) for ex in weights]
        self.symbols = Symbols(gm, examples)
        self.unpadded = {s.name: self._fixed(s) for s in self.symbols.all if self._fixed(s)}
        self._only: Variant | None = None
        self.call: Callable[..., Any] = self.eager if options.verdict == "eager" else self._call

    @property
    def orphaned(self) -> bool:
        """As `Shapes.orphaned`."""
        return bool(self._weights) and all(weight() is None for weight in self._weights)

    def _call(self, *args: Any) -> Any:
        only = self._only
        if only is not None and only.captured is None:
            only.calls += 1
            return self.eager(*args)
        return self._run(args, only)

    def _eagerly(self, args: tuple[Any, ...]) -> Any:
        return self.eager(*args)

    def _variant(self, args: tuple[Any, ...]) -> Variant:
        if not self.symbols.changing:
            self._only = self.variants[()] = self._new((), args)
            return self._only
        return super()._variant(args)

    def _key(self, args: Sequence[Any]) -> Any:
        """What calls share a plan by: sizes, those that are padded as buckets."""
        sizes = self.symbols.of(args)
        padded = [
            size if s.name in self.unpadded else bucket_of(size)
            for s, size in zip(self.symbols.all, sizes, strict=False)
        ]
        return (*padded, *sizes[len(padded) :])

    def _captured(self, args: tuple[Any, ...]) -> Captured:
        paddings = self._paddings(args)
        given = self.symbols.resized(args, self._key(args))
        flow = self._flow(given)
        # Collectives run as torch's own: ours are checked at capture by all ranks, and only Dynamo knows who captures.
        lowered = lower("torch_compile", flow, recognise(flow, collectives=False))
        if paddings:
            return Padded(lowered, args, self._options.scheduler, paddings=paddings)
        return Captured(lowered, args, self._options.scheduler)

    def _flow(self, args: Sequence[Any], *, fold: bool = True) -> Flow:
        sources = [
            Source(name, "weight" if static and isinstance(a, torch.Tensor) else "input", a)
            for name, static, a in zip(self._names, self._static, args, strict=True)
        ]
        return flow_of(to_aten(self.symbols.fixed(self._gm, args), args), sources, fold=fold)

    def _fixed(self, symbol: Symbol) -> str:
        """Why a size cannot be padded at all; empty if it may be."""
        if not symbol.axes:
            return "it is no size of a tensor"
        if any(self._static[i] for i, _ in symbol.axes):
            return "it is a size of a tensor that is used in place"
        return "" if proportional(self._gm, symbol.name) else "it is computed with"

    def _paddings(self, args: tuple[Any, ...]) -> list[Padding]:
        """How each size that may be padded is, after a proof that it may; what fails is `unpadded` from now on."""
        found: list[Padding] = []
        for place, symbol in enumerate(self.symbols.all):
            if symbol.name in self.unpadded:
                continue
            try:
                found.append(Padding(symbol.axes, tuple(self._rows(args, place))))
            except (Unpadded, TaskgraphError) as error:
                self.unpadded[symbol.name] = str(error)
                return self._paddings(args)  # of the others, with this one as it is
        return found

    def _rows(self, args: tuple[Any, ...], place: int) -> list[Rows | None]:
        key = self._key(args)
        size: int = key[place]
        other = size - 1 if size > 2 else size + 1  # 1 is special to torch
        keys = (key, (*key[:place], other, *key[place + 1 :]))
        one, two = (self._flow(self.symbols.resized(args, sizes), fold=False) for sizes in keys)
        return rows_of_results(one, two, (size, other))


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _is_static(node: fx.Node, example: Any) -> bool:
    """Whether a placeholder is a parameter or buffer, or an input that is marked as static."""
    if isinstance(example, torch.nn.Parameter):
        return True
    marked = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    name = str(node.target)
    return bool(marked) or "_parameters_" in name or "_buffers_" in name


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
