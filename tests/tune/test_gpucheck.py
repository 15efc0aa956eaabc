"""gpu-check on the virtual GPU: it runs to its end whatever fails in it, and nothing simulated is called measured."""

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import taskgraph as tg
from taskgraph.cost.gpu_report import Check, GemmTime, GpuReport, KernelTime, Overlap, PairTime, read_report
from taskgraph.cost.profiles import ProfileDB
from taskgraph.errors import CalibrationError, DeviceError
from taskgraph.graph import device as specs
from taskgraph.runtime.gpu import driver, kinds, spec
from taskgraph.runtime.gpu.driver import Capability
from taskgraph.tune.fill import fill
from taskgraph.tune.gpucheck import cases, checks, fast, power, rig
from taskgraph.tune.gpucheck import run as running
from tests.conftest import Call, virtual_process

DEVICE = "virtual:h200_sxm"
COLUMNS = {
    "gemm.csv": "m,n,k,seconds",
    "kernels_by_sms.csv": "kernel,sms,seconds",
    "corun.csv": "a,b,mode,sms_a,sms_b,a_alone_s,b_alone_s,a_beside_b_s,b_beside_a_s",
    "kernels.csv": "kernel,shape,choice,seconds,rate",
    "gaps.csv": "kernel,after_end_s,dependent_s",
    "plans.csv": "plan,graph,made_by,partitions,lanes,predicted_s,measured_s",
}
"""Of the measurements that the co-running model is judged by; watts and clocks stand behind them."""


def test_autotune_on_the_virtual_gpu_is_simulated_and_stores_no_time(on_virtual: Call, tmp_path: Path) -> None:
    on_virtual(tune, tmp_path)


def tune(folder: Path) -> None:
    b = tg.GraphBuilder("pair")
    x, w, y = b.input("x", (64, 64), "f32"), b.weight("w", (64, 64), "f32"), b.input("y", (256, 64), "f32")
    b.output(tg.ops.gemm(x, w, name="product"), tg.ops.add(y, y, name="twice"))
    store = ProfileDB(folder / "profiles.sqlite")
    tuned = tg.autotune(b.build(), "cuda", budget_s=60, device="virtual:h100_sxm", database=store)
    assert tuned.kind == "simulated" and "virtual h100_sxm" in tuned.origin
    assert tuned.trials and all(t.measured_s is None or t.measured_s > 0 for t in tuned.trials)
    assert not store.path.exists() or store.platforms() == ()


@pytest.mark.parametrize(
    ("name", "found"), [("NVIDIA H100 80GB HBM3", "h100_sxm"), ("NVIDIA A100-SXM4-80GB", "a100_sxm")]
)
def test_a_real_device_is_planned_for_by_its_published_spec(name: str, found: str) -> None:
    made = spec._of_real(Capability(device=name, sm_count=114), 1 << 36)
    assert made.name == found and (made.sm_count, made.memory_bytes) == (114, 1 << 36)
    assert made.hbm_bytes_per_s == specs.get(found).hbm_bytes_per_s
    unknown = Capability(device="NVIDIA GTX 480", sm_count=15, compute_capability=(8, 9))
    with pytest.raises(DeviceError, match=r"GTX 480.*devices\.make"):
        spec._of_real(unknown, 1 << 30)
    stand_in = running._unpublished(unknown, 1 << 30)
    assert (stand_in.name, stand_in.sm_count, stand_in.memory_bytes) == ("nvidia_gtx_480", 15, 1 << 30)


# ------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(("version", "unequal"), [(12050, [(64, 64), (100, 32)]), (13010, [(64, 64), (96, 32)])])
def test_gpu_check_leaves_a_whole_report_with_and_without_workqueues(
    version: int, unequal: list[tuple[int, int]], tmp_path: Path
) -> None:
    with virtual_process(DEVICE, driver_version=version) as call:
        call(check_all, tmp_path)
    report = read_report(tmp_path / "gpu-check.json")
    assert report.kind == "simulated" and report.driver_version == version and report.device.name == "h200_sxm"
    assert [s.state for s in report.sections] == ["done"] * len(running.SECTIONS), report.sections
    assert report.passed and len(report.checks) == 2
    assert {(r.sms_a, r.sms_b) for r in report.corun if r.mode == "partition"} == set(unequal)
    assert all(r.sms_a == r.sms_b == 132 for r in report.corun if r.mode == "shared")
    assert {r.sms for r in report.kernels_by_sms} == {8, 32, 64, 132}
    assert len(report.gemm) == 20 and report.plans and report.kernels
    for name, columns in COLUMNS.items():
        rows = list(csv.DictReader((tmp_path / name).read_text().splitlines()))
        assert [*rows[0]] == [*columns.split(","), *(() if name == "gaps.csv" else ("watts", "sm_mhz"))]
        assert len(rows) == len(getattr(report, name.removesuffix(".csv")))
        assert {(row.get("watts", ""), row.get("sm_mhz", "")) for row in rows} == {("", "")}
    plan = tg.Plan.from_json((tmp_path / report.plans[0].plan).read_text())
    graph = tg.Graph.from_json((tmp_path / report.plans[0].graph).read_text())
    tg.verify(plan, graph)


