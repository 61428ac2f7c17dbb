"""Both stages of ProcrustesGPT (arXiv 2506.02818), one position of the residual stream after the other.

Stage 1 (Algorithm 2): alternate Frobenius projections and Procrustes, `als_iterations` times. Stage 2 (Algorithm 3), on
the network rotated by stage 1: weighted projections at Q = I, the weighted Procrustes problem for Q with these factors
(`descent`), weighted projections at the Q found. The moments are those of the uncompressed network, so
positions do not depend on each other. Each block's weights are read once, and one block is in memory at a time.

Matrices that stay dense (v, embeddings, head) fit exactly at any Q: in stage 1 each adds W^T W Q to the Procrustes
problem (embedding and head with rows times sqrt(D + 1), D the tokens' counts), in stage 2 they are left out (as the
paper does for v). Position 0, which the embedding writes, is left where stage 1 put it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from compress.architecture import SUB_BLOCKS, WRITERS
from compress.linalg import polar
from compress.methods.paper.descent import Norm, weighted_rotation
from compress.methods.paper.projections import frobenius_factors, weighted_factors
from compress.methods.paper.shapes import Kind, paper_structures
from compress.rewrites.folding import FoldedModel
from compress.rewrites.rotations import Rotations
from compress.structures import KroneckerStructure, Structure, cast

ALS_ITERATIONS = 10
"""Alternations of stage 1: the paper's configuration file; its text has 50, and 25 for the 13b models."""
GD_ITERATIONS = 500

Factors = dict[str, dict[str, Tensor]]


class SubBlockGrams(Protocol):
    """What the solver needs of `statistics.StreamMoments`: second moments of what the readers of a sub-block read,
    (d, d), and of its writer's input, (inner, inner), of the uncompressed and unrotated network."""

    @property
    def read(self) -> Tensor: ...

    @property
    def inner(self) -> Tensor: ...


PaperMoments = Mapping[tuple[int, str], SubBlockGrams]


@dataclass(frozen=True)
class PaperMember:
    """A compressed linear at a position: weight (out, in) float32, Gram matrix (in, in) float64 of its input, both in
    the unrotated stream; side "in" or "out"."""

    name: str
    weight: Tensor
    gram: Tensor
    side: str
    structure: Structure

    def rotated(self, q: Tensor) -> Tensor:
        """W Q for readers, Q^T W for writers, in the dtype of q."""
        weight = self.weight.to(q.dtype)
        return weight @ q if self.side == "in" else q.T @ weight

    def rotated_gram(self, q: Tensor) -> Tensor:
        """The Gram matrix of its input in the rotated stream."""
        return q.T @ self.gram.to(q.dtype) @ q if self.side == "in" else self.gram.to(q.dtype)

    def relative_error(self, q: Tensor, factors: Mapping[str, Tensor]) -> float:
        """||X (W - What)||^2 / ||X W||^2, all in the stream rotated by q (d, d) float64."""
        target, gram = self.rotated(q), self.rotated_gram(q)
        gap = target - self.structure.dense(factors).to(q)
        energy = float(((target @ gram) * target).sum())
        return float(((gap @ gram) * gap).sum()) / energy if energy > 0 else 0.0


@dataclass(frozen=True)
class PaperPosition:
    """The result at one position: Q (d, d) float64, and the final factors of the linears there, by name, float32."""

    position: int
    q: Tensor
    factors: Factors
    errors: dict[str, float]
    record: PaperRecord


@dataclass(frozen=True)
class PaperRecord:
    """What a position cost and gained. Errors are sums over its linears of ||X (W - What)||^2 / ||X W||^2.

    frobenius_errors: squared Frobenius error at each iteration of stage 1. stage_one_error: with stage 1's own factors.
    error_before: weighted factors at stage 1's Q. error_after: the final ones. steps: taken by the descent.
    """

    position: int
    frobenius_errors: tuple[float, ...]
    stage_one_error: float
    error_before: float
    error_after: float
    steps: int
    stage_one_seconds: float
    rotation_seconds: float
    projection_seconds: float


@dataclass(frozen=True)
class PaperPlan:
    """Rotations of kind "block", the structure of every linear that is not dense, one record per position."""

    rotations: Rotations
    structures: dict[str, Structure]
    records: tuple[PaperRecord, ...]


def paper_plan(
    model: FoldedModel,
    kind: Kind,
    kept: float,
    moments: PaperMoments,
    token_counts: Tensor,
    *,
    als_iterations: int = ALS_ITERATIONS,
    gd_iterations: int = GD_ITERATIONS,
    device: torch.device,
    on_position: Callable[[PaperPosition], None] | None = None,
) -> PaperPlan:
    """All positions. The factors go to `on_position`, one position at a time, and are not kept.

    moments: by (layer, "attn" | "mlp"), with `read` and `inner`. token_counts (vocabulary,): of the calibration text.
    Raises UsageError for a `kept` other than 0.75, 0.625 and 0.5, and for widths that the shapes do not divide.
    """
    matrices, records = [], []
    for result in paper_positions(
        model,
        kind,
        kept,
        moments,
        token_counts,
        als_iterations=als_iterations,
        gd_iterations=gd_iterations,
        device=device,
    ):
        matrices.append(result.q)
        records.append(result.record)
        if on_position is not None:
            on_position(result)
    return PaperPlan(Rotations("block", tuple(matrices)), paper_structures(model.arch, kind, kept), tuple(records))


