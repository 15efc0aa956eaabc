"""The times of kernels as plain functions for numba: seconds of one op alone on some SMs of a device.

A formula takes a row of shape numbers, the device's `spec`, its family's coefficients and an SM count. Rates are the
spec's, times a fitted efficiency, so that a device without measurements can borrow the coefficients of its
architecture. Every formula is monotone in SMs: it takes the least over choices that do not get slower with more SMs.
"""

import math

import numpy as np

from taskgraph.jit import njit

SMS, FLOPS, HBM, LINK, L2, H2D, D2H, HBM_REACH, HBM_SHARP, LINK_REACH, LINK_SHARP = range(11)
"""Places of the `spec` vector: the device's numbers, then its response to fewer SMs (see `drawn_share`)."""

GEMM_TILES = (
    (256, 128), (128, 256), (128, 128), (256, 64), (64, 256), (128, 64),
    (64, 128), (64, 64), (128, 32), (32, 128), (64, 32), (32, 64),
)  # fmt: skip
"""Output tiles of the GEMM kernels that are tried: those of CUTLASS's profiled configurations for sm_80 and sm_90."""

_TILES = np.array(GEMM_TILES, np.float64)
_SPLITS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32], np.float64)


@njit
def drawn_share(sms: float, device_sms: float, reach: float, sharp: float) -> float:
    """Share of a shared resource's full rate that `sms` SMs can draw: linear in SMs, then saturating; 1 on all SMs.

    `reach` is how many times over all SMs together could saturate it; `sharp` how sharp the knee is. Fitted to the
    R -> P tables of NanoFlow (arXiv 2408.12757, table 3).
    """
    x = reach * min(sms / device_sms, 1.0)
    return float(x / (1.0 + x**sharp) ** (1.0 / sharp) * (1.0 + reach**sharp) ** (1.0 / sharp) / reach)


@njit
def both(a: float, b: float, sharp: float) -> float:
    """Time of two parts that overlap all but perfectly: the p-norm, between their maximum and their sum."""
    high, low = max(a, b), min(a, b)
    return float(high * (1.0 + (low / high) ** sharp) ** (1.0 / sharp)) if high > 0.0 else 0.0


@njit
def waves(ctas: float, sms: float, wave: float) -> float:
    """Rounds of thread blocks over the SMs; `wave` is 1 for hard rounds, 0 for a perfectly even spread."""
    raw = max(ctas / sms, 1.0)
    return raw + wave * (math.ceil(ctas / sms) - raw)


# ---------------------------------------------------------------------------------------------- gemm

GEMM_COEFFICIENTS = (
    ("fixed_s", 2.6e-6), ("sm_load_bytes_per_s", 140e9), ("k_step_s", 2e-10), ("epilogue_s", 0.9e-6),
    ("fill_s", 0.2e-6), ("split_s", 2.5e-6), ("reduce_bytes_per_s", 2e12), ("hbm_efficiency", 0.85),
    ("overlap", 3.0), ("wave", 0.5), ("heat", 0.03),
    *((f"tile_{m}x{n}", e) for (m, n), e in zip(
        GEMM_TILES, (0.85, 0.85, 0.85, 0.8, 0.8, 0.75, 0.75, 0.65, 0.6, 0.5, 0.5, 0.5), strict=True)),
)  # fmt: skip


@njit
def gemm_seconds(x: np.ndarray, spec: np.ndarray, c: np.ndarray, sms: float) -> float:
    """x = (m, n, k, bytes an element). Tiles of the output in waves over the SMs, the best of a few tile shapes and
    splits of k (Osama et al. 2023, "Stream-K"; CUTLASS's efficient-GEMM notes), against one pass over memory.

    A tile costs its multiply-adds at `tile_*` of the SM's peak, or the loading of its operands from L2 at
    `sm_load_bytes_per_s`, or `k_step_s` of latency per step of k, whichever is longest, and an epilogue. A split of k
    adds a reduction. `heat`: long kernels run at lower clocks (a share of the arithmetic that grows with its log).
    """
    m, n, k, itemsize = x[0], x[1], x[2], x[3]
    peak = spec[FLOPS] / spec[SMS]
    best = 1e30
    for i in range(len(_TILES)):
        bm, bn = _TILES[i, 0], _TILES[i, 1]
        tiles = math.ceil(m / bm) * math.ceil(n / bn)
        multiply, load = 2.0 * bm * bn / (peak * c[11 + i]), (bm + bn) * itemsize / c[1]
        step = max(multiply, load) * (1.0 + (min(multiply, load) / max(multiply, load)) ** 4) ** 0.25
        step = max(step, c[2])
        for j in range(len(_SPLITS)):
            s = _SPLITS[j]
            if s > 1.0 and (k < 192.0 * s or tiles * s > 1.5 * spec[SMS]):
                break
            depth = math.ceil(k / s / 32.0) * 32.0
            t = waves(tiles * s, sms, c[9]) * (depth * step + c[3] * bm * bn / 16384.0) + c[4]
            if s > 1.0:
                t += c[5] + m * n * 4.0 * (s + 1.0) / c[6]
            best = min(best, t)
    arithmetic = 2.0 * m * n * k / spec[FLOPS]
    best += c[10] * arithmetic * math.log1p(arithmetic / 1e-3)
    drawn = spec[HBM] * c[7] * drawn_share(sms, spec[SMS], spec[HBM_REACH], spec[HBM_SHARP])
    return float(c[0] + both(best, itemsize * (m * k + k * n + m * n) / drawn, c[8]))


