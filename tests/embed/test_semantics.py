"""What torch means is what runs: aliases, changes in place, dtypes, lazy and empty tensors, near misses of patterns.

Every module is imported and called twice, as calls may leave something behind; some are compiled too."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

import taskgraph as tg

Made = tuple[nn.Module, tuple[torch.Tensor, ...]]


class Fn(nn.Module):
    """A function of the module and its arguments, with parameters and buffers by name."""

    def __init__(self, function: Callable[..., Any], **held: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in held.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def weight(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*size), requires_grad=False)


def case(function: Callable[..., Any], *inputs: Any, **held: Any) -> Callable[[], Made]:
    """Inputs and what is held: sizes, or functions that make them."""

    def tensor(what: Any) -> Any:
        return what() if callable(what) else torch.randn(*what)

    return lambda: (Fn(function, **{k: tensor(v) for k, v in held.items()}), tuple(map(tensor, inputs)))


def module(make: Callable[[], nn.Module], *inputs: Any) -> Callable[[], Made]:
    return lambda: (make(), tuple(i() if callable(i) else torch.randn(*i) for i in inputs))


def ids(*values: Any) -> Callable[[], torch.Tensor]:
    return lambda: torch.tensor([*values])


def then(*values: Any) -> Any:
    """The last of them: what a lambda does in order."""
    return values[-1]


def rms(s: Any, x: torch.Tensor, axis: int, keep: bool) -> torch.Tensor:
    made: torch.Tensor = s.w * (x * torch.rsqrt(x.pow(2).mean(axis, keepdim=keep) + 1e-6))
    return made


def spread(s: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return s.w * (x * size), size


def swapped(s: Any, x: torch.Tensor, c: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return x * c + torch.cat([-x[..., :2], x[..., 2:]], -1) * n


def turned(s: Any, x: torch.Tensor, c: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return x * c + torch.cat([-x[..., 2:], x[..., :2]], -1) * n


def halves(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = x + 0
    a, b = h.chunk(2, -1)
    a.add_(1)
    b.mul_(a)
    return h


def read_before(s: Any, x: torch.Tensor) -> Any:
    kept = s.b.clone()
    view = s.b[1:]
    s.b.add_(x)
    return kept + 1, view * 1.0, s.b * 2


CASES: dict[str, Callable[[], Made]] = {
    "a parameter changed": case(lambda s, x: then(s.w.add_(1), x * s.w), (3,), w=lambda: weight(3)),
    "batch norm in training": module(lambda: nn.BatchNorm1d(4).train(), (5, 4)),
    "a parameter returned": case(lambda s, x: (s.w, x + s.w, s.b[0]), (3,), w=lambda: weight(3), b=(2, 3)),
    "a state and its view returned": case(lambda s, x: (s.b.mul_(2), s.b[1:], x + 1), (3,), b=(4,)),
    "a state read before and after": case(read_before, (3,), b=(3,)),
    "as_strided": case(lambda s, x: torch.as_strided(x * 2, (3, 2), (1, 2), 1) + 1, (4, 4)),
    "a dictionary": case(lambda s, x: {"a": x + 1, "b": [None, (x * 2,)]}, (2,)),
    "f64": case(lambda s, x: (x.double() @ x.double().t()).sum(1), (4, 4)),
    "tied weights": case(lambda s, x: F.linear(F.embedding(x, s.w), s.w), ids([1, 2]), w=lambda: weight(10, 4)),
    "an out argument": case(lambda s, x: torch.add(x, 1, out=torch.empty(3)) * 2, (3,)),
    "index_put_": case(lambda s, x, i: x.clone().index_put_((i,), torch.tensor(5.0)), (4,), ids(0, 2)),
    "chunks changed": case(halves, (2, 4)),
    "einsum": case(lambda s, a, b: torch.einsum("bij,bjk->bik", a, b).mT, (2, 3, 4), (2, 4, 5)),
    "integers": case(lambda s, x: (x // 3, x % 3, x.float() / 3, torch.bitwise_and(x, 5)), lambda: torch.arange(10)),
    "where": case(lambda s, x: torch.where(x > 0, x, 0.0) * torch.where(x > 0, 1, 2), (5,)),
    "masks of infinity": case(lambda s, x: x.masked_fill(x > 0, float("-inf")).exp(), (3, 5)),
    "powers": case(lambda s, x: (x**2, x.abs() ** 0.5, 2**x, x**3, x**-1, x.pow(0)), (5,)),
    "alpha": case(
        lambda s, x, y: (torch.add(x, y, alpha=2), torch.sub(x, y, alpha=0.5), torch.rsub(x, y), 1 - x), (5,), (5,)
    ),
    "truths": case(lambda s, x: ((x > 0) * x, ~(x > 0), (x > 0) & (x < 1), (x > 0).float() - 1), (5,)),
    "bf16 rounds at every call": case(lambda s, x: (x.bfloat16() * 2.5 + 1).float() * 3, (7,)),
    "f16 with f32": case(lambda s, x: x.half() + x, (7,)),
    "a scalar tensor does not widen": case(lambda s, x, y: x.bfloat16() * y, (7,), lambda: torch.tensor(2.0)),
    "broadcast views": case(lambda s, x: x[:, None] * x[None] + x.t()[..., None].mT.sum(0), (3, 3)),
    "conv in channels last": module(
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        lambda: torch.randn(1, 3, 8, 8).to(memory_format=torch.channels_last),
    ),
    "multi-head attention": module(lambda: nn.MultiheadAttention(16, 4, batch_first=True), *[(2, 5, 16)] * 3),
    "encoder layer": module(lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 5, 16)),
    "sorts": case(lambda s, x: (x.cumsum(-1), *x.sort(-1), x.argsort(-1), *x.max(-1)), (3, 4)),
    "layer norm without weights": module(lambda: nn.LayerNorm(8, elementwise_affine=False), (2, 3, 8)),
    "layer norm over two axes": module(lambda: nn.LayerNorm((3, 8)), (2, 3, 8)),
    "RMS norm of torch": module(lambda: nn.RMSNorm(8, eps=1e-6), (2, 3, 8)),
    "a product of a vector": module(lambda: nn.Linear(3, 4), (3,)),
    "h + h of a product": case(lambda s, x: F.linear(x, s.w).add(F.linear(x, s.w)), (2, 3), w=lambda: weight(3, 3)),
    "twice a product": case(lambda s, x: (lambda h: h + h)(F.linear(x, s.w)), (2, 3), w=lambda: weight(3, 3)),
    "a scaled addmm": case(
        lambda s, x: torch.addmm(s.b, x, s.w, beta=0.5, alpha=2), (2, 3), w=lambda: weight(3, 4), b=lambda: weight(4)
    ),
    "weights turned and cut": case(
        lambda s, x: (x @ s.w.t(), x @ s.w, F.linear(x, s.w[:2])), (2, 3), w=lambda: weight(3, 3)
    ),
    "a weight changed between products": case(
        lambda s, x: then(y := F.linear(x, s.w), s.w.add_(1), y + F.linear(x, s.w)), (2, 3), w=(3, 3)
    ),
    "an embedding of i32": module(lambda: nn.Embedding(10, 4), lambda: torch.tensor([[0, 3]], dtype=torch.int32)),
    "an embedding of a scalar": module(lambda: nn.Embedding(10, 4), lambda: torch.tensor(3)),
    "argmax": case(lambda s, x: (x.argmax(-1), x.argmax(0), x.argmax(), x.argmax(-1, keepdim=True)), (3, 4)),
    "conjugates": case(
        lambda s, x: ((x * x.conj()).real, torch.view_as_real(x.conj() * 1), x.conj().imag + 1),
        lambda: torch.randn(3, dtype=torch.complex64),
    ),
    "u8": case(lambda s, x: (x + 200, x.float() / 255), lambda: torch.arange(100, dtype=torch.uint8)),
    "empty": case(lambda s, x: (x * 2, torch.cat([x, x]), x.sum()), (0, 3)),
    "an empty batch": module(lambda: nn.Linear(3, 4), (0, 3)),
    "rotary": case(turned, (1, 2, 3, 4), (3, 4), (3, 4)),
    "rotary of five axes": case(turned, (1, 2, 2, 3, 4), (3, 4), (3, 4)),
    "no rotary": case(swapped, (1, 2, 3, 4), (3, 4), (3, 4)),
    "no RMS norm: another axis": case(lambda s, x: rms(s, x, 0, True), (3, 4), w=lambda: weight(4)),
    "no RMS norm: axis dropped": case(lambda s, x: rms(s, x, -1, False), (4, 4), w=lambda: weight(4)),
    "RMS norm whose size is needed": case(spread, (3, 4), w=lambda: weight(4)),
}
COMPILED = ("a parameter changed", "batch norm in training", "a state and its view returned", "chunks changed",
            "a state read before and after", "conjugates", "empty", "a dictionary", "tied weights")  # fmt: skip


def flat(value: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def twice(call: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> list[list[torch.Tensor]]:
    return [copy.deepcopy(flat(call(*[t.clone() for t in inputs]))) for _ in range(2)]


def same(got: list[list[torch.Tensor]], want: list[list[torch.Tensor]]) -> None:
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            tolerance = 1e-2 if x.dtype in (torch.bfloat16, torch.float16) else 1e-4
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance / 10)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
        yield
    torch._dynamo.reset()


def pair(name: str) -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(len(name))
    made, inputs = CASES[name]()
    if "training" not in name:
        made.eval()
    return made, copy.deepcopy(made), inputs


@pytest.mark.parametrize("name", CASES)
def test_imported(name: str) -> None:
    eager, other, inputs = pair(name)
    want, imported = twice(eager, inputs), tg.from_torch(other, inputs)
    with tg.compile(imported.graph, tg.plan(imported.graph, "cpu")) as exe:
        exe.bind(imported.tensors)
        same(twice(lambda *args: imported.call(exe, *args), inputs), want)
    same([[*other.state_dict().values()]], [[*eager.state_dict().values()]])


SEEN: list[float] = []


@torch.library.custom_op("taskgraph_tests::tell", mutates_args=())
def tell(x: torch.Tensor) -> None:
    SEEN.append(float(x.sum()))


@tell.register_fake
def tell_fake(x: torch.Tensor) -> None:
    return None


def told(s: Any, x: torch.Tensor) -> torch.Tensor:
    torch.ops.taskgraph_tests.tell(x + 1)
    return x * 2


def test_what_returns_nothing_is_still_called() -> None:
    x = torch.ones(3)
    imported = tg.from_torch(Fn(told), (x,))
    with tg.compile(imported.graph, tg.plan(imported.graph, "cpu")) as exe:
        SEEN.clear()
        assert torch.equal(imported.call(exe, x), x * 2)
    assert SEEN == [6.0]


def test_an_assertion_of_torch_is_kept() -> None:
    def checked(s: Any, x: torch.Tensor) -> torch.Tensor:
        torch._assert_async((x > 0).all())
        return x * 2

    x = torch.ones(3)
    imported = tg.from_torch(Fn(checked), (x,))
    with tg.compile(imported.graph, tg.plan(imported.graph, "cpu")) as exe:
        assert torch.equal(imported.call(exe, x), x * 2)
        with pytest.raises(tg.ExecutionError):
            imported.call(exe, -x)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    eager, other, inputs = pair(name)
    want = twice(eager, inputs)
    fast = torch.compile(other, backend=tg.embed.backend, options={"verdict": "plan"})
    same(twice(fast, inputs), want)
    same([[*other.state_dict().values()]], [[*eager.state_dict().values()]])
