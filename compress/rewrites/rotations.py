"""Exact rewrites: folding the norms into their neighbours, and rotating the residual stream.

Neither changes the model's output beyond rounding. Weights are (out_features, in_features); the stream is a row
vector x of width d, x_rot = x Q. Folds: ProcrustesGPT (arXiv 2506.02818) section 3 and SliceGPT section 3;
tied heads and the tied OPT embedding are derived here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.architecture import WRITERS, Architecture
from compress.model.skips import DenseSkip, SkipForm

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Rotations:
    """The orthogonal matrices of the residual stream, each (d, d) float64.

    Position 2i is what the attention of block i reads, 2i + 1 what its MLP reads, 2L what the head reads.
    `kind` is "none" (matrices empty), "shared" (one matrix) or "block" (2L + 1 matrices). `skips` are the forms of the
    2L skips of kind "block", from position p to p + 1; all dense when it is empty.
    """

    kind: str
    matrices: tuple[Tensor, ...]
    skips: tuple[SkipForm, ...] = ()

    @classmethod
    def none(cls) -> Rotations:
        """No rotation at all."""
        return cls("none", ())

    def at(self, position: int) -> Tensor | None:
        """Q at `position`, or None where the stream is not rotated."""
        if self.kind == "none":
            return None
        return self.matrices[0] if self.kind == "shared" else self.matrices[position]

    def forms(self) -> tuple[SkipForm, ...]:
        """The 2L skips in order of position; none but for kind "block"."""
        if self.kind != "block":
            return ()
        return self.skips or (DenseSkip(len(self.matrices[0])),) * (len(self.matrices) - 1)

    def of_block(self, layer: int) -> tuple[SkipForm, ...]:
        """The skips past attention and MLP of block `layer`: two of them, or none."""
        return self.forms()[2 * layer : 2 * layer + 2]

    def skip_choices(self) -> dict[str, Any]:
        """`skip` and `skip_config` of config.json."""
        forms = self.forms()
        listed = [form.to_config() for form in self.skips] or None
        return {"skip": forms[0].name if forms else "none", "skip_config": listed}

    def exact(self) -> Rotations:
        """The same rotations with skips that lose nothing: dense ones in place of those of form "slice"."""
        return self if all(form.exact for form in self.skips) else Rotations(self.kind, self.matrices)


def _rotate_rows(rows: Tensor, q: Tensor | None) -> Tensor:
    return rows if q is None else rows @ q


def rotate_block(weights: Weights, arch: Architecture, layer: int, rotations: Rotations) -> Weights:
    """The weights of block `layer` in the rotated stream, with the skips of per-block rotations.

    Readers: W Q_in. Writers: Q_out^T W and Q_out^T b. Skip from position p to p + 1: x Q_p^T Q_{p+1}, in the factors of
    its form, "attn_skip.{factor}"; a dense one as a Linear weight Q_{p+1}^T Q_p (ProcrustesGPT section 3). Computed in
    float64, returned in the dtype of `weights`.
    """
    if rotations.kind == "none":
        return dict(weights)
    positions = {"attn": 2 * layer, "mlp": 2 * layer + 1}
    rotated = dict(weights)

    def product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
        return (left.double() @ right.double()).to(like.dtype)

    for sub_block, position in positions.items():
        q_in, q_out = _must(rotations, position), _must(rotations, position + 1)
        for role in arch.readers(sub_block):
            name = f"{role}.weight"
            rotated[name] = product(weights[name], q_in, weights[name])
        writer = WRITERS[sub_block]
        for name in (f"{writer}.weight", f"{writer}.bias"):
            if name in weights:
                rotated[name] = product(q_out.T, weights[name], weights[name])
        if rotations.kind == "block":
            like = weights[f"{writer}.weight"]
            factors = rotations.forms()[position].factors(q_in, q_out)
            rotated |= {f"{sub_block}_skip.{name}": factor.to(like.dtype) for name, factor in factors.items()}
    return rotated


def _must(rotations: Rotations, position: int) -> Tensor:
    q = rotations.at(position)
    assert q is not None
    return q


def unrotate(weight: Tensor, side: str, q: Tensor | None) -> Tensor:
    """A linear's weight (or a writer's bias) back in the stream's own coordinates; inverse of `rotate_block`."""
    if q is None:
        return weight
    q = q.double()
    back = weight.double() @ q.T if side == "in" else q @ weight.double()
    return back.to(weight.dtype)


def orthogonality_error(matrices: Sequence[Tensor]) -> float:
    """max |Q^T Q - I| over all matrices; 0 when there are none."""
    errors = [(q.T @ q - torch.eye(len(q), dtype=q.dtype)).abs().max().item() for q in matrices]
    return max(errors, default=0.0)
