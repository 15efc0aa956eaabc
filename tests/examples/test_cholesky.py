"""Sparse Cholesky as a task graph: the factor solves what SuperLU solves, by any order and grain."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import splu

import taskgraph as tg
from benchmarks import cholesky as benchmark
from examples.cholesky import (
    Factor,
    MatrixError,
    NotPositiveDefiniteError,
    SingularError,
    analyse,
    approximate_minimum_degree,
    fill_reducing,
    grid_dissection,
    kernels,
    metis,
    minimum_degree,
    picture,
)
from examples.cholesky.factor import pieces
from examples.cholesky.problems import poisson


def random_spd(n: int, seed: int) -> sp.csc_array:
    """A symmetric, diagonally dominant matrix with a random pattern."""
    part = sp.random_array((n, n), density=3.0 / n, rng=np.random.default_rng(seed))
    both = sp.csc_array(part + part.T)
    return sp.csc_array(both + sp.diags_array(both.sum(axis=0) + 1.0))


CASES: dict[str, Callable[[], tuple[sp.csc_array, np.ndarray]]] = {
    "grid": lambda: (poisson((20, 20)), grid_dissection((20, 20))),
    "brick": lambda: (poisson((7, 8, 6), (1.0, 50.0, 1.0)), grid_dissection((7, 8, 6))),
    "natural": lambda: (poisson((12, 9)), np.arange(108)),
    "random": lambda: (random_spd(300, 1), minimum_degree(random_spd(300, 1))),
    "forest": lambda: (sp.csc_array(sp.block_diag([poisson((5, 5))] * 3)), np.random.default_rng(0).permutation(75)),
    "one": lambda: (sp.csc_array(np.array([[4.0]])), np.arange(1)),
}


@pytest.mark.parametrize(("grain", "dense"), [(0.0, 0.0), (2e3, 0.0), (2e3, 1e12), (1e12, 1e6)])
@pytest.mark.parametrize("case", CASES)
def test_factor_solves_as_superlu_does_and_is_replayed_for_new_values(case: str, grain: float, dense: float) -> None:
    matrix, order = CASES[case]()
    rhs = np.random.default_rng(2).standard_normal(matrix.shape[0])
    with Factor(matrix, order, grain_flops=grain, dense_flops=dense, scheduler="list") as factor:
        for scale in (1.0, 3.0):
            scaled = sp.csc_array(scale * matrix + (scale - 1.0) * sp.diags_array(matrix.diagonal()))
            factor.refactor(scaled)
            x = factor.solve(rhs)
            assert np.linalg.norm(scaled @ x - rhs) <= 1e-10 * np.linalg.norm(rhs)
            np.testing.assert_allclose(x, splu(scaled).solve(rhs), rtol=1e-8, atol=1e-10 * abs(x).max())


@given(columns=st.integers(1, 150), below=st.integers(0, 150), parts=st.integers(1, 5), seed=st.integers(0, 99))
def test_threads_assemble_rows_of_their_own(columns: int, below: int, parts: int, seed: int) -> None:
    """Whatever the order of the threads: each row of a front is zeroed and added to by one of them."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, columns + below + 1))
    relative = np.sort(rng.permutation(columns + below)[:count]).astype(np.int32)
    child = torch.from_numpy(rng.random((count, count)))
    guide = np.concatenate([[columns, below, 1, 1], [0], [0], relative]).astype(np.int32)
    tensors = [torch.ones(1, dtype=torch.float64), torch.from_numpy(guide), child]
    table = np.array([(t.data_ptr(), t.numel()) for t in tensors], np.int64)
    height = columns + below
    panel, update = np.full((columns, height), np.nan), np.full((below, below), np.nan)
    for part in rng.permutation(parts):
        kernels.assemble_part(table.ctypes.data, panel, update, int(part), parts)
    wanted = np.zeros((height, height))
    wanted[0, 0] = 1.0
    wanted[np.ix_(relative, relative)] += np.triu(child.numpy())
    np.testing.assert_allclose(panel, wanted[:columns])
    np.testing.assert_allclose(update, wanted[columns:, columns:])


