"""The paper's rotation solver against ours, at one position and at equal structures: error and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.linalg import damped
from compress.methods.paper.solver import (
    Factors,
    PaperMember,
    alpha_of,
    frobenius_stage,
    orthogonal,
    output_norms,
    solve_position,
)
from compress.rotation.majorised import Member, frobenius_rotation, majorised_rotation
from compress.rotation.nested import StreamTerm, nested_rotation, nested_start
from compress.structures import KroneckerStructure, Structure

GRAM_DAMPING = 1e-3
"""Damping of our Kronecker solver, as in a recipe; the errors reported are without."""


@dataclass(frozen=True)
class Row:
    """One method at a position.

    error: sum over the linears of ||X (W - What)||^2 / ||X W||^2, which ours minimises. norms: the paper's objective,
    sum of ||X (W - What)|| over readers plus that of the writer scaled to their mean. rotation_seconds: the search for
    Q; seconds: with all starts and fits.
    """

    method: str
    error: float
    norms: float
    rotation_seconds: float
    seconds: float


def compare_position(
    position: int,
    members: Sequence[PaperMember],
    exact: Tensor,
    *,
    als_iterations: int,
    gd_iterations: int,
    rotation_iterations: int,
) -> list[Row]:
    """The paper's two stages and ours on the same linears with as many parameters.

    members and exact as `solver.position_members` yields them. Ours: for Kronecker sums variable projection with the
    mix absorbed in Q (`procrustes.nested_rotation`), for group-and-shuffle majorisation (`majorised_rotation`).
    Raises UsageError at a position without compressed linears.
    """
    if not members:
        raise UsageError(f"nothing is compressed at position {position}; choose another --position")
    result = solve_position(position, members, exact, als_iterations, gd_iterations)
    record = result.record
    clock = perf_counter()
    first = orthogonal(frobenius_stage(members, exact, als_iterations)[0])
    searched = perf_counter() - clock
    own = _fits(members, first, weighted=False)
    stage_one = _row("paper, stage 1", members, first, own, searched, perf_counter() - clock)
    spent = record.stage_one_seconds + record.rotation_seconds + record.projection_seconds
    paper = _row("paper, both stages", members, result.q, result.factors, record.rotation_seconds, spent)
    nested = all(isinstance(m.structure, KroneckerStructure) for m in members)
    ours = _nested(members, rotation_iterations) if nested else _majorised(members, rotation_iterations)
    return [stage_one, paper, ours]


def _nested(members: Sequence[PaperMember], iterations: int) -> Row:
    """Variable projection on the flag manifold, then the closed-form fit."""
    clock = perf_counter()
    terms, kept, leading = [], [], []
    shared: dict[int, Tensor] = {}  # readers have one Gram matrix, and `nested_rotation` goes by its identity
    for m in members:
        structure, weight = m.structure, m.weight.double()
        assert isinstance(structure, KroneckerStructure)
        output = weight @ m.gram @ weight.T
        energy = float(output.trace())
        if m.side == "in":
            p = shared.setdefault(id(m.gram), damped(m.gram, GRAM_DAMPING))
            terms.append(StreamTerm(m.name, p, weight.T @ weight / energy, m.structure.out_features))
        else:
            p = torch.eye(len(output), dtype=output.dtype, device=output.device) / energy
            terms.append(StreamTerm(m.name, p, output, m.structure.in_features))
        kept.append(structure.kept)
        n, k = structure.out_features, structure.in_features
        cut: Structure = KroneckerStructure(k, n, structure.blocks, structure.terms, structure.side, "leading")
        leading.append(PaperMember(m.name, m.weight, m.gram, m.side, cut))
    d = len(terms[0].p)
    q = nested_start(terms)
    q = nested_rotation(terms, kept, q, iterations=iterations, dtype=torch.float32 if d >= 256 else torch.float64)
    searched = perf_counter() - clock
    factors = _fits(leading, q)
    return _row("ours, variable projection", leading, q, factors, searched, perf_counter() - clock)


def _majorised(members: Sequence[PaperMember], iterations: int) -> Row:
    """Alternating fits and majorised polar steps from the Frobenius start."""
    clock = perf_counter()
    rows = []
    for m in members:
        weight = m.weight.double()
        energy = float(((weight @ m.gram) * weight).sum())
        rows.append(Member(weight, m.gram, m.side, m.structure, 1 / max(energy, 1e-30)))
    d = next(m.weight.shape[1] if m.side == "in" else m.weight.shape[0] for m in members)
    start = torch.eye(d, dtype=torch.float64, device=members[0].weight.device)
    start = frobenius_rotation(lambda: rows, start, 2 * iterations)
    q, _ = majorised_rotation(lambda: rows, start, iterations)
    searched = perf_counter() - clock
    factors = _fits(members, q)
    return _row("ours, majorisation", members, q, factors, searched, perf_counter() - clock)


def _fits(members: Sequence[PaperMember], q: Tensor, weighted: bool = True) -> Factors:
    return {m.name: m.structure.fit(m.rotated(q), m.rotated_gram(q) if weighted else None) for m in members}


def _row(
    method: str, members: Sequence[PaperMember], q: Tensor, factors: Factors, searched: float, seconds: float
) -> Row:
    errors = {m.name: m.relative_error(q, factors[m.name]) for m in members}
    sizes = output_norms(members)
    alpha = alpha_of(members, sizes)
    norms = sum((alpha if m.side == "out" else 1.0) * sizes[m.name] * errors[m.name] ** 0.5 for m in members)
    return Row(method, sum(errors.values()), norms, searched, seconds)
