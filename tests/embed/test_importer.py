"""from_torch: outputs are eager torch's, whatever shares memory, is changed in place, or has a dtype of its own."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import taskgraph as tg
from taskgraph.embed.flow import Unsupported


def run(module: nn.Module, *args: Any) -> Any:
    """What the imported module returns."""
    imported = tg.from_torch(module, args)
    plan = tg.plan(imported.graph, "cpu", "list")
    tg.verify(plan, imported.graph)
    with tg.compile(imported.graph, plan) as exe:
        exe.bind(imported.tensors)
        first = imported.call(exe, *args)
        again = imported.call(exe, *args)
        assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(again), strict=True))
        return again


def flat(value: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def same(got: Any, want: Any) -> None:
    assert len(flat(got)) == len(flat(want))
    for a, b in zip(flat(got), flat(want), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def in_place(x: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h[:, 1:3] += 1
    h.relu_()
    part = h[0]
    part.mul_(3)
    return h + part


def scattered(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape[0], 2 * x.shape[1])
    out[:, ::2] = x
    view = out.t()
    out[:, 1::2] = x.neg()
    return view @ out


def masked(x: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.ones(4, 4).tril().bool(), x, torch.tensor(-1.0))


CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "views": (lambda x: x.t()[1:].reshape(-1).view(3, -1).transpose(0, 1) * 2, lambda: (torch.randn(4, 4),)),
    "view of strided": (lambda x: (x.mT * 2).mT.view(2, -1), lambda: (torch.randn(2, 3, 4),)),
    "in place": (in_place, lambda: (torch.randn(4, 5),)),
    "scattered": (scattered, lambda: (torch.randn(3, 4),)),
    "channels last": (lambda x: x.to(memory_format=torch.channels_last).relu(), lambda: (torch.randn(2, 3, 4, 5),)),
    "input strides": (lambda x: (x + 1, x.view(-1)), lambda: (torch.randn(4, 6),)),
    "several results": (lambda x: torch.topk(x, 2), lambda: (torch.randn(4, 6),)),
    "split": (lambda x: [p * 2 for p in x.split(2, 1)], lambda: (torch.randn(4, 6),)),
    "complex": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * 1j), lambda: (torch.randn(4, 6),)),
    "int16": (lambda x: (x.to(torch.int16) + 3).to(torch.int64), lambda: (torch.arange(6),)),
    "scalar": (lambda x: x.sum() + 1, lambda: (torch.randn(3, 2),)),
    "empty": (lambda x: torch.cat([x, x[:, 5:]], 1) * 2, lambda: (torch.randn(3, 5),)),
    "constants": (masked, lambda: (torch.randn(4, 4),)),
    "same twice": (lambda x: (lambda y: (y, y, y[0], 7, None))(x + 1), lambda: (torch.randn(3, 2),)),
    "input returned": (lambda x: (x, x[0] , x + 1), lambda: (torch.randn(3, 2),)),
    "expanded": (lambda x: x[:, None].expand(3, 5, 2) + torch.arange(2), lambda: (torch.randn(3, 2),)),
    "diagonal": (lambda x: x.diagonal().mul(2) + x.unfold(0, 2, 1).sum(), lambda: (torch.randn(3, 3),)),
    "bf16": (lambda x: torch.softmax(x.bfloat16(), -1), lambda: (torch.randn(3, 9),)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_eager_torch(name: str) -> None:
    torch.manual_seed(len(name))
    function, inputs = CASES[name]
    args = inputs()
    want = function(*[a.clone() for a in args])
    same(run(Fn(function), *args), want)


def test_dropout_that_drops_nothing_is_no_op() -> None:
    module, x = (
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.ReLU()).eval(),
        torch.randn(2, 4),
    )
    with torch.inference_mode():
        graph = tg.from_torch(module, (x,)).graph
        assert [op.kind for op in graph.ops] == ["gemm", "elementwise"]
        same(run(module, x), module(x))


def test_inputs_of_any_strides() -> None:
    wide = torch.randn(4, 6)
    module = Fn(lambda x: x.reshape(-1) * 2)
    for x in (wide.t(), wide[:, ::2], wide[:, :1].expand(4, 6)):
        same(run(module, x), (x.reshape(-1) * 2))


class Counter(nn.Module):
    """A buffer that every call changes, and a window of the last rows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("window", torch.zeros(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.window.sum()
        self.window[:-1] = self.window[1:].clone()
        self.window[-1] = x
        self.steps.add_(1)
        return self.window * self.steps + before


def test_buffers_that_the_module_changes_are_states() -> None:
    eager, module = Counter(), Counter()
    imported = tg.from_torch(module, (torch.randn(2),))
    assert {t.name for t in imported.graph.with_role("state")} == {"steps", "window"}
    with tg.compile(imported.graph, tg.plan(imported.graph, "cpu")) as exe:
        exe.bind(imported.tensors)
        for _ in range(4):
            x = torch.randn(2)
            same(imported.call(exe, x), eager(x))
    assert torch.equal(module.window, eager.window)
    assert int(module.steps) == 4


def test_an_input_that_the_module_changes_is_changed() -> None:
    def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x[0].add_(y)
        return x.sum() * y

    x, y = torch.randn(3, 2), torch.randn(2)
    imported = tg.from_torch(Fn(add), (x.clone(), y))
    mine, theirs = x.clone(), x.clone()
    with tg.compile(imported.graph, tg.plan(imported.graph, "cpu")) as exe:
        exe.bind(imported.tensors)
        same(imported.call(exe, mine, y), add(theirs, y))
    assert torch.equal(mine, theirs)


def test_weights_are_bound_not_copied() -> None:
    module = nn.Linear(8, 4)
    imported = tg.from_torch(module, (torch.randn(2, 8),))
    assert {t.data_ptr() for t in imported.tensors.values()} == {t.data_ptr() for t in module.parameters()}


def test_a_module_on_the_meta_device_is_planned_for_any_gpu() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4096, 14336), nn.GELU(), nn.Linear(14336, 4096))
    imported = tg.from_torch(module, (torch.empty(64, 4096, device="meta"),))
    plan = tg.plan(imported.graph, "h100_sxm")
    tg.verify(plan, imported.graph)
    flops = 2 * 2 * 64 * 4096 * 14336
    assert flops <= sum(op.work.flops for op in imported.graph.ops) < 1.01 * flops
    with (
        tg.compile(imported.graph, tg.plan(imported.graph, "cpu")) as exe,
        pytest.raises(tg.GraphError, match="no data"),
    ):
        exe.bind(imported.tensors)


