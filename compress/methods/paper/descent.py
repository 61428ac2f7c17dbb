"""ProcrustesGPT's weighted orthogonal Procrustes solver: Cayley transform, non-linear conjugate gradients.

Minimises over orthogonal Q, all factors fixed (eq. 3 in the form that the paper's code has it: norms, not their
squares, and the writer scaled to the mean of the readers)

    F(Q) = sum_readers ||X (W - Q What)|| + alpha ||X (W Q - What)||_writer      (row vectors, as in the paper)

Here weights are (out, in): readers E = W - What Q^T, writers E = Q^T W - What, ||E||_G = sqrt(tr(E G E^T)).
Everything is written in D = Q - I, so that no large terms cancel, and depends on (d, d) matrices only: the same values
as the paper's products with a root of the Gram matrix, at a quarter of its work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALVINGS = 20


@dataclass(frozen=True)
class Norm:
    """scale * sqrt(constant - 2 <D, linear> + <D, left D right>): one term of F. right None: the identity."""

    constant: float
    linear: Tensor
    left: Tensor
    right: Tensor | None
    scale: float = 1.0

    @classmethod
    def reader(cls, weight: Tensor, approximation: Tensor, gram: Tensor) -> Norm:
        """E = E0 - What D^T with E0 = W - What: tr(E G E^T) = tr(E0 G E0^T) - 2 <D, G E0^T What> + <D, G D H>."""
        gap = weight - approximation
        seen = gap @ gram
        return cls(float((seen * gap).sum()), seen.T @ approximation, gram, approximation.T @ approximation)

    @classmethod
    def writer(cls, weight: Tensor, approximation: Tensor, gram: Tensor, scale: float) -> Norm:
        """E = E0 + D^T W: tr(E G E^T) = tr(E0 G E0^T) + 2 <D, W G E0^T> + <D, W G W^T D>."""
        gap = weight - approximation
        seen = weight @ gram
        return cls(float(((gap @ gram) * gap).sum()), -(seen @ gap.T), seen @ weight.T, None, scale)


def total_norm(terms: Sequence[Norm], D: Tensor) -> tuple[float, Tensor]:
    """F at Q = I + D, and its Euclidean gradient in D, (d, d). A norm of zero has the subgradient zero."""
    value, slope = 0.0, torch.zeros_like(D)
    seen: dict[int, Tensor] = {}  # readers share their Gram matrix, and with it the product
    for term in terms:
        if id(term.left) not in seen:
            seen[id(term.left)] = term.left @ D
        image = seen[id(term.left)] if term.right is None else seen[id(term.left)] @ term.right
        square = term.constant - 2 * float((D * term.linear).sum()) + float((D * image).sum())
        if square > 0:
            norm = square**0.5
            value += term.scale * norm
            slope += (term.scale / norm) * (image - term.linear)
    return value, slope


def cayley(S: Tensor) -> Tensor:
    """Q - I for Q(S) = 2 (I + S - S^T)^{-1} - I, as -2 (I + K)^{-1} K with K = S - S^T."""
    K = S - S.T
    identity = torch.eye(len(S), dtype=S.dtype, device=S.device)
    moved: Tensor = torch.linalg.solve(identity + K, K)
    return -2 * moved


def pull_back(D: Tensor, slope: Tensor) -> Tensor:
    """The gradient in S from that in Q: dQ = -2 M^{-1} dK M^{-1} with M^{-1} = (Q + I) / 2, dK = dS - dS^T."""
    half = D / 2 + torch.eye(len(D), dtype=D.dtype, device=D.device)  # M^{-1}
    in_k = -2 * (half.T @ slope @ half.T)
    return in_k - in_k.T


def weighted_rotation(terms: Sequence[Norm], width: int, iterations: int) -> tuple[Tensor, list[float]]:
    """Q (width, width) in the dtype of `terms`, from Q = I, and F before every step and at the end.

    Fletcher-Reeves directions; the step is 1 at first, is halved up to 20 times when F would rise, and never grows
    again. The paper leaves two cases open: a direction that does not descend is replaced by the gradient, and the
    search ends when 20 halvings do not help. F never rises.
    """
    like = terms[0].linear
    S = torch.eye(width, dtype=like.dtype, device=like.device)
    D = cayley(S)
    value, slope = total_norm(terms, D)
    gradient = pull_back(D, slope)
    direction, size, step = -gradient, float(gradient.square().sum()), 1.0
    values = [value]
    for _ in range(iterations):
        if size == 0:
            break
        for _ in range(HALVINGS + 1):
            candidate = S + step * direction
            moved = cayley(candidate)
            new_value, slope = total_norm(terms, moved)
            if new_value <= value:
                break
            step /= 2
        else:
            break
        S, D, value = candidate, moved, new_value
        values.append(value)
        gradient = pull_back(D, slope)
        size, before = float(gradient.square().sum()), size
        direction = -gradient + (size / before) * direction
        if float((direction * gradient).sum()) >= 0:
            direction = -gradient
    return torch.eye(width, dtype=D.dtype, device=D.device) + D, values