@pytest.mark.parametrize(("package", "order_of"), [("pymetis", metis), ("cvxopt", approximate_minimum_degree)])
def test_orders_of_libraries_are_permutations_that_fill_less(
    package: str, order_of: Callable[[sp.csc_array], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = poisson((20, 20))
    if find_spec(package) is not None:
        natural = analyse(matrix, np.arange(400)).flops.sum()
        assert analyse(matrix, order_of(matrix)).flops.sum() < 0.7 * natural
        diagonal = sp.csc_array(sp.diags_array(np.ones(5)))
        assert sorted(order_of(diagonal)) == list(range(5))
    for module in (package, "cvxopt.amd"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(tg.BackendUnavailable, match=f"pip install {package}"):
        order_of(matrix)


def test_a_matrix_that_is_no_grid_has_an_order() -> None:
    matrix = random_spd(200, 3)
    assert sorted(fill_reducing(matrix)) == list(range(200))


def test_symbolic_counts_are_those_of_the_dense_factor() -> None:
    matrix = poisson((9, 9))
    found = analyse(matrix, grid_dissection((9, 9)))
    dense = np.linalg.cholesky(matrix.toarray()[np.ix_(found.order, found.order)])
    held = sum(c * (c + 1) // 2 + c * m for c, m in zip(found.columns, found.below, strict=True))
    filled = np.count_nonzero(abs(dense) > 1e-14)
    assert filled <= held <= 2 * filled
    for s, (a, z) in enumerate(zip(found.first, found.first[1:], strict=False)):
        rows = found.rows[found.row_at[s] : found.row_at[s + 1]]
        outside = np.setdiff1d(np.arange(z, 81), rows)
        assert abs(dense[np.ix_(outside, np.arange(a, z))]).max(initial=0.0) < 1e-14


@pytest.mark.parametrize(("grain", "dense"), [(500.0, 0.0), (500.0, 1e6), (1e12, 1e6)])
def test_the_ops_pass_the_checks_of_custom_ops(grain: float, dense: float) -> None:
    matrix = poisson((8, 8))
    with Factor(matrix, grid_dissection((8, 8)), grain_flops=grain, dense_flops=dense, scheduler="list") as factor:
        factor.refactor(matrix)
        factor.executable.check()


def test_what_is_no_spd_matrix_is_refused() -> None:
    matrix = poisson((6, 6))
    order = grid_dissection((6, 6))
    with Factor(matrix, order, grain_flops=100.0, dense_flops=0.0) as factor:
        with pytest.raises(MatrixError, match="refactor"):
            factor.solve(np.ones(36))
        for shift in (-100.0, -2.0):
            with pytest.raises(NotPositiveDefiniteError, match="positive definite"):
                factor.refactor(sp.csc_array(matrix + shift * sp.eye_array(36)))
        laplacian = sp.csc_array(matrix - sp.diags_array(matrix.sum(axis=0)))
        with pytest.raises((SingularError, NotPositiveDefiniteError), match=r"singular|positive definite"):
            factor.refactor(laplacian)
        with pytest.raises(MatrixError, match="refactor"):
            factor.solve(np.ones(36))
        nearly = sp.csc_array(laplacian + 1e-9 * sp.eye_array(36))
        factor.refactor(nearly)
        x = factor.solve(np.ones(36))
        assert np.linalg.norm(nearly @ x - 1.0) <= 1e-13 * 8.0 * np.linalg.norm(x)
        factor.refactor(matrix)
        with pytest.raises(MatrixError, match="shape"):
            factor.solve(np.ones(35))
        with pytest.raises(MatrixError, match="pattern"):
            factor.refactor(poisson((4, 9)))
        skewed = matrix.copy()
        skewed.data[1] *= 2
        with pytest.raises(MatrixError, match="symmetric"):
            factor.refactor(skewed)
        skewed.data[1] = np.nan
        with pytest.raises(MatrixError, match="finite"):
            factor.refactor(skewed)
    with pytest.raises(MatrixError, match="symmetric"):
        analyse(sp.csc_array(np.triu(matrix.toarray())), order)
    with pytest.raises(MatrixError, match="grain"):
        Factor(matrix, order, grain_flops=-1.0)
    with pytest.raises(MatrixError, match="permutation"):
        analyse(matrix, np.zeros(36, int))
    with pytest.raises(MatrixError, match="square"):
        analyse(matrix[:5], order)
    with pytest.raises(MatrixError, match="real"):
        analyse(sp.csc_array(matrix * 1j), order)


@given(st.integers(2, 9), st.integers(2, 9), st.floats(0.0, 1e4))
def test_every_front_is_in_one_op_and_every_child_is_within_or_before(rows: int, columns: int, grain: float) -> None:
    symbolic = analyse(poisson((rows, columns)), grid_dissection((rows, columns)))
    found = pieces(symbolic.parent, symbolic.flops, grain)
    op_of = {s: k for k, piece in enumerate(found) for s in range(piece.begin, piece.end)}
    assert sorted(op_of) == list(range(len(symbolic.flops)))
    assert sum(piece.end - piece.begin for piece in found) == len(op_of)
    for s, above in enumerate(symbolic.parent):
        if above >= 0 and op_of[s] != op_of[above]:
            piece = found[op_of[above]]
            assert op_of[s] < op_of[above] and above == piece.begin and s in piece.children


def test_benchmark_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--unknowns", "300", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    assert set(result) == {f"{kind}-300" for kind in benchmark.PROBLEMS}
    assert all(row["residual"] <= 1e-10 and row["tree_bound"] >= 1.0 for row in result.values())


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    if tg.devices.get("cpu").sm_count < 2:
        pytest.skip("one core has nothing to take turns with")
    assert picture.main([str(tmp_path / "tree.png"), "--side", "40", "--rounds", "1"]) == 0
    assert (tmp_path / "tree.png").stat().st_size > 10_000


def test_an_op_stands_over_its_children_in_the_picture() -> None:
    with Factor(poisson((20, 20)), grid_dissection((20, 20)), grain_flops=1e3, scheduler="sequential") as factor:
        x, depth, edges = picture.places(factor.graph)
    assert len(edges) == len(x) - 1
    for child, parent in edges:
        assert depth[child] == depth[parent] + 1
        mine = [c for c, p in edges if p == parent]
        assert min(x[mine]) <= x[parent] <= max(x[mine])
