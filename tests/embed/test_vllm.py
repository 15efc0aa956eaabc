"""The decoder of vLLM by plans, with operators of vLLM's names in place of its own: rows, buckets, what is refused."""

import sys
import types
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import taskgraph as tg
from taskgraph.embed import vllm
from taskgraph.embed.entry import backend

_KEYS: dict[str, list[torch.Tensor]] = {}
"""What the cache of each layer was given: the rows of every call."""
_LIBRARY = torch.library.Library("vllm", "FRAGMENT")
_LIBRARY.define("unified_kv_cache_update(Tensor key, Tensor value, str layer_name) -> Tensor")
_LIBRARY.define(
    "unified_attention_with_output(Tensor query, Tensor key, Tensor value, Tensor(a!) output, str layer_name, "
    "Tensor? output_scale=None, Tensor? output_block_scale=None, Tensor? kv_cache_dummy_dep=None) -> ()"
)
_LIBRARY.define("looks_at_layers(Tensor x, str layer_name) -> Tensor")


def _update(key: torch.Tensor, value: torch.Tensor, layer_name: str) -> torch.Tensor:
    _KEYS.setdefault(layer_name, []).append(key.clone())
    return key.new_empty(0)


def _attend(query: Any, key: Any, value: Any, output: Any, layer_name: str, *_: Any, **__: Any) -> None:
    """Every token looks at all tokens of the call: rows of padding would be seen."""
    output.copy_(query.softmax(-1) * value.mean(0, keepdim=True) + key.sum(0, keepdim=True))


_LIBRARY.impl("unified_kv_cache_update", _update, "CompositeExplicitAutograd")
_LIBRARY.impl("unified_attention_with_output", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("looks_at_layers", lambda x, layer_name: x + 1, "CompositeExplicitAutograd")
torch.library.register_fake(
    "vllm::unified_kv_cache_update", lambda key, value, layer_name: key.new_empty(0), lib=_LIBRARY
)
torch.library.register_fake("vllm::unified_attention_with_output", lambda *_, **__: None, lib=_LIBRARY)
torch.library.register_fake("vllm::looks_at_layers", lambda x, layer_name: torch.empty_like(x), lib=_LIBRARY)


class Layer(nn.Module):
    def __init__(self, name: str, width: int, *, more: bool = False) -> None:
        super().__init__()
        self.name, self.more = name, more
        self.norm, self.qkv, self.out = nn.RMSNorm(width, 1e-6), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(-1, 2, t.shape[-1] // 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        output = torch.empty(x.shape, dtype=x.dtype).view(-1, 2, x.shape[-1] // 2)
        ordered = torch.ops.vllm.unified_kv_cache_update(k, v, self.name)
        torch.ops.vllm.unified_attention_with_output(q, k, v, output, self.name, kv_cache_dummy_dep=ordered)
        made: torch.Tensor = x + self.out(output.view(-1, x.shape[-1]))
        return torch.ops.vllm.looks_at_layers(made, self.name) if self.more else made  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, names: tuple[str, ...] = ("layers.0", "layers.1"), *, more: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(Layer(name, 16, more=more) for name in names)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return x  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A vLLM of a release that is known; nothing compiled before."""
    torch._dynamo.reset()
    module = types.ModuleType("vllm")
    module.__version__ = f"{vllm.SUPPORTED[0]}.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    vllm._CALLS.clear()
    return module


def compiled(model: nn.Module, how: Any = vllm.planned) -> Any:
    """As vLLM compiles: once, for any number of tokens from two on."""
    made = torch.compile(model, backend=how, fullgraph=True)

    def call(ids: torch.Tensor) -> torch.Tensor:
        torch._dynamo.mark_dynamic(ids, 0)
        with torch.no_grad():
            return made(ids)  # type: ignore[no-any-return]

    return call


def test_every_number_of_tokens_is_as_eager_and_the_cache_sees_no_padding() -> None:
    torch.manual_seed(1)
    model = Model().eval()
    call = compiled(model)
    for tokens in (11, 2, 3, 9, 11, 12, 33, 5):
        ids = torch.randint(0, 50, (tokens,))
        _KEYS.clear()
        with torch.no_grad():
            wanted = model(ids)
        cached = {name: rows[0] for name, rows in _KEYS.items()}
        _KEYS.clear()
        torch.testing.assert_close(call(ids), wanted)
        assert _KEYS.keys() == cached.keys()
        for name, rows in _KEYS.items():
            assert len(rows) == 1
            torch.testing.assert_close(rows[0], cached[name])
    assert vllm.calls_of_layers() == {"layers.0": 8, "layers.1": 8}
    pieces = [p for p in tg.embed.report().pieces if p.shape in {2, 4, 5, 10, 12, 40} or p.way == "plan"]
    assert {p.way for p in pieces} == {"plan"}


def test_results_are_the_callers_to_keep() -> None:
    model = Model().eval()
    call = compiled(model)
    first = call(torch.arange(7))
    kept = first.clone()
    call(torch.arange(10, 17))
    assert torch.equal(first, kept)


@settings(deadline=None)
@given(tokens=st.integers(1, 1 << 20))
def test_a_bucket_holds_its_tokens_and_pads_little(tokens: int) -> None:
    bucket = vllm.bucket_of(tokens)
    assert tokens <= bucket <= max(1.25 * tokens, tokens + 1)
    assert vllm.bucket_of(bucket) == bucket
    assert vllm.bucket_of(tokens + 1) >= bucket


def test_buckets_are_few() -> None:
    assert len({vllm.bucket_of(n) for n in range(1, 8193)}) <= vllm.MOST_PLANS


@pytest.mark.parametrize("version", ["0.31.9", "0.320.1", "1.0", "dev"])
def test_another_vllm_is_left_to_torch_and_said(engine: Any, version: str) -> None:
    engine.__version__ = version
    model = Model().eval()
    ids = torch.arange(9)
    with torch.no_grad():
        wanted = model(ids)
    with pytest.warns(tg.embed.FallbackWarning, match=f"this is vLLM {version}, and taskgraph knows"):
        call = compiled(model, backend)
        assert torch.equal(call(ids), wanted)
    assert not vllm.calls_of_layers()


@pytest.mark.parametrize(
    ("names", "more", "why"),
    [(("one", "one"), False, "do not attend once each"), (("one", "two"), True, "looks_at_layers")],
)
def test_what_is_not_known_is_left_to_torch_once_said(names: tuple[str, ...], more: bool, why: str) -> None:
    model = Model(names, more=more).eval()
    call = compiled(model)
    ids = torch.arange(9)
    with torch.no_grad():
        wanted = model(ids)
    with pytest.warns(tg.embed.FallbackWarning, match=why):
        assert torch.equal(call(ids), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(ids), wanted)
    assert not vllm.calls_of_layers()


def test_the_backend_of_torch_compile_finds_vllm_by_its_operators() -> None:
    model = Model().eval()
    call = compiled(model, backend)
    ids = torch.arange(12)
    with torch.no_grad():
        wanted = model(ids)
    for _ in range(12):
        torch.testing.assert_close(call(ids), wanted)
    assert vllm.calls_of_layers()["layers.0"] >= 4, "the first calls of a bucket go by its plan"