def paper_positions(
    model: FoldedModel,
    kind: Kind,
    kept: float,
    moments: PaperMoments,
    token_counts: Tensor,
    *,
    als_iterations: int,
    gd_iterations: int,
    device: torch.device,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[PaperPosition]:
    """The positions start ... stop - 1 of 2L + 1 in depth order, on the CPU. See `paper_plan`."""
    structures = paper_structures(model.arch, kind, kept)
    for position, members, exact in position_members(
        model, structures, moments, token_counts, device, start=start, stop=stop
    ):
        found = solve_position(position, members, exact, als_iterations, gd_iterations)
        factors = {name: {k: v.cpu() for k, v in parts.items()} for name, parts in found.factors.items()}
        yield replace(found, q=found.q.cpu(), factors=factors)


def position_members(
    model: FoldedModel,
    structures: Mapping[str, Structure],
    moments: PaperMoments,
    token_counts: Tensor,
    device: torch.device,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[int, list[PaperMember], Tensor]]:
    """(position, its compressed linears, sum of W^T W of those that stay dense, (d, d) float32) in depth order.

    The writer comes first. Reads each block's weights once.
    """
    arch, count = model.arch, 2 * model.arch.num_layers + 1
    stop = count if stop is None else stop
    writer: list[PaperMember] = []
    for layer in range(arch.num_layers):
        first = 2 * layer
        if first + 2 < start or first >= stop:  # first + 2: where its last writer writes
            continue
        weights = model.block(layer)
        for position, sub_block in enumerate(SUB_BLOCKS, first):
            moment = moments[layer, sub_block]
            grams = {"in": moment.read.to(device, torch.float64), "out": moment.inner.to(device, torch.float64)}
            members: dict[str, list[PaperMember]] = {"in": [], "out": []}
            exact = torch.zeros(arch.hidden_size, arch.hidden_size, device=device)
            for role in (*arch.readers(sub_block), WRITERS[sub_block]):
                name, side = f"layers.{layer}.{role}", arch.side(role)
                weight = weights[f"{role}.weight"].to(exact)
                if name in structures:
                    members[side].append(PaperMember(name, weight, grams[side], side, structures[name]))
                else:  # a reader: every writer is compressed
                    exact += weight.T @ weight
            if start <= position < stop:
                if position == 0:
                    exact += _embedding_gram(model, token_counts).to(exact)
                yield position, writer + members["in"], exact
            writer = members["out"]
    if start < count <= stop:
        exact = torch.zeros(arch.hidden_size, arch.hidden_size, device=device)
        yield count - 1, writer, exact if arch.tied else exact + _head_gram(model, token_counts).to(exact)


def _embedding_gram(model: FoldedModel, token_counts: Tensor) -> Tensor:
    """E^T diag(D + 1) E of the token embedding, plus P^T P of learned positions: (d, d)."""
    ends = model.ends(Rotations.none())
    tables = [(ends["model.embed_tokens.weight"], (token_counts + 1).to(torch.float32))]
    if "model.embed_positions.weight" in ends:
        positions = ends["model.embed_positions.weight"]
        tables.append((positions, torch.ones(len(positions))))
    total = torch.zeros(model.arch.hidden_size, model.arch.hidden_size)
    for table, weights in tables:
        if model.arch.norm == "layernorm":  # a tied embedding comes with its mean, which never enters the stream
            table = table - table.mean(1, keepdim=True)
        total += (table * weights[:, None]).T @ table
    return total


def _head_gram(model: FoldedModel, token_counts: Tensor) -> Tensor:
    """W^T diag(D + 1) W of a head of its own: (d, d). A tied head meets the stream through an exact head map."""
    head = model.ends(Rotations.none())["lm_head.weight"]
    return (head * (token_counts + 1).to(head)[:, None]).T @ head


def solve_position(
    position: int, members: Sequence[PaperMember], exact: Tensor, als_iterations: int, gd_iterations: int
) -> PaperPosition:
    """Stages 1 and 2 at one position. exact (d, d) as in `position_members`; members may be none."""
    clock = perf_counter()
    first, frobenius_errors = frobenius_stage(members, exact, als_iterations)
    first = orthogonal(first)
    stage_one_seconds = perf_counter() - clock
    own = {m.name: frobenius_factors(m.structure, m.rotated(first)) for m in members}
    stage_one_error = sum(m.relative_error(first, own[m.name]) for m in members)

    clock = perf_counter()
    factors = project(members, first)
    projection_seconds = perf_counter() - clock
    error_before = sum(m.relative_error(first, factors[m.name]) for m in members)
    q, steps, rotation_seconds = first, 0, 0.0
    if position > 0 and members:
        clock = perf_counter()
        second, values = weighted_rotation(objective(members, first, factors), len(first), gd_iterations)
        q, steps = orthogonal(first @ second.double()), len(values) - 1
        rotation_seconds = perf_counter() - clock
        clock = perf_counter()
        factors = project(members, q)
        projection_seconds += perf_counter() - clock
    errors = {m.name: m.relative_error(q, factors[m.name]) for m in members}
    record = PaperRecord(
        position,
        tuple(frobenius_errors),
        stage_one_error,
        error_before,
        sum(errors.values()),
        steps,
        stage_one_seconds,
        rotation_seconds,
        projection_seconds,
    )
    stored = {name: cast(parts, torch.float32) for name, parts in factors.items()}
    if not all(bool(torch.isfinite(v).all()) for parts in stored.values() for v in (q, *parts.values())):
        raise ArithmeticError(f"the paper's fit at position {position} is not finite")
    return PaperPosition(position, q, stored, errors, record)


def frobenius_stage(members: Sequence[PaperMember], exact: Tensor, iterations: int) -> tuple[Tensor, list[float]]:
    """Algorithm 2 from Q = I: Q (d, d) in the dtype of `exact`, and the squared error before each Procrustes step.

    Q = polar(exact Q + sum_readers W^T What + sum_writers W What^T) never raises the error. Stops when it stays equal.
    """
    q, errors = torch.eye(len(exact), dtype=exact.dtype, device=exact.device), list[float]()
    grams = {m.name: m.weight.T @ m.weight if m.side == "in" else m.weight @ m.weight.T for m in members}
    for _ in range(iterations if members else 0):
        total, error = exact @ q, 0.0
        for m in members:
            if isinstance(m.structure, KroneckerStructure):
                cross, lost = _kron_cross(grams[m.name].to(q), q, m.structure.blocks, m.structure.terms)
            else:
                target = m.rotated(q)
                approximation = m.structure.dense(frobenius_factors(m.structure, target))
                lost = float((target - approximation).square().sum())
                weight = m.weight.to(q)
                cross = weight.T @ approximation if m.side == "in" else weight @ approximation.T
            total += cross
            error += lost
        errors.append(error)
        if len(errors) > 1 and errors[-1] == errors[-2]:
            break
        q = polar(total)
    return q, errors


def _kron_cross(M: Tensor, q: Tensor, blocks: int, terms: int) -> tuple[Tensor, float]:
    """W^T What (or W What^T) and the squared error of the best one-sided Kronecker sum, from M = W^T W (or W W^T).

    What = (W Q)(P (x) I), P the projection onto the top eigenvectors of the block traces of Q^T M Q (Van Loan's SVD):
    all that stage 1 needs, at d^3 and without the matrix itself.
    """
    d = len(q)
    mq = (M @ q).reshape(d, blocks, d // blocks)
    traces = torch.einsum("xai,xbi->ab", q.reshape(d, blocks, d // blocks), mq)
    top = torch.linalg.eigh((traces + traces.T) / 2).eigenvectors[:, blocks - terms :]
    P = top @ top.T
    cross = torch.einsum("xai,ab->xbi", mq, P).reshape(d, d)
    return cross, float(traces.trace() - (P * traces).sum())


def project(members: Sequence[PaperMember], q: Tensor) -> Factors:
    """The paper's weighted projections of all members at Q, factors in float64."""
    return {m.name: weighted_factors(m.structure, m.rotated(q), m.rotated_gram(q)) for m in members}


def objective(members: Sequence[PaperMember], q: Tensor, factors: Factors) -> list[Norm]:
    """The terms of F in the network rotated by q, float32, the writer's scaled by `alpha_of`."""
    single = torch.float32
    alpha = alpha_of(members, output_norms(members))
    shared: dict[int, Tensor] = {}  # one object per Gram matrix: what `total_norm` recognises it by
    terms = []
    for m in members:
        weight, gram = m.rotated(q), m.rotated_gram(q)
        approximation = m.structure.dense(factors[m.name]).to(single)
        if m.side == "in":
            gram = shared.setdefault(id(m.gram), gram.to(single))
            terms.append(Norm.reader(weight.to(single), approximation, gram))
        else:
            terms.append(Norm.writer(weight.to(single), approximation, gram.to(single), alpha))
    return terms


def output_norms(members: Sequence[PaperMember]) -> dict[str, float]:
    """||X W|| of each member, which no rotation changes."""
    norms = {}
    for m in members:
        weight = m.weight.double()
        norms[m.name] = max(float(((weight @ m.gram) * weight).sum()), 0.0) ** 0.5
    return norms


def alpha_of(members: Sequence[PaperMember], norms: Mapping[str, float]) -> float:
    """mean over the readers of ||X W||, over that of the writer; 1 where either is missing or zero."""
    reading = [norms[m.name] for m in members if m.side == "in"]
    written = sum(norms[m.name] for m in members if m.side == "out")
    return sum(reading) / len(reading) / written if reading and written > 0 else 1.0


def orthogonal(q: Tensor) -> Tensor:
    """q in float64 and orthogonal to rounding, by Newton-Schulz steps: q is within 1e-3 of orthogonal already."""
    q = q.double()
    for _ in range(3):
        q = 1.5 * q - 0.5 * q @ (q.T @ q)
    return q
