"""Embedding and head in two factors: E (vocabulary, d) ~ U (vocabulary, r) R (r, d). Closed form, derived here.

A row of E counts as often as its token occurs, w_t = D_t + 1 for D_t occurrences in the calibration text
(ProcrustesGPT weighs rows by sqrt(D + 1), which squared is w). What a row's error costs depends on the use:

    embedding  |e - e^|^2, for rows enter the stream as they are; less the mean where LayerNorm's centring removes it
    head       (e - e^) G (e - e^)^T, the squared error of the token's logit; G = E[h h^T] of what the head reads

Both are sum_t w_t (e_t - e^_t) M (e_t - e^_t)^T with one metric M for all rows. With M = C C^T and the truncated SVD of
diag(sqrt(w)) E C, whose right singular vectors P are the eigenvectors of C^T E^T diag(w) E C,

    U = E C P_r,   R = P_r^T C^{-1},   error = the sum of the other eigenvalues

A tied matrix serves both uses with one factorisation. As both weigh rows alike, the sum of the two relative errors
is again of this form, with M = M_embedding / energy_embedding + M_head / energy_head, and its optimum closed form.
It would not be with row weights that differ between the uses: every row then has a metric of its own, and a weighted
low-rank approximation with a metric per row has no known closed form.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compress.architecture import Architecture
from compress.errors import UsageError
from compress.linalg import Moment, balance
from compress.rewrites.rotations import Weights

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ROWS = 8192
"""Rows of the vocabulary that are in float64 at a time."""


@dataclass(frozen=True)
class EmbeddingRanks:
    """Inner dimensions; 0 where the matrix is dense, and for the head where it is tied to the embedding."""

    embedding: int = 0
    head: int = 0


def token_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each token occurs in `tokens` (any shape): (vocab_size,) int64."""
    return torch.bincount(tokens.reshape(-1), minlength=vocab_size)


def compress_embedding(
    ends: Weights,
    arch: Architecture,
    counts: Tensor | None,
    final_gram: Tensor | None,
    fraction: float,
    unit: int,
    final_mean: Tensor | None = None,
) -> tuple[Weights, EmbeddingRanks]:
    """`ends` (as FoldedModel.ends) with embedding and head in factors that keep `fraction` of their parameters.

    counts (vocabulary,): occurrences of each token, None for none at all. final_gram (d, d) and final_mean (d,): second
    moment and mean of the normalised stream after the last block, in the coordinates of `ends`, that is, rotated by the
    last rotation; None for the identity and for zero (a mean matters to a tied OPT only, whose head map has a bias).
    "model.embed_tokens.weight" becomes ".U" (vocabulary, r) and ".R" (r, d), in its own type, and so does
    "lm_head.weight" where it is not tied; ranks are multiples of `unit`. Untied, the two share the budget so that the
    sum of their relative errors is least; one may then stay dense. Returns `ends` itself when fraction is 1. Raises
    UsageError when not even the smallest ranks fit.
    """
    if fraction >= 1:
        return ends, EmbeddingRanks()
    d, size = arch.hidden_size, arch.vocab_size + arch.hidden_size  # parameters per rank
    weights = (torch.zeros(arch.vocab_size) if counts is None else counts).double() + 1
    reads = head_gram(ends, torch.eye(d) if final_gram is None else final_gram, final_mean)
    writes = torch.eye(d, dtype=torch.float64)
    if "model.center" in ends:
        u = ends["model.center"].double()
        writes = writes - u[:, None] * u
    if arch.tied:
        tables = {EMBEDDING: WeightedTable(ends[f"{EMBEDDING}.weight"], weights, [writes, reads])}
    else:
        tables = {
            EMBEDDING: WeightedTable(ends[f"{EMBEDDING}.weight"], weights, [writes]),
            HEAD: WeightedTable(ends[f"{HEAD}.weight"], weights, [reads]),
        }
    dense = arch.vocab_size * d
    budget = fraction * dense * len(tables)
    saving = [k for k in range(unit, d + 1, unit) if k * size < dense]
    if not saving or budget < len(tables) * unit * size:
        raise UsageError(
            f"--embedding {fraction:g} keeps {int(budget):,} parameters of embedding and head, less than factors of "
            f"rank {unit} take ({len(tables) * unit * size:,}): raise --embedding or lower --unit"
        )
    menus = [[_Option(k * size, float(table.errors[k]), k) for k in saving] for table in tables.values()]
    best = _best([[*menu, _Option(dense, 0.0, 0)] for menu in menus], budget)
    made, ranks = dict(ends), dict.fromkeys((EMBEDDING, HEAD), 0)
    for (name, table), option in zip(tables.items(), best, strict=True):
        if option.rank:
            ranks[name] = option.rank
            like = made.pop(f"{name}.weight")
            U, R = table.factors(option.rank)
            made[f"{name}.U"], made[f"{name}.R"] = U.to(like.dtype).contiguous(), R.to(like.dtype).contiguous()
    return made, EmbeddingRanks(ranks[EMBEDDING], ranks[HEAD])


