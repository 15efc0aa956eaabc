"""Randomized Cholesky: unbiased, equal for a seed whatever the grain and the lanes, and a good preconditioner."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import cholesky_randomized as benchmark
from examples.cholesky import (
    MatrixError,
    Randomized,
    SingularError,
    conjugate_gradients,
    grid_dissection,
    minimum_degree,
)
from examples.cholesky.problems import poisson


def random_m_matrix(n: int, seed: int) -> sp.csc_array:
    """Random edges, and here and there an excess on the diagonal, one of them at least."""
    draw = np.random.default_rng(seed)
    part = sp.random_array((n, n), density=3.0 / n, rng=draw)
    path = sp.diags_array([np.full(n - 1, 0.01)], offsets=[1], shape=(n, n))
    both = part + path
    both = both + both.T
    both.setdiag(0.0)
    excess = draw.random(n) * (draw.random(n) < 0.2)
    excess[0] += 0.1
    return sp.csc_array(sp.diags_array(both.sum(axis=0) + excess) - both)


@settings(max_examples=6, deadline=None)
@given(st.integers(10, 120), st.integers(0, 1000), st.floats(0.0, 300.0))
def test_a_seed_has_one_factor_whatever_the_grain_and_the_lanes(n: int, seed: int, grain: float) -> None:
    matrix = random_m_matrix(n, seed)
    order = minimum_degree(matrix)
    with (
        Randomized(matrix, order, seed=seed, grain=1e12, scheduler="sequential") as whole,
        Randomized(matrix, order, seed=seed, grain=grain, scheduler="list") as parts,
    ):
        for each in (whole, parts):
            each.refactor(matrix)
        assert (whole.lower() != parts.lower()).nnz == 0
        parts.replay()
        assert (whole.lower() != parts.lower()).nnz == 0


def test_where_no_vertex_has_two_neighbours_and_a_boundary_nothing_is_drawn() -> None:
    matrix = poisson((40,))
    with Randomized(matrix, np.arange(40), grain=20.0, scheduler="list") as chain:
        chain.refactor(matrix)
        lower, order = chain.lower(), chain.ordered.order
        assert abs(lower @ lower.T - matrix[order][:, order]).max() < 1e-14


def test_the_product_of_the_factors_is_the_matrix_in_the_mean() -> None:
    matrix = poisson((4, 4), (1.0, 3.0))
    products = []
    with Randomized(matrix, grid_dissection((4, 4), leaf=2), scheduler="sequential") as drawn:
        order = drawn.ordered.order
        for seed in range(2000):
            drawn.seed[0] = seed
            drawn.refactor(matrix)
            lower = drawn.lower().toarray()
            products.append(lower @ lower.T)
    exact = matrix.toarray()[np.ix_(order, order)]
    error = np.std(products, axis=0) / np.sqrt(len(products))
    assert (abs(np.mean(products, axis=0) - exact) <= 5 * error + 1e-12).all()
    assert error.max() > 1e-4


@pytest.mark.parametrize("weights", [None, (1.0, 1000.0)])
def test_it_preconditions_conjugate_gradients(weights: tuple[float, float] | None) -> None:
    matrix = poisson((60, 60), weights)
    rhs = np.random.default_rng(0).standard_normal(3600)
    with Randomized(matrix, grid_dissection((60, 60)), grain=2e3, scheduler="list") as factor:
        factor.refactor(matrix)
        factor.executable.check()
        found = conjugate_gradients(matrix, rhs, factor.apply)
    assert found.converged and len(found.residuals) <= 40
    assert np.linalg.norm(matrix @ found.x - rhs) <= 1.1e-8 * np.linalg.norm(rhs)
    alone = conjugate_gradients(matrix, rhs, lambda r: r, most=60)
    assert not alone.converged and len(alone.residuals) == 60


def test_values_that_make_more_entries_are_declared_anew() -> None:
    matrix = poisson((30, 30))
    cut = matrix.copy()
    cut.data[cut.data < 0] = 0.0
    order = grid_dissection((30, 30))
    with Randomized(cut, order, grain=200.0, scheduler="list") as factor, Randomized(matrix, order) as other:
        factor.refactor(cut)
        assert factor.lower().nnz == 900
        for each in (factor, other):
            each.refactor(matrix)
        assert (factor.lower() != other.lower()).nnz == 0


def test_what_it_cannot_take_is_refused() -> None:
    matrix, order = poisson((6, 6)), grid_dissection((6, 6))
    positive = matrix.copy()
    positive[0, 1] = positive[1, 0] = 0.5
    with pytest.raises(MatrixError, match=r"not above 0.*Factor"):
        Randomized(positive, order)
    with pytest.raises(MatrixError, match=r"diagonally dominant.*Factor"):
        Randomized(sp.csc_array(matrix - 0.5 * sp.eye_array(36)), order)
    laplacian = sp.csc_array(matrix - sp.diags_array(matrix.sum(axis=0)))
    with pytest.raises(SingularError, match="Fix one unknown"):
        Randomized(laplacian, order)
    skewed = matrix.copy()
    skewed.data[1] *= 2
    with pytest.raises(MatrixError, match="symmetric"):
        Randomized(skewed, order)
    with pytest.raises(MatrixError, match="seed"):
        Randomized(matrix, order, seed=-1)
    with pytest.raises(MatrixError, match="grain"):
        Randomized(matrix, order, grain=-1.0)
    with Randomized(matrix, order, scheduler="list", grain=50.0) as factor:
        with pytest.raises(MatrixError, match="refactor"):
            factor.apply(np.ones(36))
        factor.refactor(matrix)
        with pytest.raises(SingularError, match=r"sample\."):
            factor.refactor(laplacian)
        with pytest.raises(MatrixError, match="pattern"):
            factor.refactor(poisson((4, 9)))
        factor.refactor(matrix)
        with pytest.raises(MatrixError, match="shape"):
            factor.apply(np.ones(35))
    with pytest.raises(MatrixError, match="tolerance"):
        conjugate_gradients(matrix, np.ones(36), lambda r: r, tolerance=0.0)


def test_benchmark_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--unknowns", "400", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    assert set(result) == {f"{kind}-400" for kind in benchmark.PROBLEMS}
    for row in result.values():
        assert row["randomized"]["converged"] and row["randomized"]["residual"] <= 1.1e-8
        assert row["spilu 0.01"]["iterations"] > 0
