"""How the SMs of a device are divided into partitions: one split, and one or more of its groups to a partition.

Drivers from 12.5 on split a device into equal groups of its granularity with a rest, and a green context takes several
groups (cuDevSmResourceSplitByCount, cuDevResourceGenerateDesc). So partitions of any sizes are made, also unequal ones;
the results of a split cannot be split again (error 915), and separate splits of a device overlap. An H200 gives 15
groups of 8 and a rest of 12. Drivers from 13.1 on also split into groups of given sizes, in steps of 2 SMs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from taskgraph.errors import PlanError

STRUCTURED = 13010
"""The driver that brought cuDevSmResourceSplit, groups of given sizes."""
_LEAST = {7: 2, 8: 4}
"""Compute capability, major -> the smallest group (CUDA Programming Guide 4.6); 8 from 9.0 on."""


class Driver(Protocol):
    """What a division asks of a Capability."""

    @property
    def driver_version(self) -> int: ...
    @property
    def compute_capability(self) -> tuple[int, int]: ...


class Share(NamedTuple):
    """What a partition is made of: so many groups, and the rest of the split or not."""

    groups: int
    rest: bool


def composed(sizes: Sequence[int], groups: int, each: int, rest: int) -> tuple[Share, ...] | None:
    """Shares of a split into `groups` of `each` SMs and a `rest`, such that every partition has at least its size.

    The division with the fewest SMs beyond what was asked for; the rest goes to one partition, if that helps. None when
    there are too few groups."""
    found: list[tuple[int, int, tuple[Share, ...]]] = []
    largest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    for turn, taker in enumerate([None, *(largest_first if rest else ())]):
        shares = tuple(
            Share(-(-max(size - (rest if i == taker else 0), 0) // each), i == taker) for i, size in enumerate(sizes)
        )
        if sum(share.groups for share in shares) <= groups:
            given = sum(share.groups for share in shares) * each + (rest if taker is not None else 0)
            found.append((given - sum(sizes), turn, shares))
    return min(found)[2] if found else None


def divided(whole: Any, sizes: Sequence[int], driver: Driver) -> list[list[Any]]:
    """The SM resources of each partition, from one split of the device's resource `whole`. PlanError, with what the
    device divides into, when partitions of these sizes cannot be made."""
    exact = _structured(whole, sizes) if driver.driver_version >= STRUCTURED else None
    exact = exact or (_equal(whole, sizes) if len(set(sizes)) == 1 else None)
    if exact:
        return [[group] for group in exact]
    each = max(int(whole.min_partition_size), _LEAST.get(driver.compute_capability[0], 8))
    groups, left = _by_count(whole, each, int(whole.sm_count) // each)
    rest = int(left.sm_count)
    shares = composed(sizes, len(groups), each, rest)
    if shares is None:
        raise PlanError(
            f"{' + '.join(map(str, sizes))} SMs cannot be made of this device: it divides into {len(groups)} groups of "
            f"{each} SMs and a rest of {rest}. Plan partitions that such groups hold, and one of them the rest."
        )
    taken = iter(groups)
    return [[*(next(taken) for _ in range(share.groups)), *([left] if share.rest else [])] for share in shares]


def _structured(whole: Any, sizes: Sequence[int]) -> list[Any] | None:
    """Groups of exactly these sizes; None where the topology of the device does not allow them."""
    from cuda.core import SMResourceOptions

    # Coscheduling of fewer SMs than the default permits sizes that are no multiple of 8 on 9.0 and later.
    fine = next((step for step in (8, 4, 2) if all(size % step == 0 for size in sizes)), None)
    try:
        groups, _ = whole.split(SMResourceOptions(count=tuple(sizes), coscheduled_sm_count=fine))
    except Exception as error:
        if "INVALID_RESOURCE_CONFIGURATION" not in str(error):
            raise
        return None
    return list(groups)


def _equal(whole: Any, sizes: Sequence[int]) -> list[Any] | None:
    """One group a partition, where the driver makes as many of just that size."""
    groups, _ = _by_count(whole, sizes[0], len(sizes))
    made = [int(group.sm_count) for group in groups[: len(sizes)]]
    return list(groups[: len(sizes)]) if made == list(sizes) else None


def _by_count(whole: Any, size: int, count: int) -> tuple[list[Any], Any]:
    """Equal groups of at least `size` SMs, `count` of them or as many as there are, and the rest."""
    from cuda.core import SMResourceOptions

    groups, rest = whole.split(SMResourceOptions(count=(size,) * count))
    return list(groups), rest