def head_gram(ends: Weights, gram: Tensor, mean: Tensor | None = None) -> Tensor:
    """E[h h^T] (d, d) of what the head's matrix reads, h = W x + b with the head map W, b of `ends`, in float64.

    gram (d, d) and mean (d,) are those of x, the normalised stream; no mean stands for zero.
    """
    gram = gram.double()
    if "model.head_map.weight" not in ends:
        return gram
    weight = ends["model.head_map.weight"].double()
    weight = weight if weight.dim() == 2 else torch.diag(weight)
    mapped = weight @ gram @ weight.T
    if "model.head_map.bias" in ends:
        bias = ends["model.head_map.bias"].double()
        cross = torch.zeros_like(mapped) if mean is None else (weight @ mean.double())[:, None] * bias
        mapped = mapped + cross + cross.T + bias[:, None] * bias
    return mapped


class _Option(NamedTuple):
    """A rank (0 for dense), what it costs in parameters, and the error that it leaves."""

    cost: int
    error: float
    rank: int


def _best(menus: list[list[_Option]], budget: float) -> list[_Option]:
    """One option per menu of one or two, within the budget, with the smallest sum of errors: exact, by trying all.

    Each menu is in order of cost, and the dearer the option the smaller its error. At least the cheapest ones fit.
    """
    fitting = []
    for first in menus[0]:
        chosen = [first]
        for menu in menus[1:]:
            count = bisect_right(menu, budget - first.cost, key=lambda option: option.cost)
            chosen.append(menu[max(count, 1) - 1])
        if sum(option.cost for option in chosen) <= budget:
            fitting.append(chosen)
    return min(fitting, key=lambda chosen: sum(option.error for option in chosen))


class WeightedTable:
    """A matrix E (vocabulary, d), its row weights (vocabulary,) and the metrics (d, d) of its uses.

    `errors` are the smallest sums of the uses' relative errors at the ranks 0 ... d, in float64.
    """

    def __init__(self, table: Tensor, weights: Tensor, metrics: list[Tensor]) -> None:
        self.table = table
        energy = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
        for rows, weight in zip(torch.split(table, ROWS), torch.split(weights, ROWS), strict=True):
            energy += rows.double().T @ (rows.double() * weight[:, None])
        whole = torch.zeros_like(energy)
        for metric in metrics:
            whole += metric / (metric * energy).sum().clamp(min=1e-300)
        self.metric = Moment.of(whole, table.shape[1], "metric of the embedding", energy)
        values, vectors = torch.linalg.eigh(self.metric.factor.T @ energy @ self.metric.factor)
        self.vectors = vectors.flip(-1)  # of the largest eigenvalue first
        self.errors = torch.cat([values.new_zeros(1), values.clamp(min=0).cumsum(0)]).flip(0)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """U (vocabulary, rank) and R (rank, d), of equal norms term by term, in the table's type."""
        P = self.vectors[:, :rank]
        onto = self.metric.factor @ P  # (d, rank)
        parts = [(rows.double() @ onto).to(self.table.dtype) for rows in torch.split(self.table, ROWS)]
        R = torch.linalg.solve_triangular(self.metric.factor, P.T, upper=False, left=False)
        return balance(torch.cat(parts), R.to(self.table.dtype))
