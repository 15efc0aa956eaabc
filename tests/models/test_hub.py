"""Checkpoints from the hub, against a small server of our own that speaks what huggingface_hub asks for."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

REPO, COMMIT = "tiny/llama", "a" * 40
CODE = """
import sys
from taskgraph.errors import WeightsError
from taskgraph.models.weights import open_checkpoint
try:
    with open_checkpoint(sys.argv[1]) as c:
        print("opened", c.config.layers, float(c.tensor("model.norm.weight").float().sum()))
except WeightsError as error:
    print("WeightsError", error)
"""


class Hub(BaseHTTPRequestHandler):
    """Repository info, and files with the headers that the client wants; `cut` names a file that breaks off halfway."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, cut: list[str], *args: Any) -> None:
        self.folder, self.cut = folder, cut
        super().__init__(*args)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPO}"):
            names = sorted(p.name for p in self.folder.iterdir())
            entries = [self._entry(name) for name in names]
            info = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._send(200, json.dumps(entries if "/tree/" in path else info).encode(), body)
        elif path.startswith(f"/{REPO}/resolve/"):
            name = path.rpartition("/")[2]
            data = (self.folder / name).read_bytes()
            etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            self._send(206 if first else 200, data[first:], body, etag, cut=name in self.cut)
        else:
            self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def _entry(self, name: str) -> dict[str, Any]:
        data = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _send(
        self, code: int, data: bytes, body: bool, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = cut or self.close_connection

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a tiny model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, names of files that break off)."""
    cut: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, published, cut)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", cut
        server.shutdown()
        thread.join()


def open_from(address: str, home: Path, repo: str = REPO) -> str:
    """What opening `repo` says, in a process whose hub is at `address` and whose cache is `home`."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", CODE, repo], env={**os.environ, **own, **proxies, **path},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_checkpoint_is_fetched_once(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = hub
    assert open_from(address, tmp_path).startswith("opened 2 64.0")
    files = {p.name for p in tmp_path.rglob("*") if p.is_symlink() or p.suffix == ".safetensors"}
    assert "model.safetensors" in files and "pytorch_model.bin" not in files


@pytest.mark.slow
def test_a_download_that_breaks_off_leaves_no_half_file(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, cut = hub
    cut.append("model.safetensors")
    message = open_from(address, tmp_path)
    assert message.startswith("WeightsError") and REPO in message and len(message.splitlines()) == 1
    assert not list(tmp_path.rglob("*.safetensors"))
    cut.clear()
    assert open_from(address, tmp_path).startswith("opened 2 64.0")


@pytest.mark.slow
def test_absent_repositories_and_hubs_are_named(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    message = open_from(hub[0], tmp_path, "tiny/absent")
    assert message.startswith("WeightsError") and "tiny/absent" in message
    message = open_from("http://127.0.0.1:9", tmp_path)
    assert message.startswith("WeightsError") and "unreachable" in message
