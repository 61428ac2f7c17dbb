"""Second moments with their Cholesky factors, weighted errors and truncated decompositions, all in float64."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UsageError

logger = logging.getLogger(__name__)

# A moment is singular when its Cholesky factorisation meets a pivot below SINGULAR * mean diagonal, and is then damped
# by DAMPING * mean diagonal. Both are far below the damping that helps perplexity (1e-4 ... 1e-1, the caller's
# business).
SINGULAR = 1e-8
DAMPING = 1e-6

_noted: ContextVar[list[str] | None] = ContextVar("_noted", default=None)


class NumericalError(UsageError):
    """Numbers that no fit can be made of: NaN, infinity, or a moment that is not positive semi-definite."""


@contextmanager
def noted_damping() -> Iterator[list[str]]:
    """A list that collects, while the block runs, which moments were singular: "Gram matrix", "metric". A list of an
    outer block receives them in the end."""
    noted: list[str] = []
    outer, token = _noted.get(), _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)
        if outer is not None:
            outer.extend(noted)


def _note(what: str) -> None:
    noted = _noted.get()
    if noted is not None:
        noted.append(what)


def is_singular(moment: Tensor) -> bool:
    """True if `Moment.of` would damp this symmetric matrix (k, k)."""
    moment = moment.double()
    factor, info = torch.linalg.cholesky_ex((moment + moment.T) / 2)
    return int(info) != 0 or float(factor.diagonal().min()) ** 2 <= SINGULAR * float(moment.diagonal().mean())


@dataclass(frozen=True)
class Moment:
    """A symmetric positive definite matrix (k, k) and its lower Cholesky factor C, matrix = C C^T, in float64."""

    matrix: Tensor
    factor: Tensor

    @classmethod
    def of(cls, matrix: Tensor, size: int, what: str, like: Tensor) -> Moment:
        """Check, symmetrise, damp where singular, and factorise.

        A singular matrix gets DAMPING times its mean diagonal added to the diagonal, and a zero matrix becomes the
        identity, which is the limit of damping it: directions that never occur then count in the Frobenius norm, so
        that the optimum is unique and finite. Raises UsageError for a wrong shape, and NumericalError for values
        that are not finite or a matrix that is indefinite beyond rounding.
        """
        if matrix.shape != (size, size):
            raise UsageError(f"the {what} is {tuple(matrix.shape)} but the weight needs ({size}, {size})")
        matrix = matrix.to(device=like.device, dtype=torch.float64)
        if not all_finite(matrix):
            raise NumericalError(f"the {what} ({size} x {size}) contains NaN or infinity; check the calibration data")
        matrix = (matrix + matrix.T) / 2
        mean = float(matrix.diagonal().mean())
        if mean == 0 and not bool(matrix.any()):
            logger.info("the %s (%d x %d) is zero: the fit uses the Frobenius norm", what, size, size)
            _note(what)
            identity = torch.eye(size, dtype=torch.float64, device=like.device)
            return cls(identity, identity)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0 and float(factor.diagonal().min()) ** 2 > SINGULAR * mean:
            return cls(matrix, factor)
        logger.info("the %s (%d x %d) is singular: damped by %g of its mean diagonal", what, size, size, DAMPING)
        _note(what)
        damped = matrix + DAMPING * abs(mean) * torch.eye(size, dtype=torch.float64, device=like.device)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) != 0:
            raise NumericalError(
                f"the {what} ({size} x {size}) is not positive semi-definite; accumulate second moments in float64"
            )
        return cls(damped, factor)

    def block(self, start: int, stop: int) -> Moment:
        """The moment of coordinates start ... stop - 1."""
        matrix = self.matrix[start:stop, start:stop]
        return Moment(matrix, torch.linalg.cholesky(matrix))

    def inverse(self) -> Tensor:
        """The inverse matrix (k, k)."""
        return torch.cholesky_inverse(self.factor)

    def solve(self, right: Tensor) -> Tensor:
        """matrix^{-1} right, right (k, n)."""
        return torch.cholesky_solve(right, self.factor)


@dataclass(frozen=True)
class Problem:
    """One fit in float64: W (out, in), the Gram matrix G of the inputs and the metric H of the outputs (None: I)."""

    weight: Tensor
    gram: Moment | None
    metric: Moment | None

    @classmethod
    def of(
        cls, weight: Tensor, gram: Tensor | None, metric: Tensor | None, in_features: int, out_features: int
    ) -> Problem:
        """Check the arguments of `Structure.fit`. Raises UsageError, see there; NumericalError for their values."""
        if weight.shape != (out_features, in_features):
            raise UsageError(
                f"the weight is {tuple(weight.shape)} but the structure has (out, in) = {(out_features, in_features)}"
            )
        W = weight.detach().to(torch.float64)
        if not all_finite(W):
            raise NumericalError(
                f"the weight ({out_features} x {in_features}) contains NaN or infinity; check the source model"
            )
        return cls(
            W,
            None if gram is None else Moment.of(gram.detach(), in_features, "Gram matrix", W),
            None if metric is None else Moment.of(metric.detach(), out_features, "metric", W),
        )

    @property
    def transposed(self) -> Problem:
        """The same problem for W^T: tr(H E G E^T) = tr(G E^T H E), so G and H change places."""
        return Problem(self.weight.T, self.metric, self.gram)

    def error(self, approximation: Tensor) -> float:
        """tr(H E G E^T), E = W - approximation."""
        return float(self.whiten(self.weight - approximation).square().sum())

    def gradient(self, E: Tensor) -> Tensor:
        """H E G, (out, in)."""
        E = E if self.gram is None else E @ self.gram.matrix
        return E if self.metric is None else self.metric.matrix @ E

    def whiten(self, E: Tensor) -> Tensor:
        """C_H^T E C_G, whose squared Frobenius norm is tr(H E G E^T)."""
        E = E if self.gram is None else E @ self.gram.factor
        return E if self.metric is None else self.metric.factor.T @ E


def weighted_error(
    weight: Tensor, approximation: Tensor, gram: Tensor | None = None, metric: Tensor | None = None
) -> float:
    """tr(H E G E^T), E = weight - approximation, in float64 and without damping. None is the identity."""
    E = weight.double() - approximation.double()
    right = E if gram is None else E @ gram.double()
    left = E if metric is None else metric.double() @ E
    return float((left * right).sum())


def low_rank(T: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` approximation U V of T (..., n, m): U (..., n, rank), V (..., rank, m); batched.

    Eigenvectors of the smaller of T T^T and T^T T: several times faster than an SVD, and since U (or V) is orthonormal
    and the other factor a projection of T itself, singular values that drown in rounding (below 1e-8 of the largest)
    cost no accuracy of the product.
    """
    n, m = T.shape[-2:]
    if n <= m:
        U = torch.linalg.eigh(T @ T.mT).eigenvectors[..., n - rank :].flip(-1)
        return U, U.mT @ T
    V = torch.linalg.eigh(T.mT @ T).eigenvectors[..., m - rank :].flip(-1)
    return T @ V, V.mT


