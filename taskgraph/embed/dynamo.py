"""taskgraph as a backend of torch.compile: one captured plan a shape, torch itself where that is better or needed.

    torch.compile(module, backend="taskgraph", options={"scheduler": "auto"})

Graphs for training, and graphs that no plan can hold, are run as torch runs them; a warning says so once and why. Each
plan is compared with eager torch over its first calls, all of which are real ones, and given up where it is slower.
"""

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final
from weakref import WeakSet, ref

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from taskgraph.embed.capture import Captured
from taskgraph.embed.flow import Source, Unsupported, faked, flow_of
from taskgraph.embed.lower import lower
from taskgraph.embed.patterns import recognise
from taskgraph.errors import PlanError, TaskgraphError
from taskgraph.record import shown

TRIAL_CALLS: Final = 4
"""Calls by each way before a verdict; the fastest of each counts."""
LEAST_GAIN: Final = 0.98
"""A plan is given up where eager torch takes less than this share of its time."""
_WAYS: Final = ("measured", "plan", "eager")


class FallbackWarning(UserWarning):
    """A part of a module runs as torch runs it; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `torch.compile(options=...)` may say.

    `scheduler` as for `tg.plan`. `verdict`: "measured" compares each plan with eager torch over its first calls and
    keeps the faster, "plan" keeps the plan, "eager" runs torch alone. `most_plans` shapes are planned, others run as
    torch runs them. `quiet`: no warning about what runs as torch runs it.
    """

    scheduler: str = "sequential"
    verdict: str = "measured"
    most_plans: int = 32
    quiet: bool = False

    @staticmethod
    def of(given: Mapping[str, Any] | None) -> "Options":
        """The options of torch.compile; PlanError for one that does not exist or cannot be."""
        known = {f.name: f.type for f in fields(Options)}
        for name, value in (given or {}).items():
            if name not in known:
                raise PlanError(f"the backend taskgraph has no option {shown(name)}; it has {', '.join(known)}.")
            if type(value) is not type(getattr(Options(), name)):
                raise PlanError(f"the option {name!r} is {shown(value)}; it must be like {getattr(Options(), name)!r}.")
        made = Options(**dict(given or {}))
        if made.verdict not in _WAYS:
            raise PlanError(f"the option 'verdict' is {shown(made.verdict)}; it is one of {', '.join(_WAYS)}.")
        return made


ALL: "WeakSet[Compiled]" = WeakSet()
"""What is alive of what the backend made."""


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: Any = None) -> Any:
    """What Dynamo calls with each graph. PlanError for options that do not exist."""
    if mode is not None:
        raise PlanError(f"the backend taskgraph has no mode {shown(mode)}; leave it out.")
    made = Options.of(options)
    reason = _refusal(example_inputs)
    if reason:
        _warn(reason, made)
        made = Options(made.scheduler, "eager", made.most_plans, made.quiet)
    compiled = Compiled(gm, example_inputs, made, reason or "as asked")
    ALL.add(compiled)
    return compiled.call


def _refusal(given: Sequence[Any]) -> str:
    """Why the graph is left to torch as a whole; empty if it is not."""
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return (
            "the graph is for training: gradients are enabled and some of its tensors require them. Call the module "
            "under torch.no_grad() or torch.inference_mode() for inference"
        )
    devices = {t.device.type for t in tensors}
    if devices - {"cpu"}:
        return f"the graph's tensors are on {', '.join(sorted(devices))}, and plans of torch graphs run on the CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on; convert the module to the type that you want instead"
    return ""


def _warn(reason: str, options: Options) -> None:
    if not options.quiet:
        warnings.warn(f"taskgraph runs a graph as torch runs it: {reason}.", FallbackWarning, stacklevel=2)


@dataclass(slots=True)
class Variant:
    """One shape of a graph: its captured plan, if any, how its calls went, and what was decided."""

    captured: Captured | None
    reason: str = ""
    calls: int = 0
    ours_s: list[float] = field(default_factory=list)
    """Seconds of the trial calls by `captured`."""
    eager_s: list[float] = field(default_factory=list)
    decided: bool = False
    rival: Captured | None = None
    """The plan that `captured` was better than, or is to be compared with: on all cores, where that is on one."""
    rival_s: list[float] = field(default_factory=list)


