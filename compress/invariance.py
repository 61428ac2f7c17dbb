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
from compress.model.skips import DenseSkip, SkipForm, SliceSkip
from compress.source.families import TensorNames
from compress.source.readers import WeightReader

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


class FoldedModel:
    """The source model with its norms folded, read tensor by tensor; nothing is kept.

    All folds are computed in float64 and returned in `dtype`.
    """

    def __init__(
        self, reader: WeightReader, arch: Architecture, names: TensorNames, dtype: torch.dtype = torch.float32
    ) -> None:
        self.reader, self.arch, self.names, self.dtype = reader, arch, names, dtype

    def _get(self, name: str | None) -> Tensor | None:
        return None if name is None else self.reader.get(name).double()

    def _need(self, name: str) -> Tensor:
        return self.reader.get(name).double()

    def block(self, layer: int) -> Weights:
        """Folded weights of block `layer` under their names in the block ("attn.q.weight", "attn.q.bias", ...)."""
        names, folded = self.names.layers[layer], Weights()
        for sub_block, norm in (("attn", names.attn_norm), ("mlp", names.mlp_norm)):
            scale, shift = self._need(norm.weight), self._get(norm.bias)
            for role in self.arch.readers(sub_block):
                weight, bias = self._need(names.linears[role].weight), self._get(names.linears[role].bias)
                if shift is not None:  # y = W (x_hat * scale + shift) + b
                    bias = weight @ shift + (0 if bias is None else bias)
                folded[f"{role}.weight"] = weight * scale
                if bias is not None:
                    folded[f"{role}.bias"] = bias
            writer = WRITERS[sub_block]
            weight, bias = self._need(names.linears[writer].weight), self._get(names.linears[writer].bias)
            folded[f"{writer}.weight"] = self._centred(weight, 0)
            if bias is not None:
                folded[f"{writer}.bias"] = self._centred(bias, 0)
        for name, source in (("attn.q_norm.weight", names.q_norm), ("attn.k_norm.weight", names.k_norm)):
            if source is not None:
                folded[name] = self._need(source)
        return {name: tensor.to(self.dtype) for name, tensor in folded.items()}

    def _centred(self, tensor: Tensor, axis: int) -> Tensor:
        """LayerNorm subtracts the mean of the stream: make every write to it mean-free instead."""
        return tensor - tensor.mean(axis, keepdim=True) if self.arch.norm == "layernorm" else tensor

    def ends(self, rotations: Rotations) -> Weights:
        """Embeddings and head, folded and rotated, under their names in the checkpoint.

        A tied head stays tied: the last norm's scale becomes `head_map` (see modeling.HeadMap), and the mean of an
        OPT token embedding, which its head still needs, is removed from the stream at run time (`model.center`).
        Where the first skip is a slice, the coordinates that it drops are zero in the embeddings; not in tied ones,
        whose head needs them all.
        """
        first, last = rotations.at(0), rotations.at(2 * self.arch.num_layers)
        embedding = self._need(self.names.embed)
        scale, shift = self._need(self.names.final_norm.weight), self._get(self.names.final_norm.bias)
        ends = Weights()
        if self.arch.tied:
            ends["model.embed_tokens.weight"] = _rotate_rows(embedding, first)
            if self.arch.norm == "layernorm":
                d = self.arch.hidden_size
                ends["model.center"] = _rotate_rows(torch.full((d,), d**-0.5, dtype=torch.float64), first)
            # logits = ((x_rot Q_last^T) * scale + shift) Q_first (E Q_first)^T
            if first is None or last is None:
                ends["model.head_map.weight"] = scale
            else:
                ends["model.head_map.weight"] = first.T @ (scale[:, None] * last)
            if shift is not None:
                ends["model.head_map.bias"] = _rotate_rows(shift, first)
        else:
            ends["model.embed_tokens.weight"] = _rotate_rows(self._centred(embedding, 1), first)
            head = self._need(self.names.lm_head or self.names.embed)
            ends["lm_head.weight"] = _rotate_rows(head * scale, last)
            if shift is not None:
                ends["lm_head.bias"] = head @ shift
        if self.names.positions is not None:
            positions = self._need(self.names.positions)
            ends["model.embed_positions.weight"] = _rotate_rows(self._centred(positions, 1), first)
        start = rotations.forms()[:1]
        if start and isinstance(start[0], SliceSkip) and not self.arch.tied:
            for name in ends.keys() & {"model.embed_tokens.weight", "model.embed_positions.weight"}:
                ends[name][:, start[0].kept_in :] = 0
        return {name: tensor.to(self.dtype) for name, tensor in ends.items()}


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
