"""A server under clients that behave badly: it loses no answer, leaves no page, and does not grow."""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import machine, print_json

EPILOG = """\
A process serves a tiny model of random weights over HTTP, with so few pages that sequences are pre-empted. Clients
send requests whose answers are known from asking for each alone, whole and streamed; some read slowly, some leave
within an answer, some within their own request; between them go bodies with every kind of wrong value. What is
counted as lost: an answer that differs or does not come, a status that says that the server is at fault, pages or
requests that are left at the end. Memory is the server's own (VmRSS), after the first tenth and at the end.

example:
  python -m benchmarks.soak --minutes 10 --json
"""
NAME = "tiny"
CONTEXT, PAGE = 160, 32


# ------------------------------------------------------------------------------------------ the server


def tiny_served(*, pages: int = 14, host_pages: int = 20, sequences: int = 6, most_open: int = 48) -> Any:
    """What the server has: a real engine of a tiny model in f32, and a tokenizer with a token a byte. In steps of up to
    64 rows its answers do not depend on what else it does."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from taskgraph.models import llama
    from taskgraph.models.config import from_hf
    from taskgraph.models.text.tokenizer import Tokenizer as Ours
    from taskgraph.serving.http.app import Served
    from taskgraph.serving.options import KvMemory, Policy
    from taskgraph.serving.runners.cpu import cpu_engine
    from taskgraph.serving.scheduler import Limits
    from taskgraph.serving.service import Service

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True) for text in ("<|turn|>", "<|end|>")])
    template = "{% for m in messages %}<|turn|>{{ m['role'] }}:{{ m['content'] }}{% endfor %}<|turn|>"
    tokenizer = Ours(raw, source="soak", eos_ids=[257], chat_template=template)
    body = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 258, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    config, drawn = from_hf(body, NAME), torch.Generator().manual_seed(0)
    shapes = llama.step_graph(config, batch=1, tokens=1, cache=8, dtype="f32").flat().with_role("weight")
    weights = {t.name: torch.randn(t.shape, generator=drawn) * 0.3 for t in shapes}
    engine = cpu_engine(
        config, weights, Limits(sequences, 48, 4, CONTEXT), KvMemory(pages, host_pages, page_size=PAGE),
        policy=Policy(expected_output=4.0),
    )  # fmt: skip
    engine.runner.warm()
    return Served(Service(engine, most_open), tokenizer, NAME, 1 << 16)


def serve() -> None:
    """Serve on a free port, which is printed; at the end a line with what the engine did and has left."""
    from taskgraph.serving.http.app import run_server

    served = tiny_served()
    run_server(served, "127.0.0.1", 0, drain_s=10.0, started=lambda port: print(port, flush=True))
    engine = served.service.engine
    left = engine.cache.device.held + engine.cache.host.held
    facts = {"steps": engine.stats.steps, "tokens": engine.stats.tokens, "preemptions": engine.scheduler.preemptions}
    print(json.dumps({**facts, "recomputed": engine.scheduler.recomputed, "pages_left": left}), flush=True)


# ------------------------------------------------------------------------------------------- requests


def good_bodies() -> list[tuple[str, dict[str, Any]]]:
    """(path, body) of requests whose answers do not depend on anything else."""
    draw = random.Random(0)
    asks: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "top_p": 0.9, "seed": 1, "n": 2},
        {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5}, {"temperature": 0, "logprobs": 3},
        {"temperature": 0, "stop": ["e", "\n"]}, {"temperature": 0, "logit_bias": {"70": 3, "5": -100}},
        {"temperature": 0.9, "seed": 3, "response_format": {"type": "json_object"}}, {"temperature": 0, "echo": True},
    ]  # fmt: skip
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    made = []
    for i in range(24):
        prompt = "".join(draw.choices("abcdefgh 0123é", k=draw.randint(1, 60)))
        body = {"model": NAME, "prompt": prompt, "max_tokens": draw.randint(1, 70), **asks[i % len(asks)]}
        made.append(("/v1/completions", body))
    for i in range(8):
        chat = {"model": NAME, "messages": [{"role": "user", "content": "hi" * i}], "temperature": 0}
        wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}
        more = [{"max_tokens": 30}, {"max_tokens": 40, "logprobs": True, "top_logprobs": 2}, {**wanted}, {}][i % 4]
        made.append(("/v1/chat/completions", {**chat, **more}))
    return made


WRONG: list[Any] = [
    None, True, False, 0, -1, 1, 1.0, 1.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**40,
    -(2**63), "", "x", "1", "\x00", "é" * 500, [], [[]], [None], [0], [-1], [257], [258], [2**63], [True], [[1], [2]],
    ["a", 1], ["a"] * 1000, {}, {"a": 1}, {"type": "json_object"}, {"type": "json_schema"}, {"1": 2}, {"x": 1},
    {"999": 1}, {"1": float("nan")}, {"include_usage": True}, [{"role": "user", "content": "x"}],
    [{"role": "tool", "content": "x"}],
    {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nothing"}}},
    {"type": "json_schema", "json_schema": {"name": "s", "schema": {"$ref": "#/a"}}},
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], [[[[[[[[[[]]]]]]]]]],
]  # fmt: skip
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n",
    "best_of", "seed", "stop", "stream", "stream_options", "echo", "suffix", "logprobs", "top_logprobs", "logit_bias",
    "presence_penalty", "frequency_penalty", "response_format", "tools", "tool_choice", "user", "metadata",
    "ignore_eos", "functions", "store", "unknown",
)  # fmt: skip


def hostile(draw: random.Random) -> tuple[str, bytes]:
    """(path, body): one with wrong values in one to three fields, or one that is no JSON of any use."""
    path, body = draw.choice(good_bodies())
    if draw.random() < 0.15:
        junk = [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 30_000, b'{"a":' * 5_000, b'"' + b"a" * 70_000]
        return path, draw.choice(junk)
    changed = {**body, **{name: draw.choice(WRONG) for name in draw.sample(FIELDS, draw.randint(1, 3))}}
    if draw.random() < 0.2:
        changed.pop(draw.choice(list(changed)))
    text = json.dumps(changed)
    if draw.random() < 0.1:
        text = text[:-1] + ', "temperature": 0, "temperature": 1e400}'
    return path, text.encode()


# -------------------------------------------------------------------------------------------- clients


@dataclass
class Soak:
    """What clients saw."""

    url: str
    expected: list[Any] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def complain(self, what: str) -> None:
        self.seen["lost"] += 1
        if len(self.wrong) < 20:
            self.wrong.append(what[:400])

    async def learn(self, client: httpx.AsyncClient) -> None:
        """The answer of every good request, asked for alone."""
        for path, body in good_bodies():
            response = await client.post(path, json=body)
            if response.status_code != 200:
                raise RuntimeError(f"{path} {body}: {response.text}")
            self.expected.append(_said(response.json()))

    async def good(self, client: httpx.AsyncClient, draw: random.Random, slow: bool = False) -> None:
        """One request: the answer is what it was alone. When too many are open, it comes back later."""
        number = draw.randrange(len(self.expected))
        path, body = good_bodies()[number]
        stream = slow or draw.random() < 0.5
        while True:
            try:
                status, got = await (_streamed(client, path, body, slow) if stream else _whole(client, path, body))
            except Exception as error:
                return self.complain(f"{path} {body}: {type(error).__name__}: {error}")
            if status != 429:
                break
            self.seen["429"] += 1
            await asyncio.sleep(0.05)
        self.seen["slow" if slow else "streamed" if stream else "whole"] += 1
        if status != 200 or got != self.expected[number]:
            self.complain(f"{path} {body}: {status} {got!r}, alone {self.expected[number]!r}")
        return None

    async def leave(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        """Go away within an answer."""
        path, body = draw.choice(good_bodies())
        self.seen["left"] += 1
        if draw.random() < 0.3:
            with suppress(httpx.TimeoutException):
                await client.post(path, json=body, timeout=draw.uniform(0.001, 0.05))
            return
        async with client.stream("POST", path, json={**body, "stream": True}) as response:
            wanted = draw.randint(0, 6)
            async for _ in response.aiter_lines():
                wanted -= 1
                if wanted < 0:
                    return

    async def half(self, draw: random.Random) -> None:
        """Go away within the request."""
        self.seen["half"] += 1
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        path, body = draw.choice(good_bodies())
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        writer.write((head + data)[: draw.randint(1, len(head) + len(data) - 1)])
        await writer.drain()
        await asyncio.sleep(draw.uniform(0, 0.02))
        writer.close()

    async def wicked(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        """A body with wrong values: an answer, or an error that says what is wrong, as JSON in either case."""
        path, body = hostile(draw)
        response = await client.post(path, content=body)
        self.seen[f"hostile {response.status_code}"] += 1
        if response.status_code not in (200, 400, 404, 413, 429):
            return self.complain(f"{path} {body[:200]!r}: {response.status_code} {response.text}")
        try:
            if not response.headers["content-type"].startswith("text/event-stream"):
                json.loads(response.text, parse_constant=_no_constant)
        except ValueError as error:
            self.complain(f"{path} {body[:200]!r}: {error} in {response.text[:200]}")
        return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _said(answer: dict[str, Any]) -> list[Any]:
    """What must be equal: text and end of every choice."""
    return [((c.get("message") or {}).get("content", c.get("text")), c["finish_reason"]) for c in answer["choices"]]


async def _whole(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    response = await client.post(path, json=body)
    return response.status_code, _said(response.json()) if response.status_code == 200 else response.text


async def _streamed(client: httpx.AsyncClient, path: str, body: dict[str, Any], slow: bool) -> tuple[int, Any]:
    texts, ends = [""] * body.get("n", 1), [None] * body.get("n", 1)
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            return response.status_code, (await response.aread()).decode()
        async for line in response.aiter_lines():
            if slow:
                await asyncio.sleep(0.01)
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return 500, event
            for choice in event["choices"]:
                texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content", "")
                ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
    return 200, list(zip(texts, ends, strict=True))


@asynccontextmanager
async def _client(url: str, clients: int) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=4 * clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        yield client


def memory_mb(pid: int) -> float:
    """A process's resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def soak(url: str, pid: int, seconds: float, clients: int, seed: int) -> dict[str, Any]:
    """Send requests for so long; what was seen, and what was left when all had ended."""
    state = Soak(url)
    async with _client(url, clients) as client:
        await state.learn(client)
        begin, until = time.monotonic(), time.monotonic() + seconds
        early: list[float] = []

        async def one(number: int) -> None:
            draw = random.Random(f"{seed}-{number}")
            kinds: Sequence[Callable[[], Any]] = (
                lambda: state.good(client, draw), lambda: state.wicked(client, draw),
                lambda: state.leave(client, draw), lambda: state.half(draw), lambda: state.good(client, draw, True),
            )  # fmt: skip
            while time.monotonic() < until:
                (kind,) = draw.choices(kinds, (55, 20, 15, 5, 5))
                try:
                    await kind()
                except Exception as error:
                    state.complain(f"a client: {type(error).__name__}: {error}")
                if not early and time.monotonic() - begin > seconds / 10:
                    early.append(memory_mb(pid))

        await asyncio.gather(*(one(number) for number in range(clients)))
        health: dict[str, Any] = {}
        for _ in range(200):
            health = (await client.get("/health")).json()
            if health["open"] == 0 and health["pages_held"] == 0:
                break
            await asyncio.sleep(0.05)
        if health["open"] or health["pages_held"]:
            state.complain(f"left at the end: {health}")
        again = Soak(url)
        await again.learn(client)
        if again.expected != state.expected:
            state.complain("answers differ after the soak")
    first, last = (early or [memory_mb(pid)])[0], memory_mb(pid)
    return {
        "seconds": round(time.monotonic() - begin, 1), "seen": dict(sorted(state.seen.items())),
        "lost": state.seen["lost"], "wrong": state.wrong, "memory_mb": [round(first, 1), round(last, 1)],
    }  # fmt: skip


def run(seconds: float, clients: int = 12, seed: int = 0) -> dict[str, Any]:
    """Start a server, soak it, and end it; what clients saw and what the engine did."""
    command = [sys.executable, "-m", "benchmarks.soak", "--serve"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            report = asyncio.run(soak(url, server.pid, seconds, clients, seed))
            server.send_signal(signal.SIGTERM)
            out, err = server.communicate(timeout=60)
        finally:
            server.kill()
    report["engine"] = json.loads(out.splitlines()[-1])
    report["exit"], report["stderr"] = server.returncode, err[-2000:]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=0.5, help="how long (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=12, help="at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what clients do (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    report = run(60 * given.minutes, given.clients, given.seed)
    if given.json:
        print_json({"machine": machine(), **report})
    else:
        for name, value in report.items():
            print(f"{name}: {value}")
    if report["lost"] or report["exit"] or report["engine"]["pages_left"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
