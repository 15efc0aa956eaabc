"""The register tile on processors that this machine is not: it lowers to their code, without spills or calls."""

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from taskgraph.runtime.cpu import tile

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
PROCESSORS = [
    (X86, "x86-64", "+sse2", (16, 4, False)),
    (X86, "sandybridge", "+avx", (16, 8, False)),
    (X86, "haswell", "+avx,+avx2,+fma,-avx512f", (16, 8, False)),
    (X86, "skylake-avx512", "+avx,+avx2,+fma,+avx512f", (32, 16, False)),
    (X86, "znver4", "+avx,+avx2,+fma,+avx512f,+avx512bf16", (32, 16, True)),
    (ARM, "generic", "+neon", (32, 4, False)),
    (ARM, "neoverse-v1", "+neon,+sve,+bf16", (32, 4, False)),
]


def assembly(triple: str, processor: str, target: tile.Target, mode: int) -> str:
    """The code of the tile as a function of its own."""
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, opt=3)
    module = ir.Module("tile")
    module.triple = triple
    made = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 7 + [ir.IntType(1)]), "tile")
    builder = ir.IRBuilder(made.append_basic_block())
    tile.emit_tile(builder, mode, target, made.args[0], made.args[1:])
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    parsed.data_layout = str(machine.target_data)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


@pytest.mark.parametrize(
    ("triple", "processor", "features", "want"), PROCESSORS, ids=[processor for _, processor, _, _ in PROCESSORS]
)
def test_the_tile_lowers_to_every_processor(
    triple: str, processor: str, features: str, want: tuple[int, int, bool]
) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = tile.target_of(triple, features)
    assert (target.registers, target.lanes, target.dot) == want
    for rows in range(1, target.rows + 1):
        assert tile.COLUMNS % target.width(rows) == 0 and target.width(rows) % target.lanes == 0
    for mode in (tile.SINGLE, tile.WIDE, *([tile.PAIRS] if target.dot else [])):
        lines = assembly(triple, processor, target, mode).splitlines()
        assert not [line for line in lines if "Spill" in line]
        assert not [line for line in lines if line.split()[:1] in (["callq"], ["call"], ["bl"])]
        wanted = {"vdpbf16ps"} if mode == tile.PAIRS else {"fmla", "vfmadd", "mulps"}
        assert any(word in line for line in lines for word in wanted)


def test_this_process_compiles_for_what_the_tile_is_made_for() -> None:
    triple, _, features = tile._compiled_for()
    assert tile.target_of(triple, features) == tile.TARGET
    assert (tile.TARGET.rows, tile.TARGET.dot) == (tile.ROWS, tile.DOT)
