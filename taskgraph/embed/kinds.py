"""The op kinds of this room; importing it registers them and how they run on a CPU.

`aten` is a call of one of torch's operators, which its attribute `program` holds as text (`taskgraph.embed.calls`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from taskgraph.cost.families import PLAIN_STREAM, priced
from taskgraph.cost.families.attention import DecodeShape, PrefillShape
from taskgraph.cost.families.gemm import GemmShape
from taskgraph.cost.family import Kernel
from taskgraph.embed import kernels
from taskgraph.embed.calls import Strided, decoded, leaves, mapped, out_variant, target_of
from taskgraph.embed.convolutions import bind_convolution
from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import ITEMSIZE, Op, Work
from taskgraph.ops.kinds import Kind, Output, register
from taskgraph.ops.signatures import FLAG, NUMBER, WORD, Attrs, Shapes, Signature
from taskgraph.runtime.cpu import pointwise
from taskgraph.runtime.cpu.algebra import alone_if_small
from taskgraph.runtime.cpu.arguments import ready
from taskgraph.runtime.cpu.kinds import COMPILED, TORCH, CpuSite, Entry, Tensors, bits
from taskgraph.runtime.cpu.kinds import register as register_on_cpu
from taskgraph.runtime.cpu.standard import CPU_KINDS

ATEN: Final = "aten"


def _stated(ins: Shapes, attrs: Attrs) -> Output:
    raise AssertionError("an aten op states its outputs")


def _stated_work(ins: Shapes, outs: Shapes, attrs: Attrs) -> Work:
    raise AssertionError("an aten op states its work")


register(Kind(ATEN, Signature("*", {"program": WORD}, many=True), _stated, _stated_work, stated=True))


def taken(base: torch.Tensor, views: list[Any]) -> torch.Tensor:
    """The view of `base` that the text says."""
    value = base
    for name, args, kwargs, item in views:
        made = target_of(name)(value, *decoded(args, dict), **{k: decoded(v, dict) for k, v in kwargs.items()})
        value = made if item is None else made[item]
    return value


def bind_aten(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    """The call, with its views taken of these buffers, writing straight into the output where torch can."""
    body = json.loads(str(op.attr("program")))
    given = [Strided.from_json(text).on(t) for text, t in zip(body["in"], ins, strict=True)]
    made = [Strided.from_json(text).on(t) for text, t in zip(body["out"], outs, strict=True)]

    def tensor(text: dict[str, Any]) -> torch.Tensor:
        base = given[text["i"]] if "i" in text else made[text["o"]]
        view = taken(base, text["v"])
        if view.numel() and not _within(view, base):
            raise BackendUnavailable(f"op {op.name!r}: a view became a copy on this machine; import the module again.")
        return view

    target = target_of(body["call"])
    args = decoded(body["args"], tensor)
    kwargs = {k: decoded(v, tensor) for k, v in body["kwargs"].items()}
    copies = [(made[o], given[i]) for i, o in body["copies"]]
    results = [None if o is None else made[o] for o in body["results"]]
    if not copies and not kwargs and len(results) == 1 and results[0] is not None:
        weight = body["args"][1] if len(args) > 1 else None
        fixed = isinstance(weight, dict) and "i" in weight and op.inputs[weight["i"]] in site.constants
        direct = bind_convolution(op, target._opname, args, results[0], fixed, site)
        if direct is not None:
            return direct
    run = _entry(target, args, kwargs, copies, results)
    return alone_if_small(op, site, run) if target._opname in _PARALLEL else run


_PARALLEL: Final = frozenset({
    "matmul", "bmm", "mm", "addmm", "baddbmm", "linear", "einsum", "conv1d", "conv2d", "convolution", "lstm", "gru",
    "conv_transpose2d", "scaled_dot_product_attention",
})  # fmt: skip
"""Calls that libraries spread over all threads, however small they are."""


def _entry(target: Any, args: list[Any], kwargs: dict[str, Any], copies: list[Any], results: list[Any]) -> Entry:
    run: Any = target._op
    if target.namespace == "_c10d_functional" and target._opname != "wait_tensor":
        run = partial(_waited, run)
    if not any(r is not None for r in results):
        plain = partial(run, *args, **kwargs)
        if not copies:
            return plain
        return partial(_copied, copies, plain)
    if len(results) == 1 and not copies:
        (out,) = results
        moved = _move(target._opname, args, out)
        if moved is not None:
            return moved
        direct = out_variant(target)
        if direct is not None and out.numel():
            return partial(direct._op, *args, **kwargs, out=out)
        return partial(_into, out.copy_, partial(run, *args, **kwargs))
    return partial(_all_into, copies, results, partial(run, *args, **kwargs))


def _move(name: str, args: list[Any], out: torch.Tensor) -> Entry | None:
    """One copy in place of a call that only moves or converts elements."""
    if name in ("clone", "contiguous", "to", "_to_copy"):
        return partial(out.copy_, args[0])
    if name in ("reshape", "flatten", "_unsafe_view") and out.is_contiguous():
        return partial(out.view(args[0].shape).copy_, args[0])
    return None


def _waited(run: Any, *args: Any, **kwargs: Any) -> Any:
    """A collective that has ended: torch knows which to wait for by the tensor that it returned, of which ours is a
    copy."""
    return mapped(run(*args, **kwargs), torch.ops._c10d_functional.wait_tensor)


def _copied(copies: list[Any], run: Entry) -> None:
    for to, source in copies:
        to.copy_(source)
    run()


def _into(put: Any, run: Entry) -> None:
    put(run())


def _all_into(copies: list[Any], outs: list[Any], run: Entry) -> None:
    for to, source in copies:
        to.copy_(source)
    made = run()
    for out, one in zip(outs, [t for t in leaves(made) if isinstance(t, torch.Tensor)], strict=True):
        if out is not None:
            out.copy_(one)


def _within(view: torch.Tensor, base: torch.Tensor) -> bool:
    return bool(view.untyped_storage()._cdata == base.untyped_storage()._cdata)


register_on_cpu(ATEN, bind_aten, TORCH)


# -------------------------------------------------------------------------------------- operands as views


def operands_of(op: Op, ins: Tensors, outs: Tensors) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The operands of an op of this room, as views of its inputs, and its output as torch has it."""
    body = json.loads(str(op.attr("program")))
    given = [Strided.from_json(text).on(t) for text, t in zip(body["in"], ins, strict=True)]
    views = [taken(given[text["i"]], text["v"]) for text in body["operands"]]
    views = [t.view(text["as"]) if "as" in text else t for t, text in zip(views, body["operands"], strict=True)]
    return views, Strided.from_json(body["out"][0]).on(outs[0])


