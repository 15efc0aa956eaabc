"""wrap(): modules called by plans without Dynamo, and what makes them fall back."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from taskgraph.embed import FallbackWarning, direct, report, wrap
from taskgraph.errors import GraphError, PlanError


class Mixer(nn.Module):
    """Takes and returns structures, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, pair: dict[str, Any], *, scale: float = 1.0, shift: torch.Tensor | None = None) -> dict[str, Any]:
        made = self.inner(pair["a"]) * scale + pair["b"][0]
        self.get_buffer("seen").add_(1)
        return {"made": made if shift is None else made + shift, "both": [made, pair["a"]], "scale": scale}


class ByData(nn.Module):
    """Control that depends on data: torch.export does not take it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x - 1


def alike(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@given(rows=st.lists(st.integers(1, 5), min_size=1, max_size=2), verdict=st.sampled_from(["plan", "measured", "eager"]))
@settings(max_examples=5, deadline=None)
def test_results_are_those_of_the_module(rows: list[int], verdict: str) -> None:
    module = Mixer().eval()
    fast = wrap(module, verdict=verdict)
    calls = 0
    with torch.no_grad():
        for n in rows * 2:
            pair = {"a": torch.randn(n, 8), "b": (torch.randn(n, 8),)}
            for more in ({}, {"scale": 0.5}, {"shift": torch.randn(8), "scale": 2.0}):
                got = fast(pair, **more)
                calls += 1
                assert float(module.get_buffer("seen")) == calls
                want = Mixer.forward(module, pair, **more)
                module.get_buffer("seen").sub_(1)
                alike(got, want)
                assert got["both"][1] is pair["a"] or torch.equal(got["both"][1], pair["a"])


def test_a_call_sees_weights_that_changed_moved_or_were_replaced() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    fast, x = wrap(module, verdict="plan"), torch.randn(3, 6)
    first: Any = module[0]
    with torch.no_grad():
        alike(fast(x), module(x))
        first.weight.mul_(2)
        alike(fast(x), module(x))
        first.weight = nn.Parameter(torch.randn(6, 6))
        alike(fast(x), module(x))
        module.load_state_dict({k: torch.randn_like(v) for k, v in module.state_dict().items()})
        alike(fast(x), module(x))
        module.double()
        with pytest.raises(GraphError, match="wrap the module again"):
            fast(x)
        alike(fast(x.double()), module(x.double()))


def test_gradients_autocast_and_other_devices_go_to_eager_torch() -> None:
    module = nn.Linear(4, 4)
    fast, x = wrap(module, verdict="plan"), torch.randn(2, 4)
    with pytest.warns(FallbackWarning, match="gradients"):
        made = fast(x)
    made.sum().backward()
    assert module.weight.grad is not None
    with torch.no_grad():
        alike(fast(x), module(x))
        with torch.autocast("cpu"), pytest.warns(FallbackWarning, match="autocast"):
            assert fast(x).dtype == torch.bfloat16
        with pytest.warns(FallbackWarning, match="meta"), torch.device("meta"):
            assert wrap(nn.Linear(4, 4))(torch.empty(2, 4)).is_meta
    frozen = nn.ReLU()
    leaf = torch.randn(2, 4, requires_grad=True)
    with pytest.warns(FallbackWarning, match="gradients"):
        wrap(frozen, verdict="plan")(leaf).sum().backward()
    assert leaf.grad is not None


def test_training_mode_has_plans_of_its_own() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    fast, x = wrap(module, verdict="plan"), torch.randn(2, 4)
    with torch.no_grad():
        alike(fast(x), module(x))
        module.train()
        with pytest.warns(FallbackWarning, match="random"):
            fast(x)
        module.eval()
        alike(fast(x), module(x))


def test_what_cannot_be_exported_runs_as_it_is_and_is_said_once() -> None:
    fast = wrap(ByData())
    with torch.no_grad():
        with pytest.warns(FallbackWarning, match=r"torch\.export"):
            assert torch.equal(fast(torch.ones(3)), 2 * torch.ones(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2 * direct.RESTS + 5):
                assert torch.equal(fast(-torch.ones(3)), -2 * torch.ones(3))
    (piece,) = report(fast).pieces
    assert piece.way == "eager" and "torch.export" in piece.reason
    assert 0 < piece.calls <= 2 * direct.RESTS + 6


def test_arguments_without_a_key_and_bad_options() -> None:
    class Odd:
        value = 2.0

    class Takes(nn.Module):
        def forward(self, x: torch.Tensor, odd: Odd) -> torch.Tensor:
            return x * odd.value

    with torch.no_grad(), pytest.warns(FallbackWarning, match="Odd"):
        assert torch.equal(wrap(Takes())(torch.ones(2), Odd()), 2 * torch.ones(2))
    with pytest.raises(GraphError, match=r"torch\.nn\.Module"):
        wrap(len)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no option"):
        wrap(nn.ReLU(), speed=1)


def test_shapes_beyond_the_limit_take_turns() -> None:
    fast = wrap(nn.Linear(4, 4).eval(), verdict="plan", most_plans=2, quiet=True)
    with torch.no_grad():
        for n in (1, 2, 3, 3, 1):
            x = torch.randn(n, 4)
            alike(fast(x), fast.module(x))
    made = report(fast)
    assert sum(p.way == "plan" for p in made.pieces) == 2 and made.captures == 4