# ----------------------------------------------------------------------------------------- attention

PREFILL_COEFFICIENTS = (
    ("fixed_s", 10e-6), ("cta_s", 1e-6), ("mma_efficiency", 0.6), ("pad_keys", 64.0), ("hbm_efficiency", 0.8),
    ("overlap", 3.0), ("wave", 0.3), ("softmax_s", 1e-10), ("heat", 0.03),
)  # fmt: skip


@njit
def causal_pairs(new: float, context: float, window: float) -> float:
    """Query-key pairs of `new` causal queries at the end of `context` keys, each seeing at most `window` (0: all)."""
    seen = new * (context - new) + new * (new + 1.0) / 2.0
    if window <= 0.0 or window >= context:
        return seen
    ramp = max(min(window - (context - new), new), 0.0)  # queries that see fewer keys than the window
    return ramp * (context - new) + ramp * (ramp + 1.0) / 2.0 + (new - ramp) * window


@njit
def prefill_seconds(x: np.ndarray, spec: np.ndarray, c: np.ndarray, sms: float) -> float:
    """x = (batch, new tokens, context, heads, kv heads, head dim, window, bytes an element). FlashAttention (Dao 2023):
    a thread block for every 128 queries of a head walks over the keys that they see, `pad_keys` more for the
    edges of the mask; a key costs two products of depth head dim and a softmax step."""
    batch, new, context, heads, kv, dim, window, itemsize = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    rows = min(128.0, 16.0 * math.ceil(new / 16.0))
    ctas = batch * heads * math.ceil(new / rows)
    keys = causal_pairs(new, context, window) / new + c[3]
    product = 4.0 * rows * dim / (spec[FLOPS] / spec[SMS] * c[2])
    busy = waves(ctas, sms, c[6]) * (c[1] + keys * (product + c[7] * rows))
    arithmetic = 4.0 * ctas * rows * keys * dim / spec[FLOPS]
    busy += c[8] * arithmetic * math.log1p(arithmetic / 1e-3)
    moved = itemsize * batch * dim * (2.0 * new * heads + 2.0 * context * kv)
    drawn = spec[HBM] * c[4] * drawn_share(sms, spec[SMS], spec[HBM_REACH], spec[HBM_SHARP])
    return float(c[0] + both(busy, moved / drawn, c[5]))


DECODE_COEFFICIENTS = (
    ("fixed_s", 9e-6), ("cta_s", 3e-6), ("sm_bytes_per_s", 40e9), ("split_s", 1e-6), ("hbm_efficiency", 0.92),
    ("overlap", 3.0), ("wave", 0.2), ("l2_gain", 2.0), ("l2_share", 0.8), ("group_s", 1e-10),
)  # fmt: skip


@njit
def decode_seconds(x: np.ndarray, spec: np.ndarray, c: np.ndarray, sms: float) -> float:
    """x = (batch, keys, heads, kv heads, head dim, window, bytes an element). One pass over the cached keys and values,
    split over thread blocks when there are fewer sequences than SMs (FlashDecoding, Dao et al. 2023). A cache that
    fits `l2_share` of the L2 and was read just before comes from there, `l2_gain` times as fast."""
    batch, keys, heads, kv, dim, window, itemsize = x[0], x[1], x[2], x[3], x[4], x[5], x[6]
    if window > 0.0:
        keys = min(keys, window)
    ctas = batch * kv
    token = 2.0 * dim * itemsize / c[2] + c[9] * heads / kv
    busy, s = 1e30, 1.0
    while s <= 64.0 and (s == 1.0 or keys >= 64.0 * s):
        t = waves(ctas * s, sms, c[6]) * (c[1] + math.ceil(keys / s) * token)
        busy = min(busy, t + (c[3] * math.log2(s) if s > 1.0 else 0.0))
        s *= 2.0
    moved = itemsize * batch * dim * (2.0 * keys * kv + 2.0 * heads)
    hit = min(max(2.0 - moved / (c[8] * spec[L2] + 1.0), 0.0), 1.0)
    drawn = spec[HBM] * c[4] * drawn_share(sms, spec[SMS], spec[HBM_REACH], spec[HBM_SHARP])
    return float(c[0] + both(busy, moved * (1.0 - hit + hit / c[7]) / drawn, c[5]))


