"""SGLang's contract for replaced decode steps, against the spec file of its wheel (`make test-sglang`)."""

import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from taskgraph.embed import sglang
from taskgraph.errors import BackendUnavailable


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The spec file of an installed SGLang, alone: the rest of SGLang wants CUDA."""
    found = importlib.util.find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        pytest.skip("SGLang is not installed here; `make test-sglang` fetches its wheel without what it depends on")
    pytest.importorskip("msgspec", reason="SGLang's contract needs msgspec")
    file = Path(found.submodule_search_locations[0], "kernels", "plugin_kernels", "nvidia", "spec.py")
    if not file.exists():
        pytest.skip(f"this SGLang has no {file.name} of a megakernel contract")
    at = importlib.util.spec_from_file_location(sglang.CONTRACT, file)
    assert at is not None and at.loader is not None
    module = importlib.util.module_from_spec(at)
    monkeypatch.setitem(sys.modules, sglang.CONTRACT, module)
    at.loader.exec_module(module)
    monkeypatch.delitem(vars(sglang), "SPEC", raising=False)
    return module


class Mode:
    def __init__(self, decode: bool) -> None:
        self.is_decode = lambda: decode


class Batch:
    def __init__(self, *, decode: bool = True) -> None:
        self.forward_mode = Mode(decode)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.head = nn.Embedding(40, 16), nn.Linear(16, 32), nn.Linear(32, 40)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        x = self.table(input_ids) * (1 + positions[:, None])
        return self.head(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def test_sglang_finds_the_spec_and_it_runs_the_steps_that_it_covers(spec: Any) -> None:
    torch._dynamo.reset()
    sglang.register("TinyForCausalLM")
    found, why = spec.find_spec(architectures=["TinyForCausalLM"], isa="sm_90")
    assert why == "" and isinstance(found, spec.MegakernelSpec)
    assert spec.find_spec(architectures=["TinyForCausalLM"], isa="sm_75")[0] is None
    assert found.numerics.kind is spec.NumericsKind.TOLERANCE
    model = Decoder().eval()
    assert found.model_disable_reasons(model, None) == []
    context = spec.BuildContext(widths=(1, 4, 200), tokens_per_request=1, deadline_s=1.0)
    built = found.build(model, None, context)
    assert built.widths == (1, 4) and built.draft_sampler is None and "2 widths" in built.summary()
    for name in ("plan", "forward", "summary", "widths", "draft_sampler"):
        assert hasattr(built, name)
    for rows in (4, 1, 4):
        args = (torch.randint(0, 40, (rows,)), torch.arange(rows), Batch())
        step = built.plan(args[0], args[2])
        assert isinstance(step, spec.Step) and (step.mode, step.rows) == ("decode", rows)
        with torch.no_grad():
            wanted = model(*args)
        made = built.forward(step, model.forward, *args)
        assert (made - wanted).abs().max() <= found.numerics.tolerances["max_rel_diff_f32"] * wanted.abs().max()


def test_other_steps_are_the_models_own(spec: Any) -> None:
    built = sglang.Built([1, 4])
    assert built.plan(torch.zeros(3), Batch()) is None
    assert built.plan(torch.zeros(4), Batch(decode=False)) is None
    assert sglang.Built([4], tokens_per_request=2).plan(torch.zeros(4), Batch()) is None


def test_a_model_that_no_plan_runs_is_refused_with_a_reason() -> None:
    with torch.device("meta"):
        model = Decoder()
    (why,) = sglang.reasons(model, None)
    assert "plans of torch graphs run on the CPU" in why


def test_another_contract_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType(sglang.CONTRACT)
    other.MEGAKERNEL_API_VERSION = sglang.API_VERSION + 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, sglang.CONTRACT, other)
    with pytest.raises(BackendUnavailable, match="has version 2; taskgraph knows version 1"):
        sglang.register("TinyForCausalLM")


def test_without_sglang_registering_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, sglang.CONTRACT, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BackendUnavailable, match="install sglang"):
            sglang.register("TinyForCausalLM")
