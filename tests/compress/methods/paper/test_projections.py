"""The paper's weighted steps against brute-force least squares in float64."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from compress.errors import UsageError
from compress.linalg import low_rank, weighted_error
from compress.methods.paper.projections import (
    frobenius_factors,
    l_step,
    r_step,
    reader_a_step,
    reader_b_step,
    weighted_factors,
    writer_a_step,
    writer_b_step,
)
from compress.structures import KroneckerStructure, LowRankStructure, Structure
from compress.structures.gs import GroupShuffleStructure
from compress.structures.gs_fit import cut, join

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def moment(width: int) -> Tensor:
    """A Gram matrix with a falling spectrum and no special coordinates."""
    basis = torch.linalg.qr(normal(width, width)).Q
    return (basis * 0.8 ** torch.arange(width, dtype=torch.float64)) @ basis.T


def least_squares(atoms: Tensor, W: Tensor, G: Tensor) -> Tensor:
    """The coefficients x that minimise ||(W - sum_i x_i atoms[i]) G^(1/2)||; atoms (k, out, in)."""
    root = torch.linalg.cholesky(G)
    A = (atoms @ root).flatten(1).T  # (out * in, k)
    return torch.linalg.lstsq(A, (W @ root).reshape(-1, 1), driver="gelsd").solution[:, 0]


def units(*shape: int) -> Tensor:
    """All arrays of this shape with a single 1: (product, *shape)."""
    count = int(torch.tensor(shape).prod())
    return torch.eye(count, dtype=torch.float64).reshape(count, *shape)


def reader(A: Tensor, B: Tensor) -> Tensor:
    """sum_t A_t (x) B_t^T for A (..., terms, blocks), B (..., terms, size, n): (..., n, blocks * size)."""
    return torch.einsum("...tb,...tin->...nbi", A, B).flatten(-2)


def writer(A: Tensor, B: Tensor) -> Tensor:
    """(..., blocks * size, n)."""
    return torch.einsum("...tb,...tin->...bin", A, B).flatten(-3, -2)


BLOCKS, TERMS, SIZE, N = 4, 3, 3, 5


def test_reader_steps() -> None:
    W, G = normal(N, BLOCKS * SIZE), moment(BLOCKS * SIZE)
    A, B = normal(TERMS, BLOCKS), normal(TERMS, SIZE, N)
    best_a = least_squares(reader(units(TERMS, BLOCKS), B), W, G).reshape(TERMS, BLOCKS)
    torch.testing.assert_close(reader_a_step(W, G, B, BLOCKS), best_a)
    best_b = least_squares(reader(A, units(TERMS, SIZE, N)), W, G).reshape(TERMS, SIZE, N)
    torch.testing.assert_close(reader_b_step(W, G, A), best_b)


def test_writer_steps() -> None:
    W, G = normal(BLOCKS * SIZE, N), moment(N)
    A, B = normal(TERMS, BLOCKS), normal(TERMS, SIZE, N)
    blocks = W.reshape(BLOCKS, SIZE, N)
    best_a = least_squares(writer(units(TERMS, BLOCKS), B), W, G).reshape(TERMS, BLOCKS)
    torch.testing.assert_close(writer_a_step(blocks, G, B), best_a)
    best_b = least_squares(writer(A, units(TERMS, SIZE, N)), W, G).reshape(TERMS, SIZE, N)
    torch.testing.assert_close(writer_b_step(blocks, A), best_b)


def test_group_shuffle_steps() -> None:
    right, left, rows, columns, rank = 2, 3, 4, 3, 2
    W, G = normal(right * rows, left * columns), moment(left * columns)
    U, V = normal(right, left, rows, rank), normal(right, left, rank, columns)
    every_u = torch.stack([join(u @ V) for u in units(*U.shape)])
    torch.testing.assert_close(r_step(W, G, V), least_squares(every_u, W, G).reshape(U.shape))
    every_v = torch.stack([join(U @ v) for v in units(*V.shape)])
    best = weighted_error(W, join(U @ least_squares(every_v, W, G).reshape(V.shape)), G)
    start, found = (weighted_error(W, join(U @ v), G) for v in (V, l_step(W, G, U, V)))
    assert best <= found < best + 1e-4 * (start - best)  # an iterative solver, stopped at the paper's tolerance


STRUCTURES: list[Structure] = [
    KroneckerStructure(16, 10, 4, 3, "in"),
    KroneckerStructure(10, 16, 4, 3, "out"),
    KroneckerStructure(16, 10, 8, 5, "in"),
    KroneckerStructure(10, 16, 2, 1, "out"),
    GroupShuffleStructure(16, 12, 4, 2, 2),
    GroupShuffleStructure(12, 16, 2, 4, 2),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_factors_belong_to_the_structure(structure: Structure) -> None:
    W, G = normal(structure.out_features, structure.in_features), moment(structure.in_features)
    plain, weighted = frobenius_factors(structure, W), weighted_factors(structure, W, G)
    for factors in (plain, weighted):
        structure.check_factors(factors)
        if "A" in factors:
            torch.testing.assert_close(factors["A"] @ factors["A"].T, torch.eye(len(factors["A"])).double())
    # The Frobenius projection is the structure's own unweighted optimum; the sweep lowers the weighted error.
    torch.testing.assert_close(structure.dense(plain), structure.dense(structure.fit(W)))
    assert weighted_error(W, structure.dense(weighted), G) < weighted_error(W, structure.dense(plain), G)
    assert frobenius_factors(structure, W.float())[next(iter(plain))].dtype == torch.float32


def test_one_sweep_is_both_steps_from_the_frobenius_optimum() -> None:
    W, G = normal(10, 16), moment(16)
    reading = KroneckerStructure(16, 10, 4, 3, "in")
    B = frobenius_factors(reading, W)["B"].T.reshape(3, 4, 10)
    A = reader_a_step(W, G, B, 4)
    expected = reader(A, reader_b_step(W, G, A))
    torch.testing.assert_close(reading.dense(weighted_factors(reading, W, G)), expected)
    writing = KroneckerStructure(16, 12, 4, 3, "out")
    W = normal(12, 16)
    blocks = W.reshape(4, 3, 16)
    A = writer_a_step(blocks, G, frobenius_factors(writing, W)["B"].reshape(3, 3, 16))
    expected = writer(A, writer_b_step(blocks, A))
    torch.testing.assert_close(writing.dense(weighted_factors(writing, W, G)), expected)
    grid = GroupShuffleStructure(16, 12, 4, 2, 2)
    U, V = low_rank(cut(W, 2, 4), 2)
    U = r_step(W, G, V)
    torch.testing.assert_close(grid.dense(weighted_factors(grid, W, G)), join(U @ l_step(W, G, U, V)))


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_what_the_structure_can_hold_is_found(structure: Structure) -> None:
    exact = structure.dense({name: normal(*shape) for name, shape in structure.shapes().items()})
    factors = weighted_factors(structure, exact, moment(structure.in_features))
    torch.testing.assert_close(structure.dense(factors), exact)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_singular_gram(structure: Structure) -> None:
    """Fewer tokens than features, and one feature that never fires."""
    x = normal(5, structure.in_features)
    x[:, 0] = 0
    W, G = normal(structure.out_features, structure.in_features), x.T @ x / 5
    dense = structure.dense(weighted_factors(structure, W, G))
    assert torch.isfinite(dense).all()
    assert weighted_error(W, dense, G) <= weighted_error(W, structure.dense(frobenius_factors(structure, W)), G)


def test_other_structures_are_refused() -> None:
    wrong: Literal["both"] = "both"
    two_sided = KroneckerStructure(16, 16, 4, 2, wrong, n1=2, m1=2)
    low_rank = LowRankStructure(16, 16, 4)
    W, G = normal(16, 16), moment(16)
    for structure in (two_sided, low_rank):
        with pytest.raises(UsageError, match="paper"):
            frobenius_factors(structure, W)
        with pytest.raises(UsageError, match="paper"):
            weighted_factors(structure, W, G)