def small_step() -> tg.Graph:
    b = tg.GraphBuilder("step")
    x, w = b.input("x", (64, 64), "f32"), b.weight("w", (64, 64), "f32")
    b.output(tg.ops.gemm(x, w, name="product"), tg.ops.add(x, x, name="twice"))
    return b.build()


def check_all(folder: Path) -> None:
    """All sections; two of the checks and one of the pairs of autotune stand for the rest."""
    with pytest.MonkeyPatch.context() as patch:
        kept = [name for name in checks.CHECKS if "partitions" in name]
        patch.setattr(running, "CHECKS", {name: checks.CHECKS[name] for name in kept})
        patch.setattr(running.overlaps, "pairs", lambda rows: [("twice", small_step())])
        running.run(DEVICE, folder / "gpu-check.json", minutes=60, graphs={"step": small_step()})


def test_the_command_says_what_it_did(on_virtual: Call, tmp_path: Path) -> None:
    code, text = on_virtual(run_command, tmp_path)
    assert code == 0, text
    said = " ".join(text.split())
    assert "(simulated), 132 SMs" in said and "rates: done" in said
    assert "0 of 0 checks hold; 0 of 0 pairs were compared; all times and rates are simulated" in said
    report = read_report(tmp_path / "gpu-check.json")
    rates = [value for name, value in (report.calibration or {}).items() if name.startswith("hbm_read")]
    assert rates == sorted(rates) and len(rates) == 5, "more SMs draw more bandwidth"


def run_command(folder: Path) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "SECTIONS", tuple(s for s in running.SECTIONS if s[0] == "rates"))
        patch.setattr("taskgraph.cli.gpu_check.steps", lambda virtual: {})
        return run_cli(
            "gpu-check", "--device", "virtual:h100_sxm", "--minutes", "60", "--out", str(folder / "gpu-check.json")
        )


def run_cli(*arguments: str) -> tuple[int, str]:
    from taskgraph.cli.main import app

    done = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    return done.exit_code, done.output


def test_doctor_tells_of_the_virtual_gpu(on_virtual: Call) -> None:
    code, text = on_virtual(run_cli, "doctor", "--device", "virtual:h100_sxm")
    assert code == 0 and "simulated" in text and "h100_sxm" in text


def test_a_section_that_fails_is_told_and_the_next_begins(on_virtual: Call, tmp_path: Path) -> None:
    states = on_virtual(fail_sections, tmp_path)
    assert states == [
        ("breaks", "failed", "ValueError: no such thing"),
        ("loses one", "partly", "1 of 2; 1 failed, the first: second: DeviceError: gone"),
        ("works", "done", "well"),
    ]
    assert [(s.name, s.state, s.text) for s in read_report(tmp_path / "r.json").sections] == states
    assert len(json.loads((tmp_path / "seen.json").read_text())) == 1, "the file was there after the first section"


def fail_sections(folder: Path) -> list[tuple[str, str, str]]:
    def breaks(run: running.Run) -> str:
        raise ValueError("no such\nthing")

    def loses(run: running.Run) -> str:
        def gone() -> int:
            raise DeviceError("gone")

        (folder / "seen.json").write_text(json.dumps(json.loads(run.out.read_text())["sections"]))
        return f"{sum(run.tried(name, body) or 0 for name, body in (('first', lambda: 1), ('second', gone)))} of 2"

    def works(run: running.Run) -> str:
        return "well"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "SECTIONS", (("breaks", breaks, 1.0), ("loses one", loses, 1.0), ("works", works, 1.0)))
        report = running.run("virtual:h100_sxm", folder / "r.json", minutes=60)
    assert not report.passed and "failed: breaks" in running.summary(report)
    return [(s.name, s.state, s.text) for s in report.sections]