class Compiled:
    """A graph of Dynamo's: what torch.compile calls in its place."""

    def __init__(self, gm: fx.GraphModule, examples: Sequence[Any], options: Options, reason: str) -> None:
        self.eager: Callable[..., Any] = gm.forward
        self._gm, self._options, self.reason = gm, options, reason
        self._static = [_is_static(node, ex) for node, ex in zip(_placeholders(gm), examples, strict=True)]
        self._names = [str(node.target) for node in _placeholders(gm)]
        self.addresses = frozenset(
            ex.data_ptr() for ex, static in zip(examples, self._static, strict=True) if static and _is_real(ex)
        )
        """Where the weights are that it uses."""
        self._weights = [ref(ex) for ex, static in zip(examples, self._static, strict=True) if static and _is_real(ex)]
        self._symbolic = any(isinstance(ex, torch.SymInt) or _symbols(ex) for ex in examples)
        self.variants: dict[Any, Variant] = {}
        self._lock = threading.Lock()
        self._only: Variant | None = None
        self.call: Callable[..., Any] = self.eager if options.verdict == "eager" else self._call

    @property
    def orphaned(self) -> bool:
        """Whether none of its weights lives: what now lies at their addresses is another module's."""
        return bool(self._weights) and all(weight() is None for weight in self._weights)

    def _call(self, *args: Any) -> Any:
        with self._lock:
            variant = self._only if self._only is not None else self._variant(args)
            captured = variant.captured
            if variant.decided and captured is not None:
                variant.calls += 1
                made = captured.run(args)
                if made is not None:
                    return made
                self._give_up(variant, captured.why)
            elif captured is not None:
                return self._trial(variant, captured, args)
            variant.calls += 1
        return self.eager(*args)

    def _variant(self, args: tuple[Any, ...]) -> Variant:
        key = tuple(tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args) if self._symbolic else ()
        variant = self.variants.get(key)
        if variant is None:
            variant = self.variants[key] = self._new(args)
        if not self._symbolic:
            self._only = variant
        return variant

    def _new(self, args: tuple[Any, ...]) -> Variant:
        if len(self.variants) >= self._options.most_plans:
            reason = f"it was called with more than {self._options.most_plans} shapes (option 'most_plans')"
            _warn(reason, self._options)
            return Variant(None, reason, decided=True)
        try:
            captured = self._captured(args)
        except Exception as error:  # whatever a graph of somebody's meets here, the graph itself still runs
            known = isinstance(error, TaskgraphError)
            reason = str(error) if known else f"it cannot be imported ({type(error).__name__}: {shown(str(error))})"
            _warn(reason.rstrip("."), self._options)
            return Variant(None, reason, decided=True)
        return Variant(captured, decided=self._options.verdict == "plan")

    def _captured(self, args: tuple[Any, ...]) -> Captured:
        sources = [
            Source(name, "weight" if static and isinstance(a, torch.Tensor) else "input", a)
            for name, static, a in zip(self._names, self._static, args, strict=True)
        ]
        flow = flow_of(_to_aten(self._gm, args), sources)
        lowered = lower("torch_compile", flow, recognise(flow))
        return Captured(lowered, args, self._options.scheduler)

    # -- the verdict -----------------------------------------------------------------------------

    def _trial(self, variant: Variant, captured: Captured, args: tuple[Any, ...]) -> Any:
        """A call by one of the ways, timed: the plan, then one core alone, then eager torch."""
        if len(variant.ours_s) == TRIAL_CALLS and variant.rival is None and captured.cores > 1:
            variant.rival, variant.rival_s, variant.ours_s = captured, variant.ours_s, []
            captured = variant.captured = Captured(captured.lowered, args, self._options.scheduler, alone=True)
        ours = len(variant.ours_s) < TRIAL_CALLS
        begin = time.perf_counter()
        made = captured.run(args) if ours else self.eager(*args)
        took = time.perf_counter() - begin
        variant.calls += 1
        if ours and made is None:
            self._give_up(variant, captured.why)
            return self.eager(*args)
        (variant.ours_s if ours else variant.eager_s).append(took)
        if len(variant.eager_s) >= TRIAL_CALLS:
            self._decide(variant)
        return made

    def _decide(self, variant: Variant) -> None:
        """Keep the fastest way; the plan on all cores where it is as fast as that on one."""
        rival = variant.rival
        if rival is not None and variant.captured is not None:
            if min(variant.rival_s) <= min(variant.ours_s):
                variant.captured, rival, variant.ours_s = rival, variant.captured, variant.rival_s
            rival.close()
            variant.rival = None
        mine, theirs = min(variant.ours_s), min(variant.eager_s)
        variant.decided = True
        if theirs < LEAST_GAIN * mine:
            self._give_up(variant, f"its plan took {1e6 * mine:.0f} us and eager torch {1e6 * theirs:.0f} us")

    def _give_up(self, variant: Variant, reason: str) -> None:
        for one in (variant.captured, variant.rival):
            if one is not None:
                one.close()
        variant.captured, variant.rival, variant.reason, variant.decided = None, None, reason, True


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


def _symbols(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in value.shape)


def _to_aten(gm: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
    """The graph at these shapes as calls of operators, composite ones whole."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [faked(mode, a) if isinstance(a, torch.Tensor) else a for a in args]
    try:
        with torch.no_grad(), mode:
            return make_fx(gm, pre_dispatch=True, tracing_mode="real")(*fakes)
    except TaskgraphError:
        raise
    except Exception as error:  # whatever the module's own code and torch's tracing raise
        text = " ".join(str(error).split())[:200]
        raise Unsupported(f"torch cannot trace the graph ({type(error).__name__}: {text})") from error
