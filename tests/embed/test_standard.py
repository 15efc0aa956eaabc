"""What from_torch recognises of calls over whole axes: the kind, and torch's result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import taskgraph as tg
from tests.conftest import Call
from tests.embed.test_importer import Fn, run, same
from tests.runtime.gpu.test_cuda import run_plan

Case = tuple[tuple[str, ...], Callable[..., Any], tuple[torch.Tensor, ...]]


def r(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


CASES: dict[str, Case] = {
    "softmax": (("softmax",), lambda x: x.softmax(-1), (r(2, 3, 5),)),
    "log softmax, inner axis": (("softmax",), lambda x: F.log_softmax(x, 1), (r(2, 3, 5),)),
    "softmax of other dtype": (("aten",), lambda x: x.softmax(-1, dtype=torch.float64), (r(3, 5),)),
    "bmm": (("matmul",), torch.bmm, (r(2, 3, 5), r(2, 5, 4))),
    "matmul of a transpose": (("matmul",), lambda a, b: a @ b.transpose(-1, -2), (r(2, 3, 5, 4), r(3, 6, 4))),
    "square transpose": (("elementwise", "matmul"), lambda a, b: a @ (b + 1).mT, (r(4, 4), r(4, 4))),
    "matmul of rows": (("aten.matmul",), lambda a, b: a[1:] @ b[:3], (r(4, 3), r(4, 4))),
    "matmul of columns": (("aten",), lambda a, b: a[:, 1:] @ b, (r(4, 4), r(3, 4))),
    "sum": (("reduce", "elementwise"), lambda x: x.sum(-1, keepdim=True) * 2, (r(2, 3, 5),)),
    "sum of all": (("reduce",), lambda x: x.sum(), (r(2, 3, 5),)),
    "mean of inner axes": (("reduce",), lambda x: x.mean((1, 2)), (r(2, 3, 5, 4),)),
    "mean of axes apart": (("aten",), lambda x: x.mean((0, 2)), (r(2, 3, 5),)),
    "largest": (("reduce",), lambda x: x.amax(0), (r(2, 3, 5),)),
    "sum of integers": (("aten",), lambda x: x.sum(0), (torch.arange(12).view(3, 4),)),
    "joined columns": (("concat",), lambda x, y: torch.cat([x, y, x], -1), (r(2, 3, 5), r(2, 3, 2))),
    "joined rows": (("aten.concat_rows",), lambda x, y: torch.cat([x, y[1:]]), (r(2, 3, 5), r(4, 3, 5))),
    "joined integers": (("concat_rows",), lambda x, y: torch.cat([x, y]), (torch.arange(5), torch.arange(3))),
    "joined between": (("concat",), lambda x, y: torch.cat([x, y], 1), (r(2, 3, 5), r(2, 1, 5))),
    "joined views": (
        ("aten.concat",), lambda x, y: torch.cat([x.transpose(1, 2)[:, 1:], y], -1), (r(2, 3, 5), r(2, 4, 2)),
    ),
    "joined transposes": (("aten.concat_rows",), lambda x, y: torch.cat([x.t(), y.t()]), (r(4, 4), r(4, 4))),
    "picked": (("index_select",), lambda x, i: x.index_select(1, i), (r(2, 6, 5), torch.tensor([3, 0, 5]))),
    "gathered": (("take_along",), lambda x, i: x.gather(1, i), (r(2, 6), torch.tensor([[3, 0, 5], [1, 1, 1]]))),
    "gathered in part": (("aten",), lambda x, i: x.gather(1, i), (r(2, 6), torch.tensor([[3, 0, 5]]))),
    "stacked": (("concat",), lambda x, y: torch.stack([x, y], 1), (r(3, 5), r(3, 5))),
    "stacked rows": (("concat_rows",), lambda x, y: torch.stack([x, y]), (r(3, 5), r(3, 5))),
    "stacked views": (("aten.concat",), lambda x, y: torch.stack([x[:, 1], y.t()[0]], -1), (r(3, 5), r(3, 5))),
    "rows at known places": (("index_select",), lambda x, i: x[i], (r(4, 3, 2), torch.tensor([2, 0, 1]))),
    "rows at known places, one negative": (("aten",), lambda x, i: x[i], (r(4, 3), torch.tensor([2, -1]))),
    "rows at places that are given": (("aten",), lambda x, i: x[i], (r(4, 3), torch.tensor([2, 0]))),
    "repeated": (("expand",), lambda x: x.repeat_interleave(3, 1), (r(2, 4, 5),)),
    "copied transpose": (("permute",), lambda x: x.transpose(1, 2).contiguous(), (r(2, 6, 3, 5),)),
    "reshaped transpose": (
        ("permute", "gemm"), lambda x, w: F.linear(x.transpose(1, 2).reshape(12, 15), w), (r(2, 3, 6, 5), r(4, 15)),
    ),
    "copied slice": (("aten",), lambda x: x[:, 1:].contiguous(), (r(3, 5),)),
    "attention by hand": (
        ("matmul", "elementwise", "softmax", "matmul", "permute"),
        lambda q, k, v: ((q @ k.mT * 0.5).softmax(-1) @ v).transpose(1, 2).contiguous(),
        (r(2, 3, 5, 4), r(2, 3, 6, 4), r(2, 3, 6, 4)),
    ),
    "softplus": (("elementwise",), lambda x: F.softplus(30 * x) + 1, (r(3, 5),)),
    "masked": (
        ("elementwise", "softmax"), lambda x, m: x.masked_fill(m, -torch.inf).softmax(-1), (r(3, 5), r(3, 5) > 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_recognised_gives_torchs_result(name: str) -> None:
    module, arguments = module_of(name)
    same(run(module, *arguments), module(*arguments))
    graph = tg.from_torch(module, arguments).graph
    assert tuple(op.kind for op in graph.ops) == CASES[name][0]


def module_of(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """The case as a module, which has what a gemm multiplies by and places that are known, and its arguments."""
    kinds, function, given = CASES[name]
    if "gemm" not in kinds and "known" not in name:
        return Fn(function), given
    module = Fn(lambda x: function(x, given[1]))
    module.register_buffer("held", given[1])
    return module, given[:1]


@pytest.mark.parametrize(
    ("norm", "x"),
    [
        (torch.nn.BatchNorm2d(4), r(2, 4, 3, 5)),
        (torch.nn.BatchNorm2d(4), r(2, 4, 3, 5).to(memory_format=torch.channels_last)),
        (torch.nn.BatchNorm1d(5, affine=False), r(7, 5)),
        (torch.nn.BatchNorm1d(5), r(7, 5, 3).bfloat16()),
    ],
)
def test_batch_norms_join_pointwise_chains(norm: torch.nn.Module, x: torch.Tensor) -> None:
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.dtype.is_floating_point:
            torch.nn.init.uniform_(tensor, 0.5, 2.0)
    module = torch.nn.Sequential(norm, torch.nn.ReLU()).eval().to(x.dtype)
    with torch.no_grad():
        got, wanted = run(module, x), module(x)
    assert got.stride() == wanted.stride()
    near = 2e-2 if x.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, wanted, rtol=near, atol=near)
    (op,) = tg.from_torch(module, (x,)).graph.ops
    assert op.kind in ("elementwise", "aten.elementwise")


OURS = [name for name, case in CASES.items() if not any(kind.startswith("aten") for kind in case[0])]


@pytest.mark.parametrize("name", OURS)
def test_what_is_recognised_runs_on_the_virtual_gpu(on_virtual: Call, name: str) -> None:
    module, arguments = module_of(name)
    imported = tg.from_torch(module, arguments)
    given = imported.feed(*arguments)
    plan = tg.plan(imported.graph, "h100_sxm", "sequential")
    made = on_virtual(run_plan, imported.graph, plan, {**imported.tensors, **given})
    same(imported.results(made, given), module(*arguments))
