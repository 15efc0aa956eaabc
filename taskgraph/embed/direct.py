"""wrap(): a module as plans without Dynamo: torch.export gives a graph a shape, a call looks at its arguments alone.

Dynamo looks at each call whether all that its graph was made of is as it was, and takes 15 to 60 us for it, which a
module of 0.2 ms feels. Here a call compares the shapes and types of its arguments, and where the weights are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.utils import _pytree as pytree

from taskgraph.embed.border import refusal, warn
from taskgraph.embed.calls import leaves
from taskgraph.embed.capture import Captured
from taskgraph.embed.dynamo import ALL
from taskgraph.embed.flow import Unsupported, flow_of
from taskgraph.embed.importer import exported, sources_of
from taskgraph.embed.lower import Lowered, lower
from taskgraph.embed.patterns import recognise
from taskgraph.embed.variants import Options, Shapes, Variant
from taskgraph.errors import GraphError

RESTS: Final = 31
"""Calls that are not looked at after one that found no shape with a plan."""
_TENSOR: Final = torch.Tensor
_TENSORS: Final = frozenset({torch.Tensor, torch.nn.Parameter})
_PLAIN: Final = frozenset({int, float, bool, str, type(None)})


def wrap(module: torch.nn.Module, **options: Any) -> "Wrapped":
    """A callable like `module` that runs a captured plan a shape where that is faster than eager torch.

    `options` are those of torch.compile(backend="taskgraph"). Other than under torch.compile nothing but arguments,
    weights, training mode and gradients is looked at: what else the module reads (its attributes, its hooks, globals)
    is as it was at a shape's first call, as for torch.export. A module that torch.export does not take is called as it
    is, with a FallbackWarning that says why. GraphError unless it is a module; PlanError for options that do not exist.
    """
    if not isinstance(module, torch.nn.Module):
        raise GraphError(f"wrap takes a torch.nn.Module; got {type(module).__name__}.")
    made = Wrapped(module, Options.of(options))
    ALL.add(made)
    return made


class Wrapped(Shapes):
    """A module whose calls go by plans where they are faster; `module` is the module itself."""

    BESIDES_S = 14e-6  # a look at the arguments takes 4 us (measured)

    def __init__(self, module: torch.nn.Module, options: Options) -> None:
        super().__init__(options, "as asked")
        self.module = module
        self.owner = self  # its pieces are no module's that torch.compile returned
        self._rests: float = math.inf if options.verdict == "eager" else 0
        """How many calls go to eager torch without a look."""
        self._rested = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        module = self.module
        if self._rests:
            self._rests -= 1
            return module(*args, **kwargs)
        values = [*args, *kwargs.values()]
        try:
            lies = [(v.shape, v.dtype) if type(v) is _TENSOR else _known(v) for v in values]
            key = (module.training, *kwargs, *lies)
            variant = self.variants.get(key)
        except Unsupported as error:
            return self._without(str(error), args, kwargs)
        if variant is not None and variant.captured is None and not variant.waits:
            return self._at_rest(variant, args, kwargs)
        why = self._hindrance(values)
        if why:
            return self._without(why, args, kwargs)
        only = variant if len(self.variants) == 1 else None  # of several, the one that was used last is known
        return self._run(_Given(values, args, kwargs, key), only)

    def _at_rest(self, variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a shape without a plan. While no shape has one, the next calls are not looked at: eager torch is
        right for any shape, and a look takes 2 to 5 us, which a small module feels."""
        variant.calls += 1 + self._rested
        self._rested = 0
        if all(v.captured is None and not v.waits for v in self.variants.values()):
            self._rests = self._rested = RESTS
        return self.module(*args, **kwargs)

    def _hindrance(self, values: list[Any]) -> str:
        """Why eager torch runs this call, whatever its shapes; empty if it need not."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not all(map(_here, values)):
            return refusal([*self.module.parameters(), *pytree.tree_leaves(values)])
        return ""

    def _without(self, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        warn(why, self._options.quiet)
        return self.module(*args, **kwargs)

    def sizes(self, key: Any) -> Any:
        """The sizes of the tensors that are arguments themselves."""
        return tuple(tuple(k[0]) for k in key if isinstance(k, tuple) and isinstance(k[0], torch.Size))

    def _key(self, args: "_Given") -> Any:
        return args.key

    def _eagerly(self, args: "_Given") -> Any:
        return self.module(*args.args, **args.kwargs)

    def _captured(self, args: "_Given") -> Captured:
        reason = refusal([*self.module.parameters(), *pytree.tree_leaves(args.values)])
        if reason:
            raise Unsupported(reason)
        program = exported(self.module, args.args, args.kwargs)
        sources = sources_of(program, args.args, args.kwargs)
        flow = flow_of(program.graph_module, sources)
        # Collectives stay torch's own: ours are checked at capture by all ranks, which only the caller knows of.
        lowered = lower(type(self.module).__name__, flow, recognise(flow, collectives=False))
        weights = [s for s in sources if s.role == "weight"]
        if sources[: len(weights)] != weights:
            raise Unsupported("the exported program has arguments before weights")
        names = program.example_inputs[1] if program.example_inputs is not None else args.kwargs
        order = [*args.kwargs]
        places = (*range(len(args.args)), *[len(args.args) + order.index(name) for name in names])
        slots = [_slot(self.module, s.name, s.value) for s in weights]
        reads = _Reads(slots, places if [*places] != [*range(len(places))] else (), program.call_spec.out_spec)
        return _Exported(lowered, args, self._options.scheduler, reads=reads)


def _known(value: Any) -> Any:
    """What calls share a plan by, of an argument. Unsupported for what has no such key."""
    if type(value) in _TENSORS:
        return value.shape, value.dtype
    if type(value) in _PLAIN:
        return type(value), value
    held, tree = pytree.tree_flatten(value)
    if tree.is_leaf():
        raise Unsupported(
            f"an argument is a {type(value).__name__}; plans take tensors, numbers, texts, and lists and dicts of them"
        )
    return tree, *[_known(v) for v in held]


def _here(value: Any) -> bool:
    """Whether it is a tensor on the CPU, or none."""
    return value.is_cpu if type(value) is torch.Tensor else type(value) in _PLAIN


class _Given(NamedTuple):
    """The arguments of a call: one by one, as given, and what calls share a plan by."""

    values: list[Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: Any


class _Reads(NamedTuple):
    """Where a plan's operands are: weights as (where, name), the order of the arguments if it is another than that of
    the call, and how results become what the module returns."""

    weights: Sequence[tuple[Mapping[str, Any], str]]
    places: tuple[int, ...]
    results: Any


def _slot(module: torch.nn.Module, name: str, value: Any) -> tuple[Mapping[str, Any], str]:
    """Where a module keeps a weight, or a place of its own for a constant."""
    path, _, last = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = module
    for held in (owner._parameters, owner._buffers):
        if held.get(last) is value:
            return held, last
    return {last: value}, last


class _Exported(Captured):
    """A captured plan of what torch.export made of a module."""

    def __init__(self, lowered: Lowered, args: _Given, scheduler: str, *, reads: _Reads, alone: bool = False) -> None:
        self._reads, self._single = reads, reads.results.is_leaf()
        super().__init__(lowered, self._operands(args), scheduler, alone=alone)

    def _operands(self, args: _Given) -> list[Any]:
        values, reads = args.values, self._reads
        if reads.places:
            values = [values[i] for i in reads.places]
        if any(type(v) not in _TENSORS and type(v) not in _PLAIN for v in values):
            values = pytree.tree_leaves(values)
        return [*[held[name] for held, name in reads.weights], *values]

    def alone(self, args: Any) -> Captured:
        """As `Captured.alone`."""
        return _Exported(self.lowered, args, self._scheduler, reads=self._reads, alone=True)

    def run(self, args: Any) -> Any:
        """As `Captured.run`; `args` is a `_Given`."""
        made = super().run(self._operands(args))
        if made is None:
            return None
        return made[0] if self._single else pytree.tree_unflatten([*leaves(made)], self._reads.results)

    def _bind(self, args: Sequence[Any]) -> None:
        for i, p in self._bound:
            if (tuple(args[i].shape), args[i].dtype) != (p.layout.size, p.layout.dtype):
                raise GraphError(
                    f"the weight {p.tensor!r} is {args[i].dtype}{list(args[i].shape)} now; wrap the module again."
                )
        super()._bind(args)