# ----------------------------------------------------------------------------------------------- moe

MOE_COEFFICIENTS = (
    ("fixed_s", 20e-6), ("tile_efficiency", 0.55), ("tile_s", 1e-6), ("hbm_efficiency", 0.85), ("overlap", 3.0),
    ("wave", 0.5), ("token_s", 1e-9), ("moved_activations", 4.0), ("skew_rows", 0.5), ("skew_experts", 0.3),
)  # fmt: skip


@njit
def moe_seconds(x: np.ndarray, spec: np.ndarray, c: np.ndarray, sms: float) -> float:
    """x = (tokens, hidden, inter, top k, experts, expert ranks, skew, bytes an element): route, gather, two grouped
    products (gate and up, down), scatter (MegaBlocks, Gale et al. 2022).

    Of the local experts as many are active as uniform draws reach, fewer under a power law of exponent `skew`; an
    active expert's rows fill tiles of up to 128. The weights of active experts are read once.
    """
    tokens, hidden, inter, top, experts, ranks, skew, itemsize = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
    local = experts / ranks
    rows = max(tokens * top / ranks, 1.0)
    active = local * (1.0 - (1.0 - 1.0 / local) ** rows) if local > 1.0 else 1.0
    active = max(active / (1.0 + c[9] * skew / (1.0 + rows / local)), 1.0)
    each = rows / active
    tile = min(max(2.0 ** math.ceil(math.log2(each)), 16.0), 128.0)
    tall = active * math.ceil(each / tile) + c[8] * skew * active * min(each / 128.0, 1.0)
    peak = spec[FLOPS] / spec[SMS] * c[1]
    busy = waves(tall * math.ceil(2.0 * inter / 128.0), sms, c[5]) * (c[2] + 256.0 * tile * hidden / peak)
    busy += waves(tall * math.ceil(hidden / 128.0), sms, c[5]) * (c[2] + 256.0 * tile * inter / peak)
    drawn = spec[HBM] * c[3] * drawn_share(sms, spec[SMS], spec[HBM_REACH], spec[HBM_SHARP])
    weights = 3.0 * active * hidden * inter * itemsize / drawn
    moved = c[7] * (rows * (hidden + inter) + tokens * hidden) * itemsize / drawn
    return float(c[0] + both(busy, weights, c[4]) + moved + c[6] * tokens * top)


# --------------------------------------------------------------------- collectives, copies, the rest

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "alltoall")

COLLECTIVE_COEFFICIENTS = (("fixed_s", 6e-6), ("hop_s", 1e-6), ("link_efficiency", 0.7), ("overlap", 2.0))


@njit
def collective_seconds(x: np.ndarray, spec: np.ndarray, c: np.ndarray, sms: float) -> float:
    """x = (kind, ranks, bytes of the whole message): latency and bandwidth (Hockney 1994; Thakur et al. 2005).

    A ring moves (ranks - 1) / ranks of the message over each link, an all-reduce twice.
    """
    trips = 2.0 if x[0] == 0.0 else 1.0
    moved = trips * x[2] * (x[1] - 1.0) / x[1]
    rate = spec[LINK] * c[2] * drawn_share(sms, spec[SMS], spec[LINK_REACH], spec[LINK_SHARP])
    if rate <= 0.0:
        return math.inf if moved > 0.0 else c[0]
    return float(c[0] + both(c[1] * trips * (x[1] - 1.0), moved / rate, c[3]))


STREAM_COEFFICIENTS = (
    ("fixed_s", 2.6e-6), ("hbm_efficiency", 0.85), ("overlap", 4.0), ("pcie_efficiency", 0.85), ("pageable", 0.4),
    ("copy_fixed_s", 8e-6),
)  # fmt: skip


@njit
def stream_seconds(x: np.ndarray, spec: np.ndarray, c: np.ndarray, sms: float, share: float) -> float:
    """x = (flops, hbm bytes, h2d bytes, d2h bytes, link bytes, pageable): norms, elementwise, embedding, sampling,
    copies and custom ops: the slowest path binds (roofline, Williams et al. 2009), at a part of the published rate.
    `share` is the `drawn_share` of hbm on these SMs, which graphs of many small ops look up once."""
    t = both(x[0] / (spec[FLOPS] * sms / spec[SMS]), x[1] / (spec[HBM] * c[1] * share), c[2])
    host = c[3] * (c[4] if x[5] > 0.0 else 1.0)
    for nbytes, rate in ((x[2], spec[H2D] * host), (x[3], spec[D2H] * host), (x[4], spec[LINK])):
        if nbytes > 0.0:
            t = max(t, nbytes / rate if rate > 0.0 else math.inf)
    return float(t + (c[5] if x[2] + x[3] > 0.0 else c[0]))
