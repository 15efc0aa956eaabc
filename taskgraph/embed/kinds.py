"""The op kinds of this room; importing it registers them and how they run on a CPU.

`aten` is a call of one of torch's operators, which its attribute `program` holds as text (`taskgraph.embed.calls`).
"""

import json
from functools import partial
from typing import Any, Final

import torch

from taskgraph.embed.calls import Layout, decoded, leaves, out_variant, target_of
from taskgraph.errors import BackendUnavailable
from taskgraph.graph.op import Op, Work
from taskgraph.ops.kinds import Kind, Output, register
from taskgraph.ops.signatures import WORD, Attrs, Shapes, Signature
from taskgraph.runtime.cpu.kinds import TORCH, CpuSite, Entry, Tensors
from taskgraph.runtime.cpu.kinds import register as register_on_cpu

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
    given = [Layout.from_json(text).on(t) for text, t in zip(body["in"], ins, strict=True)]
    made = [Layout.from_json(text).on(t) for text, t in zip(body["out"], outs, strict=True)]

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
    return _entry(target, args, kwargs, copies, results)


def _entry(target: Any, args: list[Any], kwargs: dict[str, Any], copies: list[Any], results: list[Any]) -> Entry:
    run: Any = target._op
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
