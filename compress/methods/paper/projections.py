"""ProcrustesGPT's projections of a matrix onto its classes: Frobenius norm, and Gram-weighted (appendices A and B).

The weighted ones are one sweep of exact steps from the Frobenius optimum, as in the paper's code. That code solves
least squares with a root of the Gram matrix; here it is the normal equations with the Gram matrix itself, which has
the same solution and squares the condition number: hence float64, where the paper has float32.

Weights are (out, in), E = W - What, error tr(E G E^T). Kronecker sums are written for side "in"; see `compress.
structures.kron` for A (terms, blocks) and B.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.linalg import conjugate_gradient, low_rank
from compress.structures import KroneckerStructure, Structure
from compress.structures.gs import GroupShuffleStructure
from compress.structures.gs_fit import cut, join

LSMR_TOLERANCE = 1e-3
"""Tolerance of the inner solver of the L-step (`ftol` and `xtol` of the paper's code)."""
LSMR_ITERATIONS = 200

SINGULAR = 1e-10
DAMPING = (0.0, 1e-8, 1e-6, 1e-4, 1e-2)
"""Fractions of the mean diagonal. A pivot below SINGULAR of it, the mean diagonal, asks for the next."""

logger = logging.getLogger(__name__)


def frobenius_factors(structure: Structure, weight: Tensor) -> dict[str, Tensor]:
    """The nearest matrix of the class in the Frobenius norm, as the structure's factors, in the dtype of `weight`."""
    if isinstance(structure, KroneckerStructure):
        A, B = _van_loan(_stream_side_first(structure, weight), structure.terms)
        return _kron_factors(structure, A, B)
    if isinstance(structure, GroupShuffleStructure):
        return _gs_factors(structure, *low_rank(_cut(structure, weight), structure.rank))
    raise UsageError(f"the paper has no projection onto a {structure.name} structure; use kron or gs")


def weighted_factors(structure: Structure, weight: Tensor, gram: Tensor) -> dict[str, Tensor]:
    """One sweep of the paper's weighted fit from the Frobenius optimum: factors in float64.

    weight (out, in), gram (in, in) symmetric; of a zero Gram matrix the Frobenius optimum comes back. A singular
    system is damped (`definite`), where the paper's code leaves the step out. Raises UsageError for a structure that
    the paper does not have.
    """
    W, G = weight.double(), gram.double()
    if not bool(G.any()):
        return frobenius_factors(structure, W)
    if isinstance(structure, KroneckerStructure):
        blocks = _stream_side_first(structure, W)
        _, B = _van_loan(blocks, structure.terms)
        if structure.side == "in":
            A = reader_a_step(W, G, B, structure.blocks)
            B = reader_b_step(W, G, A)
        else:
            A = writer_a_step(blocks, G, B)
            B = writer_b_step(blocks, A)
        return _kron_factors(structure, A, B)
    if isinstance(structure, GroupShuffleStructure):
        U, V = low_rank(_cut(structure, W), structure.rank)
        U = r_step(W, G, V)
        return _gs_factors(structure, U, l_step(W, G, U, V))
    raise UsageError(f"the paper has no weighted fit of a {structure.name} structure; use kron or gs")


# ---- Kronecker sums, one-sided. A (terms, blocks) and the blocks of B, B[t] (size, n), where W[b] is approximated by
# sum_t A[t, b] B[t]; W[b] (size, n) is a block of columns of W, transposed (readers), or of rows (writers).


def _stream_side_first(structure: KroneckerStructure, weight: Tensor) -> Tensor:
    """(blocks, size, n): the blocks of the side that lies in the stream."""
    if structure.side == "both":
        raise UsageError("the paper's configurations have one-sided Kronecker sums only, side in or out")
    rows = weight.T if structure.side == "in" else weight
    return rows.reshape(structure.blocks, rows.shape[0] // structure.blocks, rows.shape[1])


def _van_loan(blocks: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """The truncated SVD of the (blocks, size * n) rearrangement: A with orthonormal rows, B (terms, size, n)."""
    A, B = low_rank(blocks.flatten(1), terms)
    return A.T, B.reshape(terms, *blocks.shape[1:])


def _kron_factors(structure: KroneckerStructure, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Make the rows of A orthonormal, as the structure wants them: A = R^T Q^T, and R goes into B."""
    Q, R = torch.linalg.qr(A.T)  # (blocks, terms), (terms, terms)
    B = torch.einsum("st,tpn->spn", R, B).flatten(0, 1)  # (terms * size, n)
    return {"A": Q.T.contiguous(), "B": (B.T if structure.side == "in" else B).contiguous()}


def reader_a_step(W: Tensor, G: Tensor, B: Tensor, blocks: int) -> Tensor:
    """A for fixed B: C[(r,a),(n,b)] = sum B_r[i,j] B_n[k,j] Z[a,i,b,k], D[(r,a)] = sum B_r[i,j] T[a,i,j], A = C^+ D.

    W (n, d), Z = G as (blocks, size, blocks, size), T = G W^T as (blocks, size, n), B (terms, size, n).
    """
    terms, size, n = B.shape
    Z = G.reshape(blocks, size, blocks, size)
    T = (G @ W.T).reshape(blocks, size, n)
    BB = torch.einsum("rij,nkj->rnik", B, B)
    C = torch.einsum("rnik,aibk->ranb", BB, Z).reshape(terms * blocks, terms * blocks)
    D = torch.einsum("rij,aij->ra", B, T).reshape(terms * blocks, 1)
    return _solve(C, D).reshape(terms, blocks)


def reader_b_step(W: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """B (terms, size, n) for fixed A: (K G K^T) B = K G W^T with K = A (x) I."""
    terms, blocks = A.shape
    size = G.shape[0] // blocks
    Z = G.reshape(blocks, size, blocks, size)
    C = torch.einsum("ra,aibk,nb->rink", A, Z, A).reshape(terms * size, terms * size)
    D = torch.einsum("ra,aij->rij", A, (G @ W.T).reshape(blocks, size, -1)).flatten(0, 1)
    return _solve(C, D).reshape(terms, size, -1)


def writer_a_step(blocks: Tensor, G: Tensor, B: Tensor) -> Tensor:
    """A (terms, blocks) for fixed B: C[r,n] = tr(B_r G B_n^T), D[r,b] = tr(B_r G W_b^T)."""
    weighted = (B @ G).flatten(1)  # (terms, size * in)
    C, D = weighted @ B.flatten(1).T, weighted @ blocks.flatten(1).T
    return _solve(C, D)


def writer_b_step(blocks: Tensor, A: Tensor) -> Tensor:
    """B_i = sum_n (A A^T)^{-1}_in sum_b A[n,b] W_b: the Gram matrix does not matter."""
    mixed = torch.einsum("nb,bpm->npm", A, blocks)
    return _solve(A @ A.T, mixed.flatten(1)).reshape(mixed.shape)


def _solve(C: Tensor, D: Tensor) -> Tensor:
    """C^{-1} D for a symmetric positive semi-definite C, damped where it is singular."""
    solution: Tensor = torch.cholesky_solve(D, definite(C))
    return solution


def definite(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a symmetric matrix, damped by as little of its mean diagonal as makes it definite.

    The steps reach far enough for moments that were rounded to float32 beside outlier channels. Raises UsageError
    for a matrix that is not finite, or indefinite beyond any rounding.
    """
    mean = float(matrix.diagonal().mean())
    if mean == 0 and not bool(matrix.any()):
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for fraction in DAMPING:
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex((matrix + matrix.T) / 2 + fraction * abs(mean) * identity)
        if int(info) == 0 and float(factor.diagonal().min()) ** 2 > SINGULAR * mean:
            if fraction:
                logger.info("a %d x %d system is singular: damped by %g of its mean diagonal", *matrix.shape, fraction)
            return factor
    raise UsageError(
        f"a {len(matrix)} x {len(matrix)} system of the paper's fit is not positive semi-definite (mean diagonal "
        f"{mean:g}); check the weights and the calibration data for NaN, infinity and extreme values"
    )


# ---- group-and-shuffle matrices: part (r, l) of What is U[r, l] V[r, l], see `compress.structures.gs_fit`


def _cut(structure: GroupShuffleStructure, weight: Tensor) -> Tensor:
    return cut(weight, structure.right_blocks, structure.left_blocks)


def _gs_factors(structure: GroupShuffleStructure, U: Tensor, V: Tensor) -> dict[str, Tensor]:
    shapes = structure.shapes()
    return {
        "L": V.transpose(0, 1).reshape(shapes["L"]).contiguous(),  # from (left, right, rank, columns)
        "R": U.transpose(1, 2).reshape(shapes["R"]).contiguous(),  # from (right, rows, left, rank)
    }


def r_step(W: Tensor, G: Tensor, V: Tensor) -> Tensor:
    """U (right, left, rows, rank) for fixed V: U_r = W_r G D_r^T (D_r G D_r^T)^{-1}, D_r = blkdiag_l V[r, l]."""
    right, left, rank, columns = V.shape
    DG = torch.einsum("rlkc,lcm->rlkm", V, G.reshape(left, columns, -1)).flatten(1, 2)  # (right, left * rank, in)
    normal = torch.einsum("rxlc,rlkc->rxlk", DG.reshape(right, left * rank, left, columns), V).flatten(2)
    rhs = DG @ W.reshape(right, -1, W.shape[1]).mT  # (right, left * rank, rows)
    U = torch.stack([_solve(normal[r], rhs[r]) for r in range(right)])
    return U.mT.reshape(right, -1, left, rank).transpose(1, 2)


def l_step(W: Tensor, G: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """V (right, left, rank, columns), all of it at once, for fixed U: conjugate gradients from V to LSMR_TOLERANCE.

    Normal equations U_rl^T [What G]_rl = U_rl^T [W G]_rl. The preconditioner is (U_rl^T U_rl) (x) G_ll: what the
    paper's QR factorisations of the blocks amount to.
    """
    right, left, rank, columns = V.shape
    grams = torch.stack([G[i * columns : (i + 1) * columns, i * columns : (i + 1) * columns] for i in range(left)])
    gram_factor = torch.stack([definite(g) for g in grams])
    inner_factor = torch.stack([definite(u) for u in (U.mT @ U).flatten(0, 1)]).reshape(right, left, rank, rank)

    def pull(error: Tensor) -> Tensor:
        return U.mT @ cut(error @ G, right, left)

    def precondition(residual: Tensor) -> Tensor:
        half = torch.cholesky_solve(residual, inner_factor)  # (right, left, rank, columns)
        return torch.cholesky_solve(half.mT, gram_factor.expand(right, -1, -1, -1)).mT

    return conjugate_gradient(
        lambda x: pull(join(U @ x)), pull(W), V, precondition, iterations=LSMR_ITERATIONS, tolerance=LSMR_TOLERANCE
    )
