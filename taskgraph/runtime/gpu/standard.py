"""The launches of an op on a GPU; importing this registers how every kind of `taskgraph.ops` runs."""

from taskgraph.runtime.gpu import algebra, attention, axes, dense, experts, latent, moves, pointwise, sampling  # noqa: F401 - they register their kinds
from taskgraph.runtime.gpu.ahead import standard as _ahead  # noqa: F401 - it registers their Triton functions
from taskgraph.runtime.gpu.kinds import GPU_KINDS, launches

__all__ = ["GPU_KINDS", "launches"]
