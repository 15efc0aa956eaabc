"""The step over pages as a graph: what its states are, what its moves are taken to cost, and where a plan puts them."""

from dataclasses import replace

import pytest

import taskgraph as tg
from taskgraph.models.config import ModelConfig, load_config
from taskgraph.models.paged import Bucket, PageShape, step_graph
from taskgraph.schedule.planner import candidate
from taskgraph.schedule.problem import Budget
from taskgraph.serving.simulate.runner import page_bytes

LLAMA = replace(load_config("llama-3-8b"), layers=6)
DEEPSEEK = replace(load_config("deepseek-v3"), layers=6)


@pytest.mark.parametrize("config", [LLAMA, DEEPSEEK], ids=["llama", "deepseek"])
def test_states_are_as_large_as_the_simulation_counts(config: ModelConfig) -> None:
    shape = PageShape(pages=40, page_size=32, context=256, host_pages=7)
    graph = step_graph(config, Bucket(4, 32, 2, moves=True), shape)
    states = graph.flat().with_role("state")
    assert {t.name.rpartition("/")[2].removeprefix("host_").rpartition(".")[2] for t in states} == (
        {"latents"} if config.latent else {"keys", "values"}
    )
    assert sum(t.nbytes for t in states) == (40 + 7) * page_bytes(config, 32)


def test_a_page_of_deepseek_is_its_latents() -> None:
    """576 channels a token and layer (arXiv 2405.04434, table 1), not keys and values of 128 heads."""
    assert page_bytes(load_config("deepseek-v3"), 32) == 61 * 32 * 576 * 2


def test_rows_of_no_sequence_go_to_no_expert() -> None:
    graph = step_graph(DEEPSEEK, Bucket(4, 32, 2), PageShape(pages=40, page_size=32, context=256))
    routes = [op for op in graph.ops if op.kind == "route"]
    assert routes
    assert all("slots" in op.inputs for op in routes)


@pytest.mark.parametrize("config", [LLAMA, DEEPSEEK], ids=["llama", "deepseek"])
def test_moves_hide_under_the_step(config: ModelConfig) -> None:
    """However long the pair tables are: a step that fills 34 pages is costed at 34 pages out and 34 in, the plan puts
    these beside the ops that compute, and but for the first layer's, which nothing precedes, they cost next to nothing.
    """
    made = {}
    for pages, moves in ((4096, False), (4096, True), (1024, True)):
        graph = step_graph(config, Bucket(64, 1024, 2, moves), PageShape(pages, 32, 1024, pages))
        plan = candidate(graph, tg.devices.get("h100_sxm"), "auto", Budget(1.0))
        tg.verify(plan, graph, memory=False)
        made[pages, moves] = plan
    flat = graph.flat()
    copies = {op.name for op in flat.ops if op.kind == "copy_pages" and op.attr("direction") != "d2d"}
    moved = sum(op.work.h2d_bytes + op.work.d2h_bytes for op in flat.ops)
    assert moved == pytest.approx(2 * 34 * page_bytes(config, 32))
    plain, moving, short = (made[key].makespan_s for key in ((4096, False), (4096, True), (1024, True)))
    assert short == pytest.approx(moving, rel=1e-3)
    spans = made[4096, True].timeline.spans
    taken = [span for span in spans if span.op in copies]
    alone = max(sum(s.end_s - s.start_s for s in taken if way in s.op) for way in ("page_in", "page_out"))
    first = max(span.end_s for span in taken if span.op.partition("/")[0] in ("layer.0", "first.0"))
    assert moving <= plain + first + 0.05 * plain
    assert moving - plain <= 0.5 * alone