def test_a_graph_survives_its_file() -> None:
    x = torch.randn(4, 5)
    imported = tg.from_torch(Fn(in_place), (x,))
    again = tg.Graph.from_json(imported.graph.to_json())
    assert again == imported.graph
    with tg.compile(again, tg.plan(again, "cpu")) as exe:
        exe.bind(imported.tensors)
        same(imported.call(exe, x), in_place(x))


def test_dynamic_is_checked_by_torch() -> None:
    x = torch.randn(4, 5)
    free = {"x": {0: torch.export.Dim("n")}}
    tg.from_torch(Named(), (x,), dynamic=free)
    with pytest.raises(Unsupported, match="Named"):
        tg.from_torch(Named(), (x,), dynamic={"x": {1: torch.export.Dim("m")}})


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 5) * 2


def imports(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: tg.from_torch(Fn(function), args)


def feeds(*args: Any) -> Callable[[], Any]:
    return lambda: tg.from_torch(nn.Linear(2, 2), (torch.randn(2, 2),)).feed(*args)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "data-dependent shape": (imports(lambda x: x[x > 0].sum() * len(x[x > 0]), torch.randn(4)), "torch.compile"),
    "data-dependent branch": (imports(lambda x: x + 1 if x.sum() > 0 else x, torch.randn(4)), "torch.compile"),
    "random": (lambda: tg.from_torch(nn.Dropout(), (torch.randn(4),)), "random"),
    "no module": (lambda: tg.from_torch(len, (torch.randn(4),)), "nn.Module"),  # type: ignore[arg-type]
    "no inputs": (lambda: tg.from_torch(nn.Linear(2, 2), 3), "tuple of arguments"),
    "nothing computed": (lambda: tg.from_torch(nn.Identity(), (torch.randn(4),)), "nothing"),
    "sparse": (imports(lambda x: x * 2, torch.eye(3).to_sparse()), "sparse"),
    "two devices": (imports(lambda x, y: (x + 1, y + 1), torch.ones(2), torch.ones(2, device="meta")), "devices"),
    "other shape": (feeds(torch.randn(3, 2)), "fixed shapes"),
    "other dtype": (feeds(torch.randn(2, 2).double()), "fixed shapes"),
    "other arguments": (feeds(), "arguments"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_a_typed_error(name: str) -> None:
    make, said = BAD[name]
    with pytest.raises(tg.GraphError, match=said):
        make()


def test_explain_names_what_was_recognised_and_its_share() -> None:
    imported = tg.from_torch(nn.Sequential(nn.Linear(64, 64), Fn(lambda x: x.cumsum(0))), (torch.randn(8, 64),))
    text = imported.explain("h100_sxm")
    assert "as it is" in text
    assert "gemm" in text
    assert "simulated" in text
    assert "aten.cumsum" in text


def test_importing_the_package_imports_no_torch() -> None:
    code = "import taskgraph, sys; taskgraph.embed; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
