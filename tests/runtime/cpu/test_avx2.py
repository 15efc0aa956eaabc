"""On a processor without AVX-512, as far as one that has it can be told to forget it (tests/avx2)."""

import platform
import subprocess
import sys

import pytest

from tests.avx2.__main__ import environment

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is of x86-64")

SEEN = """
import torch
from taskgraph.runtime.cpu import products, tile

assert torch.backends.cpu.get_cpu_capability() == "AVX2"
assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
try:
    torch.ops.mkldnn._reorder_linear_weight(torch.randn(64, 256).bfloat16(), 128)
except RuntimeError as error:
    assert "avx512bw" in str(error)
else:
    raise AssertionError("oneDNN still has AVX-512")
assert tile.TARGET.lanes <= 8 and not tile.DOT
assert "packed" not in products.able() and "dot" not in products.able()
"""

PRODUCTS = """
import itertools, torch
import taskgraph as tg
from taskgraph.graph import device as specs
from taskgraph.runtime.cpu import products

cpu = specs.make("h100_sxm", name="two", kind="cpu", sm_count=2, sm_granularity=1, sm_min=1, launch_seconds=1e-6)
torch.manual_seed(0)
for dtype, rows, way in itertools.product(("bf16", "f32"), (1, 7, 65, 200), (None, "plain", "f32", "tile")):
    if (dtype, way) == ("f32", "f32"):
        continue
    b = tg.GraphBuilder("product")
    b.output(tg.ops.gemm(b.input("x", (rows, 96), dtype), b.weight("w", (80, 96), dtype), transpose_w=True, name="y"))
    graph = b.build()
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    x, w = torch.randn(rows, 96).to(kind), torch.randn(80, 96).to(kind)
    ways = products.by_capability() if way is None else products.forced(way)
    with tg.compile(graph, tg.plan(graph, cpu, scheduler="sequential"), ways=ways) as exe:
        got = exe(x=x, w=w)["y.out"].float()
    torch.testing.assert_close(got, x.float() @ w.float().t(), rtol=2e-2, atol=0.2)
"""


@pytest.mark.parametrize("script", [SEEN, PRODUCTS], ids=["what is seen", "products"])
def test_without_avx512(script: str) -> None:
    made = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
