"""from_torch(): any module that torch.export takes becomes a graph, its weights bound where they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

import taskgraph as tg
from taskgraph.embed.calls import leaves, mapped
from taskgraph.embed.flow import Flow, Source, Unsupported, flow_of
from taskgraph.embed.lower import Lowered, Recognised, Residence, lower
from taskgraph.embed.patterns import recognise
from taskgraph.errors import GraphError


@dataclass(frozen=True, slots=True)
class Imported:
    """A torch module as a graph.

    `graph` is planned and compiled like any other; `tensors` are its weights and states by name, the module's own
    memory, for `Executable.bind`; `outputs` names the graph's tensors that hold results.
    """

    graph: tg.Graph
    tensors: Mapping[str, torch.Tensor]
    outputs: tuple[str, ...]
    recognised: tuple[Recognised, ...] = field(repr=False, default=())
    _lowered: Lowered | None = field(repr=False, default=None)
    _inputs: tuple[tuple[int, Residence], ...] = field(repr=False, default=())
    _in_tree: Any = field(repr=False, default=None)
    _out_tree: Any = field(repr=False, default=None)

    def feed(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The module's arguments as the graph's inputs by name, for `Executable.__call__`.

        GraphError unless they are as many tensors, of the shapes and dtypes, as the example had."""
        flat, tree = pytree.tree_flatten((args, kwargs))
        if tree != self._in_tree:
            raise GraphError(
                f"the module was imported with arguments {self._in_tree}; got {tree}. Import it again for others."
            )
        return {place.tensor: self._fits(place, flat[i]) for i, place in self._inputs}

    def _fits(self, place: Residence, value: Any) -> torch.Tensor:
        wanted = place.layout
        if not isinstance(value, torch.Tensor) or (tuple(value.shape), value.dtype) != (wanted.size, wanted.dtype):
            got = f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise GraphError(
                f"input {place.tensor!r} is {wanted.dtype}{list(wanted.size)}; got {got}. A graph has fixed shapes: "
                "import the module again, or use torch.compile(module, backend='taskgraph'), which plans each shape."
            )
        from taskgraph.embed.lower import memory_of

        return memory_of(value, wanted, place.shape)

    def results(self, made: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor] | None = None) -> Any:
        """What the module returns, of the outputs by name that a call of the executable returned.

        `given` is what `feed` made of the arguments, for a module that returns one of them."""
        assert self._lowered is not None
        have = {**self.tensors, **(given or {}), **made}

        def one(value: Any) -> Any:
            if not isinstance(value, Residence):
                return value
            if value.tensor not in have:
                raise GraphError(f"the module returns its argument {value.tensor!r}; give results() what feed() made.")
            return value.of(have[value.tensor])

        return pytree.tree_unflatten(list(leaves(mapped(self._lowered.outputs, one))), self._out_tree)

    def call(self, executable: tg.Executable, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for these arguments, by an executable of the graph that is bound to `tensors`."""
        given = self.feed(*args, **kwargs)
        return self.results(executable(given), given)

    def explain(self, device: "str | tg.Device" = "cpu") -> str:
        """Which ops were recognised, which run as they are, and what share of the predicted time each kind has."""
        from taskgraph.embed.explain import explain

        return explain(self, device)


def from_torch(module: torch.nn.Module, example_inputs: Any, *, dynamic: Any = None) -> Imported:
    """The graph of `module` at the shapes of `example_inputs`: a tuple of arguments, or a mapping of named ones.

    The module is exported by torch.export without gradients; it may be an ExportedProgram too. Calls that are
    recognised become ops of our kinds, all others `aten` ops that run torch's operator itself on a lane. Buffers and
    inputs that the module changes in place are states. Weights are bound, not copied; those of a module on the meta
    device have no memory, and its graph can be planned but not run. `dynamic` is torch.export's `dynamic_shapes`: it
    checks that the module may have other sizes there, the graph has those of the example.

    GraphError for a module that cannot be exported, whose shapes depend on data, or that draws random numbers.
    """
    args, kwargs = arguments(example_inputs)
    program = exported(module, args, kwargs, dynamic)
    flow = flow_of(program.graph_module, sources_of(program, args, kwargs))
    lowered = lower(_name(module), flow, recognise(flow))
    return _imported(program, flow, lowered)


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of an example."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if isinstance(example, Sequence) and not isinstance(example, str):
        return tuple(example), {}
    raise GraphError(
        f"example_inputs are a tuple of arguments or a mapping of named ones; got {type(example).__name__}."
    )


def _name(module: Any) -> str:
    return type(module).__name__


def exported(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any = None
) -> torch.export.ExportedProgram:
    """What torch.export makes of a module without gradients. Unsupported if it cannot."""
    if isinstance(module, torch.export.ExportedProgram):
        return module
    if not isinstance(module, torch.nn.Module):
        raise GraphError(f"from_torch takes a torch.nn.Module or an ExportedProgram; got {type(module).__name__}.")
    try:
        with torch.no_grad():
            if dynamic is not None:
                torch.export.export(module, args, kwargs=kwargs, dynamic_shapes=dynamic, strict=False)
            return torch.export.export(module, args, kwargs=kwargs, strict=False)
    except Exception as error:  # torch.export raises anything, also what the module itself raises
        text = " ".join(str(error).split())[:300]
        raise Unsupported(
            f"torch.export cannot export {_name(module)} ({type(error).__name__}: {text}). Call it through "
            "torch.compile(module, backend='taskgraph'), which leaves such parts to torch."
        ) from error


def sources_of(program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Source]:
    """A source for each placeholder: parameters and buffers by their names in the module, then the arguments."""
    found, state = [], {**program.state_dict, **program.constants}
    given = program.example_inputs
    flat, _ = pytree.tree_flatten(given if given is not None else (args, kwargs))
    values = iter(flat)
    for spec in program.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "argument")
        if spec.kind == InputKind.USER_INPUT:
            found.append(Source(name, "input", next(values)))
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            found.append(Source(str(spec.target), "weight", state[str(spec.target)]))
        else:
            raise Unsupported(f"the exported program takes {name!r}, a {spec.kind.name}; no graph can hold that.")
    return found


def _imported(program: torch.export.ExportedProgram, flow: Flow, lowered: Lowered) -> Imported:
    inputs, number = [], 0
    for spec, place in zip(program.graph_signature.input_specs, lowered.sources, strict=True):
        if spec.kind == InputKind.USER_INPUT:
            if place is not None:
                inputs.append((number, place))
            number += 1
    call = program.call_spec
    used = {t.name for t in lowered.graph.tensors}
    outputs = tuple(dict.fromkeys(p.tensor for p in leaves(lowered.outputs) if isinstance(p, Residence)))
    return Imported(
        lowered.graph,
        lowered.tensors,
        outputs,
        lowered.recognised,
        lowered,
        tuple((i, p) for i, p in inputs if p.tensor in used),
        call.in_spec,
        call.out_spec,
    )