def test_a_section_whose_time_is_over_says_partly() -> None:
    clock = running.Clock(100.0, iter([0.0, 0.0, 0.0, 0.0, 24.0, 25.0]).__next__)
    assert clock.give(0.25) == 25.0
    assert not clock.over and clock.over


# --------------------------------------------------------------------------------------------- checks


def test_what_was_not_asked_or_not_compared_is_counted_apart() -> None:
    """Nothing that did not happen is inside a number of things that hold."""
    held = (Check("a", True, "seen"), Check("b", False, "not asked: no splits", asked=False))
    pairs = (
        Overlap("p", True, "sequential", 1.0, 1.0, 0.1, "sequential: it loses."),
        Overlap("q", False, "sequential", 1.0, 1.0, 0.1, "sequential: nothing was compared."),
    )
    report = replace(EMPTY, checks=held, overlaps=pairs)
    text = running.summary(report)
    assert report.passed and "1 of 1 checks hold, 1 not asked; 1 of 2 pairs were compared; all times" in text
    assert "--   b: not asked" in text and "q: NOT COMPARED" in text and "p: sequential" in text
    failing = replace(EMPTY, checks=(Check("a", False, "x"),))
    assert not failing.passed and "FAIL a: x" in running.summary(failing)
    assert "0 of 1 checks hold; 0 of 0 pairs" in running.summary(failing)


def raises_device_error(bench: checks.Bench) -> str:
    raise DeviceError("lost")


def raises_assertion(bench: checks.Bench) -> str:
    raise AssertionError("outputs differ")


def raises_anything(bench: checks.Bench) -> str:
    raise RuntimeError("torch\nfailed")


@pytest.mark.parametrize(
    ("broken", "seen"),
    [(raises_device_error, "DeviceError: lost"), (raises_assertion, "AssertionError: outputs differ"),
     (raises_anything, "RuntimeError: torch failed")],
)  # fmt: skip
def test_a_check_that_fails_is_reported(broken: Callable[[checks.Bench], str], seen: str, on_virtual: Call) -> None:
    made = on_virtual(run_check, broken)
    assert (made.passed, made.seen) == (False, seen)


def run_check(function: Callable[[checks.Bench], str]) -> Check:
    return checks.checked("broken", function, bench())


def bench() -> checks.Bench:
    return checks.Bench(driver.Gpu.open(), specs.get("h100_sxm"), "virtual:h100_sxm")


def test_a_nan_is_a_difference() -> None:
    right = torch.ones(4)
    assert checks._difference(right, right) == 0.0
    assert checks._difference(torch.tensor([1.0, math.nan, 1.0, 1.0]), right) == math.inf


@pytest.mark.parametrize(
    ("kind", "name"),
    [("add", "every op kind, {}, equals the cpu backend"),
     ("elementwise", "pointwise ops, norms and moves along axes, {}, equal the cpu backend")],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_equality_checks_see_a_wrong_output(on_virtual: Call, kind: str, name: str, dtype: str) -> None:
    on_virtual(see_a_wrong_output, kind, name.format(dtype))


def see_a_wrong_output(kind: str, name: str) -> None:
    """The check holds, and with a launch rule that takes the first operand for all it must fail."""
    assert checks.checked(name, checks.CHECKS[name], bench()).passed
    right = kinds.GPU_KINDS[kind]
    wrong = replace(right, launches=lambda op, ins, outs, site: right.launches(op, [ins[0]] * len(ins), outs, site))
    kinds._KINDS[kind] = wrong
    try:
        made = checks.checked(name, checks.CHECKS[name], bench())
    finally:
        kinds._KINDS[kind] = right
    assert not made.passed and "differ from the cpu backend" in made.seen


def test_the_leak_check_counts_what_torch_holds(on_virtual: Call) -> None:
    on_virtual(see_a_leak)


def see_a_leak() -> None:
    """Bytes that torch's allocator says it holds are no leak; others are."""
    name = "a bind to other memory updates the graph in place; closing frees everything"
    lost: list[driver.Memory] = []

    def leaking(bench: checks.Bench, inner: Callable[[checks.Bench], None] = checks._bind_and_close) -> None:
        inner(bench)
        lost.append(driver.Memory(8 << 20))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "_bind_and_close", leaking)
        made = checks.checked(name, checks.CHECKS[name], bench())
        assert not made.passed and f"{8 << 20} bytes of device memory were not freed" in made.seen
        patch.setattr(checks, "held_bytes", lambda: sum(memory.nbytes for memory in lost))
        made = checks.checked(name, checks.CHECKS[name], bench())
        assert made.passed and f"torch's allocator holds {8 << 20} bytes more" in made.seen
    for memory in lost:
        memory.close()


