"""Drawing tokens: the distribution is the cut softmax, and a row's token is its own affair."""

from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taskgraph.runtime.cpu.sampling import draw
from taskgraph.serving.requests import Request, Sampling
from taskgraph.serving.sampling import NO_TOKEN, NONE_LEFT, Chances, Draws, Edits, likeliest, sample, uniforms
from taskgraph.serving.steering import Steer, edits_of

NAN, INF = float("nan"), float("inf")


def expected(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The chances, by the definition, one token after another."""
    chances = np.exp((logits - logits.max()) / temperature)
    chances /= chances.sum()
    kept, before = np.zeros(len(chances)), 0.0
    for rank, token in enumerate(np.argsort(-chances)):
        if (top_k and rank >= top_k) or before >= top_p:
            break
        kept[token] = chances[token]
        before += chances[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "vocabulary"),
    [(1.0, 0, 1.0, 50), (0.5, 0, 1.0, 50), (2.0, 7, 1.0, 50), (1.0, 0, 0.6, 50), (1.3, 9, 0.8, 50), (1.0, 0, 0.9, 900),
     (1.0, 300, 1.0, 900), (1.0, 1, 1.0, 50), (1.0, 0, 1e-6, 50)],
)  # fmt: skip
def test_chances_are_those_of_the_cut_softmax(temperature: float, top_k: int, top_p: float, vocabulary: int) -> None:
    logits = np.random.default_rng(0).normal(size=vocabulary).astype(np.float32)
    n = 4_000
    rows = torch.from_numpy(logits).expand(n, -1)
    got = draw(
        rows, np.full(n, temperature, np.float32), np.full(n, top_k), np.full(n, top_p, np.float32),
        (np.arange(n) + 0.5) / n,
    )  # fmt: skip
    share = np.bincount(got, minlength=vocabulary) / n
    np.testing.assert_allclose(share, expected(logits.astype(float), temperature, top_k, top_p), atol=2.5 / n)


def test_rows_do_not_depend_on_each_other() -> None:
    made = np.random.default_rng(1)
    n = 40
    logits = torch.from_numpy(made.normal(size=(n, 700)).astype(np.float32) * 2)
    parameters = (
        made.uniform(0.2, 2, n).astype(np.float32), made.choice([0, 1, 5, 400], n),
        made.choice([0.3, 0.97, 1.0], n).astype(np.float32), made.uniform(size=n),
    )  # fmt: skip
    together = draw(logits, *parameters)
    alone = [draw(logits[i : i + 1], *(p[i : i + 1] for p in parameters))[0] for i in range(n)]
    assert together.tolist() == alone


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_place() -> None:
    seeds, places = np.repeat(np.arange(100, dtype=np.uint64), 100), np.tile(np.arange(100), 100)
    numbers = uniforms(seeds, places)
    assert len(set(numbers)) == 10_000
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 50  # chi square of 19 degrees: 1e-4 beyond
    grid = numbers.reshape(100, 100)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.05


def split_mix(seed: int, place: int) -> float:
    """SplitMix64 in whole numbers: the finaliser of Steele et al. over a seed and a place in its stream."""
    x = (seed * 0x9E3779B97F4A7C15 + place * 0xD1B54A32D192ED03) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return ((x ^ (x >> 31)) >> 11) / 2**53


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_uniform_numbers_are_those_of_split_mix(seed: int, place: int) -> None:
    """A seed draws the same tokens in every version: who kept it can ask again."""
    assert uniforms(np.array([seed], np.uint64), np.array([place])).tolist() == [split_mix(seed, place)]


# ------------------------------------------------------------------------------------------- at the edges


def drawn(logits: list[float], temperature: float, top_k: int, top_p: float, chance: float) -> int:
    """One token of one row."""
    one = np.ones(1)
    made = draw(torch.tensor([logits]), one * temperature, np.array([top_k]), one * top_p, np.array([chance]))
    return int(made[0])


BELOW_1 = float(np.nextafter(1.0, 0.0))


@pytest.mark.parametrize("cut", [(0, 1.0), (4, 1.0), (0, 0.999999)])
def test_a_number_at_a_border_is_the_next_tokens(cut: tuple[int, float]) -> None:
    """Four tokens of a quarter each, in some order."""
    chances = [0.0, 0.2499, 0.25, 0.4999, 0.5, 0.7499, 0.75, BELOW_1]
    tokens = [drawn([0.0] * 4, 1.0, *cut, u) for u in chances]
    assert tokens[::2] == tokens[1::2] and len(set(tokens)) == 4
    assert drawn([-INF, 0.0, -INF, 0.0], 1.0, 0, 1.0, 0.0) == 1  # never one without a chance
    assert drawn([0.0, -INF, 0.0, -INF], 1.0, *cut, BELOW_1) == 2


def test_top_p_keeps_tokens_while_less_than_it_has_been() -> None:
    """Of quarters 0.5 keeps two, and the least bit more keeps a third."""
    for top_p, kept in ((0.25, 1), (0.2500001, 2), (0.5, 2), (0.5000001, 3), (0.75, 3), (0.7500001, 4), (0.1, 1)):
        for top_k in (0, 2):
            found = {drawn([0.0] * 4, 1.0, top_k, top_p, i / 24) for i in range(24)}
            assert len(found) == (min(kept, 2) if top_k else kept)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_top_k_keeps_so_many(top_k: int) -> None:
    assert drawn([4.0, 3.0, 2.0, 1.0], 100.0, top_k, 1.0, BELOW_1) == top_k - 1
    assert drawn([1.0, 2.0, 3.0, 4.0], 100.0, top_k, 1.0, BELOW_1) == 4 - top_k


@pytest.mark.parametrize("kept", [254, 255, 256, 257, 258, 599, 600])
def test_cuts_around_the_tokens_that_are_sorted_first(kept: int) -> None:
    """Of 600 tokens, each a little less likely than the one before, the last that is kept can be drawn."""
    logits = [-i / 1000 for i in range(600)]
    assert drawn(logits, 1.0, kept, 1.0, BELOW_1) == kept - 1
    share = np.exp(np.float64(logits))
    share /= share.sum()
    middle = float(share[: kept - 1].sum() + share[kept - 1] / 2)
    assert drawn(logits, 1.0, 0, middle, BELOW_1) == kept - 1
    assert drawn(logits, 1.0, 0, middle, 0.0) == 0


def test_the_least_temperature_that_draws() -> None:
    logits = [0.0, -1e-5]
    assert drawn(logits, 1e-5, 0, 1.0, 0.9) == 1  # e^0 against e^-1
    assert drawn(logits, 9.999e-6, 0, 1.0, 0.9) == 0
    assert drawn(logits, 1e-5, 0, 1.0, 0.7) == 0


def test_as_many_chances_are_told_as_were_asked_for() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [0.0, 0.0, NAN], [0.0, 3.0, 0.0]])
    draws = Draws(
        np.array([5, 6, 7, 8]), np.zeros(4), np.zeros(4, np.int64), np.ones(4), np.zeros(4), np.array([-1, 0, 2, 2])
    )
    tokens, told = sample(logits, draws)
    assert tokens.tolist() == [2, 0, NO_TOKEN, 1]
    assert told is not None and told.samples.tolist() == [6, 8]
    assert told.top_tokens.shape == (2, 2) and told.top_tokens[:, 0].tolist() == [0, 1]
    np.testing.assert_allclose(told.logprobs, [-np.log(1 + np.exp(-1) + np.exp(-2)), -np.log(1 + 2 * np.exp(-3))])
    none = Draws(np.array([5]), np.zeros(1), np.zeros(1, np.int64), np.ones(1), np.zeros(1), np.array([-1]))
    assert sample(logits[:1], none)[1] is None and none.edits is None


def test_what_is_drawn_and_told_is_frozen() -> None:
    draws = Draws(*[np.zeros(1)] * 6)
    edits = Edits(*[np.zeros(1)] * 5)
    for value in (draws, edits, Chances(*[np.zeros(1)] * 4)):
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, None)
        assert value != replace(value)  # arrays: only itself is equal to it


# ------------------------------------------------------------------------------- rows that have no likeliest


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-10, 1e-6, 0.7, 100.0])
@pytest.mark.parametrize(
    "bad", [[NAN, 1, 2], [1, 2, NAN], [NAN] * 3, [INF, 1, 2], [-INF] * 3, [NAN, INF, -INF], [INF, INF, 0]], ids=str
)
def test_a_row_without_a_finite_likeliest_has_no_token_and_spoils_no_other(
    bad: list[float], temperature: float
) -> None:
    good = [0.5, -INF, 4.0]
    rows = torch.tensor([good, bad, good])
    for cut in ((0, 1.0), (2, 1.0), (0, 0.5)):
        got = draw(
            rows, np.full(3, temperature), np.full(3, cut[0]), np.full(3, cut[1]), np.full(3, 1e-9)
        )  # fmt: skip
        alone = draw(rows[:1], np.full(1, temperature), np.full(1, cut[0]), np.full(1, cut[1]), np.full(1, 1e-9))
        assert got.tolist() == [alone[0], NO_TOKEN, alone[0]]
        assert alone[0] in (0, 2)


def test_likeliest_says_where_there_is_none() -> None:
    logits = torch.tensor([1.0, NAN, INF, -INF, 3.0], dtype=torch.bfloat16)
    assert likeliest(np.arange(5), logits).tolist() == [0, -1, -1, -1, 4]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-50, 1e-45, 1e-40, 1e-10, 9e-6])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(3).normal(size=(20, 400)).astype(np.float32) * 50)
    logits[:, 7] = logits.amax(1) - 1e-4  # so close that a division which is not exact would not tell them apart
    got = draw(logits, np.full(20, temperature), np.zeros(20, np.int64), np.ones(20), np.linspace(0, 1, 20, False))
    assert got.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-50, 1e-12, 1e-7])
def test_a_tiny_top_p_leaves_the_likeliest(top_p: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(4).normal(size=(20, 900)).astype(np.float32))
    ones = np.ones(20)
    got = draw(logits, ones, np.zeros(20, np.int64), ones * top_p, np.linspace(0, 1, 20, False))
    assert got.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("top_k", [50, 51, 256, 1000, 2**31])
def test_a_top_k_of_the_vocabulary_or_more_cuts_nothing(top_k: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(5).normal(size=(30, 50)).astype(np.float32))
    chance, ones = np.linspace(0, 1, 30, False), np.ones(30)
    cut = draw(logits, ones, np.full(30, top_k), ones, chance)
    share = np.exp(logits.double().numpy())
    share /= share.sum(1, keepdims=True)
    order = np.argsort(-share, axis=1)
    below = np.cumsum(np.take_along_axis(share, order, 1), 1)
    assert cut.tolist() == [int(order[i, np.searchsorted(below[i], chance[i], side="right")]) for i in range(30)]


# --------------------------------------------------------------- biases, penalties, grammars and chances


def reference(logits: np.ndarray, add: dict[int, float], allowed: set[int] | None) -> tuple[int, np.ndarray]:
    """The greedy token after the edits, and the log-probabilities before them."""
    edited = logits.astype(np.float64).copy()
    for token, value in add.items():
        edited[token] += value
    if allowed is not None:
        edited[[t for t in range(len(edited)) if t not in allowed]] = -np.inf
    top = logits.astype(np.float64).max()
    return int(edited.argmax()), logits - top - np.log(np.exp(logits.astype(np.float64) - top).sum())


@given(st.data())
def test_edits_and_chances_are_those_of_the_definition(data: st.DataObject) -> None:
    rows, vocabulary = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, vocabulary)).astype(np.float32) * 4
    steered, wanted = [], []
    for row in range(rows):
        presence, frequency = data.draw(st.sampled_from([(0.0, 0.0), (1.5, 0.0), (-2.0, 0.25), (0.0, 2.0)]))
        bias = data.draw(st.dictionaries(st.integers(0, vocabulary - 1), st.floats(-100, 100), max_size=4))
        answer = rng.integers(0, vocabulary, int(rng.integers(0, 30)))
        allowed = data.draw(st.none() | st.sets(st.integers(0, vocabulary - 1), min_size=1))
        guide = None if allowed is None else FixedGuide(vocabulary, frozenset(allowed))
        how = Sampling(presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias)
        steer = Steer.of(Request([1], 5, how, guide=guide))  # type: ignore[arg-type]
        if steer is not None:
            steered.append((row, steer, answer))
        add = dict(how.biases)
        for token in set(answer.tolist()):
            taken = (answer == token).sum() * frequency + presence
            add[token] = add.get(token, 0.0) - taken
        wanted.append(reference(logits[row], add, allowed))
    told = rng.integers(-1, min(vocabulary, 6) + 1, rows)
    draws = Draws(
        np.arange(rows) + 10, np.zeros(rows), np.zeros(rows, np.int64), np.ones(rows), rng.random(rows), told,
        edits_of(steered) if steered else None,
    )  # fmt: skip
    before = logits.copy()
    tokens, chances = sample(torch.from_numpy(logits), draws)
    assert (logits == before).all(), "the model's own logits are not touched"
    for row, (token, logs) in enumerate(wanted):
        assert tokens[row] == token
        if told[row] >= 0:
            assert chances is not None
            at = chances.samples.tolist().index(row + 10)
            np.testing.assert_allclose(chances.logprobs[at], logs[token], atol=1e-5)
            best = chances.top_tokens[at, : told[row]].tolist()
            assert best == np.argsort(-logs)[: told[row]].tolist()
            np.testing.assert_allclose(chances.top_logprobs[at, : told[row]], logs[best], atol=1e-5)
    assert (chances is None) == bool((told < 0).all())


def test_a_grammar_that_leaves_only_what_cannot_be_is_said_so() -> None:
    logits = torch.tensor([[1.0, -INF, 2.0], [1.0, NAN, 2.0], [1.0, 3.0, 2.0]])
    steers = [Steer.of(Request([1], 5, guide=FixedGuide(3, frozenset({1})))) for _ in range(3)]  # type: ignore[arg-type]
    edits = edits_of([(i, steer, np.empty(0, np.int64)) for i, steer in enumerate(steers) if steer is not None])
    draws = Draws(np.arange(3), np.ones(3), np.zeros(3, np.int64), np.ones(3), np.ones(3) / 2, np.full(3, -1), edits)
    assert sample(logits, draws)[0].tolist() == [NONE_LEFT, NO_TOKEN, 1]


class FixedGuide:
    """A grammar that always allows the same tokens."""

    ended = False

    def __init__(self, vocabulary: int, tokens: frozenset[int]) -> None:
        self.vocabulary, self._tokens = vocabulary, tokens

    def begin(self) -> "FixedGuide":
        return self

    def advance(self, token: int) -> str:
        return ""

    def allowed(self) -> np.ndarray:
        bits = np.zeros(-(-self.vocabulary // 32) * 32, np.uint8)
        bits[list(self._tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)
