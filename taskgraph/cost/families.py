"""Kernel families: for each its measured columns, its formula, the features of its correction, and its tables.

Everything that differs between families is here, by family number, so that one numba loop serves them all.
"""

import math
from dataclasses import dataclass

import numpy as np

from taskgraph.cost import formulas as f
from taskgraph.cost.surface import Axis, Term, correction
from taskgraph.jit import njit

GEMM, PREFILL, DECODE, MOE, COLLECTIVE, STREAM = range(6)
MOST_FEATURES = 16
_TAILS = 6
"""The first tile shapes of GEMM_TILES get a table of their waves each."""


@dataclass(frozen=True, slots=True)
class Family:
    """`columns` of a table of measurements (besides system and milliseconds); `shape` names of a formula's row;
    `coefficients` (name, start); `features` of the correction and its `terms`; `ridge` the fit's penalty."""

    number: int
    name: str
    columns: tuple[str, ...]
    shape: tuple[str, ...]
    coefficients: tuple[tuple[str, float], ...]
    features: tuple[str, ...] = ()
    terms: tuple[Term, ...] = ()
    ridge: float = 0.3


@njit
def base_seconds(family: int, x: np.ndarray, spec: np.ndarray, c: np.ndarray, sms: float) -> float:
    """The family's formula, launch included."""
    if family == GEMM:
        return f.gemm_seconds(x, spec, c, sms)
    if family == PREFILL:
        return f.prefill_seconds(x, spec, c, sms)
    if family == DECODE:
        return f.decode_seconds(x, spec, c, sms)
    if family == MOE:
        return f.moe_seconds(x, spec, c, sms)
    if family == COLLECTIVE:
        return f.collective_seconds(x, spec, c, sms)
    return f.stream_seconds(x, spec, c, sms, f.drawn_share(sms, spec[f.SMS], spec[f.HBM_REACH], spec[f.HBM_SHARP]))


@njit
def features_of(family: int, x: np.ndarray, spec: np.ndarray, out: np.ndarray) -> None:
    """The features of the family's correction, in the order of Family.features."""
    if family == GEMM:
        for i in range(3):
            out[i] = math.log2(x[i])
        for i in range(_TAILS):
            rounds = math.ceil(x[0] / f._TILES[i, 0]) * math.ceil(x[1] / f._TILES[i, 1]) / spec[f.SMS]
            out[3 + 2 * i] = math.log2(rounds)
            out[4 + 2 * i] = math.log2(math.ceil(rounds) / rounds)
    elif family == PREFILL:
        seen = min(x[6], x[2]) if x[6] > 0.0 else x[2]
        out[0], out[1], out[2] = math.log2(x[1]), math.log2(x[0] * x[3]), math.log2(x[5])
        out[3], out[4], out[5] = math.log2(x[3] / x[4]), math.log2(seen), 1.0 if x[6] > 0.0 else 0.0
        out[6] = math.log2(x[0])
    elif family == DECODE:
        seen = min(x[5], x[1]) if x[5] > 0.0 else x[1]
        out[0], out[1], out[2] = math.log2(x[0] * x[3]), math.log2(seen), math.log2(x[2] / x[3])
        out[3], out[4], out[5] = math.log2(x[4]), 1.0 if x[5] > 0.0 else 0.0, math.log2(x[0])
        out[6] = math.log2(x[1])
    elif family == MOE:
        local = x[4] / x[5]
        out[0], out[1], out[2], out[3] = math.log2(x[0]), math.log2(x[1]), math.log2(x[2]), math.log2(local)
        out[4], out[5], out[6] = math.log2(x[3]), math.log2(x[0] * x[3] / x[4]), x[6]
        out[7] = math.log2(x[5])
    elif family == COLLECTIVE:
        out[0], out[1], out[2] = math.log2(max(x[2], 1.0)), math.log2(x[1]), x[0]


