"""Pointwise ops, norms, products, reductions and moves along axes: what every table of op kinds says about them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from taskgraph import ops
from taskgraph.graph.graph import GraphBuilder, Value
from taskgraph.graph.op import Work

Tensors = dict[str, torch.Tensor]
Maker = Callable[[GraphBuilder], Value]
Case = tuple[Callable[[GraphBuilder, str], Value], Callable[[Tensors], torch.Tensor]]


def _given(b: GraphBuilder, d: str, x: tuple[int, ...], y: tuple[int, ...] | None = None) -> list[Value]:
    return [b.input(name, shape, d) for name, shape in (("x", x), ("y", y)) if shape is not None]


def _layer_norm(b: GraphBuilder, d: str) -> Value:
    return ops.layer_norm(b.input("x", (5, 48), d), b.weight("w", (48,), d), b.weight("bias", (48,), d), eps=1e-3)


CASES: dict[str, Case] = {
    "elementwise": (
        lambda b, d: ops.elementwise("mul x0 x1; add s0 0.5; silu s1; where x1 s2 s0", _given(b, d, (5, 7), (5, 7))),
        lambda t: torch.where(t["y"] != 0, F.silu(t["x"] * t["y"] + 0.5), t["x"] * t["y"]),
    ),
    "elementwise trailing": (
        lambda b, d: ops.mul(*_given(b, d, (5, 3, 7), (7,))), lambda t: t["x"] * t["y"],
    ),
    "elementwise leading": (
        lambda b, d: ops.div(*_given(b, d, (5, 1, 7), (5, 3, 1))), lambda t: t["x"] / t["y"],
    ),
    "elementwise gelu": (lambda b, d: ops.gelu(*_given(b, d, (5, 7))), lambda t: F.gelu(t["x"])),
    "elementwise gelu tanh": (
        lambda b, d: ops.gelu(*_given(b, d, (5, 7)), approximate="tanh"),
        lambda t: F.gelu(t["x"], approximate="tanh"),
    ),
    "elementwise cast": (lambda b, d: ops.cast(*_given(b, d, (5, 7)), "i64"), lambda t: t["x"].long()),
    "elementwise whole": (
        lambda b, d: ops.elementwise("mul x0 3; sub 7 s0", [b.input("x", (5, 7), "i64")]), lambda t: 7 - 3 * t["x"],
    ),
    "layer_norm": (_layer_norm, lambda t: F.layer_norm(t["x"], (48,), t["w"], t["bias"], 1e-3)),
    "layer_norm plain": (
        lambda b, d: ops.layer_norm(b.input("x", (2, 5, 48), d)), lambda t: F.layer_norm(t["x"], (48,)),
    ),
    "softmax": (lambda b, d: ops.softmax(*_given(b, d, (5, 3, 33))), lambda t: t["x"].softmax(2)),
    "softmax inner": (lambda b, d: ops.softmax(*_given(b, d, (5, 9, 3)), 1), lambda t: t["x"].softmax(1)),
    "softmax log": (
        lambda b, d: ops.softmax(*_given(b, d, (5, 33)), log=True), lambda t: t["x"].log_softmax(1),
    ),
    "matmul": (
        lambda b, d: ops.matmul(*_given(b, d, (5, 3, 4, 9), (5, 3, 9, 7))), lambda t: t["x"] @ t["y"],
    ),
    "matmul transposed": (
        lambda b, d: ops.matmul(*_given(b, d, (5, 3, 40, 9), (3, 35, 9)), transpose_b=True),
        lambda t: t["x"] @ t["y"].transpose(-1, -2),
    ),
    "matmul plain": (lambda b, d: ops.matmul(*_given(b, d, (5, 9), (9, 7))), lambda t: t["x"] @ t["y"]),
    "reduce": (lambda b, d: ops.reduce_sum(*_given(b, d, (5, 3, 33)), -1), lambda t: t["x"].sum(2)),
    "reduce mean": (
        lambda b, d: ops.reduce_mean(*_given(b, d, (5, 3, 4, 9)), (1, 3), keep_axes=True),
        lambda t: t["x"].mean((1, 3), keepdim=True),
    ),
    "reduce max": (lambda b, d: ops.reduce_max(*_given(b, d, (5, 3, 9)), 1), lambda t: t["x"].amax(1)),
    "reduce min": (lambda b, d: ops.reduce("min", *_given(b, d, (5, 3, 9)), (0, 2)), lambda t: t["x"].amin((0, 2))),
    "reshape": (lambda b, d: ops.reshape(*_given(b, d, (6, 4, 5)), (4, 3, -1)), lambda t: t["x"].reshape(4, 3, 10)),
    "permute": (
        lambda b, d: ops.permute(*_given(b, d, (5, 3, 4, 9)), (2, 0, 3, 1)), lambda t: t["x"].permute(2, 0, 3, 1),
    ),
    "permute rows": (
        lambda b, d: ops.permute(*_given(b, d, (5, 3, 4)), (1, 0, 2), (3, -1)),
        lambda t: t["x"].transpose(0, 1).reshape(-1, 20),
    ),
    "permute last": (lambda b, d: ops.transpose(*_given(b, d, (5, 3, 8)), 0, 1), lambda t: t["x"].transpose(0, 1)),
    "expand": (lambda b, d: ops.expand(*_given(b, d, (5, 1, 7)), (2, 5, 3, 7)), lambda t: t["x"].repeat(2, 1, 3, 1)),
    "concat": (
        lambda b, d: ops.concat(_given(b, d, (5, 3, 8), (5, 2, 8)), 1), lambda t: torch.cat([t["x"], t["y"]], 1),
    ),
    "slice_axis": (lambda b, d: ops.slice_axis(*_given(b, d, (5, 9, 4)), 1, 2, 9, 3), lambda t: t["x"][:, 2:9:3]),
    "index_select": (
        lambda b, d: ops.index_select(b.input("x", (5, 12, 4), d), b.input("i", (7,), "i64"), 1),
        lambda t: t["x"].index_select(1, t["i"]),
    ),
    "index_select rows": (
        lambda b, d: ops.index_select(b.input("x", (12, 5), d), b.input("i", (7,), "i64")), lambda t: t["x"][t["i"]],
    ),
    "take_along": (
        lambda b, d: ops.take_along(b.input("x", (5, 12, 3), d), b.input("i", (5, 4, 3), "i64"), 1),
        lambda t: t["x"].take_along_dim(t["i"].long(), 1),
    ),
}  # fmt: skip
"""Runs: the op of one dtype, and torch's result."""

