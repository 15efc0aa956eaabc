"""The backend of torch.compile: results of eager torch, whatever is called how often."""

import gc
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import taskgraph as tg
from taskgraph.embed import FallbackWarning, backend, dynamo, report, variants

PLAN = {"verdict": "plan"}


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(module: Any, **options: Any) -> Any:
    return torch.compile(module, backend=backend, options={**PLAN, **options})


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_calls_are_eager_ones_and_results_stay() -> None:
    module = Mlp()
    fast = compiled(module)
    xs = [torch.randn(3, 16) for _ in range(5)]
    made = [fast(x) for x in xs]
    for x, y in zip(xs, made, strict=True):
        close(y, module(x))
    (piece,) = report(fast).pieces
    assert (piece.way, piece.calls) == ("plan", 5)
    assert report(fast).hit_rate == 1.0
    assert "plan of" in str(report(fast))


def test_shapes_get_a_plan_each() -> None:
    module = Mlp()
    fast = compiled(module)
    for rows in (1, 2, 3, 5, 3, 2, 7):
        x = torch.randn(rows, 16)
        close(fast(x), module(x))
    assert all(p.way == "plan" for p in report(fast).pieces)


def test_beyond_most_plans_torch_runs() -> None:
    module = Mlp()
    fast = torch.compile(module, backend=backend, options={**PLAN, "most_plans": 2}, dynamic=True)
    with pytest.warns(FallbackWarning, match="more than 2 shapes"):
        for rows in (2, 3, 4, 5):
            x = torch.randn(rows, 16)
            close(fast(x), module(x))
    assert {p.way for p in report(fast).pieces} == {"plan", "eager"}


def test_weights_that_change_or_move_are_seen() -> None:
    module = Mlp()
    fast, x = compiled(module), torch.randn(3, 16)
    close(fast(x), module(x))
    module.up.weight.mul_(2)
    close(fast(x), module(x))
    module.up.weight.data = torch.randn(32, 16)
    close(fast(x), module(x))
    module.load_state_dict(Mlp().state_dict())
    close(fast(x), module(x))
    assert report(fast).pieces[0].rebinds == 3


def test_inputs_of_other_strides() -> None:
    module = Mlp()
    fast = compiled(module)
    for x in (torch.randn(16, 3).t(), torch.randn(3, 32)[:, ::2], torch.randn(1, 16).expand(3, 16)):
        close(fast(x), module(x))


class Cache(nn.Module):
    def forward(self, x: torch.Tensor, cache: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, at, x)
        at.add_(1)
        return cache.sum(0)


def test_inputs_that_are_changed_in_place() -> None:
    fast = compiled(Cache())
    for _ in range(2):
        mine, theirs = torch.zeros(8, 4), torch.zeros(8, 4)
        at, there = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        for _ in range(4):
            x = torch.randn(1, 4)
            close(fast(x, mine, at), Cache()(x, theirs, there))
        close(mine, theirs)
        assert int(at) == 4


