"""What gpu-check times, and whether it is right: cuBLAS for products, and the functions that are compiled ahead.

Each kind that has a plain torch reference here is compared with it on that GPU first; one that is wrong, or fails, is
left out: then ops of it run by the kernels in cuda/kernels, in captured plans too.
"""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch

from taskgraph.graph.op import Op
from taskgraph.runtime.gpu import torch_ops
from taskgraph.runtime.gpu.kinds import AHEAD_KINDS, CU, TRITON

Tensors = Sequence[torch.Tensor]
Run = Callable[[Op, Tensors, torch.Tensor], None]
TOLERANCE = 2e-2
"""Largest difference from the reference, relative to its largest entry, in bf16."""


@dataclass(frozen=True, slots=True)
class Example:
    """An op with its inputs, an output, and what fills it."""

    op: Op
    ins: Tensors
    out: torch.Tensor
    run: Callable[[], None]


class Fast:
    """What runs each kind on one device, and why some do not run as they should."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {"gemm": torch_ops.gemm} if torch.cuda.is_available() else {}
        self.left_out: list[str] = []

    def verify(self, examples: Mapping[str, Example], left_out: MutableMapping[str, str]) -> None:
        """Put the kinds whose example does not equal its reference, with the reason, into `left_out`."""
        for kind, example in examples.items():
            try:
                wanted = REFERENCES[kind](example.op, [t.clone() for t in example.ins], example.out)
                example.run()
                torch.cuda.synchronize()
                worst = float((example.out.float() - wanted.float()).abs().max() / wanted.float().abs().max())
                if worst <= TOLERANCE:
                    continue
                left_out[kind] = f"differs by {worst:.1e} of the largest entry"
            except Exception as error:  # a compiler of another version: the run goes on without this kernel
                left_out[kind] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.left_out.append(f"{kind}: {left_out[kind]}")

    def lacks(self, kind: str, arch: str) -> bool:
        """Whether a kind that should be compiled ahead is not, on a device of `arch` ("" where it is left out): our own
        kernel takes up to 370 times as long, which would be measured in its place."""
        return kind in REFERENCES and not (arch and kind in AHEAD_KINDS)

    def name_of(self, kind: str, arch: str) -> str:
        """What runs a kind on a device of `arch`, for people."""
        if kind in self.runs:
            return "cuBLAS"
        return TRITON if arch and kind in AHEAD_KINDS else CU


# ------------------------------------------------------------------------------------------ references


def _attended(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
    """(rows, heads, dim) over (kv heads, length, wide): row i sees the keys up to `first` + i."""
    rows, heads, dim = q.shape
    k, v = (t.repeat_interleave(heads // t.shape[0], 0)[..., :dim].float() for t in (keys, values))
    score = torch.einsum("nhd,hld->hnl", q.float(), k) / math.sqrt(dim)
    place = torch.arange(k.shape[1], device=q.device)
    hidden = place[None, :] > (first + torch.arange(rows, device=q.device))[:, None]
    share = score.masked_fill(hidden, -1e30).softmax(-1)
    return torch.einsum("hnl,hld->nhd", share, v).reshape(rows, heads * dim)


def _gathered(table: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """(kv heads, length, wide) of the pages that a block table names."""
    return torch.cat([pages[page] for page in table.tolist()], 1)[:, :length]


def _decode(op: Op, ins: Tensors, out: torch.Tensor) -> torch.Tensor:
    q, lengths, tables, keys, values = ins
    rows = []
    for i, length in enumerate(lengths.tolist()):
        k, v = (_gathered(tables[i], pages, length) for pages in (keys, values))
        rows.append(_attended(q[i : i + 1], k, v, length - 1))
    return torch.cat(rows)


def _prefill(op: Op, ins: Tensors, out: torch.Tensor) -> torch.Tensor:
    q, starts, lengths, tables, keys, values = ins
    rows = []
    for i, length in enumerate(lengths.tolist()):
        begin, end = starts[i : i + 2].tolist()
        k, v = (_gathered(tables[i], pages, length) for pages in (keys, values))
        rows.append(_attended(q[begin:end], k, v, length - (end - begin)))
    return torch.cat(rows)


def _rope(op: Op, ins: Tensors, out: torch.Tensor) -> torch.Tensor:
    from taskgraph.runtime import rotary

    qkv, positions = ins[:2]
    tokens, heads, dim = out.shape
    inverse = torch.from_numpy(rotary.inverse_frequencies(op, dim)).to(qkv.device)
    angle = positions.float()[:, None, None] * inverse
    low, high = qkv.float().reshape(tokens, -1, dim)[:, :heads].chunk(2, -1)
    c, s = angle.cos() * rotary.size(op), angle.sin() * rotary.size(op)
    return torch.cat([low * c - high * s, high * c + low * s], -1)


def _swiglu(op: Op, ins: Tensors, out: torch.Tensor) -> torch.Tensor:
    gate, up = ins[0].float().chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _rmsnorm(op: Op, ins: Tensors, out: torch.Tensor) -> torch.Tensor:
    x = ins[0].float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + op.number("eps")) * ins[1].float()


def _argmax(op: Op, ins: Tensors, out: torch.Tensor) -> torch.Tensor:
    """The first of equals: torch leaves open which it takes."""
    x = ins[0].float()
    places = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), places, x.shape[-1]).amin(-1)


def _add(op: Op, ins: Tensors, out: torch.Tensor) -> torch.Tensor:
    return ins[0].float() + ins[1].float()


def _embedding(op: Op, ins: Tensors, out: torch.Tensor) -> torch.Tensor:
    return ins[1][ins[0].long()].float()


def _slice_rows(op: Op, ins: Tensors, out: torch.Tensor) -> torch.Tensor:
    return ins[0][op.integer("start") : op.integer("stop") : op.integer("step")].float()


def _experts(op: Op, ins: Tensors, out: torch.Tensor) -> torch.Tensor:
    x, routing, up, down = (t.float() for t in ins[:4])
    gate, inner = torch.einsum("th,eih->tei", x, up).chunk(2, -1)
    return torch.einsum("tei,ehi,te->th", torch.nn.functional.silu(gate) * inner, down, routing)


REFERENCES: Mapping[str, Callable[[Op, Tensors, torch.Tensor], torch.Tensor]] = {
    "paged_decode": _decode, "paged_prefill": _prefill, "paged_rope": _rope, "swiglu": _swiglu, "rmsnorm": _rmsnorm,
    "argmax": _argmax, "add": _add, "embedding": _embedding, "slice_rows": _slice_rows, "experts": _experts,
}  # fmt: skip
"""kind -> its output in f32."""
