"""Lanes keep their numbers of threads to themselves."""

import threading

import torch

import taskgraph as tg
from taskgraph.runtime.cpu.kernels import use_threads


def threads_of_a_new_one() -> int:
    found: list[int] = []
    made = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    made.start()
    made.join()
    return found[0]


def test_a_lane_of_one_core_changes_no_other_thread() -> None:
    b = tg.GraphBuilder("one")
    x = b.input("x", (2, 2), "f32")
    b.output(tg.ops.add(x, x))
    graph = b.build()
    device = tg.devices.make("cpu", name="one core", sm_count=1, sm_granularity=1, sm_min=1, compute_scaling=())
    here, new = torch.get_num_threads(), threads_of_a_new_one()
    with tg.compile(graph, tg.plan(graph, device)) as exe:
        exe(x=torch.ones(2, 2))
        assert (torch.get_num_threads(), threads_of_a_new_one()) == (here, new)


def test_use_threads_is_of_the_calling_thread() -> None:
    here, found = torch.get_num_threads(), list[int]()

    def work() -> None:
        use_threads(here + 1)
        found.append(torch.get_num_threads())

    made = threading.Thread(target=work)
    made.start()
    made.join()
    assert found == [here + 1]
    assert torch.get_num_threads() == here
