"""Cubins: compiled without a GPU, kept, told apart by what they are made of, launched with what they were made for."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import taskgraph as tg
from taskgraph import compiling
from taskgraph.errors import BackendUnavailable, GraphError
from taskgraph.graph.op import Op
from taskgraph.runtime.gpu import driver, kinds
from taskgraph.runtime.gpu.ahead import cubins
from taskgraph.runtime.gpu.ahead.cubins import Specialisation, check_arguments, kept, obtain, obtainable, place
from taskgraph.runtime.gpu.ahead.launching import Pointer, launch
from taskgraph.runtime.gpu.driver import Capability, Gpu
from taskgraph.runtime.gpu.kinds import Buffer, GpuSite, Launches, made_by
from taskgraph.runtime.gpu.standard import launches

pytest.importorskip("triton", reason="Triton is not installed: pip install 'taskgraph-gpu[kernels]'")

SAMPLES = "tests.runtime.gpu.ahead.samples"
X, OUT = Buffer(1 << 20, (100,), "f32"), Buffer(1 << 21, (100,), "f32")


def sample(wide: int = 64, x: Buffer = X) -> kinds.Launch:
    given = {"x": x, "out": OUT, "count": np.int32(100), "factor": np.float32(2.0), "N": wide}
    return launch(f"{SAMPLES}:scaled", (2,), given, warps=2, stages=1)


def spec_of(made: kinds.Launch) -> Specialisation:
    assert isinstance(made.source, Specialisation)
    return made.source


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "triton_version", lambda: "")
    monkeypatch.setitem(sys.modules, "triton", None)


def test_arguments_say_the_specialisation() -> None:
    spec = spec_of(sample())
    assert spec.types == (("x", "*fp32:16"), ("out", "*fp32:16"), ("count", "i32"), ("factor", "fp32"))
    assert spec.constants == (("N", 64),)
    assert spec_of(sample(x=replace(X, address=4 + (1 << 20)))).types[0] == ("x", "*fp32"), "not a multiple of 16"
    assert launch("m:f", (1,), {"w": Pointer(8, "i64")}, 1, 1).args == (8,)
    with pytest.raises(BackendUnavailable, match="'w' is a list"):
        launch("m:f", (1,), {"w": [1]}, 1, 1)  # type: ignore[dict-item]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_a_cubin_is_kept_and_needs_no_triton_then(folder: Path, monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    spec, told = spec_of(sample()), []
    assert kept(spec, arch) is None
    others = compiling.listen(lambda name, before: told.append(name))
    made = obtain(spec, arch)
    compiling.listen(others)
    assert told == ["scaled"], "whoever shows progress is told"
    assert made.name == "scaled" and made.arch == arch and made.warps == 2 and made.code[:4] == b"\x7fELF"
    assert made.parameters == (8, 8, 4, 4, 8, 8) and made.registers > 0 and made.stack_bytes == 0
    assert not list(folder.rglob("*.ptx"))
    without_triton(monkeypatch)
    assert obtain(spec, arch) == made
    other = spec_of(sample(wide=128))
    assert obtainable(spec, arch) and not obtainable(other, arch)
    with pytest.raises(BackendUnavailable, match=r"scaled\(N=128\) is not compiled for .* pip install"):
        obtain(other, arch)


def test_a_damaged_cubin_is_compiled_again(folder: Path) -> None:
    spec = spec_of(sample())
    made = obtain(spec, "sm_90")
    record = place(spec, "sm_90", made.triton)
    code = record.with_suffix(".cubin")
    for damage in (
        lambda: code.write_bytes(made.code[:100]),
        lambda: code.unlink(),
        lambda: record.write_text("{"),
        lambda: record.write_text(json.dumps(json.loads(record.read_text()) | {"more": 1})),
    ):
        damage()
        assert kept(spec, "sm_90") is None
        assert obtain(spec, "sm_90").parameters == made.parameters
        assert kept(spec, "sm_90") is not None


def test_where_nothing_can_be_kept_it_still_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cubins.cache, "write_atomically", refuses)
    monkeypatch.setattr(cubins.cache, "warn", lambda text: None)
    assert obtain(spec_of(sample(wide=32)), "sm_90").code


def test_every_part_of_a_specialisation_counts(folder: Path) -> None:
    spec = spec_of(sample())
    others = [
        replace(spec, warps=4),
        replace(spec, stages=2),
        replace(spec, scratch_bytes=128),
        replace(spec, constants=(("N", 32),)),
        replace(spec, types=(("x", "*bf16:16"), *spec.types[1:])),
        replace(spec, function=f"{SAMPLES}:broken"),
    ]
    places = {place(each, arch, "3.9.0") for each in (spec, *others) for arch in ("sm_90", "sm_80")}
    assert len(places) == 2 * (1 + len(others))


def test_what_cannot_be_compiled_says_so(folder: Path) -> None:
    spec = spec_of(sample())
    for arch in ("sm_70", "h100", "sm_", "90"):
        with pytest.raises(BackendUnavailable, match="give sm_80, sm_90 or sm_100"):
            obtain(spec, arch)
    broken = Specialisation(f"{SAMPLES}:broken", (("x", "*fp32"),), (("N", 4),))
    with pytest.raises(BackendUnavailable, match=r"Triton cannot compile broken\(N=4\) for sm_90"):
        obtain(broken, "sm_90")
    with pytest.raises(BackendUnavailable, match=r"parameters of .*scaled are x, out, count, factor, N"):
        obtain(replace(spec, types=spec.types[1:]), "sm_90")
    with pytest.raises(BackendUnavailable, match=r"parameters of .*scaled are"):
        obtain(replace(spec, types=(spec.types[1], spec.types[0], *spec.types[2:])), "sm_90")
    with pytest.raises(BackendUnavailable, match="does not exist"):
        obtain(replace(spec, function="taskgraph.no_such:scaled"), "sm_90")
    with pytest.raises(BackendUnavailable, match=r"no function of triton.jit"):
        obtain(replace(spec, function=f"{SAMPLES}:tl"), "sm_90")


def test_arguments_that_do_not_fit_are_refused(folder: Path) -> None:
    made = sample()
    spec = spec_of(made)
    cubin = obtain(spec, "sm_90")
    check_arguments(spec, cubin, made.args)
    for wrong in (made.args[:-1], (*made.args, np.int32(1)), (*made.args[:2], np.int64(100), made.args[3])):
        with pytest.raises(BackendUnavailable, match=r"takes parameters of \(8, 8, 4, 4\) bytes"):
            check_arguments(spec, cubin, wrong)
    with pytest.raises(BackendUnavailable, match="2 warps"):
        check_arguments(replace(spec, warps=4), cubin, made.args)
    with pytest.raises(BackendUnavailable, match="needs 256 bytes of scratch a block; the launch gives 128"):
        check_arguments(replace(spec, scratch_bytes=128), replace(cubin, scratch_bytes=256), made.args)


# ----------------------------------------------------------------------------------------------- choosing


def _by_triton(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer], site: GpuSite) -> Launches:
    site.scratch(64)
    given = {"x": ins[0], "out": outs[0], "count": np.int32(100), "factor": np.float32(2.0), "N": 64}
    return [launch(f"{SAMPLES}:scaled", (2,), given, warps=2, stages=1)]


def _f32_alone(op: Op, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> bool:
    return all(b.dtype == "f32" and b.strides is None for b in (*ins, *outs))


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An addition, which has a Triton function of f32 here."""
    monkeypatch.setattr(kinds, "_AHEAD", {})
    monkeypatch.setattr(kinds, "AHEAD_KINDS", kinds._AHEAD)
    kinds.register_ahead("add", _by_triton, _f32_alone)
    b = tg.GraphBuilder("sum")
    b.output(tg.ops.add(b.input("x", (10, 10), "f32"), b.input("y", (10, 10), "f32"), name="sum"))
    return b.build().ops[0]