def balance(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Scale column i of U (..., n, k) and row i of V (..., k, m) to equal norms; U V does not change.

    Neither factor then leaves the range of float16 or loses its small terms to the other's scale.
    """
    u = torch.linalg.vector_norm(U, dim=-2)  # (..., k)
    v = torch.linalg.vector_norm(V, dim=-1)  # (..., k)
    present = (u > 0) & (v > 0)
    scale = torch.where(present, (v / u.where(present, 1)).sqrt(), 0)
    inverse = torch.where(present, 1 / scale.where(present, 1), 0)
    return U * scale.unsqueeze(-2), V * inverse.unsqueeze(-1)


def conjugate_gradient(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """Solve operator(x) = right, operator symmetric positive semi-definite, from `start`.

    Every iterate lowers the quadratic 1/2 <x, operator(x)> - <right, x>, so an early stop is still a descent. Stops
    when the preconditioned residual has fallen by `tolerance`, or when the operator no longer sees the direction.
    """
    x = start
    residual = right - operator(x)
    step = precondition(residual)
    direction = step
    size = first = float((residual * step).sum())
    for _ in range(iterations):
        if size <= tolerance**2 * first or size == 0:
            break
        image = operator(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        x = x + (size / curvature) * direction
        residual = residual - (size / curvature) * image
        step = precondition(residual)
        size, previous = float((residual * step).sum()), size
        direction = step + (size / previous) * direction
    return x


def result_dtype(weight: Tensor) -> torch.dtype:
    """The type of fitted factors: float64 for a float64 weight, float32 for any other."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def all_finite(x: Tensor) -> bool:
    """True if no entry is NaN or infinite. A sum that is finite has finite terms only, and is ten times as fast as
    looking at each; one that is not may have overflown."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return math.isfinite(float(x.sum(dtype=wide))) or bool(torch.isfinite(x).all())


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal factor U V^T of a square matrix: argmax over orthogonal Q of tr(Q^T matrix) (Procrustes)."""
    u, _, vt = torch.linalg.svd(matrix)
    q: Tensor = u @ vt
    return q


def damped(gram: Tensor, fraction: float) -> Tensor:
    """gram + fraction * mean(diagonal) * I in float64; a zero matrix becomes the identity."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return gram + fraction * mean * torch.eye(len(gram), dtype=torch.float64, device=gram.device)


def geometric_mean(p: Tensor, m: Tensor) -> Tensor:
    """P # M = L (L^-1 M L^-T)^(1/2) L^T, P = L L^T, for positive definite P and semi-definite M; symmetric in both.

    Any factor L of P serves (L = P^(1/2) U for an orthogonal U, which cancels): a Cholesky and one eigh.
    """
    factor = torch.linalg.cholesky(p)
    half = torch.linalg.solve_triangular(factor, m, upper=False)
    inner = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    scaled = (factor @ vectors) * values.clamp(min=0).pow(0.25)
    mean: Tensor = scaled @ scaled.T
    return mean


def block_diagonal(blocks: Tensor) -> Tensor:
    """Matrices (n, k, k) along the diagonal of one (n k, n k)."""
    made: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return made


def whitened_spectrum(weight: Tensor, gram: Tensor, metric: Tensor) -> Tensor:
    """Squared singular values, descending, of C_H^T W C_G; weight (..., out, in) and its moments may be batched.

    They are the eigenvalues of C_H^T (W G W^T) C_H, and of C_G^T (W^T H W) C_G: the smaller of the two is formed, and
    the larger moment is not factorised. Several times faster than an SVD, and exact to rounding of the largest, which
    is all that sums of tails need.
    """
    n, m = weight.shape[-2:]
    moment, product = (metric, weight @ gram @ weight.mT) if n <= m else (gram, weight.mT @ metric @ weight)
    factor = torch.linalg.cholesky(moment)
    return descending_eigenvalues(factor.mT @ product @ factor)


def descending_eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of a positive semi-definite matrix (..., k, k); negative ones are rounding, and become 0."""
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values.clamp(min=0).flip(-1)


def tails(squares: Tensor) -> Tensor:
    """Entry k: the sum of all but the first k; (..., n) -> (..., n + 1)."""
    sums = squares.flip(-1).cumsum(-1).flip(-1)
    return torch.cat((sums, torch.zeros_like(sums[..., :1])), dim=-1)
