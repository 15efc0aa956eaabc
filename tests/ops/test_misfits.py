"""Every op kind with an input of another shape or dtype: a GraphError, or a graph whose result is the reference's."""

from dataclasses import replace

import pytest
import torch

import taskgraph as tg
from taskgraph.errors import BackendUnavailable, ExecutionError, GraphError
from taskgraph.graph.graph import Graph, GraphBuilder
from taskgraph.graph.op import ITEMSIZE, Tensor
from taskgraph.ops import KINDS, Attrs
from taskgraph.runtime.cpu.kinds import TORCH_DTYPE
from taskgraph.schedule.planner import plan
from tests import cases_standard
from tests.paged_cases import PLACES
from tests.runtime import test_runtime

CASES = {name: case for name, case in test_runtime.CASES.items() if "rows" not in name.split()[1:]}

GENERAL = {
    "embedding", "gemm", "rmsnorm", "rope", "swiglu", "add", "argmax", "copy", "slice_rows", "concat_rows", "gated_add",
    "all_gather", "all_reduce", "reduce_scatter", "attention", "attention decode", *cases_standard.GENERAL,
}  # fmt: skip
"""Cases whose reference holds for other sizes too; of the rest only shape and dtype are compared."""


def mutants(tensor: Tensor) -> list[Tensor]:
    """The tensor with every axis one longer or shorter, gone or doubled, one axis more, and of every other dtype."""
    shape = tensor.shape
    shapes = [(*shape[:i], n + by, *shape[i + 1 :]) for i, n in enumerate(shape) for by in (1, -1) if n + by > 0]
    shapes += [(*shape[:i], *shape[i + 1 :]) for i in range(len(shape))] + [(1, *shape), (*shape, 1), shape[::-1]]
    made = [replace(tensor, shape=s) for s in dict.fromkeys(shapes) if s != shape]
    return made + [replace(tensor, dtype=kind) for kind in ITEMSIZE if kind != tensor.dtype]


def rebuilt(graph: Graph, changed: Tensor) -> Graph:
    """The graph of one op with that tensor changed and its outputs derived anew."""
    op = graph.ops[-1]
    tensors = {t.name: t for t in graph.tensors} | {changed.name: changed}
    shape, dtype = KINDS[op.kind].output([tensors[name] for name in op.inputs], Attrs(op.attrs))
    (name,) = op.outputs
    tensors[name] = replace(tensors[name], shape=shape, dtype=dtype)
    return Graph(graph.name, tuple(tensors.values()), graph.ops, graph.outputs)


@pytest.mark.parametrize("case", CASES)
def test_inputs_of_another_shape_or_dtype_are_refused_or_right(case: str) -> None:
    make, reference = CASES[case]
    b = GraphBuilder("one")
    b.output(make(b, "f32"))
    graph = b.build()
    if len(graph.ops) != 1 or graph.ops[0].views:
        pytest.skip("more than one op")
    refused = compared = 0
    for name in dict.fromkeys(graph.ops[0].inputs):
        for changed in mutants(graph.tensor[name]):
            try:
                other = rebuilt(graph, changed)
            except GraphError:
                refused += 1
                continue
            values = values_of(other)
            try:
                with tg.compile(other, plan(other, test_runtime.CPU)) as exe:
                    (got,) = exe({key: t.clone() for key, t in values.items()}).values()
            except tg.TaskgraphError as error:  # a dtype that the cpu has no kernel for, or a table that fits no more
                assert isinstance(error, (BackendUnavailable, ExecutionError)), changed
                continue
            made = other.tensor[other.outputs[0]]
            assert (got.shape, got.dtype) == (made.shape, TORCH_DTYPE[made.dtype]), changed
            plain = all(t.dtype == torch.float32 for t in values.values() if t.is_floating_point())
            if plain and case in GENERAL:
                want = reference(test_runtime.widened(values))
                torch.testing.assert_close(got.float(), want.float().reshape(got.shape), atol=1e-3, rtol=1e-3)
                compared += 1
    assert refused or compared


def values_of(graph: Graph) -> dict[str, torch.Tensor]:
    """Values of every dtype and shape: places as the cases have them as far as they reach, then zeros."""
    made = torch.Generator().manual_seed(0)
    values = {}
    for t in graph.with_role("input", "weight", "state"):
        if t.dtype == "i32" and t.name in PLACES:
            flat, known = torch.zeros(t.shape, dtype=torch.int32).view(-1), torch.tensor(PLACES[t.name]).view(-1)
            flat[: len(known)] = known[: len(flat)].int()
            values[t.name] = flat.view(t.shape)
        elif TORCH_DTYPE.get(t.dtype, torch.int32).is_floating_point:
            values[t.name] = torch.randn(t.shape, generator=made).to(TORCH_DTYPE[t.dtype])
        else:
            kind = TORCH_DTYPE.get(t.dtype, torch.int32)
            values[t.name] = torch.randint(0, 2, t.shape, generator=made).to(kind)
    return values
