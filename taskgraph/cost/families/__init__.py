"""Every family of kernels, one file each: to add one, write its file and a line in `FAMILIES`, or, outside the
package, call `register`."""

from collections.abc import Mapping

from taskgraph.cost.families.attention import DECODE, PREFILL
from taskgraph.cost.families.collective import COLLECTIVE
from taskgraph.cost.families.gemm import GEMM
from taskgraph.cost.families.moe import MOE
from taskgraph.cost.families.stream import PLAIN_STREAM, STREAM
from taskgraph.cost.family import Family, Kernel, KernelRule
from taskgraph.errors import CalibrationError
from taskgraph.graph.op import Op, Tensor, seen_inputs

FAMILIES: dict[str, Family] = {}
"""By name, which is that of the files of measurements."""

_RULES: dict[str, KernelRule] = {}
"""Op kind -> the rule that tells the kernel of its ops."""


def register(family: Family) -> Family:
    """Make a family known, so that op kinds, tables of measurements and coefficient files can name it.

    CalibrationError where another family has its name, or one of its op kinds.
    """
    taken = [kind for kind in family.kinds if kind in _RULES]
    if family.name in FAMILIES or taken:
        what = f"op kind {taken[0]!r}" if taken else "name"
        raise CalibrationError(f"family {family.name!r}: another family has this {what}; choose another.")
    FAMILIES[family.name] = family
    _RULES.update(family.kinds)
    return family


def priced(kind: str, rule: KernelRule) -> None:
    """Say which kernels the ops of a kind are for the cost model: those of families that there are.

    CalibrationError where a family has the kind already."""
    if _RULES.setdefault(kind, rule) is not rule:
        raise CalibrationError(f"op kind {kind!r} is priced already; give yours another name.")


for _family in (GEMM, PREFILL, DECODE, MOE, COLLECTIVE, STREAM):
    register(_family)


def kernel_of(op: Op, tensors: Mapping[str, Tensor]) -> Kernel:
    """The kernel that `op` is for the cost model: by the rule of its kind, else (custom ops too) a stream of its
    declared work."""
    rule = _RULES.get(op.kind)
    if rule is None:
        return PLAIN_STREAM
    return rule(op, seen_inputs(op, tensors), [tensors[name] for name in op.outputs])
