"""How a model stretches its rotary frequencies, from a config.json or from a GGUF's keys."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from taskgraph.errors import ConfigError, WeightsError
from taskgraph.models.documents import known_formats, words
from taskgraph.models.keys import ConfigKeys
from taskgraph.record import shown


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's stretch of low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN's stretch (Peng et al. 2023): frequency number i is divided by `factor` from `high` on, not up to `low`, and
    in part between; `attention` multiplies cosines and sines, and `score_scale` the scores of latent attention.

    A linear stretch (Chen et al. 2023) is the one that divides every frequency: `low` is -1 and `high` 0."""

    factor: float
    low: float
    high: float
    attention: float
    score_scale: float


Stretch = RopeScaling | Yarn | None


def linear(factor: float, attention: float = 1.0) -> Yarn | None:
    """Every frequency divided by `factor`; None where that changes nothing."""
    return None if factor == 1.0 and attention == 1.0 else Yarn(factor, -1.0, 0.0, attention, 1.0)


def magnitude(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by (section 3.4, with DeepSeek's weight `mscale`)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def ramp(theta: float, dim: int, context: float, fast: float, slow: float, whole: bool = True) -> tuple[float, float]:
    """YaRN's (low, high): the numbers of the frequencies that make `fast` and `slow` rotations over the original
    context, rounded outwards with `whole`."""

    def making(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = making(fast), making(slow)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high if high > low else low + 0.001


# ----------------------------------------------------------------------------------------- config.json


def rope_body(keys: ConfigKeys) -> ConfigKeys:
    """The rotary settings, under their name since transformers 5 or the one before."""
    old, new = keys.part("rope_scaling"), keys.part("rope_parameters")
    rope, known = old if old.keys else new, words(known_formats()["hf"]["rotary"])
    for key, value in rope.keys.items():
        rope.need(key in known or value is None, key, "this version does not know that key of a rotary scaling")
    rope.need(
        rope.number("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor", "all of a head is rotated here"
    )
    return rope


def stretch_of(keys: ConfigKeys, theta: float, dim: int) -> Stretch:
    """The stretch that a config.json asks for; ConfigError names a kind that is not known."""
    rope = rope_body(keys)
    kind = rope.keys.get("rope_type") or rope.keys.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return linear(rope.number("factor"))
    if kind == "yarn":
        return _yarn(rope, theta, dim)
    if kind == "llama3":
        return _llama3(rope)
    raise ConfigError(
        f"{keys.name}: rope scaling {shown(kind)} is not supported; this version knows linear, llama3 and yarn."
    )


def _llama3(rope: ConfigKeys) -> RopeScaling:
    made = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.count("original_max_position_embeddings"),
    )
    good = made.high_freq_factor > made.low_freq_factor
    rope.need(good, "high_freq_factor", f"it must exceed low_freq_factor, {made.low_freq_factor}")
    return made


def _yarn(rope: ConfigKeys, theta: float, dim: int) -> Yarn:
    """The ramp over frequencies and the two factors (Peng et al. 2023, sections 3.2 and 3.4; DeepSeek's `mscale`)."""
    factor, context = rope.number("factor"), rope.number("original_max_position_embeddings")
    rope.need(theta != 1.0, "rope_theta", "YaRN needs frequencies that differ")
    whole_numbers = rope.flag("truncate", True)
    low, high = ramp(theta, dim, context, rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0), whole_numbers)
    part, whole = (rope.number(k) if rope.keys.get(k) else 0.0 for k in ("mscale", "mscale_all_dim"))
    inferred = magnitude(factor, part) / magnitude(factor, whole) if part and whole else magnitude(factor)
    attention = rope.number("attention_factor", inferred)
    return Yarn(factor, low, high, attention, magnitude(factor, whole) ** 2 if whole else 1.0)


# ------------------------------------------------------------------------------------------------ GGUF


def gguf_stretch(keys: ConfigKeys, theta: float, dim: int, divisors: npt.NDArray[np.float32] | None) -> Stretch:
    """The stretch of a GGUF model by the rules of llama.cpp (llama-model.cpp, llama-context.cpp, ggml's rope).

    A factor without a type is linear; "none" ignores the factor; YaRN's magnitude is 0.1 ln(factor) + 1, over the same
    with `yarn_log_multiplier` where that is given, times `attn_factor`; `divisors` are the tensor rope_freqs.
    """
    kind = keys.keys.get("rope.scaling.type", "linear")
    factor_key = "rope.scaling.factor" if "rope.scaling.factor" in keys.keys else "rope.scale_linear"
    factor = keys.number(factor_key) if keys.keys.get(factor_key) else 1.0
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn"):
        raise keys.wrong("rope.scaling.type", "this scaling is not supported; none, linear and yarn are")
    for key in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
        keys.need(kind != "yarn" or keys.keys.get(key, 1.0) in (1.0, -1.0), key, "only 1 is supported")
    factor = 1.0 if kind == "none" else factor
    if kind == "yarn" and factor != 1.0:
        found: Stretch = _gguf_yarn(keys, factor, attention, theta, dim)
    else:
        found = linear(factor, attention)
    if divisors is None:
        return found
    own = rope_scaling_of(divisors, theta, keys.name)
    if own is not None and found is not None:
        raise WeightsError(f"{keys.name}: it has rope_freqs and {factor_key}, and only one of them can be honoured.")
    return own or found


def _gguf_yarn(keys: ConfigKeys, factor: float, attention: float, theta: float, dim: int) -> Yarn:
    context = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
    fast, slow = keys.number("rope.scaling.yarn_beta_fast", 32.0), keys.number("rope.scaling.yarn_beta_slow", 1.0)
    keys.need(theta != 1.0, "rope.freq_base", "YaRN needs frequencies that differ")
    low, high = ramp(theta, dim, context, fast, slow)
    log = keys.keys.get("rope.scaling.yarn_log_multiplier")
    whole = magnitude(factor, keys.number("rope.scaling.yarn_log_multiplier")) if log else 1.0
    return Yarn(factor, low, high, attention * magnitude(factor) / whole, 1.0)


def rope_scaling_of(divisors: npt.NDArray[np.float32], theta: float, name: str) -> RopeScaling | None:
    """The Llama 3 scaling behind a GGUF's rope_freqs, which divide the rotary frequencies one by one.

    Between its two bounds the scaling is 1/divisor = (1 - s)/factor + s with s linear in a frequency's rotations
    over the original context (Llama 3.1's reference code), so a line through s gives the bounds. Only their ratios
    count; the lower one is 1, as in the published models. WeightsError when no such line gives the divisors back.
    """
    given = divisors.astype(np.float64).reshape(-1)
    if np.allclose(given, 1.0):
        return None
    made = _fitted(given, theta) if np.isfinite(given).all() and (given > 0).all() and theta > 1.0 else None
    if made is None:
        raise WeightsError(
            f"{name}: its rope_freqs are not Llama 3's scaling of rotary frequencies, the one this version knows; "
            "use the safetensors checkpoint."
        )
    return made


def _fitted(given: npt.NDArray[np.float64], theta: float) -> RopeScaling | None:
    factor = float(given.max())
    if factor <= 1.0:
        return None
    frequency = theta ** (-np.arange(len(given)) / len(given)) / (2 * np.pi)
    share = (1 / given - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-4) & (share < 1 - 1e-4)
    if between.sum() < 2:
        return None
    slope, zero = np.polyfit(frequency[between], share[between], 1)
    if not (np.isfinite(slope) and np.isfinite(zero)) or zero >= 0 or slope <= 0:
        return None
    low, high = 1.0, 1.0 - 1.0 / float(zero)
    context = round(float(slope) * (high - low))
    found = ((frequency * context - low) / (high - low)).clip(0, 1)
    if context < 1 or not np.allclose(1 / ((1 - found) / factor + found), given, rtol=1e-3):
        return None
    return RopeScaling(round(factor, 4), low, round(high, 4), context)


def neutral(value: Any, *harmless: Any) -> bool:
    """Whether a setting is absent or one of the values that change nothing, with their type."""
    return value is None or any(type(value) is type(h) and value == h for h in harmless)


def number_is(value: Any, wanted: float) -> bool:
    """Whether a setting is absent or a number close to `wanted`."""
    if value is None:
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isclose(value, wanted, rel_tol=1e-4)
