"""The cost model: the table of a graph and its scalar door."""

import numpy as np
from hypothesis import given, settings
from strategies import devices, graphs

from taskgraph.cost.model import op_table, predict
from taskgraph.graph.device import Device
from taskgraph.graph.graph import Graph


@settings(max_examples=50, deadline=None)
@given(graphs(), devices())
def test_table_and_predict_say_the_same(graph: Graph, device: Device) -> None:
    flat, sizes = graph.flat(), device.partition_sizes()[-3:]
    table = op_table(flat, device, sizes)
    for i, op in enumerate(flat.ops):
        for j, size in enumerate(sizes):
            seen = predict(op, flat, device, size)
            assert np.isclose(table.seconds[i, j] + device.launch_seconds, seen.seconds, rtol=1e-9)
            assert 0 <= table.sm_use[i, j] <= size
            assert np.isclose(table.rates[i, j, 0] * table.seconds[i, j], op.work.hbm_bytes)
        assert (np.diff(table.seconds[i]) <= 1e-12 * table.seconds[i, 0]).all(), "more SMs are never slower"
