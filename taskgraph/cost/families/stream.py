"""All the rest: norms, elementwise ops, embedding, sampling, copies and custom ops."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from taskgraph.cost.family import Coefficients, Family, Kernel, Spec, Tensors, coefficient
from taskgraph.cost.formulas import Numbers, both
from taskgraph.graph.op import Op

_BLOCK_BYTES = 16384.0
_BOUND_BY_ARITHMETIC = 20.0
"""FLOPs a byte above which arithmetic outside tensor cores takes longer than memory, on every GPU of the last ten
years (an H100 has 67 TFLOP/s and 3.35 TB/s)."""
LATENT_EFFICIENCY = 660 / 989
"""Share of the tensor cores' rate that latent attention reaches when arithmetic binds it: FlashMLA's 660 TFLOPS of
the H800's 989 (published, github.com/deepseek-ai/FlashMLA)."""


class StreamShape(NamedTuple):
    """The declared work of an op."""

    flops: Numbers
    hbm_bytes: Numbers
    h2d_bytes: Numbers
    d2h_bytes: Numbers
    link_bytes: Numbers
    pageable: Numbers
    """Above 0 where the host's side of a copy is not pinned."""


@dataclass(frozen=True, slots=True)
class StreamCoefficients(Coefficients):
    """Assumed: no table measures these kernels."""

    fixed_s: float = coefficient(2.6e-6)
    """Seconds of an empty kernel."""
    hbm_efficiency: float = coefficient(0.85, 0.3, 1.0)
    """Share of the published memory bandwidth that is reached."""
    overlap: float = coefficient(4.0, 1.0, 8.0)
    """How well arithmetic and memory overlap: `sharp` of `both`."""
    pcie_efficiency: float = coefficient(0.85, 0.3, 1.0)
    """Share of the published PCIe bandwidth that pinned copies reach."""
    pageable: float = coefficient(0.4)
    """Share of a pinned copy's rate that a pageable one has."""
    copy_fixed_s: float = coefficient(8e-6)
    """Seconds of an empty copy."""


def stream_seconds(shape: StreamShape, spec: Spec, c: StreamCoefficients, sms: np.ndarray) -> np.ndarray:
    """The slowest path binds (roofline, Williams et al. 2009), at a part of the published rate; infinite where a path
    is used that the device has not."""
    flops, hbm, h2d, d2h, link, pageable = map(np.asarray, shape)
    arithmetic = flops / (spec.flops_per_s * sms / spec.sms)
    seconds = both(arithmetic, hbm / (spec.hbm_bytes_per_s * c.hbm_efficiency * spec.hbm_share(sms)), c.overlap)
    copies = h2d + d2h
    if np.any(copies + link):
        host = c.pcie_efficiency * np.where(pageable > 0.0, c.pageable, 1.0)
        for nbytes, rate in ((h2d, spec.h2d_bytes_per_s * host), (d2h, spec.d2h_bytes_per_s * host),
                             (link, np.full(link.shape, spec.link_bytes_per_s))):  # fmt: skip
            path = np.divide(nbytes, rate, out=np.full(nbytes.shape, np.inf), where=rate > 0.0)
            seconds = np.maximum(seconds, np.where(nbytes > 0.0, path, 0.0))
    made: np.ndarray = seconds + np.where(copies > 0.0, c.copy_fixed_s, c.fixed_s)
    return made


def stream_blocks(shape: StreamShape) -> np.ndarray:
    """A thread block for every 16 KB that an elementwise kernel moves (256 threads, four loads of 16 bytes each); what
    arithmetic binds fills the device, as far as anybody knows."""
    flops, moved = np.asarray(shape.flops), np.asarray(shape.hbm_bytes)
    return np.where(flops > _BOUND_BY_ARITHMETIC * moved, np.inf, np.maximum(np.ceil(moved / _BLOCK_BYTES), 1.0))


PLAIN_STREAM = Kernel("stream", "f32", ())
"""The kernel of an op of which only its declared work is known. One for all of them: a graph may have millions."""


def latent_kernel(op: Op, ins: Tensors, outs: Tensors) -> Kernel:
    """No table measures latent attention: its work as a stream whose arithmetic runs on tensor cores."""
    flops, *moved = op.work.vector
    return Kernel("stream", ins[0].dtype, (flops / LATENT_EFFICIENCY, *moved, 0.0))


PRODUCT_EFFICIENCY = 0.6
"""Share of the tensor cores' rate that batched products reach: assumed, for no table measures them."""


def product_kernel(op: Op, ins: Tensors, outs: Tensors) -> Kernel:
    """Batched products: their work as a stream whose arithmetic runs on tensor cores."""
    flops, *moved = op.work.vector
    return Kernel("stream", ins[0].dtype, (flops / PRODUCT_EFFICIENCY, *moved, 0.0))


STREAM = Family(
    "stream",
    StreamShape,
    StreamCoefficients,
    stream_seconds,
    thread_blocks=stream_blocks,
    kinds={
        **dict.fromkeys(("latent_attention", "paged_latent_decode", "paged_latent_prefill"), latent_kernel),
        "matmul": product_kernel,
    },
)
