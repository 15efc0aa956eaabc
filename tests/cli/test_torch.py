"""Commands on modules of torch: --torch and hf: of plan, whatif and run."""

import json
from pathlib import Path

import pytest

from tests.command_line import call

FACTORY = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), (torch.randn(4, 64),)


def wrong():
    return nn.Linear(2, 2)
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_for_cli.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "made_for_cli:net"


def test_plan_and_whatif_of_a_factory(
    factory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", "--torch", factory, "--device", "l40s") == 0
    assert "calls/s (simulated, one l40s)" in capsys.readouterr().out
    assert call(monkeypatch, "whatif", "--torch", factory, "--hbm", "x2") == 0
    assert "simulated" in capsys.readouterr().out


def test_plan_of_a_config_that_only_transformers_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    body = {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(body))
    for source in (tmp_path, tmp_path / "config.json"):
        assert call(monkeypatch, "plan", f"hf:{source}", "--batch", "2", "--context", "32", "--scheduler", "list") == 0
        assert "tokens/s (simulated" in capsys.readouterr().out


@pytest.mark.slow
def test_run_times_three_ways(
    factory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "--torch", factory) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("eager torch", "taskgraph", "measured", "largest difference", "pieces"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan",), "one of them"),
        (("plan", "llama-3-8b", "--torch", "a:b"), "one of them"),
        (("plan", "--torch", "made_for_cli"), "package.module:function"),
        (("plan", "--torch", "made_for_cli:absent"), "cannot be imported"),
        (("plan", "--torch", "made_for_cli:wrong"), "(module, example inputs)"),
        (("plan", "--torch", "made_for_cli:net", "--ranks", "2"), "--ranks"),
        (("plan", "hf:/nowhere"), "no causal language model"),
    ],
)
def test_what_cannot_be_is_one_line(
    factory: str,
    arguments: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert said in error
