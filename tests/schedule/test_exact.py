"""CP-SAT against the search, with one mode and several, whole and real times; and the benchmark on files."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import progen, rcpsp
from benchmarks.rcpsp_list import solve_list
from taskgraph.schedule.rcpsp import exact
from taskgraph.schedule.rcpsp.evolve import solve, solve_auto
from taskgraph.schedule.rcpsp.project import Project, check, make_project

PROOF_S = 20.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("modes", [1, 3])
def test_the_search_finds_what_cp_sat_proves(modes: int, seed: int) -> None:
    project = progen.generate(12, 1.5, 0.75, 0.3, seed=seed, modes=modes)
    found, best = solve(project, 0.5, seed), exact.solve(project, PROOF_S)
    check(project, found)
    check(project, best)
    assert best.proven and best.makespan == found.makespan
    assert best.made_by == "exact"


def test_a_hint_is_never_made_worse_and_gains_a_proof() -> None:
    project = progen.generate(20, 1.5, 0.75, 0.3, seed=5)
    hint = solve_list(project, 0.005)
    best = exact.solve(project, PROOF_S, hint)
    check(project, best)
    assert best.proven and hint.lower_bound <= best.lower_bound == best.makespan <= hint.makespan


def test_real_times_are_proven_to_a_millionth() -> None:
    rng = np.random.default_rng(4)
    whole = progen.generate(10, 1.5, 0.75, 0.3, seed=2)
    before = [whole.pred[a:b].tolist() for a, b in zip(whole.pred_ptr, whole.pred_ptr[1:], strict=False)]
    project = make_project(rng.uniform(1e-5, 1e-3, whole.seconds.shape), whole.use / 3, whole.capacity / 3, before)
    best = exact.solve(project, PROOF_S, solve(project, 0.1))
    check(project, best)
    assert best.proven and best.lower_bound <= best.makespan <= best.lower_bound * (1 + 2e-6)


def test_auto_proves_small_projects() -> None:
    found = solve_auto(progen.generate(20, 1.5, 0.75, 0.3, seed=5), PROOF_S / 10)
    assert found.proven


def sm_file(project: Project) -> str:
    """A project in PSPLIB's format, with the source and sink that the format has."""
    n = project.n + 2
    rows = [project.succ[a:b] + 2 for a, b in zip(project.succ_ptr, project.succ_ptr[1:], strict=False)]
    first = [i + 2 for i in range(project.n) if project.pred_ptr[i] == project.pred_ptr[i + 1]]
    after = [first, *([*row.tolist()] or [n] for row in rows), []]
    need = [[0] * 4, *project.use[:, 0].astype(int).tolist(), [0] * 4]
    took = [0, *project.seconds[:, 0].astype(int).tolist(), 0]
    bar = "*" * 72
    lines = [bar, "PRECEDENCE RELATIONS:", "jobnr.    #modes  #successors   successors"]
    lines += [f"{i + 1} 1 {len(row)} " + " ".join(map(str, row)) for i, row in enumerate(after)]
    lines += [bar, "REQUESTS/DURATIONS:", "jobnr. mode duration  R 1  R 2  R 3  R 4", "-" * 72]
    lines += [f"{i + 1} 1 {took[i]} " + " ".join(map(str, need[i])) for i in range(n)]
    capacity = " ".join(map(str, project.capacity.astype(int)))
    return "\n".join([*lines, bar, "RESOURCEAVAILABILITIES:", "  R 1  R 2  R 3  R 4", capacity, bar, ""])


@pytest.fixture
def instances(tmp_path: Path) -> Path:
    """A folder of three instances with their optima."""
    known = ["problem,optimum"]
    (tmp_path / "optimum").mkdir()
    for i in range(3):
        project = progen.generate(10, 1.5, 0.75, 0.3, seed=i)
        (tmp_path / f"j10_{i}.sm").write_text(sm_file(project))
        known.append(f"j10_{i}.sm,{exact.solve(project, PROOF_S).makespan:.0f}")
    (tmp_path / "optimum" / "optimum.csv").write_text("\n".join(known) + "\n")
    return tmp_path