def test_arguments_that_share_memory_with_what_is_changed() -> None:
    def shift(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x + y

    fast = compiled(shift, quiet=True)
    for _ in range(2):
        a, b, c = torch.zeros(4), torch.zeros(4), torch.ones(4)
        close(fast(a, c), shift(b, c))
        base, other = torch.zeros(4), torch.zeros(4)
        close(fast(base, base.view(4)), shift(other, other.view(4)))


def test_graph_breaks_and_data_dependent_control() -> None:
    def pruned(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        if x.sum() > 0:
            return x[x > 0].cumsum(0) * 3
        return x - 1

    fast = compiled(pruned)
    for x in (torch.ones(4), -torch.ones(4), torch.tensor([1.0, -0.5, 2.0, 0.1])):
        close(fast(x), pruned(x))


def test_torch_cond_is_torchs_and_an_if_is_a_plan_on_either_side() -> None:
    def chosen(x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.cond(x.sum() > 0, lambda x: x.sin() * 2, lambda x: x.cos() - 1, (x * 3,))
        return made

    def broken(x: torch.Tensor) -> torch.Tensor:
        total, y = x.sum(), x * 3
        return y.sin() * 2 if total > 0 else y.cos() - 1

    fast = [compiled(chosen), compiled(broken)]
    with pytest.warns(FallbackWarning, match=r"torch\.cond, which chooses by data.*torch\.where"):
        fast[0](torch.ones(4))
    for f, function in zip(fast, (chosen, broken), strict=True):
        for x in (torch.rand(4), -torch.rand(4), torch.rand(4)):
            close(f(x), function(x))
    assert report(fast[0]).hit_rate == 0.0
    assert report(fast[1]).hit_rate == 1.0


def test_training_is_torchs() -> None:
    module = Mlp()
    fast = compiled(module)
    x = torch.randn(3, 16)
    with torch.enable_grad(), pytest.warns(FallbackWarning, match="no_grad"):
        loss = fast(x).sum()
        loss.backward()
    assert module.up.weight.grad is not None
    close(fast(x), module(x))


def test_random_numbers_are_torchs() -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(4)

    fast = compiled(noisy)
    with pytest.warns(FallbackWarning, match="random"):
        torch.manual_seed(1)
        got = [fast(torch.zeros(4)) for _ in range(3)]
    torch.manual_seed(1)
    for y in got:
        close(y, noisy(torch.zeros(4)))


def test_transforms_of_functions_give_eager_results() -> None:
    def mapped(x: torch.Tensor) -> torch.Tensor:
        rows = torch.vmap(lambda i: torch.arange(4) <= i)(torch.arange(3))
        return torch.where(rows, x, torch.zeros(()))

    fast = compiled(mapped, quiet=True)
    for _ in range(2):
        x = torch.randn(3, 4)
        close(fast(x), mapped(x))


def test_the_slower_way_is_given_up_by_measurement() -> None:
    fast = torch.compile(torch.nn.Tanh(), backend=backend)
    x = torch.randn(2)
    calls = 3 * variants.MOST_TRIAL_CALLS
    for _ in range(calls):
        close(fast(x), torch.tanh(x))
    (piece,) = [p for p in report(fast).pieces if p.calls == calls]
    assert piece.plan_s > 0
    assert piece.eager_s > 0
    assert (piece.way == "eager") == ("eager torch" in piece.reason)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"buckets": 3}, "no option 'buckets'"), ({"scheduler": 3}, "must be like"), ({"verdict": "x"}, "one of")],
)
def test_options_that_do_not_exist(options: dict[str, Any], said: str) -> None:
    fast = torch.compile(Mlp(), backend=backend, options=options)
    with pytest.raises(Exception, match=said) as caught:
        fast(torch.randn(2, 16))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), tg.PlanError)


def test_threads_call_one_compiled_module() -> None:
    module = Mlp()
    fast = compiled(module)
    fast(torch.randn(3, 16))
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(50):
                x = torch.randn(3, 16, generator=generator)
                if not torch.allclose(fast(x), module(x), rtol=1e-4, atol=1e-5):
                    wrong.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_no_warning_without_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        compiled(Mlp())(torch.randn(2, 16))


def test_every_way_of_a_trial_gives_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskgraph.embed import planning

    monkeypatch.setattr(planning, "MOST_ALONE_S", 0.0)  # so that the first plan has all cores
    monkeypatch.setattr(variants, "MOST_TRIAL_CALLS", variants.TRIAL_CALLS)
    module = Mlp()
    fast = torch.compile(module, backend=backend, options={"quiet": True})
    cores = tg.devices.get("cpu").sm_count
    for i in range(4 * variants.TRIAL_CALLS):
        x = torch.randn(3, 16)
        close(fast(x), module(x))
        own = {p.data_ptr() for p in module.parameters()}
        (variant,) = [v for c in dynamo.ALL if c.addresses & own for v in c.variants.values()]
        assert variant.calls == i + 1
        assert variant.decided == (i + 1 >= (2 + (cores > 1)) * variants.TRIAL_CALLS)
        assert variant.rival is None or not variant.decided


def test_pieces_of_a_module_that_is_gone_are_shown_with_no_other() -> None:
    """Its weights' memory may be the next module's, while something still holds what was made for it."""
    module, calls = Mlp(), 777
    fast, x = compiled(module), torch.randn(3, 16)
    for _ in range(calls):
        fast(x)
    own = {p.data_ptr() for p in module.parameters()}
    kept = [c for c in dynamo.ALL if c.addresses & own and not c.orphaned]
    assert len(kept) == 1 and calls in {piece.calls for piece in report(fast).pieces}
    del module, fast
    torch._dynamo.reset()
    gc.collect()
    assert kept[0].orphaned and kept[0] in dynamo.ALL
    assert calls not in {piece.calls for piece in report().pieces}
