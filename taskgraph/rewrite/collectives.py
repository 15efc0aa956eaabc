"""What else the all-reduces of a tensor-parallel layer may be: the choices of NanoFlow (Zhu et al. 2025)."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

from taskgraph.errors import GraphError
from taskgraph.graph.graph import Graph
from taskgraph.graph.op import Op, Tensor, Work, seen_inputs, with_rows
from taskgraph.rewrite.rebuild import derived, rebuilt


def collective_choices(graph: Graph) -> dict[str, tuple[str, ...]]:
    """For each all-reduce, by op name, what may take its place.

    "scatter": a reduce-scatter and an all-gather, which move the same bytes in two ops. "gather", where it sums the
    partial products of a weight sharded by rows: all-gather the features, multiply by the weight sharded by columns,
    and all-gather the result (NanoFlow's "two all-gathers").
    """
    return {
        op.name: tuple(
            name for name, fits in (("scatter", _scatters(graph, op)), ("gather", _product_of(graph, op))) if fits
        )
        for op in graph.ops
        if op.kind == "all_reduce" and op.integer("ranks") > 1
    }


def collective_variants(graph: Graph) -> dict[str, Graph]:
    """Every combination of `collective_choices` but the graph itself, by a label such as "o_reduce=gather".

    All-reduces of one name in several layers choose alike.
    """
    choices = collective_choices(graph)
    groups: dict[str, list[str]] = {}
    for name in choices:
        groups.setdefault(name.rpartition("/")[2], []).append(name)
    options = [
        ("", *(c for c in choices[names[0]] if all(c in choices[n] for n in names))) for names in groups.values()
    ]
    result = {}
    for picked in itertools.product(*options):
        chosen = {stem: choice for stem, choice in zip(groups, picked, strict=True) if choice}
        if chosen:
            label = ", ".join(f"{stem}={choice}" for stem, choice in chosen.items())
            result[label] = with_collectives(graph, {n: c for stem, c in chosen.items() for n in groups[stem]})
    return result


def with_collectives(graph: Graph, choices: Mapping[str, str]) -> Graph:
    """The graph with each all-reduce that is named replaced by "scatter" or "gather" (see `collective_choices`).

    The last op of a replacement keeps the name. "gather" replaces the weight `w` by `w.columns`, the rank's columns
    of the whole weight in place of its rows. GraphError where a choice does not apply.
    """
    offered = collective_choices(graph)
    for name, choice in choices.items():
        if choice not in offered.get(name, ()):
            options = ", ".join(f"{n!r}: {' or '.join(c) or 'none'}" for n, c in offered.items()) or "nothing"
            raise GraphError(f"{choice!r} does not apply to op {name!r}; this graph offers {options}.")
    tensors, dropped = dict(graph.tensor), set[str]()
    products = {_product(graph, n).name: n for n, choice in choices.items() if choice == "gather"}
    ops: list[tuple[int, Op]] = []
    for i, op in enumerate(graph.ops):
        made = [op]
        if op.name in products:
            reduce = next(o for o in graph.ops if o.name == products[op.name])
            made = _by_columns(op, reduce, tensors)
            dropped.add(op.inputs[1])
        elif choices.get(op.name) == "gather":
            made = [replace(op, kind="all_gather", attrs=(("axis", 1), ("ranks", op.integer("ranks"))))]
        elif choices.get(op.name) == "scatter":
            part = f"{op.name}.scatter"
            scattered = replace(op, name=part, kind="reduce_scatter", outputs=(f"{part}.out",))
            made = [scattered, replace(op, kind="all_gather", inputs=scattered.outputs, after=())]
        for new in made:
            if new is not op:
                new, out = derived(new, tensors)
                tensors[out.name] = out
            ops.append((i, new))
    return rebuilt(graph, ops, (t for name, t in tensors.items() if name not in dropped), dropped)


def _by_columns(product: Op, reduce: Op, tensors: dict[str, Tensor]) -> list[Op]:
    """All-gather the features of x and multiply by this rank's columns of the weight; declares that weight."""
    ranks, weight = reduce.integer("ranks"), tensors[product.inputs[1]]
    scale = (1 / ranks, ranks) if product.attr("transpose_w") else (ranks, 1 / ranks)
    columns = replace(
        weight, name=f"{weight.name}.columns", shape=(int(weight.shape[0] * scale[0]), int(weight.shape[1] * scale[1]))
    )
    tensors[columns.name] = columns
    name, views = f"{product.name}.gather", product.views
    attrs = with_rows({"axis": 1, "ranks": ranks}, {0: views[0]} if 0 in views else {})
    gather = Op(
        name, "all_gather", product.inputs[:1], (f"{name}.out",), Work(), reduce.demand, product.after,
        attrs=attrs,
    )  # fmt: skip
    plain = with_rows(dict(product.attrs), {})
    return [gather, replace(product, inputs=(gather.outputs[0], columns.name), after=(), attrs=plain)]


def _scatters(graph: Graph, op: Op) -> bool:
    (x,) = seen_inputs(op, graph.tensor)
    return x.shape[op.integer("axis")] % op.integer("ranks") == 0


def _product(graph: Graph, reduce: str) -> Op:
    op = next(op for op in graph.ops if op.name == reduce)
    return next(o for o in graph.ops if op.inputs[0] in o.outputs)


def _product_of(graph: Graph, op: Op) -> bool:
    """Whether `op` sums nothing but the products of a weight that no other op takes, sharded by rows."""
    made = next((o for o in graph.ops if op.inputs[0] in o.outputs), None)
    if made is None or made.kind != "gemm" or len(made.inputs) > 2 or op.inputs[0] in graph.outputs or op.views:
        return False
    users = sum(op.inputs[0] in o.inputs for o in graph.ops) + sum(made.inputs[1] in o.inputs for o in graph.ops)
    carried = graph.repeat is not None and any(c.next == op.inputs[0] for c in graph.repeat.carries)
    whole = graph.tensor[made.outputs[0]].shape[1] % op.integer("ranks") == 0
    return users == 2 and not carried and whole and graph.tensor[made.inputs[1]].role == "weight"
