"""Rotations for structures without nested subspaces: Procrustes problems, by majorisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.linalg import polar
from compress.structures import Structure


@dataclass(frozen=True)
class Member:
    """One linear at a rotation: weight (out, in), Gram matrix of its input (in, in) or None, side "in" (reads the
    stream) or "out" (writes it), its structure, and its weight in the sum of squared errors."""

    weight: Tensor
    gram: Tensor | None
    side: str
    structure: Structure
    scale: float

    def rotated(self, q: Tensor) -> Tensor:
        """W Q for readers, Q^T W for writers."""
        return self.weight @ q if self.side == "in" else q.T @ self.weight

    def rotated_gram(self, q: Tensor) -> Tensor | None:
        """The Gram matrix of the input in the rotated stream; a writer's input is not in the stream."""
        if self.gram is None or self.side == "out":
            return self.gram
        return q.T @ self.gram @ q


Members = Callable[[], Iterable[Member]]
"""Yields the members anew at each pass, so that no more than one need be in memory."""


def frobenius_rotation(members: Members, start: Tensor, iterations: int) -> Tensor:
    """Alternate the structures' Frobenius projections and Q = polar(sum W^T What + sum W What^T).

    ProcrustesGPT Algorithm 2. Each half-step is exact, so that the sum of squared errors never rises.
    """
    q = start
    for _ in range(iterations):
        total = torch.zeros_like(q)
        for member in members():
            target = member.rotated(q)
            approximation = member.structure.dense(member.structure.fit(target))
            cross = member.weight.T @ approximation if member.side == "in" else member.weight @ approximation.T
            total += member.scale * cross
        q = polar(total)
    return q


def majorised_rotation(
    members: Members, start: Tensor, iterations: int, polar_steps: int = 5
) -> tuple[Tensor, list[float]]:
    """Alternate Gram-weighted fits and majorised polar steps; returns Q and the error before each alternation.

    For readers the error as a function of Q is w tr(Q^T G Q H) - 2 w tr(Q^T G W^T What) + c with H = What^T What.
    tr(Q^T G Q H) = b tr G - tr(Q^T G Q (b I - H)) with b = lambda_max(H): the subtracted term is convex in Q, so its
    linearisation majorises, and the next Q is polar(N0 + sum w G Q (b I - H)), N0 = sum w G W^T What (readers) +
    sum w W G What^T (writers). Derived here; monotone (docs/method.md#procrustes-problems).
    """
    q, errors = start, []
    for _ in range(iterations):
        linear, quadratic, error = torch.zeros_like(q), [], 0.0
        for member in members():
            target, gram = member.rotated(q), member.rotated_gram(q)
            approximation = member.structure.dense(member.structure.fit(target, gram))
            gap = target - approximation
            weighted_gap = gap if gram is None else gap @ gram
            error += member.scale * float((weighted_gap * gap).sum())
            if member.side == "in":
                plain = member.gram if member.gram is not None else torch.eye(len(q), dtype=q.dtype, device=q.device)
                inner = member.scale * (approximation.T @ approximation)
                bound = torch.linalg.matrix_norm(inner, 2)
                quadratic.append((plain, bound * torch.eye(len(q), dtype=q.dtype, device=q.device) - inner))
                linear += member.scale * (plain @ (member.weight.T @ approximation))
            else:
                seen = member.weight if member.gram is None else member.weight @ member.gram
                linear += member.scale * (seen @ approximation.T)
        errors.append(error)
        for _ in range(polar_steps):
            total = linear.clone()
            for gram, slack in quadratic:
                total += gram @ q @ slack
            q = polar(total)
    return q, errors
