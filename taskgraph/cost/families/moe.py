"""Mixtures of experts: route, gather, two grouped products, scatter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from taskgraph.cost.family import (
    BF16_BYTES,
    Coefficients,
    Column,
    Family,
    Features,
    Kernel,
    Spec,
    Tensors,
    coefficient,
)
from taskgraph.cost.formulas import Numbers, both, log2, power, waves
from taskgraph.cost.surface import Axis
from taskgraph.graph.op import ITEMSIZE, Op


class MoeShape(NamedTuple):
    """Experts of three matrices (gate and up, down) on one of `expert_ranks` devices that share them."""

    tokens: Numbers
    hidden: Numbers
    inter: Numbers
    """Features of an expert."""
    top_k: Numbers
    """Experts of a token."""
    experts: Numbers
    """Of all ranks together."""
    expert_ranks: Numbers
    skew: Numbers
    """Exponent of the power law by which tokens choose experts; 0 for evenly."""
    itemsize: Numbers
    """Bytes an element of the weights."""


@dataclass(frozen=True, slots=True)
class MoeCoefficients(Coefficients):
    """All start at the order of magnitude of an A100's and are fitted to each device's table."""

    fixed_s: float = coefficient(20e-6)
    """Seconds of the empty kernels, the router's among them."""
    tile_efficiency: float = coefficient(0.55, 0.2, 1.0)
    """Share of an SM's peak that a tile's multiply-adds reach."""
    tile_s: float = coefficient(1e-6)
    """Seconds of a tile besides its multiply-adds."""
    hbm_efficiency: float = coefficient(0.85, 0.3, 1.0)
    """Share of the published memory bandwidth that is reached."""
    overlap: float = coefficient(3.0, 1.0, 8.0)
    """How well arithmetic and the weights' traffic overlap: `sharp` of `both`."""
    wave: float = coefficient(0.5, 0.01, 1.0)
    """How hard the rounds of thread blocks are: see `waves`."""
    token_s: float = coefficient(1e-9)
    """Seconds of routing for a token and each of its experts."""
    moved_activations: float = coefficient(4.0)
    """How often the activations cross memory."""
    skew_rows: float = coefficient(0.5)
    """How much taller the tallest expert is under a skew of 1."""
    skew_experts: float = coefficient(0.3)
    """How many fewer experts are active under a skew of 1."""


def moe_seconds(shape: MoeShape, spec: Spec, c: MoeCoefficients, sms: np.ndarray) -> np.ndarray:
    """MegaBlocks (Gale et al. 2022). Of the local experts as many are active as uniform draws reach, fewer under a
    skew; an active expert's rows fill tiles of up to 128. The weights of active experts are read once."""
    tokens, hidden, inter, top_k, experts, ranks, skew, itemsize = map(np.asarray, shape)
    local = experts / ranks
    rows = np.maximum(tokens * top_k / ranks, 1.0)
    drawn_experts = local * (1.0 - power(1.0 - 1.0 / np.maximum(local, 1.0), rows))
    active = np.where(local > 1.0, drawn_experts, 1.0)
    active = np.maximum(active / (1.0 + c.skew_experts * skew / (1.0 + rows / local)), 1.0)
    each = rows / active
    tile = np.clip(np.ldexp(1.0, np.ceil(log2(each)).astype(np.int64)), 16.0, 128.0)
    tall = active * np.ceil(each / tile) + c.skew_rows * skew * active * np.minimum(each / 128.0, 1.0)
    peak = spec.sm_flops_per_s * c.tile_efficiency
    up, down = tall * np.ceil(2.0 * inter / 128.0), tall * np.ceil(hidden / 128.0)
    busy = waves(up, sms, c.wave) * (c.tile_s + 256.0 * tile * hidden / peak)
    busy = busy + waves(down, sms, c.wave) * (c.tile_s + 256.0 * tile * inter / peak)
    drawn = spec.hbm_bytes_per_s * c.hbm_efficiency * spec.hbm_share(sms)
    weights = 3.0 * active * hidden * inter * itemsize / drawn
    moved = c.moved_activations * (rows * (hidden + inter) + tokens * hidden) * itemsize / drawn
    made: np.ndarray = c.fixed_s + both(busy, weights, c.overlap) + moved + c.token_s * tokens * top_k
    return made


def moe_features(shape: MoeShape, spec: Spec) -> Features:
    """Logs of the shape, of a rank's experts and of an expert's rows."""
    tokens, hidden, inter, top_k, experts, ranks, skew, _ = map(np.asarray, shape)
    return {
        "tokens": log2(tokens),
        "hidden": log2(hidden),
        "inter": log2(inter),
        "local": log2(experts / ranks),
        "top_k": log2(top_k),
        "rows": log2(tokens * top_k / experts),
        "skew": skew,
        "ranks": log2(ranks),
    }


def experts_kernel(op: Op, ins: Tensors, outs: Tensors) -> Kernel:
    """The measured kernels route too, so a `route` beside this one is counted twice: a few microseconds."""
    (tokens, hidden), (held, _, inter) = ins[0].shape, ins[3].shape
    dtype, ranks = ins[2].dtype, op.integer("ranks")
    shape = MoeShape(tokens, hidden, inter, op.integer("top_k"), held * ranks, ranks, 0.0, ITEMSIZE[dtype])
    return Kernel("moe", dtype, shape)


def _skew(word: str) -> float | None:
    """The exponent of "power_law_1.2"; 0 for "balanced"."""
    try:
        exponent = 0.0 if word == "balanced" else float(word.removeprefix("power_law_"))
    except ValueError:
        return None
    return exponent if math.isfinite(exponent) else None


def moe_read(columns: Mapping[str, np.ndarray]) -> MoeShape:
    """The shapes of a table; tensor parallelism cuts the experts' features."""
    return MoeShape(
        tokens=columns["num_tokens"],
        hidden=columns["hidden_size"],
        inter=columns["inter_size"] / columns["moe_tp_size"],
        top_k=columns["topk"],
        experts=columns["num_experts"],
        expert_ranks=columns["moe_ep_size"],
        skew=columns["distribution"],
        itemsize=BF16_BYTES,
    )


MOE = Family(
    "moe",
    MoeShape,
    MoeCoefficients,
    moe_seconds,
    kinds={"experts": experts_kernel},
    columns=(
        *map(Column, ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")),
        Column("distribution", word=_skew, words="balanced or power_law_X"),
    ),
    read=moe_read,
    features=moe_features,
    terms=(
        (Axis("tokens", 0, 2, 9), Axis("inter", 4, 2, 6), Axis("local", 0, 2, 6)),
        (Axis("rows", -6, 2, 11), Axis("skew", 0, 1.2, 2), Axis("local", 0, 2, 6)),
        (Axis("tokens", 0, 2, 9), Axis("hidden", 11, 1, 3), Axis("top_k", 0, 1, 6)),
        (Axis("tokens", 0, 2, 9), Axis("ranks", 0, 2, 5), Axis("top_k", 0, 1, 6)),
    ),
)
