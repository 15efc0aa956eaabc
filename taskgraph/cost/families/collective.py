"""Collectives of a few devices over their links."""

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
from taskgraph.cost.formulas import Numbers, both, log2
from taskgraph.cost.surface import Axis
from taskgraph.graph.op import Op

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "alltoall")


class CollectiveShape(NamedTuple):
    """A message that all ranks share."""

    kind: Numbers
    """Its place in COLLECTIVES."""
    ranks: Numbers
    nbytes: Numbers
    """Of the whole message."""


@dataclass(frozen=True, slots=True)
class CollectiveCoefficients(Coefficients):
    """All start at the order of magnitude of NCCL's on an A100 and are fitted to each device's table."""

    fixed_s: float = coefficient(6e-6)
    """Seconds of an empty kernel."""
    hop_s: float = coefficient(1e-6)
    """Seconds of latency from a rank to the next."""
    link_efficiency: float = coefficient(0.7, 0.3, 1.0)
    """Share of the published link bandwidth that is reached."""
    overlap: float = coefficient(2.0, 1.0, 8.0)
    """How well latency and transfer overlap: `sharp` of `both`."""


def collective_seconds(shape: CollectiveShape, spec: Spec, c: CollectiveCoefficients, sms: np.ndarray) -> np.ndarray:
    """Latency and bandwidth (Hockney 1994; Thakur et al. 2005): a ring moves (ranks - 1) / ranks of the message over
    each link, an all-reduce twice. Infinite where something is to move and there is no link."""
    kind, ranks, nbytes = map(np.asarray, shape)
    trips = np.where(kind == 0.0, 2.0, 1.0)
    moved = trips * nbytes * (ranks - 1.0) / ranks
    rate = spec.link_bytes_per_s * c.link_efficiency * spec.link_share(sms)
    if spec.link_bytes_per_s <= 0.0:
        return np.broadcast_to(np.where(moved > 0.0, np.inf, c.fixed_s), np.broadcast_shapes(moved.shape, sms.shape))
    made: np.ndarray = c.fixed_s + both(c.hop_s * trips * (ranks - 1.0), moved / rate, c.overlap)
    return made


def collective_features(shape: CollectiveShape, spec: Spec) -> Features:
    """Logs of the message and of the ranks; the kind."""
    kind, ranks, nbytes = map(np.asarray, shape)
    return {"bytes": log2(np.maximum(nbytes, 1.0)), "ranks": log2(ranks), "kind": kind}


def collective_kernel(op: Op, ins: Tensors, outs: Tensors) -> Kernel:
    """The whole message is the larger side: what goes in of a reduction, what comes out of a gather."""
    nbytes = max(sum(t.nbytes for t in side) for side in (ins, outs))
    return Kernel("nccl", "f32", CollectiveShape(COLLECTIVES.index(op.kind), op.number("ranks"), nbytes))


def _place(word: str) -> float | None:
    return float(COLLECTIVES.index(word)) if word in COLLECTIVES else None


def collective_read(columns: Mapping[str, np.ndarray]) -> CollectiveShape:
    """The shapes of a table, whose messages are counted in elements."""
    nbytes = columns["message_bytes_or_elements"] * BF16_BYTES
    return CollectiveShape(columns["op_name"], columns["num_gpus"], nbytes)


COLLECTIVE = Family(
    "nccl",
    CollectiveShape,
    CollectiveCoefficients,
    collective_seconds,
    kinds=dict.fromkeys(COLLECTIVES, collective_kernel),
    columns=(
        Column("op_name", word=_place, words=f"one of {', '.join(COLLECTIVES)}"),
        Column("num_gpus"),
        Column("message_bytes_or_elements"),
    ),
    read=collective_read,
    features=collective_features,
    terms=(
        (Axis("bytes", 9, 2, 11), Axis("ranks", 1, 1, 3), Axis("kind", 0, 1, 4)),
        (Axis("bytes", 9, 1, 21),),
    ),
    ridge=0.1,
    by_response=True,
)
