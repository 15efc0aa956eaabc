"""Lower bounds by hand: the longest chain, and the area of every resource."""

import numpy as np
import pytest

from taskgraph.schedule.bounds import longest_path, longest_tail, lower_bounds, sm_seconds
from tests.schedule.problems_by_hand import problem

# Four ops on 4 or 8 SMs; op 1 may not have 4, where it would be fastest and thriftiest.
SECONDS = [[3.0, 2.0], [0.25, 5.0], [7.0, 4.0], [1.0, 1.5]]
USE = [[[4.0, 1.0, 0, 0, 0], [8.0, 2.0, 0, 0, 0]]] * 4
LEGAL = [[True, True], [False, True], [True, True], [True, True]]


def test_every_bound_is_what_it_is_on_paper() -> None:
    work = [[30.0, 1.0, 2.0, 3.0], [50.0, 2.0, 0.0, 5.0], [0.0, 4.0, 0.0, 0.0], [20.0, 0.0, 1.0, 4.0]]
    made = problem(
        SECONDS, USE, [(0, 1), (0, 2), (1, 3)], sizes=(4, 8), legal=LEGAL, work=work, launch_s=0.5, sm_count=16,
    )  # fmt: skip
    bounds = lower_bounds(made)
    # Chains, each op's best time and its launch: 2.5 + 5.5 + 1.5 by op 1 and op 3; 2.5 + 4.5 by op 2.
    assert bounds.chain_s == 9.5
    # The least SM-seconds of its legal modes: 3 x 4, 5 x 8, 7 x 4, 1 x 4.
    assert sm_seconds(made).tolist() == [12.0, 40.0, 28.0, 4.0]
    assert bounds.sm_s == 84.0 / 16
    assert (bounds.hbm_s, bounds.h2d_s, bounds.d2h_s, bounds.link_s) == (1.0, 0.7, 3 / 20, 12 / 40)


def test_a_resource_that_the_device_has_not_and_nobody_asks_for_bounds_nothing() -> None:
    made = problem([1.0], [[8.0, 50.0, 0, 0, 0]], capacity=(100.0, 0.0, 0.0, 0.0))
    bounds = lower_bounds(made)
    assert (bounds.hbm_s, bounds.h2d_s, bounds.d2h_s, bounds.link_s) == (0.5, 0.0, 0.0, 0.0)


def test_the_capacities_are_four() -> None:
    with pytest.raises(ValueError, match="zip"):
        lower_bounds(problem([1.0], [[8.0, 50.0, 1.0, 1.0, 1.0]], capacity=(100.0, 10.0, 20.0)))


def test_the_longest_path_ends_every_op_at_the_latest_of_its_predecessors() -> None:
    made = problem([1.0] * 5, [[1.0, 0, 0, 0, 0]] * 5, [(0, 2), (1, 2), (0, 4), (2, 3)])
    ends = longest_path(np.array([1.0, 4.0, 0.5, 2.0, 8.0]), made.pred_ptr, made.pred)
    assert ends.tolist() == [1.0, 4.0, 4.5, 6.5, 9.0]


def test_the_longest_tail_is_the_longest_path_of_the_graph_turned_round() -> None:
    made = problem([1.0] * 5, [[1.0, 0, 0, 0, 0]] * 5, [(0, 2), (1, 2), (0, 4), (2, 3)])
    tails = longest_tail(np.array([1.0, 4.0, 0.5, 2.0, 8.0]), made.succ_ptr, made.succ)
    assert tails.tolist() == [9.0, 6.5, 2.5, 2.0, 8.0]


def test_the_longest_chain_is_taken_wherever_it_stands_among_the_others() -> None:
    for seconds, end in (([5.0, 1.0, 1.0], 6.0), ([1.0, 5.0, 1.0], 6.0)):
        made = problem([1.0] * 3, [[1.0, 0, 0, 0, 0]] * 3, [(0, 2), (1, 2)])
        assert longest_path(np.array(seconds), made.pred_ptr, made.pred)[2] == end
