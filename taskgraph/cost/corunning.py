"""What kernels that run at the same time do to each other, beyond sharing out SMs and bandwidth.

Two effects are left once every kernel runs at its own speed on its own SMs, and both were fitted to pairs of kernels
that a GPU ran at once (docs/predict.md tells how, and with what errors):

- *Crowded memory.* Requests of a kernel wait behind those of other partitions well before the memory is full: from a
  part of the published bandwidth on, latency grows with what all together draw. Kernels that share SMs take turns on
  them, and meet nobody there that they did not meet alone.
- *Power.* The device holds an average power. What would draw more runs at lower clocks: everything on it, alike.

A device without such measurements has neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from taskgraph.errors import CalibrationError

LAYOUTS = ("partition", "shared_sum")
"""What a held-out error is of: each kernel's speed in its own partition, the sum of both speeds on shared lanes."""


@dataclass(frozen=True, slots=True)
class CoRunning:
    """The two effects of one device; the defaults are none.

    Drawing together a share r of the published memory bandwidth, kernels of different partitions wait for memory
    1 + hbm_slope x max(0, r - hbm_knee) times as long.

    Power is counted in the device's peak arithmetic: an op draws its FLOP/s, and `flops_a_byte` more for every byte/s
    of memory, over the peak rate. Above `power_budget` on average clocks fall to
    (power_budget / power) ^ power_exponent.

    `held_out` has for each of LAYOUTS (rows, median, p90): errors on pairs that the fit has not seen.
    """

    hbm_knee: float = 1.0
    hbm_slope: float = 0.0
    power_budget: float = 1.0
    power_exponent: float = 0.0
    flops_a_byte: float = 0.0
    held_out: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def _check(self) -> None:
        for name, most in (
            ("hbm_knee", 2.0), ("hbm_slope", 20.0), ("power_budget", 20.0), ("power_exponent", 2.0),
            ("flops_a_byte", 1e4),
        ):  # fmt: skip
            value = getattr(self, name)
            if not 0.0 <= value <= most or (name == "power_budget" and not value):
                raise CalibrationError(f"{name} is {value}; it must be a number from 0 to {most:g}.")
        for layout, errors in self.held_out.items():
            if layout not in LAYOUTS or not {"rows", "median", "p90"} <= errors.keys():
                raise CalibrationError(
                    f"held_out has {layout!r}; it has rows, median and p90 of {' and '.join(LAYOUTS)}."
                )
            if not all(0.0 <= value < np.inf for value in errors.values()):
                raise CalibrationError(f"held_out of {layout!r} has an error that is no number from 0 on.")

    def band(self, layout: str) -> float:
        """The 90th percentile of the held-out error of one of LAYOUTS; where there is none, that of no model at all:
        two kernels that are predicted to run side by side may as well take turns."""
        return float(self.held_out[layout]["p90"]) if layout in self.held_out else 0.5

    def waiting(self, drawn: np.ndarray) -> np.ndarray:
        """How many times as long memory is waited for at this share of its bandwidth."""
        made: np.ndarray = 1.0 + self.hbm_slope * np.maximum(0.0, drawn - self.hbm_knee)
        return made

    def energy(self, flops: np.ndarray, hbm_bytes: np.ndarray, peak_flops_per_s: float) -> np.ndarray:
        """What work costs, in seconds of the device's peak arithmetic."""
        made: np.ndarray = (flops + self.flops_a_byte * hbm_bytes) / peak_flops_per_s
        return made

    def clocks(self, power: np.ndarray) -> np.ndarray:
        """The speed, relative to full clocks, of a device that is asked for so much power for long."""
        over = np.maximum(np.asarray(power, np.float64) / self.power_budget, 1.0)
        made: np.ndarray = np.float_power(over, -self.power_exponent)
        return made

    def settled(self, seconds: float, energy: float, measured_s: float = np.inf) -> float:
        """What a replay of `seconds` takes at the clocks that its power leaves; never less than `seconds`.

        Its power is energy / T over the time T that is looked for, so that T = seconds x (reference / T) ^ exponent,
        with reference the time at which the budget holds. Where ops are timed as measured on the whole device, whatever
        clocks it had then, reference is at most `measured_s`, their sum: to draw no more power than that is no loss.
        """
        reference = min(measured_s, energy / self.power_budget)
        if not seconds < reference or not self.power_exponent:
            return seconds
        return float((seconds * reference**self.power_exponent) ** (1.0 / (1.0 + self.power_exponent)))


NONE = CoRunning()
"""No effect beyond sharing out."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of kernels that ran at once, as arrays (pairs, 2): for each kernel the SMs that it keeps busy alone, its
    share of the published memory bandwidth alone, and the power that it draws alone. `together` (pairs,) are the SMs
    that both share, or 0 where each has a partition of its own. Copies keep no SM busy."""

    busy: np.ndarray
    drawn: np.ndarray
    power: np.ndarray
    together: np.ndarray


def pair_speeds(pairs: Pairs, model: CoRunning) -> np.ndarray:
    """The speed (pairs, 2) of each kernel while the other never stops, relative to alone on the same SMs.

    The same rules as the evaluator's clock, for two kernels and all pairs at once; power is what both draw for ever.
    """
    shared = pairs.together > 0
    room = np.where(shared, pairs.together, np.inf)
    speed = _fair(pairs.busy, np.ones(pairs.busy.shape), room)
    on_sms = pairs.busy > 0
    drawn = pairs.drawn * speed
    slower = model.waiting(drawn) / model.waiting(drawn.sum(axis=1, keepdims=True))
    speed = np.where(on_sms & ~shared[:, None], speed * slower, speed)
    speed = _fair(pairs.drawn, speed, np.ones(len(speed)))
    cooler = model.clocks((pairs.power * speed).sum(axis=1))
    return np.where(on_sms, speed * cooler[:, None], speed)


def _fair(wanted: np.ndarray, speed: np.ndarray, room: np.ndarray) -> np.ndarray:
    """`speed` (pairs, 2), slowed so that both take no more than `room` (pairs,), each half of it if it wants that."""
    asked = wanted * speed
    half = room[:, None] / 2.0
    left = room[:, None] - asked[:, ::-1]
    given = np.minimum(asked, np.maximum(left, half))
    share = np.divide(given, asked, out=np.ones(asked.shape), where=asked > 0)
    return np.where((asked.sum(axis=1) <= room)[:, None], speed, speed * share)