@njit
def seconds_on(
    family: int, x: np.ndarray, spec: np.ndarray, c: np.ndarray, axes: np.ndarray, offsets: np.ndarray,
    values: np.ndarray, sms: np.ndarray, features: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """Fill `out` with the seconds of one shape on each of `sms`, launch included: the formula times the exponential of
    the correction, which depends on the shape alone, so that the time is monotone in SMs as the formula is."""
    scale = 1.0
    if len(offsets) > 0:
        features_of(family, x, spec, features)
        scale = math.exp(correction(features, axes, offsets, values))
    for j in range(len(sms)):
        out[j] = base_seconds(family, x, spec, c, sms[j]) * scale


@njit
def table(
    family: int, rows: np.ndarray, spec: np.ndarray, c: np.ndarray, axes: np.ndarray, offsets: np.ndarray,
    values: np.ndarray, sms: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Seconds (rows, sms) of many shapes of one family, launch included."""
    out = np.empty((len(rows), len(sms)))
    if family == STREAM:
        for j in range(len(sms)):
            share = f.drawn_share(sms[j], spec[f.SMS], spec[f.HBM_REACH], spec[f.HBM_SHARP])
            for i in range(len(rows)):
                out[i, j] = f.stream_seconds(rows[i], spec, c, sms[j], share)
        return out
    features = np.empty(MOST_FEATURES)
    for i in range(len(rows)):
        seconds_on(family, rows[i], spec, c, axes, offsets, values, sms, features, out[i])
    return out


@njit
def bases(family: int, rows: np.ndarray, spec: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The formula alone on all SMs, for the fit."""
    out = np.empty(len(rows))
    for i in range(len(rows)):
        out[i] = base_seconds(family, rows[i], spec, c, spec[f.SMS])
    return out


@njit
def all_features(family: int, rows: np.ndarray, spec: np.ndarray) -> np.ndarray:
    """The features of many shapes."""
    out = np.zeros((len(rows), MOST_FEATURES))
    for i in range(len(rows)):
        features_of(family, rows[i], spec, out[i])
    return out


def _tail(tile: tuple[int, int]) -> Term:
    name = f"{tile[0]}x{tile[1]}"
    return Axis(f"waves_{name}", -3, 1, 8), Axis(f"idle_{name}", 0, 1 / 3, 4), Axis("k", 8, 2.5, 4)


_LOG_M, _LOG_N, _LOG_K = Axis("m", 0, 2, 9), Axis("n", 5, 2, 7), Axis("k", 5, 2, 7)
_TILE_FEATURES = tuple(f"{what}_{m}x{n}" for m, n in f.GEMM_TILES[:_TAILS] for what in ("waves", "idle"))

FAMILIES = (
    Family(
        GEMM, "gemm", ("m", "n", "k"), ("m", "n", "k", "itemsize"), f.GEMM_COEFFICIENTS,
        ("m", "n", "k", *_TILE_FEATURES),
        ((_LOG_M, _LOG_N, _LOG_K), *(_tail(tile) for tile in f.GEMM_TILES[:_TAILS])),
    ),
    Family(
        PREFILL, "prefill_attention",
        ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "window_size"),
        ("batch", "new", "context", "heads", "kv_heads", "head_dim", "window", "itemsize"), f.PREFILL_COEFFICIENTS,
        ("new", "batch_heads", "head_dim", "group", "seen", "windowed", "batch"),
        (
            (Axis("new", 0, 1, 15), Axis("batch_heads", 0, 2, 8), Axis("head_dim", 6, 1, 4)),
            (Axis("new", 0, 2, 8), Axis("group", 0, 1, 7), Axis("batch_heads", 0, 3, 6)),
            (Axis("new", 0, 2, 8), Axis("windowed", 0, 1, 2), Axis("head_dim", 6, 1, 4)),
            (Axis("new", 0, 2, 8), Axis("windowed", 0, 1, 2), Axis("batch_heads", 0, 3, 6)),
            (Axis("new", 0, 2, 8), Axis("batch", 0, 2, 5), Axis("group", 0, 1, 7)),
        ),
    ),
    Family(
        DECODE, "decode_attention",
        ("batch_size", "num_heads", "num_key_value_heads", "head_dim", "step", "window_size"),
        ("batch", "keys", "heads", "kv_heads", "head_dim", "window", "itemsize"), f.DECODE_COEFFICIENTS,
        ("batch_kv", "seen", "group", "head_dim", "windowed", "batch", "keys"),
        (
            (Axis("batch_kv", 0, 2, 8), Axis("seen", 1, 1, 17), Axis("head_dim", 6, 1, 4)),
            (Axis("batch_kv", 0, 2, 8), Axis("seen", 1, 2, 9), Axis("group", 0, 1, 7)),
            (Axis("windowed", 0, 1, 2), Axis("keys", 1, 2, 9), Axis("batch_kv", 0, 3, 6)),
            (Axis("group", 0, 1, 7), Axis("batch", 0, 2, 6), Axis("head_dim", 6, 1, 4)),
        ),
    ),
    Family(
        MOE, "moe",
        ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size",
         "distribution"),
        ("tokens", "hidden", "inter", "top_k", "experts", "expert_ranks", "skew", "itemsize"), f.MOE_COEFFICIENTS,
        ("tokens", "hidden", "inter", "local", "top_k", "rows", "skew", "ranks"),
        (
            (Axis("tokens", 0, 2, 9), Axis("inter", 4, 2, 6), Axis("local", 0, 2, 6)),
            (Axis("rows", -6, 2, 11), Axis("skew", 0, 1.2, 2), Axis("local", 0, 2, 6)),
            (Axis("tokens", 0, 2, 9), Axis("hidden", 11, 1, 3), Axis("top_k", 0, 1, 6)),
            (Axis("tokens", 0, 2, 9), Axis("ranks", 0, 2, 5), Axis("top_k", 0, 1, 6)),
        ),
    ),
    Family(
        COLLECTIVE, "nccl", ("op_name", "num_gpus", "message_bytes_or_elements"), ("kind", "ranks", "bytes"),
        f.COLLECTIVE_COEFFICIENTS, ("bytes", "ranks", "kind"),
        ((Axis("bytes", 9, 2, 11), Axis("ranks", 1, 1, 3), Axis("kind", 0, 1, 4)),
         (Axis("bytes", 9, 1, 21),)),
        ridge=0.1,
    ),
    Family(STREAM, "stream", (), ("flops", "hbm", "h2d", "d2h", "link", "pageable"), f.STREAM_COEFFICIENTS),
)  # fmt: skip
"""Every family, at its number. The names are those of the files of measurements; streams have none."""

BY_NAME = {family.name: family for family in FAMILIES}
