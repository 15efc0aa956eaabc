"""`taskgraph doctor --compile ARCH`: the Triton kernels of a model as cubins, on a machine that needs no GPU."""

import time
from collections.abc import Iterator
from dataclasses import replace

from rich.table import Table

from taskgraph.cli.console import say
from taskgraph.cli.steps import config_of
from taskgraph.errors import BackendUnavailable
from taskgraph.graph.graph import Graph
from taskgraph.models import llama
from taskgraph.models.config import ModelConfig
from taskgraph.models.paged import Bucket, PageShape, step_graph
from taskgraph.runtime.gpu.ahead.cubins import Specialisation, architecture, kept, obtain, place, triton_version
from taskgraph.runtime.gpu.ahead.needed import needed
from taskgraph.runtime.gpu.kinds import DrySite
from taskgraph.runtime.gpu.standard import GPU_KINDS

_BUCKETS = (Bucket(1), Bucket(16), Bucket(256), Bucket(64, 512, 1), Bucket(256, 2048, 4))
"""Steps of few and many sequences: kernels are chosen by rows and types, seldom by more."""
_PAGES = PageShape(pages=4096, page_size=32, context=4096)
_SMS = 132


def _steps(config: ModelConfig) -> Iterator[Graph]:
    """Steps over pages as they are served, and over a cache of its own as `taskgraph run` takes them."""
    for bucket in _BUCKETS:
        yield step_graph(config, bucket, _PAGES)
    yield llama.step_graph(config, batch=1, tokens=1, cache=2048)
    yield llama.step_graph(config, batch=1, tokens=512, cache=2048)


def compile_ahead(arch: str, model: str) -> Table:
    """Compile what steps of `model` in bf16 need on an `arch` ("sm_90") and is not kept yet; what there is now.

    BackendUnavailable for an architecture that Triton does not know, and without Triton where something is missing."""
    architecture(arch)
    assert GPU_KINDS  # importing these registers the kernels
    config = replace(config_of(model), layers=1)
    wanted: dict[Specialisation, str] = {}
    for graph in _steps(config):
        wanted |= needed(graph, DrySite(_SMS, arch))
    if not wanted:
        raise BackendUnavailable(f"{model} has no op with a Triton kernel on {arch}.")
    title = f"Triton kernels of {model} on {arch}"
    folder = place(next(iter(wanted)), arch, triton_version()).parent
    table = Table(title=title, title_justify="left", caption=f"kept in {folder}", caption_justify="left")
    for column in ("op kind", "kernel", "registers", "shared", "spilled", "compiled"):
        table.add_column(column, overflow="fold")
    for number, (spec, kind) in enumerate(wanted.items(), 1):
        begin, there = time.perf_counter(), kept(spec, arch) is not None
        made = obtain(spec, arch)
        took = "kept before" if there else f"{time.perf_counter() - begin:.1f} s"
        say(f"{number}/{len(wanted)} {spec.name} ({kind}): {took}")
        numbers = (str(made.registers), f"{made.shared_bytes / 1024:.0f} KB", f"{made.stack_bytes} B", took)
        table.add_row(kind, spec.describe(), *numbers)
    return table