@pytest.mark.parametrize("scheduler", ["auto", "list"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_benchmark_prints_its_keys(
    instances: Path, scheduler: str, packed: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = instances
    if packed:
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in instances.rglob("*.*"):
                if file != path:
                    archive.write(file, file.relative_to(instances))
    assert rcpsp.main([str(path), "--scheduler", scheduler, "--seconds", "0.3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"instances", "optimal", "mean_gap_pct", "mean_gap_cp_pct", "seconds", "invalid"}
    assert (result["instances"], result["optimal"], result["invalid"]) == (3, 3, 0)
    assert result["mean_gap_pct"] == 0.0 < result["mean_gap_cp_pct"]


def test_without_optima_their_figures_are_null(instances: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (instances / "optimum" / "optimum.csv").unlink()
    assert rcpsp.main([str(instances), "--scheduler", "list", "--seconds", "0.01", "--limit", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["instances"] == 2
    assert result["optimal"] is None and result["mean_gap_pct"] is None


def test_bounds_of_open_instances_are_understood_and_labelled(
    instances: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PSPLIB's larger sets have `82..87` where the optimum is not known: its gap is one to the lower bound."""
    file = instances / "optimum" / "optimum.csv"
    first, *others = rcpsp.read_instances(instances)
    assert first.optimum is not None and first.low == first.high == first.optimum
    file.write_text(file.read_text().replace(f"j10_0.sm,{first.optimum:.0f}", f"j10_0.sm,{first.optimum / 2:g}..999"))
    read = rcpsp.read_instances(instances)
    assert (read[0].low, read[0].high, read[0].optimum) == (first.optimum / 2, 999.0, None)
    assert [i.optimum for i in read[1:]] == [i.optimum for i in others]
    assert rcpsp.main([str(instances), "--scheduler", "auto", "--seconds", "0.3", "--all", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert (result["instances"], result["open"], result["optimal"]) == (3, 1, 2)
    assert result["mean_gap_lower_pct"] >= 100 / 3 and result["mean_gap_pct"] == 0.0
    assert "mean_gap_lower_pct" in out


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("optimum/optimum.csv", "j10_1.sm,", "j10_1.sm,about ", ["optimum.csv, line 3", "'about ", "82..87"]),
        ("optimum/optimum.csv", "j10_1.sm,", "j10_1.sm,87..82 #", ["optimum.csv, line 3"]),
        ("optimum/optimum.csv", "j10_1.sm,", "j10_1.sm,nan", ["optimum.csv, line 3"]),
        ("optimum/optimum.csv", "problem,", "instance,", ["optimum.csv", "problem and optimum"]),
        ("j10_1.sm", "PRECEDENCE RELATIONS:", "RELATIONS:", ["j10_1.sm"]),
        ("j10_1.sm", "\n2 1 ", "\n2 one ", ["j10_1.sm, line 5", "one"]),
        ("j10_1.sm", "REQUESTS/DURATIONS:", "", ["j10_1.sm"]),
        ("j10_1.sm", "\n2 1 ", "\n2 0 ", ["j10_1.sm", "mode"]),
    ],
)
def test_a_damaged_input_file_is_named_in_one_line(
    instances: Path, name: str, old: str, new: str, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = instances / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    assert rcpsp.main([str(instances), "--seconds", "0.01"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("rcpsp: ") and all(word in error for word in says), error


def test_what_is_no_archive_or_no_text_is_named(instances: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (instances / "set.zip").write_bytes(b"PK\x03\x04 no archive")
    (instances / "j10_1.sm").write_bytes(b"\xff\xfe\x00")
    for path, word in ((instances / "set.zip", "set.zip"), (instances, "j10_1.sm")):
        assert rcpsp.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and word in error


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nowhere"],
        ["--generate", "30", "--seconds", "nan"],
        ["--limit", "x"],
        ["--generate", "30", "--seconds", "0"],
        ["--generate", "31"],
    ],
)
def test_bad_arguments_are_named(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        rcpsp.main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err
