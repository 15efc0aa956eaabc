"""Every Triton function compiles for every architecture, spills nothing, and is what its launch rule launches."""

from collections.abc import Iterator
from functools import cache

import pytest

import taskgraph as tg
from taskgraph.graph.graph import Graph
from taskgraph.models.config import load_config
from taskgraph.models.paged import Bucket, PageShape, step_graph
from taskgraph.runtime.gpu.ahead.cubins import Cubin, Specialisation, check_arguments, obtain
from taskgraph.runtime.gpu.ahead.needed import dry_launches, needed
from taskgraph.runtime.gpu.kinds import DrySite, Launch
from taskgraph.runtime.gpu.standard import GPU_KINDS
from tests.runtime.gpu.ahead.machine_code import has, instructions

pytest.importorskip("triton", reason="Triton is not installed: pip install 'taskgraph-gpu[kernels]'")

ARCHS = ("sm_80", "sm_90", "sm_100")
LARGEST = {"sm_80": 163, "sm_90": 227, "sm_100": 227}
"""KB of shared memory that a block can have (CUDA Programming Guide, compute capabilities)."""


TOUCHES = frozenset(
    ("LD", "ST", "LDG", "STG", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG", "UBLKCP", "UBLKRED", "CCTL", "EXIT")
)  # fmt: skip
"""Instructions that touch memory which other blocks see, or end a thread (CUDA Binary Utilities, instruction sets)."""


def llama() -> Graph:
    """A step of Llama-3-8B: sequences that decode, and chunks of prefill."""
    return step_graph(load_config("llama-3-8b"), Bucket(256, 1024, 2), PageShape(4096, 32, 2048))


def attends(heads: int, kv: int, dim: int, rows: int, dtype: str) -> Graph:
    """Decode and prefill over the same pages."""
    b = tg.GraphBuilder(f"attends-{heads}-{kv}-{dim}-{rows}-{dtype}")
    pages = [b.state(n, (64, kv, rows, -(-dim // 32) * 32), dtype) for n in ("k", "v")]
    one, many = b.input("one", (5, heads, dim), dtype), b.input("many", (70, heads, dim), dtype)
    tables = b.input("lengths", (5,), "i32"), b.input("tables", (5, 9), "i32")
    starts = b.input("starts", (6,), "i32")
    b.output(tg.ops.paged_decode(one, *tables, *pages, context=9 * rows))
    b.output(tg.ops.paged_prefill(many, starts, *tables, *pages, context=9 * rows))
    return b.build()


def caches(dtype: str) -> Graph:
    """Attention over caches of their own: one row a sequence, several, and heads beside each other."""
    b = tg.GraphBuilder(f"caches-{dtype}")
    kept = [b.state(n, (2, 8, 1000, 128), dtype) for n in ("keys", "values")]
    for name, rows in (("one", 2), ("many", 128)):
        q, places = b.input(name, (rows, 32, 128), dtype), b.input(f"{name}_at", (2,), "i64")
        b.output(tg.ops.attention(q, places, *kept, name=f"{name}_mixed"))
    beside = b.state("kv", (2, 2, 1000, 8, 128), dtype)
    b.output(tg.ops.decode_attention(b.input("last", (2, 32, 128), dtype), beside))
    return b.build()


@cache
def graphs() -> tuple[Graph, ...]:
    """Steps of models, and shapes at the edges of what the rules take."""
    bf16 = [(8, 8, 64, 32), (16, 1, 96, 64), (8, 2, 256, 32)]
    f32 = [(32, 8, 128, 16)]
    return (llama(), caches("bf16"), *(attends(*s, "bf16") for s in bf16), *(attends(*s, "f32") for s in f32))


def made_on(arch: str, graph: Graph) -> Iterator[tuple[Launch, Cubin]]:
    """Every launch of a Triton function, with its cubin."""
    assert GPU_KINDS
    for _, launches in dry_launches(graph, DrySite(132, arch)):
        for one in launches:
            if isinstance(one, Launch) and isinstance(one.source, Specialisation):
                yield one, obtain(one.source, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("graph", graphs(), ids=lambda graph: graph.name)
def test_every_kernel_compiles_fits_its_launch_and_spills_nothing(graph: Graph, arch: str) -> None:
    seen, spilled = set(), []
    for launch, cubin in made_on(arch, graph):
        assert isinstance(launch.source, Specialisation)
        seen.add(cubin.name)
        check_arguments(launch.source, cubin, launch.args)
        assert launch.block == 32 * cubin.warps
        assert cubin.dependent is (arch != "sm_80"), "it waits for the kernel before it, before it touches memory"
        assert bool(launch.scratch) or not cubin.scratch_bytes, "a launch gives its kernel scratch"
        assert cubin.shared_bytes <= LARGEST[arch] * 1024
        if cubin.stack_bytes:
            spilled.append((launch.source.describe(), launch.source.types[0][1], cubin.registers, cubin.stack_bytes))
    assert not spilled
    assert seen


def different(arch: str) -> dict[str, Cubin]:
    """A cubin of each function that a step of Llama-3-8B needs."""
    return {spec.name: obtain(spec, arch) for spec in needed(llama(), DrySite(132, arch))}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_multiplies_on_tensor_cores_and_copies_in_bulk(arch: str) -> None:
    """In bf16. Decode has the product of a warp (HMMA) everywhere: its few rows fit no larger one."""
    cubins = different(arch)
    decode, prefill = instructions(cubins["decode"]), instructions(cubins["prefill"])
    assert has(decode, "HMMA.16816.F32.BF16") and has(decode, "UTMALDG" if arch != "sm_80" else "LDGSTS")
    assert has(prefill, {"sm_80": "HMMA.16816", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[arch])
    assert has(prefill, "LDGSTS")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_machine_code_waits_before_it_loads_or_stores(arch: str) -> None:
    """The assembler, too, leaves the wait (ACQBULK) before all that touches memory of others, and before any end.
    Products on an sm_100 allocate tensor memory before it, which the kernel before gives back at its end."""
    for name, cubin in different(arch).items():
        steps = [step.partition(".")[0] for step in instructions(cubin)]
        before = {step for step in steps[: steps.index("ACQBULK")] if step in TOUCHES or step.startswith("UTMA")}
        assert not before, name
        assert "PREEXIT" in steps, "it lets the next kernel be launched"


@pytest.mark.slow
def test_decode_keeps_enough_bytes_on_their_way() -> None:
    """All blocks of its grid are on the SMs at a time, and one tile of keys and values each, at the least, is what
    110 GB/s an SM take over a round trip of 0.7 us."""
    launch, cubin = next((made, c) for made, c in made_on("sm_90", llama()) if c.name == "decode")
    assert isinstance(launch.source, Specialisation)
    blocks = launch.grid[0] / 132
    registers = -(-cubin.registers // 8) * 8 * 32 * cubin.warps
    assert blocks * (cubin.shared_bytes + 1024) <= 228 * 1024 and blocks * registers <= 65536
    constants = dict(launch.source.constants)
    tile = 2 * 2 * int(constants["N"] or 0) * int(constants["CHANNELS"] or 0)
    assert blocks * tile >= 110e9 * 0.7e-6