# --------------------------------------------------------------------------------------------- timing


def test_a_loop_takes_what_its_kernel_takes(on_virtual: Call) -> None:
    on_virtual(time_a_loop)


def time_a_loop() -> None:
    """On a virtual device alone and beside another kernel are the cost model's time, however often it is captured."""
    gpu, device = driver.Gpu.open(), specs.get("h100_sxm")
    bed = rig.Rig(gpu)
    chosen = [cases.gemm_case("gemm", 64, 96, 64), cases.elementwise_case(cases.SMALL, "swiglu", 64)]
    with bed.lanes(64, 48) as lanes:
        assert [lane.sms for lane in lanes] == [64, 48]
        for case, lane in zip(chosen, lanes, strict=True):
            with cases.runner(case, gpu, device, fast.Fast()) as made, bed.loop(made, lane) as loop:
                assert loop.count > 2
                assert bed.alone_s(loop) == pytest.approx(made.predicted_s(lane.sms), rel=1e-3)
                assert bed.beside_s(loop, loop) > 0
                assert bed.power([loop], 1.0) == rig.Reading()


class FakeCounter(power.Meter):
    """A counter that is renewed every 100 ms of a clock that each call advances by 1 ms: 500 W."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        self.now += 1e-3
        return self.now

    def millijoules(self) -> int | None:
        return int(self.now / 0.1 + 1e-9) * 50_000

    def sm_mhz(self) -> int | None:
        return 1980


def test_watts_are_between_two_renewals_of_the_counter() -> None:
    counter, fed = FakeCounter(), [0]

    def feed() -> None:
        fed[0] += 1

    watts, mhz = counter.watch(0.25, feed, counter.clock)
    assert watts == pytest.approx(500, rel=0.02) and mhz == 1980 and fed[0] > 100


def test_a_counter_that_stands_still_gives_nothing() -> None:
    class Still(FakeCounter):
        def millijoules(self) -> int | None:
            return 7

    counter = Still()
    assert counter.watch(0.25, lambda: None, counter.clock) == (None, None)


def test_watts_and_clocks_go_into_the_rows(on_virtual: Call, tmp_path: Path) -> None:
    on_virtual(read_power, tmp_path)
    report = read_report(tmp_path / "r.json")
    assert [s.state for s in report.sections] == ["done", "done"], report.sections
    assert report.corun and {(row.watts, row.sm_mhz) for row in report.corun} == {(2.0, 1980.0)}
    alone = {(row.kernel, row.sms): row for row in report.kernels_by_sms}
    for pair in report.corun:
        for name, sms in ((pair.a, pair.sms_a), (pair.b, pair.sms_b)):
            assert (alone[name, sms].watts, alone[name, sms].sm_mhz) == (1.0, 1980.0)


def read_power(folder: Path) -> None:
    """With a meter that says how many loops run, for pairs in partitions."""

    def powered(run: running.Run) -> str:
        run.rig.meter = FakeCounter()
        return running.tables.power(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig.Rig, "power", lambda self, loops, seconds: rig.Reading(float(len(loops)), 1980.0))
        pairs = ("pairs", running.tables.partition_pairs, 1.0)
        patch.setattr(running, "SECTIONS", (pairs, ("power", powered, 1.0)))
        running.run("virtual:h100_sxm", folder / "r.json", minutes=60)


def test_a_kind_that_is_wrong_or_breaks_is_left_out() -> None:
    x, out = torch.randn(4, 16), torch.empty(4, 8)
    op = cases.elementwise_case(cases.SMALL, "swiglu", 4).graph.ops[0]
    gate, up = x.chunk(2, -1)

    def right() -> None:
        out.copy_(torch.nn.functional.silu(gate) * up)

    def wrong() -> None:
        out.copy_(gate * up)

    def breaks() -> None:
        raise ValueError("no\ncompiler")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        for run, why in ((right, ""), (wrong, "differs by"), (breaks, "ValueError: no compiler")):
            found, left_out = fast.Fast(), dict[str, str]()
            found.verify({"swiglu": fast.Example(op, [x], out, run)}, left_out)
            assert bool(left_out) is bool(why) and left_out.get("swiglu", "").startswith(why)
            assert [text.partition(": ")[0] for text in found.left_out] == ["swiglu"] * len(left_out)


def test_references_know_every_case_of_a_step() -> None:
    """Each against the cpu backend, on the values that gpu-check draws."""
    s = cases.SMALL
    small = [cases.rope_case(s, 6), cases.embedding_case(s, 9), cases.slice_case(s, 9), cases.experts_case(s, 9, 16, 2)]
    small += [cases.elementwise_case(s, kind, 9) for kind in ("swiglu", "rmsnorm", "argmax", "add")]
    small += [cases.decode_case(s, 5, 70), cases.prefill_case(s, 3, 40, 88, "chunks")]
    assert {case.graph.ops[0].kind for case in small} == {*fast.REFERENCES}
    for case in small:
        (op,) = case.graph.ops
        if op.kind.startswith("paged_"):
            continue  # pages of the cpu backend lie otherwise
        values = {**fill(case.graph.flat(), {}, seed=1), **case.given}
        with tg.compile(case.graph, tg.plan(case.graph, "cpu", "list"), "cpu") as exe:
            wanted = exe({name: value.clone() for name, value in values.items()})[op.outputs[0]]
        made = fast.REFERENCES[op.kind](op, [values[name] for name in op.inputs], wanted)
        torch.testing.assert_close(made.reshape(wanted.shape).float(), wanted.float(), rtol=2e-2, atol=4e-2)


# ---------------------------------------------------------------------------------------------- files

EMPTY = GpuReport("measured", specs.get("h200_sxm"), "GPU", 13000, (9, 0), (), {})
FULL = replace(
    EMPTY,
    calibration={"h2d_bytes_per_s": 5.5e10},
    gemm=(GemmTime(1, 2, 3, 1e-5), GemmTime(64, 96, 128, 3.25e-4, 512.5, 1980.0)),
    kernels_by_sms=(KernelTime("decode_512x1024", 8, 5e-3),),
    corun=(PairTime("a", "b", "partition", 64, 68, 1e-4, 2e-4, 1.1e-4, 2.2e-4),),
)


def test_a_report_reads_back_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(FULL.to_json())
    assert read_report(tmp_path / "r.json") == FULL
    assert FULL.tables()["gemm.csv"].splitlines()[1:] == ["1,2,3,1.0000e-05,,", "64,96,128,3.2500e-04,512.5,1980.0"]


def bad_files() -> Iterator[tuple[str, str]]:
    """(text, what the error says): each names the file, where it can the line, and the way out."""
    text = FULL.to_json()
    row = 1 + text[: text.index('"m": 64')].count("\n")
    yield text[: text.index('"m": 64') + 4], rf"line {row} column .*Run `taskgraph gpu-check` again"
    yield text.replace('"schema": 3', '"schema": 2'), r"has schema 2; this version reads 3\. Run `taskgraph gpu-check`"
    yield text.replace("0.000325", "NaN"), rf"r\.json, line {row}: .*gemm\.1 is refused: seconds is nan.*again"
    yield text.replace("0.000325", "-0.5"), rf"r\.json, line {row}: .*gemm\.1 is refused: seconds is -0\.5; it must be"
    yield text.replace("0.000325", "3250000"), rf"line {row}: .*seconds is 3250000\.0; it must be seconds from"
    yield text.replace('"m": 64', '"m": 0'), rf"line {row}: .*m is 0; it must be at least 1"
    yield text.replace('"mode": "partition"', '"mode": "both"'), r"corun\.0 .*mode is 'both'; it is shared or partition"
    yield text.replace('"name": "h200_sxm"', '"name": ""'), r"line 4: .*device is refused: device '': needs a name"
    yield text.replace("55000000000.0", "Infinity"), r"calibration .*h2d_bytes_per_s.* is inf.* must be finite"
    yield "[]", r"has schema None"


@pytest.mark.parametrize(("text", "wanted"), list(bad_files()))
def test_a_damaged_report_names_file_line_and_way_out(text: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=wanted) as caught:
        read_report(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(CalibrationError, match=r"cannot read gpu-check report.*nothing\.json"):
        read_report(tmp_path / "nothing.json")
