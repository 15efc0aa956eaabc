"""taskgraph as a backend of torch.compile: one captured plan a shape or bucket, torch itself where better or needed.

    torch.compile(module, backend="taskgraph", options={"scheduler": "auto"})

Graphs for training, and graphs that no plan can hold, are run as torch runs them; a warning says so once and why. Each
plan is compared with eager torch over its first calls, all of which are real ones, and given up where it is slower.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final
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
from taskgraph.errors import PlanError, TaskgraphError
from taskgraph.record import shown

TRIAL_CALLS: Final = 4
"""Calls by each way before a verdict; the fastest of each counts."""
LEAST_GAIN: Final = 0.98
"""A plan is given up where eager torch takes less than this share of its time."""
MOST_TURNS: Final = 4
"""A graph is captured for so many times `most_plans` shapes, then no more: sizes that come round in turns would have
each other's plans made anew forever."""
_WAYS: Final = ("measured", "plan", "eager")


@dataclass(frozen=True, slots=True)
class Options:
    """What `torch.compile(options=...)` may say.

    `scheduler` as for `tg.plan`. `verdict`: "measured" compares each plan with eager torch over its first calls and
    keeps the faster, "plan" keeps the plan, "eager" runs torch alone. At most `most_plans` shapes have a plan at a
    time. `quiet`: no warning about what runs as torch runs it.
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
    reason = refusal(example_inputs)
    if reason:
        warn(reason, made.quiet)
        made = replace(made, verdict="eager")
    compiled = Compiled(gm, example_inputs, made, reason or "as asked")
    ALL.add(compiled)
    return compiled.call


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
    waits: bool = False
    """Whether it has no plan for want of room, and may have one when it comes again."""


class Compiled:
    """A graph of Dynamo's: what torch.compile calls in its place."""

    def __init__(self, gm: fx.GraphModule, examples: Sequence[Any], options: Options, reason: str) -> None:
        getattr(gm, "real_recompile", list)()  # torch writes the code late; `forward` would look at each call for it
        self.eager: Callable[..., Any] = gm.forward
        self._gm, self._options, self.reason = gm, options, reason
        self._static = [_is_static(node, ex) for node, ex in zip(_placeholders(gm), examples, strict=True)]
        self._names = [str(node.target) for node in _placeholders(gm)]
        self.addresses = frozenset(
            ex.data_ptr() for ex, static in zip(examples, self._static, strict=True) if static and _is_real(ex)
        )
        """Where the weights are that it uses."""
        self.owner = owner_now()
        """Whose graph it is, if that is known: of one without weights."""
        self._weights = [ref(ex) for ex, static in zip(examples, self._static, strict=True) if static and _is_real(ex)]
        self.symbols = Symbols(gm, examples)
        self.unpadded: dict[str, str] = {s.name: self._fixed(s) for s in self.symbols.all if self._fixed(s)}
        """Of sizes that are not padded to buckets, why not."""
        self.variants: dict[Any, Variant] = {}
        """By sizes, the least recently used first."""
        self.captures = 0
        """How many shapes were captured, those whose plans are gone too."""
        self._lock = threading.Lock()
        self._only: Variant | None = None
        self.call: Callable[..., Any] = self.eager if options.verdict == "eager" else self._call

    @property
    def orphaned(self) -> bool:
        """Whether none of its weights lives: what now lies at their addresses is another module's."""
        return bool(self._weights) and all(weight() is None for weight in self._weights)

    def _call(self, *args: Any) -> Any:
        """A call, by one thread at a time: a plan has one set of buffers, and trials of two threads would measure each
        other. What torch runs itself is outside of the lock."""
        only = self._only
        if only is not None and only.captured is None:
            only.calls += 1
            return self.eager(*args)
        with self._lock:
            variant = only if only is not None else self._variant(args)
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

    # -- variants --------------------------------------------------------------------------------

    def _variant(self, args: tuple[Any, ...]) -> Variant:
        if not self.symbols.changing:
            self._only = self.variants[()] = self._new((), args)
            return self._only
        return self._kept(self._key(args), args)

    def _kept(self, key: Any, args: tuple[Any, ...]) -> Variant:
        """The variant of a key, made if there is none; it is now the last that was used."""
        variant = self.variants.pop(key, None)
        if variant is None:
            variant = self._new(key, args)
            key = self._key(args)  # which a proof that failed has changed
            variant = self.variants.pop(key, variant)
        elif variant.waits and variant.captured is None:
            variant = self._again(variant, key, args)
        self.variants[key] = variant
        return variant

    def _key(self, args: Sequence[Any]) -> Any:
        """What calls share a plan by: sizes, those that are padded as buckets."""
        sizes = self.symbols.of(args)
        padded = [
            size if s.name in self.unpadded else bucket_of(size)
            for s, size in zip(self.symbols.all, sizes, strict=False)
        ]
        return (*padded, *sizes[len(padded) :])

    def _new(self, key: Any, args: tuple[Any, ...]) -> Variant:
        """A shape's first call: it gets a plan while there is room. Where there is none it waits for its next call, as
        a shape that comes once is not worth one."""
        plans = [v for v in self.variants.values() if v.captured is not None]
        if len(plans) >= self._options.most_plans:
            return self._full()
        return self._made(key, args)

    def _full(self) -> Variant:
        reason = (
            f"it was called with more than {self._options.most_plans} shapes (option 'most_plans'); a shape that comes "
            "again takes the place of the one that was used longest ago"
        )
        if self.captures >= MOST_TURNS * self._options.most_plans:
            reason = f"its shapes changed too often: {self.captures} were captured"
        warn(reason, self._options.quiet)
        return Variant(None, reason, decided=True, waits=True)

    def _again(self, variant: Variant, key: Any, args: tuple[Any, ...]) -> Variant:
        """A plan for a shape that waits, in the place of that which was used longest ago."""
        if self.captures >= MOST_TURNS * self._options.most_plans:
            return variant
        plans = [v for v in self.variants.values() if v.captured is not None]
        if len(plans) >= self._options.most_plans:
            self._give_up(plans[0], "its plan made room for that of another shape")
            plans[0].waits = True
        made = self._made(key, args)
        made.calls = variant.calls
        return made

    def _made(self, key: Any, args: tuple[Any, ...]) -> Variant:
        self.captures += 1
        try:
            captured = self._captured(args)
        except Exception as error:  # whatever a graph of somebody's meets here, the graph itself still runs
            known = isinstance(error, TaskgraphError)
            reason = str(error) if known else f"it cannot be imported ({type(error).__name__}: {shown(str(error))})"
            warn(reason.rstrip("."), self._options.quiet)
            return Variant(None, reason, decided=True)
        return Variant(captured, decided=self._options.verdict == "plan")

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

    # -- the verdict -----------------------------------------------------------------------------

    def _trial(self, variant: Variant, captured: Captured, args: tuple[Any, ...]) -> Any:
        """A call by one of the ways, timed: the plan, then one core alone, then eager torch."""
        if len(variant.ours_s) == TRIAL_CALLS and variant.rival is None and captured.cores > 1:
            variant.rival, variant.rival_s, variant.ours_s = captured, variant.ours_s, []
            captured = variant.captured = captured.alone(args)
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
