"""`taskgraph serve` and `bench-serve` on a checkpoint: a random tiny Llama with a byte tokenizer."""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from taskgraph.cli import serve
from taskgraph.models import llama
from taskgraph.models.weights import open_checkpoint
from taskgraph.serving.session import Session
from taskgraph.serving.simulate.traces import COLUMNS
from tests.command_line import call
from tests.serve_cases import VOCABULARY, raw_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in Hugging Face layout."""
    import transformers as hf

    path = tmp_path_factory.mktemp("tiny") / "tiny"
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(5)
    hf.LlamaForCausalLM(config).save_pretrained(path)
    raw_tokenizer().save(str(path / "tokenizer.json"))
    return path


def alone(folder: Path, prompt: str, tokens: int) -> str:
    """What the model says to one prompt, greedily, on a static cache."""
    with open_checkpoint(folder) as checkpoint:
        config, tokenizer = checkpoint.config, checkpoint.tokenizer()
        weights = llama.load_weights(config, checkpoint, "f32")
    with Session(config, weights, cache=128) as session:
        return tokenizer.decode(list(session.generate(tokenizer.encode(prompt), tokens)))


@pytest.mark.parametrize("device", ["cpu", "virtual:h100_sxm"])
def test_serve_answers_what_the_model_says(folder: Path, device: str) -> None:
    command = [sys.executable, "-m", "taskgraph.cli", "serve", str(folder), "--port", "0", "--dtype", "f32"]
    command += ["--device", device]
    limits = ["--sequences", "2", "--step-tokens", "32", "--context", "64", "--name", "tiny"]
    limits += ["--no-warm"] if device == "cpu" else ["--warm-within", "0"]
    with subprocess.Popen([*command, *limits], cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            before: list[str] = []
            for said in server.stderr:
                if "serving" in said:
                    break
                before.append(said)
            assert any("ready: 1 of" in line and "they share" in line for line in before) is (device != "cpu")
            url = re.search(r"http://[\d.:]+", said)
            assert url is not None
            asked = {"model": "tiny", "prompt": ["Hello", "abc"], "max_tokens": 12, "temperature": 0}
            response = httpx.post(f"{url[0]}/v1/completions", json=asked, timeout=60)
            texts = [choice["text"] for choice in response.json()["choices"]]
            sampled = {"model": "tiny", "prompt": "Hello", "temperature": 1.0, "top_k": 20, "seed": 3}
            drawn = [httpx.post(f"{url[0]}/v1/completions", json=sampled, timeout=60).json() for _ in range(2)]
            server.send_signal(signal.SIGTERM)
            rest = server.stderr.read()
        finally:
            server.terminate()
    assert texts == [alone(folder, "Hello", 12), alone(folder, "abc", 12)]
    assert drawn[0]["choices"] == drawn[1]["choices"], "equal seeds draw equal tokens"
    *lines, last = rest.strip().splitlines()
    assert server.returncode == 0 and last == "stopped"
    assert [line for line in lines if "path=/v1/completions status=200" in line and "in=5 out=16" in line] == lines[-2:]
    assert len(lines) == 3, "a line for every request"


def test_bench_serve_measures_a_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    rows = [(0.0, 5, 4), (0.0, 30, 9), (0.05, 11, 1)]
    trace.write_text("\n".join(",".join(map(str, row)) for row in [COLUMNS, *rows]))
    options = ["--trace", str(trace), "--sequences", "2", "--step-tokens", "32", "--context", "64", "--json"]
    assert call(monkeypatch, "bench-serve", str(folder), *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["requests"]) == ("measured", 3)
    assert report["seconds"] >= 0.05 and report["output_tokens_per_s"] == pytest.approx(14 / report["seconds"])


def test_serving_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    small = ["--sequences", "1", "--context", "32", "--no-warm"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert call(monkeypatch, "serve", str(folder), *small, "--port", str(port)) == 2
        assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert call(monkeypatch, "serve", str(folder), *small, "--dtype", "f8") == 2
    assert "f8" in capsys.readouterr().err
    assert call(monkeypatch, "serve", str(folder), *small, "--device", "gpu", "--tensor-parallel", "2") == 2
    assert "several GPUs" in capsys.readouterr().err.replace("\n", " ")
    assert call(monkeypatch, "serve", "no-such-model") == 2
    assert "no-such-model" in capsys.readouterr().err
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert call(monkeypatch, "serve", str(folder)) == 2
    assert "taskgraph-gpu[serve]" in capsys.readouterr().err.replace("\n", "")
