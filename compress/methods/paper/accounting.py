"""Parameter counts of a ProcrustesGPT model from its architecture alone: as the paper counts, and at run time.

The paper counts matrices (no biases, no norms), a head of its own beside the embedding (also where the model ties
them), and each of the 2L skip matrices by the d (d + 1) / 2 numbers of its Cayley generator. That generator has to be
solved for the d x d matrix before it can be multiplied: a model that runs holds, and reads at each token, d^2.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.allocation.size import model_size
from compress.architecture import Architecture
from compress.errors import UsageError
from compress.methods.paper.shapes import (
    DENSE_ROLES,
    KRON,
    Kind,
    check_kept,
    grid,
    paper_structures,
    rounded_inner_size,
)

HEAD_GRID = (8, 1)
"""Left and right blocks of the group-and-shuffle embedding and head, Llama-2's; OPT has (4, 1), for 0.002 points."""


@dataclass(frozen=True)
class PaperSize:
    """Parameters of the dense model (`dense`) and of the parts of the compressed one; percentages are of `dense`."""

    dense: int
    projections: int
    ends: int
    skips_stored: int
    skips_run_time: int

    @property
    def stored_percent(self) -> float:
        """Removed parameters as in Tables 1 and 3 of the paper."""
        return 100 * (1 - (self.projections + self.ends + self.skips_stored) / self.dense)

    @property
    def run_time_percent(self) -> float:
        """Removed parameters of the model that runs: skips as d x d matrices."""
        return 100 * (1 - (self.projections + self.ends + self.skips_run_time) / self.dense)


def paper_size(arch: Architecture, kind: Kind, kept: float, *, ends: bool) -> PaperSize:
    """Count a model that keeps `kept` of each compressed matrix; `ends`: of embeddings and head, too (Table 1).

    Table 3 and the Llama configurations as shipped leave embeddings and head dense. Raises UsageError for a `kept` that
    the paper has no shapes for.
    """
    check_kept(kept)
    d, layers, linears = arch.hidden_size, arch.num_layers, arch.linears()
    tables = [(arch.vocab_size, d), (arch.vocab_size, d)]  # embedding and head
    if arch.positions == "learned":
        tables.append((arch.max_positions + arch.position_offset, d))
    projections = sum(
        n * m if role in DENSE_ROLES else _matrix(n, m, kind, kept, grid(role, kept))
        for role, (n, m) in linears.items()
    )
    return PaperSize(
        dense=layers * sum(n * m for n, m in linears.values()) + sum(n * m for n, m in tables),
        projections=layers * projections,
        ends=sum(_matrix(n, m, kind, kept, HEAD_GRID) if ends else n * m for n, m in tables),
        skips_stored=2 * layers * d * (d + 1) // 2,
        skips_run_time=2 * layers * d * d,
    )


def _matrix(n: int, m: int, kind: Kind, kept: float, blocks: tuple[int, int]) -> int:
    if kind == "kron":
        p, q = KRON[kept]
        return p * n * m // q + p * q
    left, right = blocks
    s = rounded_inner_size(n, m, kept, left, right)
    return s * m // left + s * n // right


def largest_kept(arch: Architecture, kind: Kind, ratio: float) -> float:
    """The largest of the paper's fractions whose run-time ratio of the projections, skips counted, is within `ratio`.

    Raises UsageError when none is.
    """
    ratios = {kept: model_size(arch, paper_structures(arch, kind, kept), "block").ratio for kept in sorted(KRON)}
    fitting = [kept for kept, seen in ratios.items() if seen <= ratio]
    if not fitting:
        smallest = min(ratios.values())
        raise UsageError(
            f"--ratio {ratio:g} is too low for --fit paper: its skip matrices and dense v included, the smallest of "
            f"its {kind} models keeps {smallest:.4f}; raise --ratio"
        )
    return max(fitting)
