"""What the formulas of several kernel families share, as numpy over shapes (rows) and SM counts (columns).

Powers, logarithms and exponentials are those of the C library, not numpy's own: numpy chooses other code for them by
the CPU, and a plan must not depend on the machine that makes it.
"""

import math
from collections.abc import Callable

import numpy as np

Numbers = float | np.ndarray
"""A number, or an array of them that broadcasts against the shapes and SM counts of the other arguments."""


def power(base: Numbers, exponent: Numbers) -> np.ndarray:
    """base ** exponent: numpy's float_power is the C library's pow, where its power is not."""
    made: np.ndarray = np.float_power(base, exponent)
    return made


def log2(x: np.ndarray) -> np.ndarray:
    """The base-2 logarithm; minus infinity of 0."""
    return _each(lambda value: math.log2(value) if value > 0.0 else -math.inf, x)


def log1p(x: np.ndarray) -> np.ndarray:
    """log(1 + x)."""
    return _each(math.log1p, x)


def exp(x: np.ndarray) -> np.ndarray:
    """The exponential."""
    return _each(math.exp, x)


def _each(function: Callable[[float], float], x: np.ndarray) -> np.ndarray:
    return np.array([function(value) for value in x.ravel().tolist()], np.float64).reshape(x.shape)


def drawn_share(sms: Numbers, device_sms: float, reach: float, sharp: float) -> np.ndarray:
    """Share of a shared resource's full rate that `sms` SMs can draw: linear in SMs, then saturating; 1 on all SMs.

    `reach` is how many times over all SMs together could saturate it; `sharp` how sharp the knee is. Fitted to the
    R -> P tables of NanoFlow (arXiv 2408.12757, table 3).
    """
    x = reach * np.minimum(np.asarray(sms) / device_sms, 1.0)
    bent = power(1.0 + power(x, sharp), 1.0 / sharp)
    made: np.ndarray = x / bent * power(1.0 + power(reach, sharp), 1.0 / sharp) / reach
    return made


def both(a: Numbers, b: Numbers, sharp: float) -> np.ndarray:
    """Time of two parts that overlap all but perfectly: the p-norm, between their maximum and their sum."""
    high, low = np.maximum(a, b), np.minimum(a, b)
    part = np.divide(low, high, out=np.zeros(high.shape), where=high > 0.0)
    made: np.ndarray = high * power(1.0 + power(part, sharp), 1.0 / sharp)
    return made


def waves(ctas: Numbers, sms: Numbers, wave: float) -> np.ndarray:
    """Rounds of thread blocks over the SMs; `wave` is 1 for hard rounds, 0 for a perfectly even spread."""
    rounds = np.asarray(ctas) / sms
    raw = np.maximum(rounds, 1.0)
    made: np.ndarray = raw + wave * (np.ceil(rounds) - raw)
    return made


def heat_seconds(flops: Numbers, flops_per_s: float, heat: float) -> np.ndarray:
    """What long kernels take longer at the lower clocks of a hot device: a share of their arithmetic at the published
    rate that grows with its logarithm."""
    arithmetic = np.asarray(flops) / flops_per_s
    made: np.ndarray = heat * arithmetic * log1p(arithmetic / 1e-3)
    return made
