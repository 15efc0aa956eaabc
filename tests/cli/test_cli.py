"""The command line: what it prints, what it writes, and one line with exit code 2 for bad input."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import taskgraph as tg
from tests.command_line import call


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("run", "plan", "devices", "doctor"))


def test_devices_lists_every_spec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "devices") == 0
    text = capsys.readouterr().out.replace("\n", "")
    assert "published" in text
    assert all(d.name[:6] in text for d in tg.devices.iter_specs())


def test_doctor_reports_backends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "doctor") == 0
    text = capsys.readouterr().out
    assert "cpu backend" in text and "sim backend" in text and "measured" in text


def test_doctor_measures_again_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from taskgraph.runtime.cpu import probe

    kept = tmp_path / "cpu.json"
    kept.write_text("{}")
    monkeypatch.setattr(probe, "cache_path", lambda: kept)
    assert call(monkeypatch, "doctor") == 0 and kept.exists()
    assert call(monkeypatch, "doctor", "--probe") == 0 and not kept.exists()


def test_doctor_compiles_kernels_for_a_gpu_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'taskgraph-gpu[kernels]'")
    from taskgraph.cli import ahead
    from taskgraph.models.paged import Bucket
    from taskgraph.runtime.gpu.ahead import cubins

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ahead, "_steps", lambda config: [ahead.step_graph(config, Bucket(4), ahead._PAGES)])
    assert call(monkeypatch, "doctor", "--compile", "sm_90", "--model", "smollm2-135m") == 0
    said = capsys.readouterr()
    assert "smollm2-135m on sm_90" in said.out and "paged_decode" in said.out and "1/" in said.err
    assert list(tmp_path.rglob("decode-*.cubin")) and not list(tmp_path.rglob("*.ptx"))
    monkeypatch.setattr(cubins, "triton_version", lambda: "")
    assert call(monkeypatch, "doctor", "--compile", "sm_90", "--model", "smollm2-135m") == 0, "all of it is kept"
    assert "kept before" in capsys.readouterr().out
    assert call(monkeypatch, "doctor", "--compile", "sm_80", "--model", "smollm2-135m") == 2
    assert "pip install 'taskgraph-gpu[kernels]'" in capsys.readouterr().err
    assert call(monkeypatch, "doctor", "--compile", "h100") == 2
    assert "'h100' is no architecture" in capsys.readouterr().err


def test_plan_of_70b_without_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = [str(tmp_path / name) for name in ("plan.json", "trace.json", "report.html")]
    options = ["--device", "h100_sxm", "--batch", "256", "--context", "1024"]
    outputs = ["--out", files[0], "--trace", files[1], "--report", files[2]]
    assert call(monkeypatch, "plan", "llama-3-70b", *options, *outputs) == 0
    text = capsys.readouterr().out
    assert "simulated" in text and "Verdict" in text and "GB" in text
    plan = tg.Plan.load(files[0])
    assert plan.device.name == "h100_sxm" and len(plan.steps) == 80 * 9 + 4
    assert len([e for e in json.loads(Path(files[1]).read_text())["traceEvents"] if e["ph"] == "X"]) == len(plan.steps)
    HTMLParser().feed(Path(files[2]).read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "report.html", "trace.json"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["plan", "no-such-model"], "no-such-model"),
        (["plan", "llama-3-8b", "--device", "h100"], "h100_sxm"),
        (["plan", "llama-3-8b", "--scheduler", "magic"], "magic"),
        (["plan", "llama-3-8b", "--tokens", "8", "--context", "4"], "context"),
        (["plan", "llama-3-8b", "--batch", "0"], "batch"),
        (["run", "/no/such/file.gguf"], "/no/such/file.gguf"),
        (["run", "smollm2", "--dtype", "f8"], "f8"),
    ],
)
def test_bad_input_is_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert word in error and "Traceback" not in error


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_run_on_a_gpu_that_is_not_here_is_exit_2() -> None:
    """In a process of its own: in this one another test may have loaded the virtual driver."""
    command = [
        sys.executable,
        "-c",
        "from taskgraph.cli.main import main; main()",
        "run",
        "smollm2",
        "--backend",
        "cuda",
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 2 and "cuda" in made.stderr and "Traceback" not in made.stderr, made.stderr


@pytest.mark.parametrize("option", ["--out", "--trace", "--report"])
@pytest.mark.parametrize("place", [".", "file/x.json"])
def test_a_place_that_cannot_be_written_is_named_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, place: str
) -> None:
    (tmp_path / "file").write_text("kept")
    assert call(monkeypatch, "plan", "llama-3-8b", option, str(tmp_path / place)) == 2
    heard = capsys.readouterr()
    assert len(heard.err.strip().splitlines()) == 1 and "cannot write" in heard.err and not heard.out
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_a_write_that_fails_late_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("taskgraph.observe.trace.write_atomically", full)
    assert call(monkeypatch, "plan", "smollm2-135m", "--trace", str(tmp_path / "t.json")) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("No space left on device. Choose another place.") and len(error.splitlines()) == 1


def test_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "plan", "no-such-model")
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("taskgraph: ")


@pytest.mark.model
@pytest.mark.slow
def test_run_generates_and_reports(smollm2_gguf: Path, tmp_path: Path) -> None:
    trace, report = tmp_path / "trace.json", tmp_path / "report.html"
    command = [
        sys.executable,
        "-m",
        "taskgraph.cli",
        "run",
        str(smollm2_gguf),
        "--max-new-tokens",
        "12",
        "--dtype",
        "f32",
    ]
    command += ["--prompt", "What is the capital of France?", "--trace", str(trace), "--report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Paris" in done.stdout
    for word in ("nodes", "lanes", "measured", "simulated", "verdict", "tokens/s"):
        assert word in done.stdout
    processes = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "process_name"]
    assert len(processes) == 2
    assert "measured" in report.read_text()
