"""How ops run together: published resource-to-performance tables, and the response that is fitted to them, which the
cost model has as `fitted.RESPONSE`.

NanoFlow gives a kernel the share R of a GPU (what its neighbour GEMM loses) and reports its performance P. Here P comes
out of the model: a memory-bound kernel on R of the SMs draws `drawn_share(R)` of the bandwidth. Two published tables
exist for the A100 and disagree with each other by up to 0.2, which bounds what any model can reach.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from taskgraph.cost.fitted import RESPONSE
from taskgraph.cost.formulas import drawn_share

PUBLISHED: Mapping[str, Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "hbm": {
        "paper": ((0.1, 0.2, 0.4, 0.8, 0.9, 1.0), (0.2, 0.3, 0.8, 0.85, 0.95, 1.0)),
        "repository": (
            (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            (0.25, 0.40, 0.50, 0.60, 0.70, 0.80, 0.85, 0.90, 0.95),
        ),
    },
    "link": {
        "paper": ((0.1, 0.2, 0.8, 0.9), (0.3, 0.5, 0.9, 1.0)),
        "repository": ((0.1, 0.2, 0.3, 0.4, 0.5), (0.40, 0.60, 0.70, 0.80, 0.90)),
    },
}
"""R -> P of decode attention ("hbm") and of collectives ("link") on A100: arXiv 2408.12757, table 3, and the tables in
the repository efeslab/Nanoflow."""


@dataclass(frozen=True, slots=True)
class TableError:
    """One published table against the model: mean and largest absolute difference of P."""

    resource: str
    table: str
    mean: float
    largest: float


def fit_response(resource: str) -> tuple[float, float]:
    """(reach, sharp) of `drawn_share` nearest to both published tables, by least squares over a fine grid."""
    tables = PUBLISHED[resource].values()
    share = np.array([r for shares, _ in tables for r in shares])
    seen = np.array([p for _, speeds in tables for p in speeds])
    best, chosen = np.inf, (2.0, 2.0)
    for reach in np.arange(1.2, 12.0, 0.05):
        for sharp in np.arange(0.6, 6.0, 0.05):
            error = float(((drawn_share(share, 1.0, reach, sharp) - seen) ** 2).sum())
            if error < best:
                best, chosen = error, (round(float(reach), 3), round(float(sharp), 3))
    return chosen


def table_errors() -> list[TableError]:
    """The error of the model's P against each published table."""
    found = []
    for resource, tables in PUBLISHED.items():
        reach, sharp = (getattr(RESPONSE, f"{resource}_{name}") for name in ("reach", "sharp"))
        for name, (shares, speeds) in tables.items():
            gap = np.abs(drawn_share(np.array(shares), 1.0, reach, sharp) - speeds)
            found.append(TableError(resource, name, float(gap.mean()), float(gap.max())))
    return found