def test_triton_runs_where_it_can(folder: Path, op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    site, sides = kinds.DrySite(132, "sm_90"), ([X, X], [OUT])
    assert made_by(launches(op, *sides, site)) == "Triton"
    assert made_by(launches(op, *sides, kinds.DrySite(132, ""))) == "cuda/kernels"
    short = [replace(b, dtype="bf16") for b in (X, X, OUT)]
    assert made_by(launches(op, short[:2], short[2:], site)) == "cuda/kernels", "not taken"
    obtain(kinds.specialisations(op, *sides, site)[0], "sm_90")
    without_triton(monkeypatch)
    assert made_by(launches(op, *sides, site)) == "Triton", "a cubin is kept"
    assert made_by(launches(op, *sides, kinds.DrySite(132, "sm_80"))) == "cuda/kernels", "none is, for this one"


@pytest.mark.parametrize(
    "capability, arch",
    [
        (Capability("NVIDIA H200", 13000, 132, (9, 0), True), "sm_90"),
        (Capability("NVIDIA A100", 13000, 108, (8, 0), True), "sm_80"),
        (Capability("NVIDIA B200", 13010, 148, (10, 0), True, True), "sm_100"),
        (Capability("Tesla T4", 13000, 40, (7, 5), True), ""),
        (Capability("taskgraph virtual h100_sxm", 13050, 132, (9, 0), True, True, "h100_sxm"), ""),
    ],
)
def test_the_device_decides(capability: Capability, arch: str) -> None:
    gpu = Gpu(capability, None)
    assert gpu.ahead("add") == arch
    gpu.left_out["add"] = "differs"
    assert gpu.ahead("add") == "" and gpu.ahead("rmsnorm") == arch


def test_what_is_sent(folder: Path, op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of the warps it was compiled for, its arguments and two null pointers, and its shared memory."""
    sent: list[tuple[Any, ...]] = []
    monkeypatch.setattr(driver, "launch_kernel", lambda *given: sent.append(given))
    gpu = Gpu(Capability("NVIDIA H200", 13000, 132, (9, 0), True), None)
    (made,) = launches(op, [X, X], [OUT], kinds.DrySite(132, gpu.ahead("add")))
    assert isinstance(made, kinds.Launch)
    cubin = replace(obtain(spec_of(made), "sm_90"), shared_bytes=100_000)
    gpu._cubins[spec_of(made)] = "kernel", cubin
    gpu.load(made)
    gpu.send("stream", made, dependent=True)
    assert sent == [("stream", "kernel", (2,), 64, (X.address, OUT.address, 100, 2.0, 0, 0), 100_000, True)]
    gpu._cubins[spec_of(made)] = "kernel", replace(cubin, parameters=(8, 8, 4, 8, 8, 8))
    with pytest.raises(BackendUnavailable, match="This is a bug of its rule"):
        gpu.load(made)


def test_more_shared_memory_than_a_kernel_has_unasked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for once, of the driver: cuda.core's view of a kernel's attributes cannot be written."""
    from cuda.bindings import driver as cu

    class FakeCode:
        @staticmethod
        def from_cubin(code: bytes) -> "FakeCode":
            return FakeCode()

        def get_kernel(self, name: str) -> "FakeKernel":
            return FakeKernel()

    class FakeKernel:
        handle = 7

    asked: list[tuple[Any, ...]] = []

    def answer(*given: Any) -> tuple[cu.CUresult]:
        asked.append(given)
        return (cu.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr("cuda.core.ObjectCode", FakeCode)
    monkeypatch.setattr(cu, "cuKernelSetAttribute", answer)
    gpu, spec = Gpu(Capability("NVIDIA H200", 13000, 132, (9, 0), True), None), spec_of(sample())
    gpu.cubin(spec)
    assert not asked
    large = replace(obtain(spec, "sm_90"), shared_bytes=131_072)
    monkeypatch.setattr(driver, "obtain", lambda spec, arch: large)
    other = replace(spec, stages=2)
    assert gpu.cubin(other) is gpu.cubin(other)
    attribute = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert asked == [(attribute, 131_072, 7, 0)]


def test_a_kind_may_have_triton_alone(folder: Path, op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "GPU_KINDS", {})
    sides = [X, X], [OUT]
    assert made_by(launches(op, *sides, kinds.DrySite(132, "sm_90"))) == "Triton"
    with pytest.raises(BackendUnavailable, match="no kernel for kind 'add'"):
        launches(op, *sides, kinds.DrySite(132, ""))


def test_registering_twice_or_an_unknown_kind(op: Op) -> None:
    kinds.register_ahead("add", _by_triton, _f32_alone)
    with pytest.raises(GraphError, match="'add' has Triton functions already"):
        kinds.register_ahead("add", _by_triton, lambda op, ins, outs: True)
    with pytest.raises(GraphError, match="unknown op kind 'subtraction'"):
        kinds.register_ahead("subtraction", _by_triton, _f32_alone)
    with pytest.raises(GraphError, match="takes a gemm"):
        kinds.register_ahead("gemm", _by_triton, None)  # type: ignore[arg-type]
