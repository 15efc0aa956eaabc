"""Shapes of one function of torch's: a plan each while there is room, compared with eager torch over its first calls.

All of those calls are real ones. Of a shape whose plan is slower, or that has none, eager torch runs every call.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from taskgraph.embed.border import warn
from taskgraph.embed.capture import Captured
from taskgraph.errors import PlanError, TaskgraphError
from taskgraph.record import shown

TRIAL_CALLS: Final = 4
"""Calls by each way before a verdict, at least; the fastest of each counts."""
MOST_TRIAL_CALLS: Final = 24
"""Calls by each way at most: the first ones of a short call find caches and branches cold."""
TRIAL_S: Final = 5e-3
"""Seconds of calls by a way that are enough for a verdict, each counted as the fastest, if there were `TRIAL_CALLS`."""
LEAST_GAIN: Final = 1.05
"""A plan is given up unless it is so many times as fast as eager torch."""
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


class Shapes:
    """What is called in place of a function of torch's: a variant a shape of its arguments.

    A call's arguments are whatever a subclass makes of them; it says by which key calls share a plan, how a plan is
    captured, and how eager torch runs the call.
    """

    BESIDES_S = 10e-6
    """Seconds that are added to a plan's: short calls of either way differ by that with what ran before them."""

    def __init__(self, options: Options, reason: str = "") -> None:
        self._options, self.reason = options, reason
        self.addresses: frozenset[int] = frozenset()
        """Where the weights are that it uses."""
        self.owner: Any = None
        """Whose function it is, if that is known: of one without weights."""
        self.unpadded: dict[str, str] = {}
        """Of sizes that are not padded to buckets, why not."""
        self.variants: dict[Any, Variant] = {}
        """By key, the least recently used first."""
        self.captures = 0
        """How many shapes were captured, those whose plans are gone too."""
        self._lock = threading.Lock()

    @property
    def orphaned(self) -> bool:
        """Whether none of its weights lives: what now lies at their addresses is another module's."""
        return False

    def _key(self, args: Any) -> Any:
        """What calls share a plan by."""
        raise NotImplementedError

    def sizes(self, key: Any) -> Any:
        """What a report says of a key."""
        return key

    def _captured(self, args: Any) -> Captured:
        """A plan for calls like this one. TaskgraphError where there can be none."""
        raise NotImplementedError

    def _eagerly(self, args: Any) -> Any:
        """The call by eager torch."""
        raise NotImplementedError

    def _variant(self, args: Any) -> Variant:
        return self._kept(self._key(args), args)

    def _run(self, args: Any, only: Variant | None = None) -> Any:
        """A call, by one thread at a time: a plan has one set of buffers, and trials of two threads would measure each
        other. What torch runs itself is outside of the lock. `only` is its variant, if that is known."""
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
        return self._eagerly(args)

    # -- variants --------------------------------------------------------------------------------

    def _kept(self, key: Any, args: Any) -> Variant:
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

    def _new(self, key: Any, args: Any) -> Variant:
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

    def _again(self, variant: Variant, key: Any, args: Any) -> Variant:
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

    def _made(self, key: Any, args: Any) -> Variant:
        self.captures += 1
        try:
            captured = self._captured(args)
        except Exception as error:  # whatever a graph of somebody's meets here, the graph itself still runs
            known = isinstance(error, TaskgraphError)
            reason = str(error) if known else f"it cannot be imported ({type(error).__name__}: {shown(str(error))})"
            warn(reason.rstrip("."), self._options.quiet)
            return Variant(None, reason, decided=True)
        return Variant(captured, decided=self._options.verdict == "plan")

    # -- the verdict -----------------------------------------------------------------------------

    def _trial(self, variant: Variant, captured: Captured, args: Any) -> Any:
        """A call by one of the ways, timed: the plan on all cores, then that on one core and eager torch by turns, so
        that what else the machine does meets both."""
        if _enough(variant.ours_s) and variant.rival is None and captured.cores > 1:
            variant.rival, variant.rival_s, variant.ours_s = captured, variant.ours_s, []
            captured = variant.captured = captured.alone(args)
        mine, theirs = variant.ours_s, variant.eager_s
        ours = not _enough(mine) and (captured.cores > 1 or _enough(theirs) or len(mine) <= len(theirs))
        begin = time.perf_counter()
        made = captured.run(args) if ours else self._eagerly(args)
        took = time.perf_counter() - begin
        variant.calls += 1
        if ours and made is None:
            self._give_up(variant, captured.why)
            return self._eagerly(args)
        (variant.ours_s if ours else variant.eager_s).append(took)
        if _enough(variant.ours_s) and _enough(variant.eager_s):
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
        mine, theirs = min(variant.ours_s) + self.BESIDES_S, min(variant.eager_s)
        variant.decided = True
        if theirs < LEAST_GAIN * mine:
            self._give_up(variant, f"its plan took {1e6 * mine:.0f} us and eager torch {1e6 * theirs:.0f} us")

    def _give_up(self, variant: Variant, reason: str) -> None:
        for one in (variant.captured, variant.rival):
            if one is not None:
                one.close()
        variant.captured, variant.rival, variant.reason, variant.decided = None, None, reason, True


def _enough(took: Sequence[float]) -> bool:
    """Whether calls that took so many seconds say how long one takes."""
    return len(took) >= MOST_TRIAL_CALLS or (len(took) >= TRIAL_CALLS and len(took) * min(took) >= TRIAL_S)
