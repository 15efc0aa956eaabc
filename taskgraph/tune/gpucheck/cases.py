"""What gpu-check times: graphs of one op each, named as the tables name kernels, and how they are run.

Where torch has the GPU, products run by cuBLAS; all else runs by what is registered: functions that are compiled ahead,
and on a virtual device the kernels in cuda/kernels.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

import taskgraph.ops as ops
from taskgraph.cost.corunning_fit import OWN
from taskgraph.cost.model import predict
from taskgraph.errors import BackendUnavailable, CalibrationError
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import Work, demand, spec
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.runtime.gpu import driver
from taskgraph.runtime.gpu.ahead.products import gemm_launches
from taskgraph.runtime.gpu.driver import Gpu, Memory
from taskgraph.runtime.gpu.interop import torch_stream
from taskgraph.runtime.gpu.kinds import AHEAD_KINDS, TRITON, Buffer, CopyLaunch, Launches, Rule
from taskgraph.runtime.gpu.sites import LaneSite
from taskgraph.runtime.gpu.standard import launches
from taskgraph.tune.gpucheck.fast import Example, Fast
from taskgraph.tune.gpucheck.rig import PartitionStream, Rig

_ROTATED_BYTES = 192 << 20
"""Weights take turns until so many bytes lie between two uses of one: more than any L2 holds."""
_PAGE = 16


@dataclass(frozen=True, slots=True)
class Scale:
    """The model that shapes come from (Llama-3-8B), and how much of it: a virtual device gets little."""

    width: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    rows: int = 2048
    vocab: int = 128256
    copy_bytes: int = 64 << 20
    stream_bytes: int = 1 << 29


LARGE = Scale()
SMALL = Scale(
    width=64, inner=128, heads=4, kv_heads=2, dim=64, rows=64, vocab=160, copy_bytes=1 << 16, stream_bytes=1 << 16
)


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel by name: a graph of one op, the values that its index inputs need, and what it does in bytes or flops
    for people; `kinds` says what fills the device: "dense", "memory" or "copy"."""

    name: str
    graph: Graph
    fills: str
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)
    function: Callable[..., None] | None = None
    rule: Rule | None = None
    """What launches it in place of what is registered, or of the library's."""


def gemm_case(name: str, m: int, n: int, k: int) -> Case:
    """(m, k) x (n, k) transposed."""
    b = GraphBuilder(name)
    b.output(ops.gemm(b.input("x", (m, k), "bf16"), b.weight("w", (n, k), "bf16"), transpose_w=True, name=name))
    return Case(name, b.build(), "dense")