SIZED = ("layer_norm", "layer_norm plain", "reshape", "permute rows")
GENERAL = {case for case in CASES if "gelu" not in case and case not in SIZED}
"""Cases whose reference holds for other sizes and dtypes too."""

MADE: dict[str, tuple[Maker, tuple[int, ...], str, Work]] = {
    "elementwise": (
        lambda b: ops.elementwise("mul x0 x1; silu s0", [b.input("x", (3, 8), "bf16"), b.weight("y", (8,), "bf16")]),
        (3, 8), "bf16", Work(flops=5 * 24, hbm_bytes=2 * (24 + 8 + 24)),
    ),
    "layer_norm": (
        lambda b: ops.layer_norm(b.input("x", (3, 8), "f32"), b.weight("w", (8,), "f32"), b.weight("c", (8,), "f32")),
        (3, 8), "f32", Work(flops=9 * 24, hbm_bytes=4 * (24 + 16 + 24)),
    ),
    "softmax": (
        lambda b: ops.softmax(b.input("x", (3, 8), "f32")), (3, 8), "f32", Work(flops=5 * 24, hbm_bytes=4 * 48),
    ),
    "matmul": (
        lambda b: ops.matmul(b.input("x", (2, 3, 8), "bf16"), b.input("y", (2, 8, 5), "bf16"), out_dtype="f32"),
        (2, 3, 5), "f32", Work(flops=2 * 30 * 8, hbm_bytes=2 * (48 + 80) + 4 * 30),
    ),
    "reduce": (
        lambda b: ops.reduce_mean(b.input("x", (3, 8, 2), "f32"), (0, 2)),
        (8,), "f32", Work(flops=48, hbm_bytes=4 * (48 + 8)),
    ),
    "reshape": (
        lambda b: ops.reshape(b.input("x", (3, 8, 2), "f32"), (6, 8)), (6, 8), "f32", Work(hbm_bytes=2 * 192),
    ),
    "permute": (
        lambda b: ops.permute(b.input("x", (3, 8, 2), "bf16"), (2, 0, 1)), (2, 3, 8), "bf16", Work(hbm_bytes=4 * 48),
    ),
    "expand": (
        lambda b: ops.expand(b.input("x", (3, 1), "f32"), (2, -1, 5)), (2, 3, 5), "f32", Work(hbm_bytes=12 + 120),
    ),
    "concat": (
        lambda b: ops.concat([b.input("x", (3, 2), "f32"), b.input("y", (3, 6), "f32")], -1),
        (3, 8), "f32", Work(hbm_bytes=2 * 96),
    ),
    "slice_axis": (
        lambda b: ops.slice_axis(b.input("x", (3, 8), "f32"), 1, 1, 8, 2), (3, 4), "f32", Work(hbm_bytes=2 * 48),
    ),
    "index_select": (
        lambda b: ops.index_select(b.input("x", (3, 8), "f32"), b.input("i", (5,), "i32"), 1),
        (3, 5), "f32", Work(hbm_bytes=20 + 2 * 60),
    ),
    "take_along": (
        lambda b: ops.take_along(b.input("x", (3, 8), "bf16"), b.input("i", (3, 2), "i64")),
        (3, 2), "bf16", Work(hbm_bytes=48 + 2 * 12),
    ),
}  # fmt: skip
"""Declarations: the op, and its shape, dtype and work by hand."""

