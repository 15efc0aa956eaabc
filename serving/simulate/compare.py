"""A trace served twice on a simulated clock: in mixed steps alone, and as `Ways` chooses for every load."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from taskgraph.models.config import ModelConfig
from taskgraph.serving.scheduler import Limits
from taskgraph.serving.simulate.runner import simulated_engine
from taskgraph.serving.simulate.stepgrid import StepGrid, StepShape
from taskgraph.serving.simulate.traces import Arrival, Replay, replay
from taskgraph.serving.ways import Choice, Room, Ways


@dataclass(frozen=True, slots=True)
class Compared:
    """What both gave (simulated), how many steps of prompts ran apart, and the choice for the loads that came most."""

    tpot_s: float
    mixed: Replay
    chosen: Replay
    beside: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """A model on a simulated device: `seconds` of its mixed steps, and the pages of its cache."""

    config: ModelConfig
    seconds: Callable[[StepShape], float]
    pages: int
    limits: Limits
    page_size: int = 16

    def replay(self, trace: Sequence[Arrival], ways: Ways | None = None, seed: int = 0) -> tuple[Replay, int]:
        """Serve a trace; the report, and the steps of prompts that ran beside others."""
        with simulated_engine(
            self.config, self.seconds, pages=self.pages, page_size=self.page_size, limits=self.limits, ways=ways
        ) as engine:
            made = replay(engine, trace, "simulated", vocabulary=self.config.vocab_size, seed=seed)
            return made, engine.stats.beside


def compared(served: Served, grid: StepGrid, trace: Sequence[Arrival], tpot_s: float, seed: int = 0) -> Compared:
    """Serve a trace in mixed steps with as many tokens of prefill as `tpot_s` leaves room for, and then with steps
    apart where they are predicted to be better. `grid` is of one rank's share of the model."""
    room = Room(served.limits.sequences, served.pages * served.page_size)
    of = partial(Ways, grid, served.seconds, tpot_s, step_tokens=served.limits.tokens, room=room)
    mixed, _ = served.replay(trace, of(splits=()), seed)
    ways = of()
    chosen, beside = served.replay(trace, ways, seed)
    return Compared(tpot_s, mixed, chosen, beside, ways.choices())
