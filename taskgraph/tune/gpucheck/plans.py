"""Whole plans of steps: planned in another process while kernels are timed, then captured and measured in turns."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from taskgraph.cache import write_atomically
from taskgraph.cost.gpu_report import PlanTime
from taskgraph.errors import PlanError, TaskgraphError
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.runtime.gpu.executable import CudaExecutable
from taskgraph.schedule.plan import Plan
from taskgraph.tune.autotune import candidates
from taskgraph.tune.fill import fill

if TYPE_CHECKING:
    from taskgraph.tune.gpucheck.run import Run

_SEARCH_S = 60.0
"""Of which a scheduler that searches gets the share that autotune gives it."""
_REPEATS, _SAMPLE_S = 5, 0.02


class Planning:
    """Candidate plans of several graphs, each made by a process of its own, which needs no GPU."""

    def __init__(self, graphs: Mapping[str, Graph], device: Device) -> None:
        self._graphs, self._device = graphs, device
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="taskgraph-plans-")

    def __enter__(self) -> Self:
        folder = Path(self._folder.name)
        for i, (name, graph) in enumerate(self._graphs.items()):
            (folder / f"{i}.json").write_text(json.dumps([graph.to_json(), self._device.to_dict()]))
            command = [sys.executable, "-m", __name__, str(folder / f"{i}.json"), str(folder / f"{i}.plans.json")]
            self._running[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running.values():
            process.kill()
            process.communicate()
        self._folder.cleanup()

    def wait(self, name: str, seconds: float) -> list[Plan]:
        """The plans of a graph, the sequential one first; PlanError when they are not there in so many seconds."""
        process, place = self._running[name], [*self._graphs].index(name)
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise PlanError(f"planning {name!r} took longer than {seconds:.0f} s. Give more minutes.") from None
        if process.returncode:
            last = (said or b"").decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise PlanError(f"planning {name!r} failed: {last[0]}.")
        made = json.loads((Path(self._folder.name) / f"{place}.plans.json").read_text())
        return [Plan.from_json(text) for text in made]

    def measure(self, run: "Run", name: str, plans: Sequence[Plan], failed: list[str]) -> Iterator[PlanTime]:
        """Rows of the plans of one graph; those that cannot be captured go to `failed` with their reason."""
        graph = self._graphs[name]
        folder = run.out.parent / "plans"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{name}.graph.json", graph.to_json() + "\n")
        with ExitStack() as stack:
            values = _values(run, graph)
            opened: list[tuple[int, Plan, CudaExecutable]] = []
            for i, plan in enumerate(plans):
                try:
                    made = stack.enter_context(run.bench.open(graph, plan))
                    made.bind(values)
                    made.capture()
                    opened.append((i, plan, made))
                except TaskgraphError as error:
                    failed.append(f"{name}-{i}: {error}")
            seconds = _in_turns([made for _, _, made in opened], 1 if run.gpu.capability.virtual else _REPEATS)
            for (i, plan, made), each in zip(opened, seconds, strict=True):
                write_atomically(folder / f"{name}-{i}.plan.json", plan.to_json() + "\n")
                partitions = "+".join(map(str, made.report.partitions))
                yield PlanTime(
                    f"plans/{name}-{i}.plan.json", f"plans/{name}.graph.json", plan.made_by, partitions,
                    len(plan.lanes), plan.makespan_s, each,
                )  # fmt: skip


def _in_turns(opened: Sequence[CudaExecutable], repeats: int) -> list[float]:
    """Median seconds of a replay of each, in interleaved repeats of _SAMPLE_S."""
    if not opened:
        return []
    once = max(opened[0].replay_seconds(1), 1e-6)
    launches = max(1, min(50, round(_SAMPLE_S / once))) if repeats > 1 else 1
    rows: list[list[float]] = [[] for _ in opened]
    for turn in range(repeats):
        for i in range(len(opened))[:: -1 if turn % 2 else 1]:
            rows[i].append(opened[i].replay_seconds(launches))
    return [statistics.median(row) for row in rows]


def _values(run: "Run", graph: Graph) -> dict[str, Any]:
    """A value for every input, weight and state: drawn on the device where torch has it, which is quicker by far."""
    given = step_values(graph)
    if run.gpu.capability.virtual or not torch.cuda.is_available():
        return fill(graph.flat(), given, seed=6)
    found: dict[str, Any] = {}
    for t in graph.flat().with_role("input", "weight", "state"):
        kind = TORCH_DTYPE[t.dtype]
        if t.name in given:
            found[t.name] = given[t.name].to("cuda")
        elif kind.is_floating_point:
            scale = t.shape[-1] ** -0.5 if t.role == "weight" and len(t.shape) > 1 else 1.0
            found[t.name] = torch.randn(t.shape, dtype=kind, device="cuda").mul_(scale)
        else:
            found[t.name] = torch.zeros(t.shape, dtype=kind, device="cuda")
    torch.cuda.synchronize()
    return found


def step_values(graph: Graph) -> dict[str, torch.Tensor]:
    """The inputs that say where things are in a step over pages: contexts that are full, rows in pages of their own."""
    tensors = {t.name: t for t in graph.flat().with_role("input")}
    if "slots" not in tensors:
        return {}
    pages = next(t for t in graph.flat().with_role("state") if len(t.shape) == 4)
    count, _, size, _ = pages.shape
    rows = tensors["slots"].shape[0]
    decode = tensors["decode_blocks"].shape[0] if "decode_blocks" in tensors else 0
    made: dict[str, torch.Tensor] = {}
    draw = torch.Generator().manual_seed(8)
    positions = torch.zeros(rows, dtype=torch.int32)
    slots = torch.zeros(rows, dtype=torch.int32)
    used = 0
    if decode:
        blocks = tensors["decode_blocks"].shape[1]
        made["decode_blocks"] = _blocks(decode, blocks, used, count)
        made["decode_lengths"] = torch.full((decode,), blocks * size, dtype=torch.int32)
        positions[:decode] = blocks * size - 1
        slots[:decode] = made["decode_blocks"][:, -1] * size + size - 1
        used += decode * blocks
    if "prefill_blocks" in tensors:
        chunks, blocks = tensors["prefill_blocks"].shape
        each = (rows - decode) // chunks
        table = _blocks(chunks, blocks, used, count)
        made["prefill_blocks"] = table
        made["prefill_lengths"] = torch.full((chunks,), blocks * size, dtype=torch.int32)
        made["prefill_starts"] = torch.arange(0, chunks * each + 1, each, dtype=torch.int32)
        for c in range(chunks):
            at = torch.arange(blocks * size - each, blocks * size)
            mine = slice(decode + c * each, decode + (c + 1) * each)
            positions[mine] = at.to(torch.int32)
            slots[mine] = table[c, at // size] * size + (at % size).to(torch.int32)
    made |= {"positions": positions, "slots": slots}
    if "samples" in tensors:
        made["samples"] = torch.arange(tensors["samples"].shape[0])
    if "tokens" in tensors:
        made["tokens"] = torch.randint(0, 100, tensors["tokens"].shape, generator=draw)
    return made


def _blocks(sequences: int, blocks: int, first: int, pages: int) -> torch.Tensor:
    """Block tables over pages of their own, in a mixed order, as far as there are pages."""
    draw = torch.Generator().manual_seed(9)
    order = (torch.randperm(sequences * blocks, generator=draw) + first) % pages
    return order.to(torch.int32).reshape(sequences, blocks)


def main(given: Path, out: Path) -> None:
    """Write the candidate plans of a graph, read with its device from `given`."""
    graph, device = json.loads(given.read_text())
    made = candidates(Graph.from_json(graph), Device.from_dict(device), _SEARCH_S, 0)
    out.write_text(json.dumps([plan.to_json() for plan in made]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
