"""Products and experts as compiled code: on tensor cores, fed by bulk copies, without spills, within shared memory."""

from collections.abc import Callable

import pytest

import taskgraph as tg
from taskgraph import ops
from taskgraph.graph.graph import Graph, Value
from taskgraph.runtime.gpu.ahead.cubins import obtain
from taskgraph.runtime.gpu.ahead.needed import needed
from taskgraph.runtime.gpu.ahead.products import TILINGS, shared_bytes, tiling
from taskgraph.runtime.gpu.kinds import DrySite
from taskgraph.runtime.gpu.standard import GPU_KINDS
from tests.runtime.gpu.ahead.machine_code import has, instructions

pytest.importorskip("triton", reason="Triton is not installed: pip install 'taskgraph-gpu[kernels]'")

MULTIPLY = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
"""mma.sync, wgmma and tcgen05.mma in machine code."""


def graph(make: Callable[[tg.GraphBuilder], Value]) -> Graph:
    b = tg.GraphBuilder("product")
    b.output(make(b))
    return b.build()


def product(m: int, n: int, k: int, out: str = "bf16") -> Graph:
    """With a residual, as the second product of a block has, or into f32, as that of the vocabulary."""
    if out == "f32":
        return graph(
            lambda b: ops.gemm(
                b.input("x", (m, k), "bf16"), b.weight("w", (n, k), "bf16"), transpose_w=True, out_dtype="f32"
            )
        )
    return graph(
        lambda b: ops.gemm(
            b.input("x", (m, k), "bf16"), b.weight("w", (n, k), "bf16"), residual=b.input("r", (m, n), "bf16"),
            transpose_w=True,
        )
    )  # fmt: skip


def routed(rows: int) -> Graph:
    """Qwen3-30B-A3B's experts."""

    def make(b: tg.GraphBuilder) -> Value:
        weights = b.weight("u", (128, 1536, 2048), "bf16"), b.weight("d", (128, 2048, 768), "bf16")
        routing = b.input("r", (rows, 128), "f32")
        return ops.experts(b.input("x", (rows, 2048), "bf16"), routing, *weights, top_k=8)

    return graph(make)


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(MULTIPLY))
def test_products_on_96_sms_and_experts(arch: str) -> None:
    """Many rows by the largest instruction of the architecture; the 16 rows of a decode step fit too."""
    assert GPU_KINDS
    plain = product(16, 4096, 4096), product(2048, 4096, 4094)  # few rows; rows that no bulk copy can move
    large = product(2048, 4096, 4096), product(2048, 4096, 4096, "f32"), routed(2048)
    for made, many in (*((each, True) for each in large), *((each, False) for each in plain)):
        for spec in needed(made, DrySite(96, arch)):
            cubin = obtain(spec, arch)
            assert cubin.stack_bytes == 0, f"{spec.describe()} spills: {cubin.registers} registers"
            assert cubin.shared_bytes <= shared_bytes(arch)
            if many and spec.name in ("product_by_tiles", "expert_up", "expert_down"):
                code = instructions(cubin)
                assert has(code, MULTIPLY[arch])
                if spec.name == "product_by_tiles" and arch != "sm_80":
                    assert has(code, "UTMALDG"), "operands come by bulk copies"


def test_what_a_tiling_says_of_shared_memory_is_what_fits_every_architecture() -> None:
    for arch in (*MULTIPLY, "sm_89", "sm_120"):
        for m in (1, 16, 33, 100, 2048):
            assert tiling(m, 4096, 96, 1, shared_bytes(arch)) in TILINGS
