"""Mixed or apart: what is chosen for a load, by prediction, under a wanted time a token."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgraph as tg
from taskgraph.errors import RequestError
from taskgraph.models.config import load_config
from taskgraph.serving.simulate.stepgrid import StepGrid
from taskgraph.serving.ways import ALIKE, LEAST_GAIN, Load, Room, Split, Way, Ways, chosen, episode, splits_of, tpot_of

LOADS = st.builds(Load, st.integers(1, 512), st.floats(1, 8192), st.integers(1, 20_000))
TPOTS = st.floats(1e-3, 0.2)


@cache
def grid(device: str = "h200_sxm") -> StepGrid:
    return StepGrid(load_config("llama-3-8b"), device, prompt_tokens=1024)


@cache
def ways(tpot_s: float = 0.03, apart: bool = True, device: str = "h200_sxm") -> Ways:
    made = grid(device)
    splits = splits_of(made.device, 4) if apart else ()
    return Ways(made, made.of("sequential"), tpot_s, step_tokens=2048, room=Room(512, 700_000), splits=splits)


@settings(max_examples=40)
@given(LOADS, TPOTS, TPOTS)
def test_a_looser_time_a_token_never_lowers_throughput(load: Load, one: float, other: float) -> None:
    every = [*ways().every(load)]
    tight, loose = (chosen(every, tpot) for tpot in sorted((one, other)))
    if tight.met:
        assert loose.met
        assert loose.work >= tight.work - ALIKE


@settings(max_examples=40)
@given(LOADS, TPOTS)
def test_apart_is_chosen_where_it_is_predicted_to_gain_and_nowhere_else(load: Load, tpot_s: float) -> None:
    every = [*ways().every(load)]
    way = chosen(every, tpot_s)
    mixed = chosen([one for one in every if one.split is None], tpot_s)
    assert way in every or not way.met
    if way.met:
        assert way.token_s <= tpot_s
        assert way.work >= (mixed.work - ALIKE if mixed.met else 0.0)
        assert way.split is None or not mixed.met or way.work * LEAST_GAIN > mixed.work, "never by hope"
    else:
        assert way.token_s == min(one.token_s for one in every) > tpot_s


@settings(max_examples=30)
@given(LOADS)
def test_the_split_in_use_stays_while_it_is_nearly_the_best(load: Load) -> None:
    made = ways()
    best = made.choose(load)
    if best.split is not None:
        assert made.choose(load, best.split) == best
    for split in made.splits[:: len(made.splits) - 1]:
        kept = made.choose(load, split)
        assert kept.split in (split, best.split)
        assert kept.met == best.met
        assert kept.work >= best.work / 1.03 - 1e-12 or not kept.met


@given(st.floats(1e-4, 1.0), st.floats(1e-4, 5.0), st.integers(1, 20_000))
def test_an_episode_does_what_waits_and_ends_when_the_device_is_whole(
    decode_s: float, prefill_s: float, waiting: int
) -> None:
    """It takes as long as the prompts do, or a part of a step more; and a longer one is a steady one."""
    steps_per_s, tokens_per_s = episode(decode_s, prefill_s, waiting)
    took = waiting / tokens_per_s
    assert prefill_s * (1 - 1e-9) <= took <= prefill_s + decode_s * (1 + 1e-9)
    assert steps_per_s * decode_s <= 1 + 1e-9
    long = episode(decode_s, 1e4 * prefill_s, 10_000 * waiting)
    assert long[1] == pytest.approx(waiting / prefill_s, rel=1e-3 + decode_s / prefill_s / 1e3)


def test_what_only_decodes_or_only_prefills_has_the_whole_device() -> None:
    for load in (Load(64, 1024, 0), Load(0, 0, 5000), Load(0, 0, 0)):
        way = ways().choose(load)
        assert way.split is None
        assert way.prefill == 2048
    assert ways().choose(Load(64, 1024, 0)).token_s == pytest.approx(ways().mixed_s(64, 1024, 0))


def test_long_contexts_are_run_apart_where_time_a_token_is_short() -> None:
    """Attention over 8192 keys leaves the tensor cores idle; chunks in the same step would make tokens wait."""
    way = ways(0.05).choose(Load(64, 8192, 16_000))
    assert way.split is not None and way.met
    mixed = ways(0.05, apart=False).choose(Load(64, 8192, 16_000))
    assert mixed.split is None and mixed.met
    assert way.prefill_per_s > 1.1 * mixed.prefill_per_s
    assert way.output_per_s > 0.8 * mixed.output_per_s


def test_the_grid_of_steps_apart_is_exact_at_its_points_and_the_clock_s_elsewhere() -> None:
    made, split = ways(), Split(64, 64)
    of = grid()
    exact = tg.beside(
        tg.Side.of(of.graph(128, 1024, 0), of.device), tg.Side.of(of.graph(0, 0, 512), of.device), split.sizes
    )
    assert made.apart_s(split, 128, 1024, 512) == pytest.approx(exact)
    near = tg.beside(
        tg.Side.of(of.graph(150, 900, 0), of.device), tg.Side.of(of.graph(0, 0, 640), of.device), split.sizes
    )
    assert made.apart_s(split, 150, 900, 640) == pytest.approx(near, rel=0.1)


def test_splits_are_legal_and_spread() -> None:
    device = tg.devices.get("h100_sxm")
    for most in (1, 3, 20):
        splits = splits_of(device, most)
        assert 1 <= len(splits) <= most
        assert {split.sizes for split in splits} <= {*tg.halves(device)}
        assert all(min(split.sizes) * 8 >= device.sm_count for split in splits)
    assert splits_of(tg.devices.make(device, sm_count=8)) == ()


def test_choices_tell_the_loads_that_came_most() -> None:
    made = Ways(grid(), grid().of("sequential"), 0.03, step_tokens=2048, room=Room(512, 700_000))
    for load in [Load(200, 1000, 4000)] * 5 + [Load(200, 1010, 3900)] * 2 + [Load(2, 100, 10)] + [Load(9, 9, 0)] * 9:
        made.choose(load)
    first, second = made.choices()
    assert (first.times, first.load.decode, second.times, second.load.decode) == (7, 200, 1, 2)
    assert first.way == made.choose(Load(200, 1000, 4000))
    assert len(made.choices(1)) == 1


def test_wishes_that_are_none_are_refused() -> None:
    assert tpot_of(0) is None
    assert tpot_of(25) == 0.025
    for wish in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="tpot-ms"):
            tpot_of(wish)
    with pytest.raises(RequestError, match="decode"):
        Load(-1, 0, 0)
    ways = Way(None, 16, 0.5, 1.0, 1.0, 1.0), Way(Split(8, 8), 16, 0.4, 1.0, 1.0, 0.5)
    assert chosen(ways, 0.1).met is False
    assert chosen(ways, 0.1).split == Split(8, 8)
