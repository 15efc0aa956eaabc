"""Implementations at the speed that plans assume, for a GPU that torch has: cuBLAS, Triton, and torch with `out=`.

gpu-check times ops through them and captures whole plans with them, after each has been compared with a plain torch
reference on that GPU; a kind that has none, or whose implementation fails there, runs through our own kernels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module, util

import torch

from taskgraph.graph.op import Op
from taskgraph.runtime.gpu import torch_ops

Tensors = Sequence[torch.Tensor]
Run = Callable[[Op, Tensors, torch.Tensor], None]
TOLERANCE = 2e-2
"""Largest difference from the reference, relative to its largest entry, in bf16."""


def _add(op: Op, ins: Tensors, out: torch.Tensor) -> None:
    torch.add(ins[0], ins[1], out=out)


def _concat_rows(op: Op, ins: Tensors, out: torch.Tensor) -> None:
    torch.cat(list(ins), out=out)


def _embedding(op: Op, ins: Tensors, out: torch.Tensor) -> None:
    torch.index_select(ins[1], 0, ins[0], out=out)


def _argmax(op: Op, ins: Tensors, out: torch.Tensor) -> None:
    torch.argmax(ins[0], dim=-1, out=out)


BY_TORCH: Mapping[str, Run] = {
    "gemm": torch_ops.gemm, "add": _add, "concat_rows": _concat_rows, "embedding": _embedding, "argmax": _argmax,
}  # fmt: skip
"""kind -> what fills the output from the inputs on the current stream."""


class Fast:
    """The implementations that are used on one device, by kind, and why others are not."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.left_out: list[str] = []
        self._triton: Mapping[str, Run] = {}
        if not torch.cuda.is_available():
            return
        self.runs |= BY_TORCH
        if util.find_spec("triton") is not None:
            try:
                self._triton = import_module("taskgraph.tune.gpucheck.triton_kernels").KERNELS
            except Exception as error:  # a Triton of another version: our own kernels run
                self.left_out.append(f"Triton: {' '.join(f'{type(error).__name__}: {error}'.split())}")

    def verify(self, examples: Mapping[str, tuple[Op, Tensors, torch.Tensor]]) -> None:
        """Take the Triton kernels that equal their reference on an example of their kind: an op, inputs, and an output
        to fill."""
        for kind, run in self._triton.items():
            op, ins, out = examples[kind]
            try:
                wanted = REFERENCES[kind](op, [t.clone() for t in ins], out)
                run(op, ins, out)
                torch.cuda.synchronize()
                worst = float((out.float() - wanted.float()).abs().max() / wanted.float().abs().max())
                if worst <= TOLERANCE:
                    self.runs[kind] = run
                else:
                    self.left_out.append(f"{kind}: differs by {worst:.1e} of the largest entry")
            except Exception as error:  # a compiler of another version: the run goes on without this kernel
                self.left_out.append(f"{kind}: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")

    def lacks(self, kind: str) -> bool:
        """Whether a kind that should have an implementation here has none: our own kernel takes up to 370 times as
        long, which would be measured in its place."""
        return kind in REFERENCES and kind not in self.runs

    def name_of(self, kind: str) -> str:
        """What runs a kind, for people."""
        if kind not in self.runs:
            return "cuda/kernels"
        return "cuBLAS" if kind == "gemm" else "torch" if kind in BY_TORCH else "Triton"

    @contextmanager
    def in_plans(self) -> Iterator[None]:
        """Within the block captured plans run these instead of our own kernels."""
        kept = dict(torch_ops.TORCH_OPS)
        torch_ops.TORCH_OPS.update(self.runs)
        try:
            yield
        finally:
            torch_ops.TORCH_OPS.clear()
            torch_ops.TORCH_OPS.update(kept)


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


REFERENCES: Mapping[str, Callable[[Op, Tensors, torch.Tensor], torch.Tensor]] = {
    "paged_decode": _decode, "paged_prefill": _prefill, "paged_rope": _rope, "swiglu": _swiglu, "rmsnorm": _rmsnorm,
}  # fmt: skip
"""kind -> its output in f32."""