def gemm_cases(s: Scale) -> Iterator[Case]:
    """The products of a layer, at several numbers of rows."""
    for rows, names in ((s.rows, ("gateup", "qkv", "down")), (s.rows // 4, ("gateup",)), (s.rows // 16, ("gateup",))):
        for name in names:
            yield gemm_case(f"gemm_{name}_{rows}", rows, *_GEMM_SHAPES[name](s))
    yield gemm_case(f"gemm_o_{s.rows}", s.rows, s.width, s.width)


def decode_case(s: Scale, sequences: int, keys: int) -> Case:
    """Attention of one row a sequence over its keys in pages."""
    blocks = -(-keys // _PAGE)
    b, name = GraphBuilder(f"decode_{sequences}x{keys}"), f"decode_{sequences}x{keys}"
    q = b.input("q", (sequences, s.heads, s.dim), "bf16")
    lengths, tables = b.input("lengths", (sequences,), "i32"), b.input("tables", (sequences, blocks), "i32")
    pages = [b.state(each, (sequences * blocks, s.kv_heads, _PAGE, s.dim), "bf16") for each in ("keys", "values")]
    b.output(ops.paged_decode(q, lengths, tables, *pages, context=keys, name=name))
    given = {"lengths": torch.full((sequences,), keys, dtype=torch.int32), "tables": _tables(sequences, blocks)}
    return Case(name, b.build(), "memory", given)


def prefill_case(s: Scale, chunks: int, rows: int, keys: int, name: str) -> Case:
    """Attention of chunks of rows at the end of their keys in pages."""
    blocks = -(-keys // _PAGE)
    b = GraphBuilder(name)
    q = b.input("q", (chunks * rows, s.heads, s.dim), "bf16")
    starts, lengths = b.input("starts", (chunks + 1,), "i32"), b.input("lengths", (chunks,), "i32")
    tables = b.input("tables", (chunks, blocks), "i32")
    pages = [b.state(each, (chunks * blocks, s.kv_heads, _PAGE, s.dim), "bf16") for each in ("keys", "values")]
    b.output(ops.paged_prefill(q, starts, lengths, tables, *pages, context=keys, name=name))
    given = {
        "starts": torch.arange(0, chunks * rows + 1, rows, dtype=torch.int32),
        "lengths": torch.full((chunks,), keys, dtype=torch.int32),
        "tables": _tables(chunks, blocks),
    }
    return Case(name, b.build(), "blocks", given)


def _tables(sequences: int, blocks: int) -> torch.Tensor:
    """Block tables whose pages are drawn without a second use."""
    draw = torch.Generator().manual_seed(7)
    return torch.randperm(sequences * blocks, generator=draw).to(torch.int32).reshape(sequences, blocks)


def rope_case(s: Scale, tokens: int) -> Case:
    """Rotation of the queries and keys of some tokens, and the write into their slots."""
    b = GraphBuilder("rope")
    qkv = b.input("qkv", (tokens, (s.heads + 2 * s.kv_heads) * s.dim), "bf16")
    positions, slots = b.input("positions", (tokens,), "i32"), b.input("slots", (tokens,), "i32")
    pages = [b.state(each, (tokens, s.kv_heads, _PAGE, s.dim), "bf16") for each in ("keys", "values")]
    places = ops.TokenPlaces(positions, slots, 64)
    b.output(ops.paged_rope(qkv, places, pages[0], pages[1], spec=ops.RopeSpec(s.heads, 5e5), name="rope"))
    at = torch.arange(tokens, dtype=torch.int32)
    return Case("rope", b.build(), "memory", {"positions": 7 * at, "slots": 3 * at})


def elementwise_case(s: Scale, kind: str, rows: int) -> Case:
    """One op over rows of the model's width (swiglu: of its inner width)."""
    b, name = GraphBuilder(f"{kind}_{rows}"), f"{kind}_{rows}"
    if kind == "swiglu":
        b.output(ops.swiglu(b.input("x", (rows, 2 * s.inner), "bf16"), name=name))
    elif kind == "rmsnorm":
        b.output(ops.rmsnorm(b.input("x", (rows, s.width), "bf16"), b.input("w", (s.width,), "bf16"), name=name))
    elif kind == "argmax":
        b.output(ops.argmax(b.input("x", (rows, s.vocab), "bf16"), name=name))
    else:
        x, y = (b.input(each, (rows, s.width), "bf16") for each in "xy")
        b.output(ops.add(x, y, name=name))
    return Case(name, b.build(), "memory")


def embedding_case(s: Scale, rows: int) -> Case:
    """Rows of the vocabulary's table by tokens."""
    b, name = GraphBuilder(f"embedding_{rows}"), f"embedding_{rows}"
    table = b.input("table", (s.vocab, s.width), "bf16")
    b.output(ops.embedding(b.input("tokens", (rows,), "i32"), table, name=name))
    tokens = torch.randint(0, s.vocab, (rows,), generator=torch.Generator().manual_seed(7), dtype=torch.int32)
    return Case(name, b.build(), "memory", {"tokens": tokens})


def experts_case(s: Scale, rows: int, experts: int = 128, top: int = 8) -> Case:
    """Routed experts of half the width and an inner one of 3/8 of that (Qwen3-30B-A3B), tokens spread evenly."""
    b, name = GraphBuilder(f"experts_{rows}"), f"experts_{rows}"
    hidden, inner = s.width // 2, 3 * s.width // 16
    weights = b.weight("up", (experts, 2 * inner, hidden), "bf16"), b.weight("down", (experts, hidden, inner), "bf16")
    routing = b.input("routing", (rows, experts), "f32")
    b.output(ops.experts(b.input("x", (rows, hidden), "bf16"), routing, *weights, top_k=top, name=name))
    drawn = torch.rand((rows, experts), generator=torch.Generator().manual_seed(7)).topk(top, 1).indices
    return Case(name, b.build(), "dense", {"routing": torch.zeros(rows, experts).scatter_(1, drawn, 1.0 / top)})


def slice_case(s: Scale, rows: int) -> Case:
    """Every second row."""
    b, name = GraphBuilder(f"slice_{rows}"), f"slice_{rows}"
    b.output(ops.slice_rows(b.input("x", (2 * rows, s.width), "bf16"), 0, 2 * rows, 2, name=name))
    return Case(name, b.build(), "memory")


def step_cases(s: Scale) -> list[Case]:
    """Kernels of a step besides a layer's, on the whole device."""
    rope = rope_case(s, s.rows)
    small = (16, 2) if s is SMALL else (128, 8)
    return [
        replace(rope, name=f"rope_{s.rows}"), embedding_case(s, s.rows), slice_case(s, s.rows),
        *(experts_case(s, rows, *small) for rows in (s.rows // 8, s.rows)),
    ]  # fmt: skip


def copy_case(s: Scale, direction: str) -> Case:
    """A copy between pinned host memory and the device."""
    size = f"{s.copy_bytes >> 20}MB" if s.copy_bytes >> 20 else f"{s.copy_bytes >> 10}KB"
    b, name = GraphBuilder(direction), f"{direction}_{size}"
    b.output(ops.copy(b.input("bytes", (s.copy_bytes,), "u8"), direction=direction, name=name))
    return Case(name, b.build(), "copy")


def stream_case(s: Scale, blocks: int) -> Case:
    """A plain read of memory by so many blocks an SM."""
    size = f"{s.stream_bytes / (1 << 30):.2g}GB"
    b, name = GraphBuilder("read"), f"stream_read_{size}_{blocks}_blocks_an_sm"
    data, most = b.input("data", (s.stream_bytes // 4,), "f32"), 1024 * 2 * 256

    def read(gpu: Gpu, lane: PartitionStream, found: Buffer, out: Buffer) -> None:
        kernel = gpu.kernel("bandwidth_probe", "probes")
        args = (found.address, out.address, np.int64(s.stream_bytes // 16), np.int32(1))
        driver.launch_kernel(lane.stream, kernel, (blocks * lane.sms,), 1024, args)

    work = Work(hbm_bytes=float(s.stream_bytes))
    b.output(b.call(_by_probe, [data], [spec("sums", (most,), "f32")], work=work, demand=demand(sm=None), name=name))
    return Case(name, b.build(), "memory", function=read)


def _by_probe(data: object, sums: object) -> None:
    """Stands in the graph for the probe, which wants its lane."""
    raise AssertionError("the probe is launched by its case")


def curve_cases(s: Scale) -> list[Case]:
    """Kernels whose times are taken on every number of SMs, the most telling first."""
    r, more = s.rows, list(gemm_cases(s))
    attention = [
        decode_case(s, r // 4, r // 2),
        prefill_case(s, 4, r // 4, r // 2, f"prefill_4x{r // 4}_{r // 2}"),
        decode_case(s, r // 32, 2 * r),
        prefill_case(s, 1, r, r, f"prefill_1x{r}"),
    ]
    return [
        *more[:1], *attention[:2], *more[1:5], *attention[2:], elementwise_case(s, "swiglu", r), *more[5:],
        stream_case(s, 2), stream_case(s, 1),
    ]  # fmt: skip


def copy_cases(s: Scale) -> list[Case]:
    """Copies each way."""
    return [copy_case(s, "h2d"), copy_case(s, "d2h")]


def rate_cases(s: Scale) -> list[Case]:
    """Kernels of a layer on the whole device alone."""
    r = s.rows
    small = [elementwise_case(s, kind, n) for n in (r // 8, r) for kind in ("rmsnorm", "swiglu", "argmax", "add")]
    decodes = [decode_case(s, n, keys) for n, keys in ((r // 8, r // 2), (r // 2, r // 2), (r // 256 or 1, 4 * r))]
    prefills = [prefill_case(s, n, rows, rows, f"prefill_{n}x{rows}") for n, rows in ((4, r), (4, r // 8))]
    return [*decodes, *prefills, *small]


_GEMM_SHAPES: Mapping[str, Callable[[Scale], tuple[int, int]]] = {
    "gateup": lambda s: (2 * s.inner, s.width),
    "down": lambda s: (s.width, s.inner),
    "qkv": lambda s: ((s.heads + 2 * s.kv_heads) * s.dim, s.width),
    "o": lambda s: (s.width, s.width),
}
"""(n, k) of a layer's products by name."""


def _own(s: Scale, name: str, groups: Sequence[str]) -> Case:
    """A product by our own persistent kernel, with the SMs of its lane as its grid."""
    return replace(named_case(groups[0], s), name=name, rule=gemm_launches)


def own_cases(s: Scale) -> list[Case]:
    """The products of a layer by our own persistent kernel."""
    return [named_case(f"{OWN}{case.name}", s) for case in gemm_cases(s)]


_NAMES: tuple[tuple[str, Callable[[Scale, str, Sequence[str]], Case]], ...] = (
    (r"gemm_(gateup|down|qkv|o)_(\d+)", lambda s, name, g: gemm_case(name, int(g[1]), *_GEMM_SHAPES[g[0]](s))),
    (rf"{OWN}(gemm_.*)", _own),
    (r"gemm_(\d+)x(\d+)x(\d+)", lambda s, name, g: gemm_case(name, int(g[0]), int(g[1]), int(g[2]))),
    (r"decode_(\d+)x(\d+)", lambda s, name, g: decode_case(s, int(g[0]), int(g[1]))),
    (r"prefill_(\d+)x(\d+)_(\d+)", lambda s, name, g: prefill_case(s, int(g[0]), int(g[1]), int(g[2]), name)),
    (r"prefill_(\d+)x(\d+)", lambda s, name, g: prefill_case(s, int(g[0]), int(g[1]), int(g[1]), name)),
    (r"(swiglu|rmsnorm|argmax|add)_(\d+)", lambda s, name, g: elementwise_case(s, g[0], int(g[1]))),
    (r"(h2d|d2h)_(\d+)MB", lambda s, name, g: copy_case(replace(s, copy_bytes=int(g[1]) << 20), g[0])),
    (r"stream_read_([\d.]+)GB_(\d+)_blocks_an_sm",
     lambda s, name, g: stream_case(replace(s, stream_bytes=int(float(g[0]) * (1 << 30))), int(g[1]))),
    (r"sdpa_\w+_causal_(\d+)x(\d+)",
     lambda s, name, g: prefill_case(replace(s, kv_heads=s.heads), int(g[0]), int(g[1]), int(g[1]), name)),
)  # fmt: skip


def named_case(name: str, scale: Scale = LARGE) -> Case:
    """The case that the tables call `name`; CalibrationError for a name that says no kernel."""
    for pattern, make in _NAMES:
        found = re.fullmatch(pattern, name)
        if found:
            return make(scale, name, found.groups())
    raise CalibrationError(
        f"{name!r} names no kernel. Names are like gemm_gateup_2048, gemm_512x4096x4096, decode_64x4096, "
        "prefill_4x512_1024, swiglu_2048, h2d_64MB and stream_read_0.5GB_2_blocks_an_sm."
    )


# ---------------------------------------------------------------------------------------------- running


class CaseRunner:
    """A case with its buffers on the device."""

    def __init__(self, case: Case, gpu: Gpu, device: Device, fast: Fast) -> None:
        self.name, self.case, self._gpu, self._device = case.name, case, gpu, device
        (self._op,) = case.graph.ops
        self._memory: list[Memory] = []
        self._made: dict[int, list[Launches]] = {}
        self._torch = torch.cuda.is_available() and not gpu.capability.virtual
        self.dependent = False
        """Whether its kernels are launched while the kernel before them runs, where they wait for it by themselves."""
        self._fast = fast.runs.get(self._op.kind)
        arch = gpu.ahead(self._op.kind)
        self.choice = fast.name_of(self._op.kind, arch) if case.rule is None else TRITON
        self._sides: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        self._places: list[tuple[list[Buffer], list[Buffer]]] = []

        if self._torch and fast.lacks(self._op.kind, arch):
            raise BackendUnavailable(f"{self.name}: no {self._op.kind} kernel here runs at the speed of plans.")
        self._fill()

    def _fill(self) -> None:
        tensors = [[self.case.graph.tensor[n] for n in side] for side in (self._op.inputs, self._op.outputs)]
        weights = sum(t.nbytes for t in tensors[0] if t.role == "weight")
        copies = max(1, min(16, math.ceil(_ROTATED_BYTES / weights))) if weights and self._torch else 1
        pinned = self._op.kind == "copy"
        if self._torch and not pinned:
            ins = [self._drawn(t) for t in tensors[0]]
            outs = [torch.empty(t.shape, dtype=TORCH_DTYPE[t.dtype], device="cuda") for t in tensors[1]]
            for turn in range(copies):
                mine = [
                    self._drawn(t) if turn and t.role == "weight" else x for t, x in zip(tensors[0], ins, strict=True)
                ]
                self._sides.append((mine, outs))
            self._places = [
                (
                    [Buffer(x.data_ptr(), t.shape, t.dtype) for x, t in zip(a, tensors[0], strict=True)],
                    [Buffer(x.data_ptr(), t.shape, t.dtype) for x, t in zip(b, tensors[1], strict=True)],
                )
                for a, b in self._sides
            ]
            torch.cuda.synchronize()
            return
        direction = str(self._op.attr("direction")) if pinned else ""
        here = [self._own(t.nbytes, pinned and direction[0] == "h") for t in tensors[0]]
        there = [self._own(t.nbytes, pinned and direction[0] == "d") for t in tensors[1]]
        self._places = [
            (
                [Buffer(m.address, t.shape, t.dtype, m.pinned) for m, t in zip(here, tensors[0], strict=True)],
                [Buffer(m.address, t.shape, t.dtype, m.pinned) for m, t in zip(there, tensors[1], strict=True)],
            )
        ]

    def tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Inputs and outputs as torch's, where torch has the device."""
        return self._sides[0]

    def _drawn(self, t: Any) -> torch.Tensor:
        if t.name in self.case.given:
            return self.case.given[t.name].to("cuda")
        kind = TORCH_DTYPE[t.dtype]
        if not kind.is_floating_point:
            return torch.randint(0, 127, t.shape, dtype=kind, device="cuda")
        scale = 1 / math.sqrt(t.shape[-1]) if t.role == "weight" else 1.0
        return torch.randn(t.shape, dtype=kind, device="cuda").mul_(scale)

    def _own(self, nbytes: int, pinned: bool = False) -> Memory:
        memory = Memory(max(nbytes, 1), pinned)
        self._memory.append(memory)
        return memory

    def launch(self, lane: PartitionStream, turn: int) -> None:
        ins, outs = self._places[turn % len(self._places)]
        if self.case.function is not None:
            self.case.function(self._gpu, lane, ins[0], outs[0])
        elif self._fast is not None and self._sides and self.case.rule is None:
            xs, ys = self._sides[turn % len(self._sides)]
            with torch_stream(lane.stream):
                self._fast(self._op, xs, ys[0])
        else:
            for made in self._launches(lane)[turn % len(self._places)]:
                if isinstance(made, CopyLaunch):
                    driver.copy_on(lane.stream, made.target, made.source, made.nbytes)
                else:
                    self._gpu.send(lane.stream, made, self.dependent and self._gpu.follows(made))

    def _launches(self, lane: PartitionStream) -> list[Launches]:
        """Those of every turn, made at the first: a capture permits no upload of constants."""
        key = int(lane.stream.handle)
        if key not in self._made:
            fault, rule = self._own(8, pinned=True).address, self.case.rule or launches
            site = LaneSite(lane.sms, self._own, [], fault, self._gpu.ahead(self._op.kind))
            self._made[key] = [rule(self._op, ins, outs, site.again()) for ins, outs in self._places]
        return self._made[key]

    def predicted_s(self, sms: int) -> float:
        return predict(self._op, self.case.graph, self._device, sms).seconds

    def rate(self, seconds: float) -> str:
        """What it does a second, for people."""
        work = self._op.work
        moved = work.hbm_bytes + work.h2d_bytes + work.d2h_bytes
        return f"{work.flops / seconds / 1e12:.0f} TFLOP/s" if self.case.fills in ("dense", "blocks") else (
            f"{moved / seconds / 1e9:.0f} GB/s"
        )  # fmt: skip

    def close(self) -> None:
        """Free its buffers."""
        self._sides, self._places, self._made = [], [], {}
        for memory in reversed(self._memory):
            memory.close()
        self._memory = []


@contextmanager
def runner(case: Case, gpu: Gpu, device: Device, fast: Fast) -> Iterator[CaseRunner]:
    """The case with buffers that live as long as the block."""
    made = CaseRunner(case, gpu, device, fast)
    try:
        yield made
    finally:
        made.close()


def verified(gpu: Gpu, device: Device) -> Fast:
    """What runs each kind here, after an example of each was compared with its reference."""
    found = Fast()
    if gpu.capability.virtual or not found.runs:
        return found
    with Rig(gpu).lanes(gpu.capability.sm_count) as (lane,), ExitStack() as stack:
        found.verify(dict(_examples(gpu, device, lane, stack)), gpu.left_out)
    return found


def _examples(gpu: Gpu, device: Device, lane: PartitionStream, stack: ExitStack) -> Iterator[tuple[str, Example]]:
    """An op of every kind that has a reference, with inputs and an output on the device."""
    s = SMALL
    chosen = [decode_case(s, 5, 70), prefill_case(s, 3, 40, 88, "chunks"), rope_case(s, 6), embedding_case(s, 9)]
    chosen += [elementwise_case(s, kind, 9) for kind in ("swiglu", "rmsnorm", "argmax", "add")]
    chosen += [experts_case(s, 9, 16, 2), slice_case(s, 9)]
    for case in chosen:
        (op,) = case.graph.ops
        if op.kind in AHEAD_KINDS and gpu.ahead(op.kind):
            made = stack.enter_context(runner(case, gpu, device, Fast()))
            ins, outs = made.tensors()

            def run(made: CaseRunner = made) -> None:
                made.launch(lane, 0)
                lane.stream.sync()

            yield op.kind, Example(op, ins, outs[0], run)
