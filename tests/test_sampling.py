"""Drawing tokens: the distribution is the cut softmax, and a row's token is its own affair."""

import numpy as np
import pytest
import torch

from taskgraph.models.sampling import draw, uniforms


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