def stated_kind(name: str, attrs: Mapping[str, str], bind: Any, by: str) -> None:
    """Register a kind of this room and how it runs on a CPU."""
    takes = Signature("*", {"program": WORD, **attrs}, many=True)
    register(Kind(name, takes, _stated, _stated_work, stated=True))
    register_on_cpu(name, bind, by)


def bind_elementwise(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    """The formula, over operands permuted so that the output lies row by row."""
    views, out = operands_of(op, ins, outs)
    order = sorted(range(out.dim()), key=lambda axis: out.stride()[axis], reverse=True)
    turned = [t.expand(out.shape).permute(order) if t.dim() else t for t in views]
    attrs = (("formula", op.attr("formula")), ("out_dtype", op.attr("out_dtype")))
    return pointwise.bind_elementwise(replace(op, kind="elementwise", attrs=attrs), turned, [out.permute(order)], site)


stated_kind("aten.elementwise", {"formula": WORD, "out_dtype": WORD}, bind_elementwise, COMPILED)


def bind_as(inner: str, op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    """As an op of the kind `inner` runs, on views of the inputs."""
    views, out = operands_of(op, ins, outs)
    attrs = tuple((key, value) for key, value in op.attrs if key not in ("program", "out_shape"))
    shape = op.attr("out_shape")
    assert isinstance(shape, tuple)
    return CPU_KINDS[inner].bind(replace(op, kind=inner, attrs=attrs), views, [out.view(shape)], site)


for _kind in (
    "gemm", "rmsnorm", "layer_norm", "embedding", "argmax", "softmax", "matmul", "reduce", "concat", "concat_rows",
    "index_select", "take_along", "expand",
):  # fmt: skip
    stated_kind(f"{ATEN}.{_kind}", {}, partial(bind_as, _kind), CPU_KINDS[_kind].by)


# ------------------------------------------------------------------------------------- rotary, attention

_MOST_SCORES = 1 << 18
"""Scores of a head up to which our kernel attends; torch's, which needs no room for them, is for more."""
_A_THREAD = 1 << 14
"""Multiplications that are worth a thread."""


def _operand(tensor: torch.Tensor, size: Sequence[int]) -> tuple[int, list[int]]:
    """Address and strides of a tensor that is repeated to `size`, of four axes."""
    full = tensor.expand(tuple(size)) if tensor.dim() == len(size) else tensor.expand(*size)
    return full.data_ptr(), [*full.stride()]


def bind_rotary(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    """By the kernel, over at most four axes."""
    views, out = operands_of(op, ins, outs)
    size = [1] * (4 - out.dim()) + [*out.shape]
    found = [_operand(t.view(size) if t is out else t.expand(out.shape)[(None,) * (4 - out.dim())], size)
             for t in (*views, out)]  # fmt: skip
    at, steps = np.array([a for a, _ in found], np.int64), np.array([s for _, s in found], np.int64)
    threads = min(site.threads, 1 + out.numel() // _A_THREAD)
    like = bits(torch.empty(0, dtype=out.dtype))
    return held(ready(kernels.rotate, like, at, np.array(size, np.int64), steps, threads), (views, out))


def held(run: Entry, tensors: object) -> Entry:
    """`run`, which knows addresses alone, with the tensors that lie there."""

    def entry(kept: object = tensors) -> None:
        run()

    return entry


def bind_attention(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    """By our kernel, or by torch's for very many queries and keys."""
    views, out = operands_of(op, ins, outs)
    q, k, v = views[:3]
    mask = views[3] if op.attr("masked") else None
    batch, heads, rows, dim = q.shape
    groups, keys, wide = k.shape[1], k.shape[2], v.shape[3]
    scale, causal = op.number("scale"), bool(op.attr("causal"))
    contiguous = all(t.stride(3) == 1 or t.shape[3] == 1 for t in (q, k, v, out))
    floats = mask is None or mask.dtype in (torch.bool, torch.float32)
    if rows * keys > _MOST_SCORES or not contiguous or not floats or k.shape[0] != batch or len({q.dtype, k.dtype}) > 1:
        attend = torch.ops.aten.scaled_dot_product_attention.default._op
        torchs = partial(attend, q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=groups != heads)
        return partial(_into, out.copy_, torchs)
    kind = kernels.NO_MASK if mask is None else kernels.TRUTHS if mask.dtype == torch.bool else kernels.ADDED
    seen = out[:1, :1, :1, :1] if mask is None else mask
    at_mask, mask_steps = (out.data_ptr(), [0] * 4) if mask is None else _operand(seen, (batch, heads, rows, keys))
    at = np.array([*(t.data_ptr() for t in (q, k, v, out)), at_mask], np.int64)
    steps = np.array([*([*t.stride()] for t in (q, k, v, out)), mask_steps], np.int64)
    threads = min(site.threads, 1 + batch * heads * rows * keys * dim // _A_THREAD, batch * heads)
    sizes = np.array([batch, heads, rows, dim, groups, keys, wide], np.int64)
    like = bits(torch.empty(0, dtype=out.dtype))
    run = ready(kernels.attend, like, at, sizes, steps, kernels.Scores(scale, kind, causal), threads)
    return held(run, (views, out))


def bind_routing(op: Op, ins: Tensors, outs: Tensors, site: CpuSite) -> Entry:
    """Each token's weights to the places of its experts; an expert that it names twice gets both."""
    (places, weights), out = operands_of(op, ins, outs)
    given = weights if weights.dtype == torch.float32 else torch.empty(weights.shape, dtype=torch.float32)

    def run() -> None:
        if given is not weights:
            given.copy_(weights)
        out.zero_().scatter_add_(1, places, given)

    return run


def attention_kernel(op: Op, ins: Shapes, outs: Shapes) -> Kernel:
    """Decode for one query a sequence, else prefill."""
    sizes = op.attr("sizes")
    assert isinstance(sizes, tuple)
    batch, heads, rows, dim, groups, keys, _ = sizes
    kind, size = outs[0].dtype, ITEMSIZE[outs[0].dtype]
    if rows == 1:
        return Kernel("decode_attention", kind, DecodeShape(batch, keys, heads, groups, dim, 0.0, size))
    return Kernel("prefill_attention", kind, PrefillShape(batch, rows, max(keys, rows), heads, groups, dim, 0.0, size))


def gemm_kernel(op: Op, ins: Shapes, outs: Shapes) -> Kernel:
    """The product that it is."""
    (m, k), (_, n) = json.loads(str(op.attr("program")))["operands"][0]["as"], _pair(op.attr("out_shape"))
    return Kernel("gemm", outs[0].dtype, GemmShape(m, n, k, ITEMSIZE[outs[0].dtype]))


def _pair(value: object) -> tuple[int, int]:
    assert isinstance(value, tuple)
    first, second = value
    return first, second


def call_kernel(op: Op, ins: Shapes, outs: Shapes) -> Kernel:
    """A stream of the declared work, at the rate of its own dtype."""
    kind = outs[0].dtype if outs and outs[0].dtype in ("bf16", "f16") else "f32"
    return PLAIN_STREAM if kind == "f32" else Kernel("stream", kind, (*op.work.vector, 0.0))


for _name, _rule in (("attention", attention_kernel), ("gemm", gemm_kernel)):
    priced(f"{ATEN}.{_name}", _rule)
priced(ATEN, call_kernel)
stated_kind("aten.rotary", {}, bind_rotary, COMPILED)
stated_kind("aten.routing", {}, bind_routing, TORCH)
stated_kind(
    "aten.attention", {"scale": NUMBER, "causal": FLAG, "masked": FLAG, "sizes": WORD}, bind_attention, COMPILED
)