MISFITS: dict[str, Callable[[GraphBuilder], Any]] = {
    "elementwise": lambda b: ops.mul(b.input("x", (3, 8), "f32"), b.input("bad", (3, 7), "f32")),
    "elementwise count": lambda b: ops.elementwise("mul x0 x1", [b.input("bad", (3, 7), "f32")]),
    "elementwise f8": lambda b: ops.relu(b.input("bad", (3, 7), "f8")),
    "layer_norm": lambda b: ops.layer_norm(b.input("x", (3, 8), "f32"), b.weight("bad", (7,), "f32")),
    "layer_norm dtype": lambda b: ops.layer_norm(b.input("x", (3, 8), "f32"), b.weight("bad", (8,), "bf16")),
    "softmax": lambda b: ops.softmax(b.input("bad", (3, 8), "i64")),
    "softmax axis": lambda b: ops.apply("softmax", [b.input("bad", (3, 8), "f32")], {"axis": 2, "log": False}),
    "matmul": lambda b: ops.matmul(b.input("x", (2, 3, 8), "f32"), b.input("bad", (2, 7, 5), "f32")),
    "matmul batch": lambda b: ops.matmul(b.input("x", (2, 3, 8), "f32"), b.input("bad", (3, 8, 5), "f32")),
    "reduce": lambda b: ops.reduce_sum(b.input("bad", (3, 8), "i64"), 1),
    "reduce axes": lambda b: ops.reduce_sum(b.input("bad", (3, 8), "f32"), (1, -1)),
    "reshape": lambda b: ops.reshape(b.input("bad", (3, 8), "f32"), (5, -1)),
    "permute": lambda b: ops.permute(b.input("bad", (3, 8), "f32"), (1, 1)),
    "permute rows": lambda b: ops.permute(b.input("bad", (3, 8), "f32"), (1, 0), (5, -1)),
    "expand": lambda b: ops.expand(b.input("bad", (3, 8), "f32"), (3, 16)),
    "concat": lambda b: ops.concat([b.input("x", (3, 8), "f32"), b.input("bad", (4, 8), "f32")], 1),
    "concat dtype": lambda b: ops.concat([b.input("x", (3, 8), "f32"), b.input("bad", (3, 8), "bf16")], 1),
    "slice_axis": lambda b: ops.slice_axis(b.input("bad", (3, 8), "f32"), 1, 4, 9),
    "index_select": lambda b: ops.index_select(b.input("x", (3, 8), "f32"), b.input("bad", (5,), "f32")),
    "take_along": lambda b: ops.take_along(b.input("x", (3, 8), "f32"), b.input("bad", (2, 8), "i64")),
}  # fmt: skip
"""What is refused, by an error that names the kind and the tensor "bad"."""
